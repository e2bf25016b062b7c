"""The record of one run, as run.json keeps it: everything the card and the tables say comes from here."""

from __future__ import annotations

import copy
import datetime
import platform
import statistics
import time
from pathlib import Path

import torch
from transformers.utils import logging

from . import report
from .student import commit_of
from .weak_head import HEAD

METRICS = ("loss", "top1", "top5", "ece", "agreement", "kl", "teacher_top1")
FORWARDS = 30
logger = logging.get_logger(__name__)


def describe_model(model: torch.nn.Module, name: str | None, size: tuple[int, int], kind: str | None = None) -> dict:
    """What a record says of a model: id, revision, library, architecture, parameters, size and latency.

    Args:
        model: a classifier on any device.
        name: its Hub id or folder.
        size: height and width of its input in pixels.
        kind: "vit" or "cnn".
    """
    own = [p for n, p in model.named_parameters() if not n.startswith(f"{HEAD}.")]
    config = getattr(model, "config", None)
    library = "timm" if getattr(config, "model_type", "") == "timm_wrapper" else "transformers"
    return {
        "id": name,
        "revision": commit_of(model),
        "library": library,
        "kind": kind,
        "architecture": getattr(config, "architecture", None) or type(model).__name__,
        "parameters": sum(p.numel() for p in own),
        "size_mb": sum(v.numel() * v.element_size() for v in [*own, *model.buffers()]) / 1e6,
        "image_size": list(size),
        "latency_ms": latency_ms(model, size),
    }


@torch.no_grad()
def latency_ms(model: torch.nn.Module, size: tuple[int, int]) -> float:
    """Median time in ms of a forward of one picture, on the CPU with one thread, as the saved model would run."""
    if any(p.device.type != "cpu" for p in model.parameters()):
        model = copy.deepcopy(model).cpu()
    training, threads = model.training, torch.get_num_threads()
    torch.set_num_threads(1)
    model.eval()
    try:
        pixels, seconds = torch.zeros(1, 3, *size, dtype=next(model.parameters()).dtype), []
        for _ in range(FORWARDS + 3):
            start = time.perf_counter()
            model(pixels)
            seconds.append(time.perf_counter() - start)
    finally:
        model.train(training)
        torch.set_num_threads(threads)
    return 1000 * statistics.median(seconds[3:])


def cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def make_record(trainer, metrics: dict, skipped: tuple[list, list], **known) -> dict:
    """The record of a trained and evaluated student; see `hf_kd.report` for its keys.

    Args:
        trainer: the `DistillationTrainer`, after training.
        metrics: what `trainer.evaluate()` gave.
        skipped: pictures that could not be decoded, of all processes: in training, in evaluation.
        **known: further keys, or other values: name, student, teacher, data, command, settings, preset, ….
    """
    args, history = trainer.args, trainer.state.log_history
    logs = [entry for entry in history if "loss" in entry]
    record = {
        "name": args.loss,
        "loss": {"name": args.loss, **trainer.train_loss.numbers()},
        "seed": args.seed,
        "versions": report.collect_versions(),
        "metrics": {k: v for name, v in metrics.items() if (k := name.removeprefix("eval_")) in METRICS},
        "teacher_metrics": trainer.teacher_metrics,
        "terms": {k: v for k, v in logs[-1].items() if k.startswith("loss")} if logs else {},
        "history": history,
        "latency": {"how": f"median of {FORWARDS} forwards of one picture, 1 thread, {cpu_name()}"},
        "device": f"{args.device}, {torch.get_num_threads()} threads, {args.world_size} processes",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "verdict": None,
        **known,
    }
    record["data"]["skipped"] = {
        "count": len(skipped[0]),
        "examples": skipped[0][:100],
        "eval_count": len(skipped[1]),
        "eval_examples": skipped[1][:100],
    }
    return report.redact(record)
