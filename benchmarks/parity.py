"""Every engine against one process: the same weights, logged terms and metrics, with two processes (gloo) on a CPU.

    python benchmarks/parity.py --folder parity > benchmarks/results/parity.md

An engine is launched once and runs its cells, a loss and a student each, in one process group. What is measured is
kept in FOLDER/cells.json, and a cell that is there is not run again. Students are tiny and made from configs, and no
network is needed. DeepSpeed is compiled at its first start, which takes minutes.

FSDP2 needs a GPU: accelerate makes DDP of it on a CPU. Here accelerate is told that the processes have GPUs
(`pretend_gpus`), so that it shards the student as it would there; the tensors stay on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

ENGINES = {
    "one": "1 process",
    "ddp": "DDP",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "fsdp2": "FSDP2",
}
LOSSES = ("ce", "kd", "nkd", "uskd")
KINDS = {"vit": "transformers ViT", "resnet": "transformers ResNet", "timm_resnet": "timm ResNet"}
LIVE, ADAMW = "ce/resnet/live", "uskd/vit/adamw"  # with statistics of each batch; with another optimizer
CELLS = [*(f"{loss}/{kind}" for loss in LOSSES for kind in KINDS), LIVE, ADAMW]
STEPS, TOLERANCE = 20, 1e-5
# Two micro-batches of 16 a step; the last one of each epoch has 5 images, 3 for one process and 2 for the other.
IMAGES, EVAL_IMAGES, MICRO_BATCH, ACCUMULATION = 53, 21, 16, 2
MEASURED = ("step 1", f"step {STEPS}", "logs", "metrics")  # weights after these steps; logged terms; evaluation

ABOUT = f"""# Every engine against one process

    python benchmarks/parity.py > benchmarks/results/parity.md

The largest absolute difference from one process with the same global batch, of the weights after 1 and after
{STEPS} steps (the auxiliary head's, too), every logged term at every step, and the metrics and sample counts of
an evaluation. Two processes (gloo) on a CPU, SGD, float32. {IMAGES} images in micro-batches of {MICRO_BATCH},
{ACCUMULATION} to a step; the last one of an epoch has 5, unevenly shared. {EVAL_IMAGES} evaluation images. More than
{TOLERANCE:.0e} is bold. The saved student's keys are the same as well, or it says `inf`.

- FSDP2 needs GPUs: accelerate was told that there are some (`pretend_gpus`); the tensors stayed on the CPU.
- ResNets have fixed batch statistics, which otherwise depend on the micro-batch. With live ones the reference
  is one process that accumulates the micro-batches of both, of 48 images. Running statistics, and an evaluation
  with them, are not compared: they are those of the first process's batches. The learning rate is 0.001 there,
  else 0.01, at which float32 rounding grows to 4e-3 from step 16 on with DDP, ZeRO-1 and FSDP2 (in float64 to 4e-16).
- USKD ranks the classes: two of them that differ by float32 rounding may change places, which is a step in the
  loss and no rounding. Such a cell agrees to 1e-7 up to that step and differs by about 1e-5 from there on.
- AdamW is reported and not held to the bound: it divides by the root of the squared gradients, which magnifies
  rounding where they are near zero.
"""


# ---- in the processes of an engine ----


@contextlib.contextmanager
def pretend_gpus():
    """Makes accelerate take the processes' CPUs for GPUs where it decides about the engine, and nowhere else."""
    from accelerate import state

    init = state.AcceleratorState.__init__

    def pretending(self, *args, **kwargs):
        fresh = not state.AcceleratorState._shared_state
        partial = state.PartialState(kwargs.get("cpu") or False)
        if fresh and partial.distributed_type == state.DistributedType.MULTI_CPU:
            partial._shared_state["distributed_type"] = state.DistributedType.MULTI_GPU
        init(self, *args, **kwargs)

    state.AcceleratorState.__init__ = pretending
    try:
        yield
    finally:
        state.AcceleratorState.__init__ = init


def engine_arguments(engine: str) -> dict:
    """The arguments of `DistillationConfig` that choose an engine."""
    if engine.startswith("zero"):
        zero = {"stage": int(engine[-1]), "stage3_gather_16bit_weights_on_model_save": True}
        auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        config = dict.fromkeys((*auto, "gradient_clipping"), "auto")
        return {"deepspeed": {"zero_optimization": zero, "zero_allow_untested_optimizer": True, **config}}
    if engine == "fsdp2":
        return {"fsdp": True, "fsdp_config": {"version": 2}}
    return {}


def cell_trainer(engine: str, cell: str, folder: Path, student=None, data=None, **settings):
    """The trainer of a cell; with another student, other `data` to train on and to evaluate, and `settings`, arguments
    of `DistillationConfig`, if any."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from tiny import tiny
    from trainer_helpers import NAMES, config, freeze_batch_norm, make_teacher, rows

    from hf_kd import DistillationTrainer
    from hf_kd.losses import LOSSES as CLASSES
    from hf_kd.models.loading import outside_deepspeed

    (loss, kind, *variant), world = cell.split("/"), int(os.environ.get("WORLD_SIZE", 1))
    split = 2 if variant == ["live"] else world  # one process has the micro-batches of two, one after the other
    with outside_deepspeed():  # transformers partitions what is built after ZeRO-3's first configuration
        model, processor = tiny(kind, names=NAMES)
        teacher = make_teacher() if "teacher_logits" in CLASSES[loss].requires else None
    options = {
        "loss": loss, "augment": "pad_crop", "max_steps": STEPS, "save_strategy": "no", "learning_rate": 0.01,
        "per_device_train_batch_size": MICRO_BATCH // split, "per_device_eval_batch_size": 8,
        "gradient_accumulation_steps": ACCUMULATION * split // world,
        **engine_arguments(engine),
    }  # fmt: skip
    if variant == ["adamw"]:
        options |= {"optim": "adamw_torch", "learning_rate": 1e-3}
    if variant == ["live"]:
        options |= {"learning_rate": 1e-3}
    train, evaluation = data or (
        rows(48 if variant == ["live"] else IMAGES),  # one process has no uneven shares
        rows(EVAL_IMAGES, seed=5),
    )
    trainer = DistillationTrainer(
        model if student is None else student,
        config(folder, **(options | settings)),
        teacher=teacher,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=processor,
    )
    if variant != ["live"]:
        freeze_batch_norm(trainer.model)
    return trainer


def run_cell(engine: str, folder: Path, cell: str) -> None:
    """Trains and evaluates a cell; the first process saves what it has found."""
    import torch
    from safetensors.torch import load_file
    from transformers import TrainerCallback

    trainer, found = cell_trainer(engine, cell, folder), {}
    check_engine(trainer, engine)

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (1, STEPS):
                whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)
                found[f"step {state.global_step}"] = {key: value.clone() for key, value in (whole or {}).items()}

    trainer.add_callback(Keep())
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        found["logs"] = [
            {k: v for k, v in entry.items() if k.startswith(("loss", "diagnostic"))}
            for entry in trainer.state.log_history
            if "loss" in entry
        ]
        times = ("runtime", "per_second", "time", "epoch")
        found["metrics"] = {key: value for key, value in metrics.items() if not key.endswith(times)}
        found["exported"] = sorted(load_file(folder / "model.safetensors"))
        torch.save(found, folder / "found.pt")
    trainer.accelerator.wait_for_everyone()  # a rank that leaves early takes the others' connections with it


def check_engine(trainer, engine: str) -> None:
    """Raises unless the engine is at work that was asked for."""
    from accelerate import DistributedType

    expected = {"one": DistributedType.NO, "ddp": DistributedType.MULTI_CPU, "fsdp2": DistributedType.FSDP}
    assert trainer.accelerator.distributed_type == expected.get(engine, DistributedType.DEEPSPEED), engine
    if engine.startswith("zero"):
        assert trainer.accelerator.state.deepspeed_plugin.zero_stage == int(engine[-1])
    if engine == "fsdp2":
        assert trainer.accelerator.is_fsdp2


def cells_of(names: list[str]) -> dict[str, Callable[[str, Path], None]]:
    """What `work` runs for these cells."""
    return {cell: functools.partial(run_cell, cell=cell) for cell in names}


def work(engine: str, folder: Path, jobs: dict[str, Callable[[str, Path], None]]) -> None:
    """Runs jobs in a process of an engine, each with the engine and a folder of its own."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    with pretend_gpus() if engine == "fsdp2" else contextlib.nullcontext():
        for name, job in jobs.items():
            start = time.perf_counter()
            job(engine, folder / engine / name)
            if int(os.environ.get("RANK", 0)) == 0:
                print(f"{ENGINES[engine]} {name}: {time.perf_counter() - start:.1f} s", flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# ---- the comparison ----


def launch(engine: str, folder: Path, script: list[str], processes: int = 2) -> str:
    """Runs a script in so many processes of an engine. Returns the first line of its errors, or nothing."""
    command, log = [sys.executable], folder / f"{engine}.log"
    if engine != "one":
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    with log.open("w") as file:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command + script, stdout=file, stderr=subprocess.STDOUT, env=env)
    if done.returncode == 0:
        return ""
    return next((line for line in log.read_text().splitlines() if "Error: " in line), f"see {log}")


def largest_difference(ours: dict, reference: dict) -> float:
    """The largest absolute difference of the tensors or numbers of two dicts; infinite where their keys differ."""
    import torch

    if ours.keys() != reference.keys():
        return math.inf
    pairs = (
        (torch.as_tensor(ours[key]).double(), torch.as_tensor(value).double()) for key, value in reference.items()
    )
    differences = [(a - b).abs().max().item() if a.shape == b.shape else math.inf for a, b in pairs]
    return max((d if math.isfinite(d) else math.inf for d in differences), default=math.inf)


def compare(engine: str, cell: str, folder: Path) -> dict:
    """The largest difference of each kind from one process."""
    import torch

    ours, reference = (torch.load(folder / name / cell / "found.pt") for name in (engine, "one"))
    if cell == LIVE:  # the running statistics are those of the first process's batches, and evaluation uses them
        for found in (ours, reference):
            del found["metrics"]
            for step in ("step 1", f"step {STEPS}"):
                found[step] = {k: v for k, v in found[step].items() if "running_" not in k and "num_batches" not in k}
    ours, reference = (
        found | {"logs": {f"{i} {k}": v for i, entry in enumerate(found["logs"]) for k, v in entry.items()}}
        for found in (ours, reference)
    )
    differences = {key: largest_difference(ours[key], reference[key]) for key in MEASURED if key in reference}
    if ours["exported"] != reference["exported"]:
        differences["export"] = math.inf
    return differences


def is_equal(differences: dict) -> bool:
    return "error" not in differences and all(value <= TOLERANCE for value in differences.values())


def measure(engines: list[str], cells: list[str], folder: Path) -> dict:
    """The differences of all cells, by "ENGINE/CELL"; runs what is not in cells.json."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "cells.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    for engine in engines:
        missing = [cell for cell in cells if "error" in known.get(f"{engine}/{cell}", {"error": ""})]
        if not missing:
            continue
        alone = [cell for cell in missing if not (folder / "one" / cell / "found.pt").exists()]
        for name, names in {"one": alone, engine: missing}.items():
            script = [__file__, "--folder", str(folder), "--worker", name, "--cells", *names]
            error = launch(name, folder, script) if names else ""
        for cell in missing:
            there = all((folder / name / cell / "found.pt").exists() for name in ("one", engine))
            known[f"{engine}/{cell}"] = compare(engine, cell, folder) if there else {"error": error or "no result"}
        file.write_text(json.dumps(known, indent=1))
    return known


def describe(cell: str, differences: dict | None) -> str:
    if differences is None:
        return "not run"
    if "error" in differences:
        return f"**{differences['error'][:120]}**".replace("|", "\\|")
    largest = f"{max(differences.values()):.0e}"
    return largest if is_equal(differences) or cell == ADAMW else f"**{largest}**"


def table(known: dict, engines: list[str], cells: list[str]) -> str:
    lines = [f"| loss | student | {' | '.join(ENGINES[engine] for engine in engines)} |"]
    lines += ["|---|---|" + "---:|" * len(engines)]
    for cell in cells:
        loss, kind, *variant = cell.split("/")
        student = KINDS[kind] + {"live": ", live batch statistics", "adamw": ", AdamW"}.get("".join(variant), "")
        row = [describe(cell, known.get(f"{engine}/{cell}")) for engine in engines]
        lines.append(f"| {loss} | {student} | {' | '.join(row)} |")
    return "\n".join(lines)


def machine() -> str:
    """The processor and the versions, as the last line of a page of results."""
    from hf_kd.reporting.collect import cpu_name
    from hf_kd.reporting.record import collect_versions

    names = ("python", "torch", "transformers", "accelerate", "timm")
    versions = collect_versions() | {"deepspeed": metadata.version("deepspeed")}
    return f"\n{cpu_name()}; {', '.join(f'{name} {versions[name]}' for name in (*names, 'deepspeed'))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("parity"), help="keeps what is measured; is continued")
    parser.add_argument("--engines", nargs="+", choices=[*ENGINES][1:], default=[*ENGINES][1:])
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=CELLS, help="LOSS/STUDENT")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.folder, cells_of(args.cells))
        return
    known = measure(args.engines, args.cells, args.folder)
    print(ABOUT)
    print(table(known, args.engines, args.cells))
    print(machine())


if __name__ == "__main__":
    main()
