"""A comparison on CIFAR-100, streamed from a Hub by two processes and killed twice, against one from disk.

    python benchmarks/stream_job.py --cifar FOLDER --markdown

FOLDER has CIFAR-100 as parquet files. The first rows of it are served in 7 uneven files by the local Hub of the tests.
Compared are accuracy, logged losses and weights with those of the uninterrupted comparison on the map-style dataset,
which is given the stream's order (`ImageDataset.groups`), in two processes and in one. The student is a ViT, which has
no batch statistics; they would depend on how many processes share a batch.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stream_kills import SHARDS, kill, write_shards

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))
NAME, LABEL = "local/cifar100", "fine_label"
LOSSES, SEEDS, BATCH = ("ce", "nkd", "uskd"), (0, 1), 64  # images of an optimizer step
EPOCH = re.compile(r"'epoch': '?([0-9.]+)")
COMMON = (
    "--from_scratch --train_image_size 32 --augment pad_crop --preset none --lr_scheduler_type cosine "
    f"--per_device_eval_batch_size 100 --label_column {LABEL} --use_cpu --disable_tqdm true --report_to none "
    "--eval_strategy epoch --logging_steps 10 --save_strategy steps --save_steps 25 --save_total_limit 1"
).split()


def ordered_session(processes: int, argv: list[str]) -> int:
    """The command line on the map-style dataset, in the order in which so many processes read the stream."""
    import numpy as np

    from hf_kd.cli import main
    from hf_kd.data import ImageDataset, load_data
    from hf_kd.data.order import EpochSampler, batch_sizes, batches, epoch_order

    groups = load_data(NAME, label_column=LABEL, streaming=True).train.groups
    init = ImageDataset.__init__

    def init_with_groups(self, dataset, *args, **kwargs):
        init(self, dataset, *args, **kwargs)
        if len(self) == groups[-1].start + groups[-1].rows:  # not the evaluation images
            self.groups = groups

    def shared_batches(self):
        order, sizes = epoch_order(groups, self.order_seed, self.epoch), batch_sizes(sum(self.sizes), size, processes)
        parts = batches(order, sizes, processes, self.workers)
        if self.processes == processes:
            return parts
        return [np.concatenate(parts[i : i + processes]) for i in range(0, len(parts), processes)]

    size = BATCH // processes
    ImageDataset.__init__, EpochSampler._batches = init_with_groups, shared_batches
    return main(["distill", *argv])


def command(processes: int, *arguments: str) -> list[str]:
    several = ["--multi_gpu"] if processes > 1 else ["--cpu"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", str(processes)]
    return [*launcher, *several, *arguments]


def start(environment: dict[str, str], words: list[str], log: Path) -> subprocess.Popen:
    with log.open("a") as file:
        options = {"stdout": subprocess.PIPE, "stderr": file, "text": True}
        return subprocess.Popen(words, env=environment, **options)


def finish(process: subprocess.Popen, log: Path) -> None:
    process.communicate()
    if process.returncode:
        raise SystemExit(f"a session failed:\n{log.read_text()[-3000:]}")


def kill_after(process: subprocess.Popen, lines: int, wait: float) -> str:
    """Ends a session with kill -9 some time after it has logged so many lines; says where that was."""
    where, run = "", ""
    for line in process.stdout or ():
        if ": " in line and not line.startswith(("{", " ")):
            run = line.strip().split(": ")[0]
        if "'loss'" in line:
            lines, where = lines - 1, f"{run}, epoch {EPOCH.findall(line)[0]}"
        if lines == 0:
            break
    time.sleep(wait)
    if process.poll() is not None:
        raise SystemExit(f"a session ended before it was killed: {where}")
    kill(process)
    return where


def compare(there: Path, here: Path) -> tuple[list[str], bool]:
    """The rows of a table of both folders' runs; whether all is equal.

    Left out of the difference of the losses are the logs at the steps that are named. The first mean after a resume is
    that of the steps since the checkpoint, and `train_loss`, logged at the end, that of the steps since the resume,
    while an uninterrupted run has those since the last log and of all steps.
    """
    import torch
    from safetensors.torch import load_file

    rows, same = [], True
    for run in (f"{loss}/seed-{seed}" for seed in SEEDS for loss in LOSSES):
        records = [json.loads((folder / run / "run.json").read_text()) for folder in (there, here)]
        accuracies = [f"{100 * record['metrics']['top1']:.2f}" for record in records]
        logged = [
            {
                (entry["step"], key): value
                for entry in record["history"]
                for key, value in entry.items()
                if "loss" in key
            }
            for record in records
        ]
        if logged[0].keys() != logged[1].keys():
            raise SystemExit(f"{run}: other losses were logged: {logged[0].keys() ^ logged[1].keys()}")
        off = {key: abs(value - logged[1][key]) for key, value in logged[0].items()}
        steps = sorted({step for (step, _), value in off.items() if value > 1e-3})  # of an interval with a resume
        losses = max(value for (step, _), value in off.items() if step not in steps)
        first, second = (load_file(folder / run / "model.safetensors") for folder in (there, here))
        weights = max((first[key] - second[key]).abs().max().item() for key in first)
        same &= losses == 0 and all(torch.equal(first[key], second[key]) for key in first)
        same &= records[0]["metrics"]["top1"] == records[1]["metrics"]["top1"]
        others = ", ".join(map(str, steps)) or "–"
        rows.append(f"| {run} | {' | '.join(accuracies)} | {len(off)} | {losses:.1e} | {weights:.1e} | {others} |")
    return rows, same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar", type=Path, help="a folder with CIFAR-100 as parquet files")
    parser.add_argument("--max_train_samples", type=int, default=2503)
    parser.add_argument("--max_eval_samples", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the points at which sessions are killed")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--session", type=int, help=argparse.SUPPRESS)
    arguments, argv = parser.parse_known_args()
    if arguments.session:
        raise SystemExit(ordered_session(arguments.session, argv))

    import datasets
    from local_hub import LocalHub

    rng, folder = random.Random(arguments.seed), Path(tempfile.mkdtemp())
    log, data, teacher = folder / "log.txt", folder / "data", folder / "teacher"
    data.mkdir()
    shares = [arguments.max_train_samples * rows // sum(SHARDS) for rows in SHARDS[:-1]]
    sizes = (*shares, arguments.max_train_samples - sum(shares))
    for split, split_sizes in (("train", sizes), ("test", (arguments.max_eval_samples,))):
        write_shards(data, datasets.load_dataset(str(arguments.cifar), split=split), split, split_sizes, 100)
    with LocalHub(folder / "hub") as hub:
        hub.add_repo(NAME, data, repo_type="dataset")
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | hub.env(folder / "cache")
        environment |= {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        script, here = str(ROOT / "examples" / "run_distill.py"), str(Path(__file__).resolve())
        shared = ["--dataset", NAME, *COMMON, "--num_train_epochs", str(arguments.epochs)]
        taught = ["--student", str(ROOT / "examples/architectures/resnet10-narrow"), "--loss", "ce", *shared]
        taught += [
            "--per_device_train_batch_size",
            str(BATCH),
            "--learning_rate",
            "3e-3",
            "--output_dir",
            str(teacher),
        ]
        finish(start(environment, command(1, script, *taught), log), log)
        student = ["--student", str(ROOT / "examples/architectures/vit-micro"), "--teacher", str(teacher), *shared]
        student += ["--compare", ",".join(LOSSES), "--seeds", *map(str, SEEDS), "--learning_rate", "2e-3"]

        def comparison(output: str, processes: int, *more: str) -> list[str]:
            batch = ["--per_device_train_batch_size", str(BATCH // processes), "--output_dir", str(folder / output)]
            return [*student, *batch, *more]

        words, places = [script, *comparison("stream", 2, "--streaming")], []
        for _ in range(arguments.kills):
            lines = len(SEEDS) * len(LOSSES) * arguments.epochs * arguments.max_train_samples // BATCH // 10
            process = start(environment, command(2, *words), log)
            places.append(kill_after(process, rng.randint(1, lines // (arguments.kills + 1)), rng.random()))
            words = ["-m", "hf_kd", "resume", str(folder / "stream")]
        finish(start(environment, command(2, *words), log), log)
        for processes in (2, 1):
            ordered = [here, "--session", "2", *comparison(f"disk-{processes}", processes)]
            finish(start(environment, command(processes, *ordered), log), log)
    text = [
        f"{arguments.max_train_samples:,} images in 7 files of {', '.join(map(str, sizes))} rows, "
        f"{arguments.max_eval_samples:,} for evaluation; {arguments.epochs} epochs in steps of {BATCH}. The stream "
        f"was killed in: {'; '.join(places)}",
    ]
    equal = {}
    for processes in (2, 1):
        rows, equal[processes] = compare(folder / "stream", folder / f"disk-{processes}")
        head = [
            "run",
            "top-1 % of the stream",
            "from disk",
            "losses logged",
            "largest difference",
            "of weights",
            "left out",
        ]
        table = [f"| {' | '.join(head)} |", "| --- | ---: | ---: | ---: | ---: | ---: | ---: |", *rows]
        text += [f"{processes} process(es) from disk, equal bit by bit: {equal[processes]}", "\n".join(table)]
    print(("\n\n" if arguments.markdown else "\n").join(text))
    raise SystemExit(0 if equal[2] else 1)


if __name__ == "__main__":
    main()
