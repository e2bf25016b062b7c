"""How this process was launched, and whether as many processes run as were asked for."""

import os
import sys
from collections.abc import Sequence

import psutil

from ..config import DistillationConfig


def launch_command(arguments: Sequence[str], *, module: bool = False) -> list[str]:
    """A command line that starts hf_kd with these arguments in the way in which this process was started.

    With `module` through `-m hf_kd`, where a script takes no subcommand but `distill`.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    script = ["-m", "hf_kd", *arguments] if module else [sys.argv[0], *arguments[1:]]
    if world == "1" and (module or not sys.argv[0].endswith(".py")) and not _by_accelerate():
        return ["hf-kd", *arguments]
    if _by_accelerate():
        several = ["--num_processes", world] if world != "1" else []
        if world != "1" and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1"):
            several = ["--multi_gpu", *several]
        return ["accelerate", "launch", *several, *script]
    if world != "1":
        return ["torchrun", "--nproc_per_node", world, *script]
    return ["python", *script]


def _by_accelerate() -> bool:
    return "ACCELERATE_MIXED_PRECISION" in os.environ


def _asked_of_accelerate() -> int | None:
    """How many processes `accelerate launch` was asked for where it started only one; None: one, or unknown.

    It leaves no number in the environment then, but sets MASTER_ADDR.
    """
    if not _by_accelerate() or "WORLD_SIZE" in os.environ or "MASTER_ADDR" not in os.environ:
        return None
    try:
        launcher = psutil.Process().parent()
        if launcher is None or "MASTER_ADDR" in launcher.environ():
            return None
        words = [part for word in launcher.cmdline() for part in word.replace("-", "_").split("=")]
    except psutil.Error:
        return None
    number = words[words.index("__num_processes") + 1] if "__num_processes" in words[:-1] else "2"
    return int(number) if number.isdigit() else 2


def check_processes(config: DistillationConfig) -> None:
    """Refuses to train with another number of processes than the launcher was asked for."""
    asked = _asked_of_accelerate() or int(os.environ.get("WORLD_SIZE", 1))
    if asked == config.world_size:
        return
    what = "runs one" if config.world_size == 1 else f"run {config.world_size}"
    script = sys.argv[0] if sys.argv[0].endswith(".py") else "-m hf_kd distill"
    raise ValueError(
        f"{asked} processes were asked for, and this {what}. On a CPU several processes are started with: "
        f"accelerate launch --multi_gpu --num_processes {asked} {script} ... --use_cpu"
    )
