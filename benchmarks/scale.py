"""What several processes cost: time, memory and collectives a step, with two processes (gloo) on a CPU; and on paper.

    python benchmarks/scale.py --folder scale > benchmarks/results/scale.md

Time is a ratio to a hand-written DDP loop of the same work in the same processes: after each step of the trainer the
loop does one of its own, so a change of the machine's speed meets both. Collectives are counted by torch's profiler,
which sees those of DDP, DeepSpeed and FSDP2, too. What is measured is kept in FOLDER, and is not measured again. No
network is needed. For DeepSpeed and FSDP2 see parity.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import parity

ENGINES = ["ddp", "zero1", "zero2", "zero3", "fsdp2"]
WARM_UP, SIZE, BATCH = 3, 224, 8  # steps that are not measured; pixels; images of a process
SHARED = ("ce/vit", "nkd/resnet", "uskd/vit")  # cells of parity.py that eight processes share
STEP_IMAGES = 32  # of these cells
KINDS = {
    "allreduce_": "all-reduce",
    "broadcast_": "broadcast",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "reduce_": "reduce",
    "barrier": "barrier",
}

ABOUT = """# What several processes cost

    python benchmarks/scale.py --pairs 40 > benchmarks/results/scale.md

**Not yet run on a GPU.** Two processes (gloo, one thread each) on a CPU. FSDP2 needs GPUs: accelerate was
told that there are some (`pretend_gpus` in parity.py); the tensors stayed on the CPU.

## Time and memory

ResNet-18 at 224 px, 8 images a process, CE, SGD with momentum, against a hand-written DDP loop of the same work in the
same processes, whose steps alternate with the trainer's. Median over the pairs of steps of the ratio, and its
range. CPU time is that of the first process; other work on the machine disturbs it less. Asked of DDP: at most 1.03.

Memory: the most resident memory of the first process in a step of a ViT-S with AdamW (1 image a process), less
what there was before the student was built. Weights, gradients and the optimizer's state are 16 bytes a weight, and
DDP has a copy of the gradients. Bare DDP is the hand-written loop in a process of its own.
"""

COUNTED = """
## Collectives a step

ResNet-18 with 1000 classes; MB is what each process gives to them. Asked of DDP: its own, one all-reduce of a count
(of the images of all processes, and in it whether one of them is to stop or has diverged) and, for USKD, one of a
mean, of each micro-batch if there are several. A log adds an all-reduce of the loss's terms, and two all-gathers
of transformers. By its MB ZeRO-3 gathers each weight once a step here, not twice. ZeRO-1 and ZeRO-2 all-reduce the
gradients here, and gather the weights besides, which is more than the formula below.
"""

SHARING = f"""
## Eight processes

Against one process, {STEP_IMAGES} images a step, SGD, {parity.STEPS} steps of epochs that end with a step of
{parity.IMAGES % STEP_IMAGES} images. One thread each.
"""

# ---- in the processes of an engine ----


def trainer_of(engine: str, folder: Path, loss: str, student, data, callbacks=(), **settings):
    from hf_kd import DistillationConfig, DistillationTrainer

    options = {
        "loss": loss, "augment": "none", "per_device_train_batch_size": BATCH, "optim": "sgd",
        "optim_args": "momentum=0.9", "learning_rate": 1e-3, "lr_scheduler_type": "constant", "save_strategy": "no",
        "logging_steps": 10_000, "disable_tqdm": True, "report_to": "none", "use_cpu": True,
        **parity.engine_arguments(engine),
    }  # fmt: skip
    config = DistillationConfig(str(folder), **(options | settings))
    model, processor = student
    trainer = DistillationTrainer(
        model, config, train_dataset=data, processing_class=processor, callbacks=[*callbacks]
    )
    parity.check_engine(trainer, engine)
    return trainer


def bare_loop(student, data, optimizer_of: Callable, size: int, batch: int = BATCH) -> Iterator[None]:
    """A step of plain DDP with each `next`: decode, preprocess, forward, CE, backward, clip, step, schedule, log."""
    import torch
    import torch.nn.functional as F
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, DistributedSampler

    from hf_kd import Preprocessing
    from hf_kd.data import ImageDataset, TrainingCollator

    preprocessing = Preprocessing(student[1])
    model = DistributedDataParallel(student[0].train())
    optimizer = optimizer_of(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    images = ImageDataset(data, "image", "label")
    loader = DataLoader(
        images, batch, sampler=DistributedSampler(images), collate_fn=TrainingCollator(size=size), drop_last=True
    )
    total = torch.tensor(0.0)
    while True:
        for inputs in loader:
            logits = model(preprocessing(inputs["pixels"], cropped=True)).logits
            loss = F.cross_entropy(logits, inputs["labels"])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            model.zero_grad()
            total += loss.detach()
            yield


def with_momentum(parameters):
    import torch

    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)


def callback(on_step_end: Callable[[int], None]):
    """A callback of the trainer that calls this with the number of the step that has ended."""
    from transformers import TrainerCallback

    class AtStepEnd(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            on_step_end(state.global_step)

    return AtStepEnd()


def save(folder: Path, name: str, values) -> None:
    """By the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(values))


def steps(engine: str, folder: Path) -> None:
    """Seconds and seconds of CPU of the trainer's steps and of the bare loop's between them."""
    from step import rows, student
    from torch import distributed

    pairs = int(os.environ["PAIRS"])
    data = rows((WARM_UP + pairs) * BATCH * 2, SIZE)
    bare = None
    taken: dict[str, list[tuple[float, float]]] = {"trainer": [], "bare": []}
    start = (0.0, 0.0)

    def now() -> tuple[float, float]:
        distributed.barrier()
        return time.perf_counter(), time.process_time()

    def note(name: str) -> None:
        nonlocal start
        end = now()
        taken[name].append((end[0] - start[0], end[1] - start[1]))
        start = end

    def alternate(step: int) -> None:
        nonlocal bare
        note("trainer")
        # Other rows than the trainer's: decoded images are shared by those who have the same.
        bare = bare or bare_loop(student(SIZE), data.select(range(len(data))), with_momentum, SIZE)
        next(bare)
        note("bare")

    trainer = trainer_of(engine, folder, "ce", student(SIZE), data, [callback(alternate)], max_steps=WARM_UP + pairs)
    trainer.train()
    save(folder, "steps", {name: times[WARM_UP:] for name, times in taken.items()})


def collectives(engine: str, folder: Path) -> None:
    """Those of a step of the bare loop, of CE and of USKD, and of a step of CE before which there was a log."""
    from step import rows, student
    from torch.profiler import ProfilerActivity, profile

    size, batch, found = 64, 4, {}
    data = rows(8 * batch * 2, size)

    def profiler():
        return profile(activities=[ProfilerActivity.CPU], record_shapes=True)

    for loss in ("ce", "uskd"):
        open_profile = None

        def between(step: int, loss=loss) -> None:
            nonlocal open_profile
            if open_profile is not None:
                open_profile.__exit__(None, None, None)
                found[f"{loss}{', logged' * (step == 5)}"] = calls_of(open_profile)
            open_profile = profiler().__enter__() if step in (2, 4) else None

        trainer_of(
            engine, folder, loss, student(size), data, [callback(between)], max_steps=6, logging_steps=4,
            per_device_train_batch_size=batch,
        ).train()  # fmt: skip
    bare = bare_loop(student(size), data, with_momentum, size, batch)
    next(bare), next(bare)
    with profiler() as profiled:
        next(bare)
    found["bare"] = calls_of(profiled)
    save(folder, "collectives", found)


def calls_of(profiled) -> dict:
    """How many collectives of each kind, and how many numbers they were given."""
    events = [event for event in profiled.events()]
    calls = Counter(event.name.removeprefix("c10d::") for event in events if event.name.startswith("c10d::"))
    shapes = [event.input_shapes[0] for event in events if event.name.startswith("gloo:") and event.input_shapes]
    return {"calls": calls, "numbers": sum(math.prod(shape) for shape in shapes)}


def memory_of_rank(engine: str, folder: Path, bare: bool = False) -> None:
    """The most resident memory of this process in a step with AdamW, without what it had before the student."""
    import torch
    from step import CLASSES, rows
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    from hf_kd import DistillationTrainer  # before memory is looked at, as all libraries

    assert DistillationTrainer
    data, seen = rows(16, SIZE), {}

    def resident(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

    def watch(step: int) -> None:
        if step == 2:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        elif step == 4:
            seen["peak"] = resident("VmHWM")

    gc.collect()
    before = resident("VmRSS")
    config = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=CLASSES)
    student = ViTForImageClassification(config), ViTImageProcessor(size={"height": SIZE, "width": SIZE})
    parameters = sum(value.numel() for value in student[0].parameters())
    settings = {"optim": "adamw_torch", "optim_args": None, "max_steps": 5, "per_device_train_batch_size": 1}
    if bare:
        torch.distributed.init_process_group("gloo")
        loop = bare_loop(student, data, torch.optim.AdamW, SIZE, 1)
        for step in range(1, 5):
            next(loop)
            watch(step)
    else:
        trainer_of(engine, folder, "ce", student, data, [callback(watch)], **settings).train()
    save(folder, "memory", {"parameters": parameters, "bytes": seen["peak"] - before})


def memory(engine: str, folder: Path) -> None:
    memory_of_rank(engine, folder)


def bare_memory(engine: str, folder: Path) -> None:
    memory_of_rank(engine, folder, bare=True)


def sharing(engine: str, folder: Path) -> None:
    """The rows of each step of this process, and the weights after the last."""
    import torch

    world, rank = (int(os.environ.get(name, value)) for name, value in (("WORLD_SIZE", 1), ("RANK", 0)))
    for cell in SHARED:
        settings = {"per_device_train_batch_size": STEP_IMAGES // world, "gradient_accumulation_steps": 1}
        trainer, ids = parity.cell_trainer(engine, cell, folder / cell, **settings), list[list[int]]()
        read = trainer.get_batch_samples

        def noting(*args, read=read, ids=ids):
            found = read(*args)
            ids.append([int(row) for batch in found[0] for row in batch["index"]])
            return found

        trainer.get_batch_samples = noting
        trainer.train()
        (folder / cell / f"ids-{rank}.json").write_text(json.dumps(ids))
        if rank == 0:
            head = trainer.auxiliary_head
            weights = trainer.model.state_dict() | ({} if head is None else head.state_dict())
            torch.save(weights, folder / cell / "weights.pt")
        trainer.accelerator.wait_for_everyone()


JOBS = {job.__name__: job for job in (steps, collectives, memory, bare_memory, sharing)}


# ---- the results ----


def measure(folder: Path, engine: str, jobs: list[str], file: str, processes: int = 2) -> None:
    """Runs jobs in the processes of an engine unless there is this file of the last of them."""
    if (folder / engine / jobs[-1] / file).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    script = [__file__, "--folder", str(folder), "--worker", engine, "--jobs", *jobs]
    if error := parity.launch(engine, folder, script, processes):
        sys.exit(f"{parity.ENGINES[engine]}, {', '.join(jobs)}: {error}")


def read(folder: Path, engine: str, job: str) -> dict:
    return json.loads((folder / engine / job / f"{job.removeprefix('bare_')}.json").read_text())


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.3f} ({min(ratios):.2f}–{max(ratios):.2f})"


def costs(folder: Path, engines: list[str]) -> str:
    bare, lines = read(folder, "ddp", "bare_memory"), []
    lines.append("| engine | step / bare DDP step | CPU time / bare DDP's | bare step, s | memory a process, MB |")
    lines.append("|---|---:|---:|---:|---:|")
    lines.append(f"| bare DDP | 1 | 1 | | {bare['bytes'] / 1e6:.0f} |")
    for engine in engines:
        taken, used = read(folder, engine, "steps"), read(folder, engine, "memory")
        pairs = list(zip(taken["trainer"], taken["bare"], strict=True))
        ratios = [spread([ours[i] / theirs[i] for ours, theirs in pairs]) for i in (0, 1)]
        seconds = statistics.median(theirs[0] for _, theirs in pairs)
        row = [parity.ENGINES[engine], *ratios, f"{seconds:.2f}", f"{used['bytes'] / 1e6:.0f}"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def counts(folder: Path, engines: list[str]) -> str:
    kinds = list(dict.fromkeys(KINDS.values()))
    found = {"bare DDP, CE": read(folder, "ddp", "collectives")["bare"]}
    for engine in engines:
        for loss, name in {"ce": "CE", "uskd": "USKD", "ce, logged": "CE, with a log"}.items():
            found[f"{parity.ENGINES[engine]}, {name}"] = read(folder, engine, "collectives")[loss]
    rows = {name: Counter[str]() for name in found}
    for name, values in found.items():
        for call, number in values["calls"].items():
            rows[name][KINDS.get(call, call)] += number
    kinds = [kind for kind in dict.fromkeys([*KINDS.values(), *(k for row in rows.values() for k in row)])]
    kinds = [kind for kind in kinds if any(row[kind] for row in rows.values())]
    lines = [f"| step | {' | '.join(kinds)} | all | MB |", "|---|" + "---:|" * (len(kinds) + 2)]
    for name, row in rows.items():
        values = [*(str(row[kind]) for kind in kinds), str(row.total()), f"{found[name]['numbers'] * 4 / 1e6:.1f}"]
        lines.append(f"| {name} | {' | '.join(values)} |")
    return "\n".join(lines)


def shared(folder: Path, processes: int) -> str:
    """Eight processes against one: the rows of each step, and the weights."""
    import torch

    lines = [
        "| loss | student | steps | rows of each step | largest difference of a weight |",
        "|---|---|---:|---|---:|",
    ]
    for cell in SHARED:
        one, many = folder / "one" / "sharing" / cell, folder / "ddp" / "sharing" / cell
        expected = json.loads((one / "ids-0.json").read_text())
        ids = [json.loads((many / f"ids-{rank}.json").read_text()) for rank in range(processes)]
        same = len({*map(len, ids), len(expected)}) == 1 and all(
            sorted(step) == sorted(sum(parts, [])) for step, *parts in zip(expected, *ids, strict=True)
        )
        difference = parity.largest_difference(*(torch.load(path / "weights.pt") for path in (many, one)))
        loss, kind = cell.split("/")
        same_text = "the same" if same else "**others**"
        lines.append(f"| {loss} | {parity.KINDS[kind]} | {len(expected)} | {same_text} | {difference:.0e} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("scale"), help="keeps what is measured; is continued")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--pairs", type=int, default=20, help="measured steps of each")
    parser.add_argument("--worker", choices=parity.ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        parity.work(args.worker, args.folder, {name: JOBS[name] for name in args.jobs})
        return
    os.environ["PAIRS"] = str(args.pairs)
    for engine in args.engines:
        measure(args.folder, engine, ["collectives"], "collectives.json")
        measure(args.folder, engine, ["steps"], "steps.json")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed memory is given back, and is not counted
    measure(args.folder, "ddp", ["bare_memory"], "memory.json")
    for engine in args.engines:
        measure(args.folder, engine, ["memory"], "memory.json")
    del os.environ["MALLOC_MMAP_THRESHOLD_"]
    for engine, processes in {"one": 1, "ddp": 8}.items():
        measure(args.folder, engine, ["sharing"], f"{SHARED[-1]}/ids-{processes - 1}.json", processes)
    import network

    print(ABOUT)
    print(costs(args.folder, args.engines))
    print(COUNTED)
    print(counts(args.folder, args.engines))
    print(SHARING)
    print(shared(args.folder, 8))
    print(f"\n## Beyond this machine, on paper\n\n{network.ABOUT}\n{network.table()}")
    print(f"{parity.machine()}; {os.cpu_count()} cores; {time.strftime('%Y-%m-%d')}")


if __name__ == "__main__":
    main()
