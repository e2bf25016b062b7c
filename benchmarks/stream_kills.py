"""Kills a streamed training at random steps (kill -9), resumes it, and compares it with an uninterrupted one.

    python benchmarks/stream_kills.py --kills 20 --processes 2 --workers 1 --markdown

Compared are the ids of each batch of each process, in order, and the final weights, bit by bit. Of each session it
reports how many images were decoded before the first new batch, and how many bytes of the files were read for it.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

SHARDS = (90, 31, 140, 12, 88, 75, 64)  # rows
BATCH, EPOCHS, EVERY = 8, 3, 5  # images a process, passes, steps between checkpoints


def write_shards(folder: Path, source, split: str, sizes: Sequence[int], rows_per_group: int = 10) -> None:
    """The first rows of a dataset in parquet files of these sizes."""
    import pyarrow.parquet as pq

    start = 0
    for i, rows in enumerate(sizes):
        part = source.select(range(start, start + rows)).with_format("arrow")[:]
        start += rows
        file = folder / f"{split}-{i:05d}-of-{len(sizes):05d}.parquet"
        pq.write_table(part.replace_schema_metadata(source.data.schema.metadata), file, row_group_size=rows_per_group)


def train(data: str, output: str, workers: int) -> None:
    """One session in one process of the launcher: goes on from the last checkpoint, if there is one."""
    from transformers import set_seed

    from hf_kd import DistillationConfig, DistillationTrainer, load_student
    from hf_kd.checkpointing import last_checkpoint
    from hf_kd.data import dataset, load_data, streaming

    folder, read, decoded = Path(output), [], []
    loaded = load_data(data, streaming=True)
    args = DistillationConfig(
        output, loss="ce", augment="pad_crop", mixup_alpha=0.2, per_device_train_batch_size=BATCH, use_cpu=True,
        num_train_epochs=EPOCHS, learning_rate=1e-3, dataloader_num_workers=workers, save_steps=EVERY,
        save_strategy="steps", save_total_limit=2, disable_tqdm=True, report_to="none", logging_strategy="no",
    )  # fmt: skip
    set_seed(args.seed)
    architecture = Path(__file__).parents[1] / "examples" / "architectures" / "vit-micro"
    student, processor = load_student(architecture, id2label=loaded.names, from_scratch=True, image_size=32)

    read_item, read_group = dataset.read_item, streaming.StreamedRows._read

    def noted_item(row, key, *arguments):
        decoded.append(key)
        return read_item(row, key, *arguments)

    def noted_read(self, group):
        table = read_group(self, group)
        read.append(table.nbytes)
        return table

    dataset.read_item, streaming.StreamedRows._read = noted_item, noted_read

    class Trainer(DistillationTrainer):
        seen = 0

        def _prepare_inputs(self, inputs):
            if self.model.training:
                line = {"step": self.state.global_step, "ids": inputs["index"].tolist()}
                if not self.seen and not workers:
                    line |= {"decoded": list(decoded), "bytes": sum(read)}
                self.seen += 1
                with open(folder / f"ids-{args.process_index}.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
            return super()._prepare_inputs(inputs)

    folder.mkdir(exist_ok=True)
    trainer = Trainer(student, args, train_dataset=loaded.train, processing_class=processor)
    trainer.train(resume_from_checkpoint=last_checkpoint(output) is not None)
    trainer.save_model()


def start(data: Path, output: Path, processes: int, workers: int) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    here = [__file__, "--train", str(data), str(output), "--processes", str(processes), "--workers", str(workers)]
    command = [sys.executable, *(launcher if processes > 1 else []), *here]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def kill(process: subprocess.Popen) -> None:
    """kill -9 to a session: the launcher and its workers, which have process groups of their own."""
    found = psutil.Process(process.pid)
    for each in [found, *found.children(recursive=True)]:
        each.kill()
    process.communicate()


def lines(folder: Path, rank: int) -> list[dict]:
    file = folder / f"ids-{rank}.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"a session failed:\n{errors[-3000:]}")


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--train", nargs=2, metavar=("DATA", "OUTPUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    processes, workers = arguments.processes, arguments.workers
    if arguments.train:
        train(*arguments.train, workers)
        return
    import datasets

    from hf_kd.quickstart import bundled

    rng, folder = random.Random(arguments.seed), Path(tempfile.mkdtemp())
    data, whole, killed = folder / "data", folder / "whole", folder / "killed"
    data.mkdir()
    source = datasets.load_dataset(str(bundled("quickstart")), split="train")
    write_shards(data, source, "train", SHARDS)
    write_shards(data, source, "test", (50,))
    finish(start(data, whole, processes, workers))
    expected = [[line["ids"] for line in lines(whole, rank)] for rank in range(processes)]
    steps = len(expected[0])
    targets = sorted(rng.sample(range(1, steps), arguments.kills))
    for target in targets:
        process = start(data, killed, processes, workers)
        while process.poll() is None and not any(line["step"] >= target for line in lines(killed, 0)):
            time.sleep(0.002)
        kill(process)
    finish(start(data, killed, processes, workers))
    good, sessions = True, []
    for rank in range(processes):
        found = lines(killed, rank)
        good &= all(line["ids"] == expected[rank][line["step"]] for line in found)
        good &= {line["step"] for line in found} == set(range(steps))
        for line in filter(lambda line: "bytes" in line, found):
            own = {row for batch in expected[rank][line["step"] : line["step"] + 2] for row in batch}
            sessions.append((len(set(line["decoded"]) - own), line["bytes"]))
    same = digest(whole) == digest(killed)
    per_pass = sorted(i for rank in expected for batch in rank[: steps // EPOCHS] for i in batch)
    once = per_pass == list(range(sum(SHARDS)))
    text = [
        f"{len(targets)} kills at the steps {', '.join(map(str, targets))} of {steps}; {processes} process(es), "
        f"{workers} worker(s) each",
        f"each row once a pass: {once}; same ids in the same order: {good}; weights bit-identical: {same}",
    ]
    if sessions:
        size = sum(file.stat().st_size for file in data.glob("train*"))
        text.append(
            f"before the first new batch of a session: {max(sessions)[0]} images decoded besides those of this batch "
            f"and the next, at most {max(read for _, read in sessions):,} bytes read of {size:,}"
        )
    print(("\n\n" if arguments.markdown else "\n").join(text))
    raise SystemExit(0 if once and good and same else 1)


if __name__ == "__main__":
    main()
