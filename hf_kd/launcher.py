"""How this process was launched, and whether as many processes run as were asked for."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from .config import DistillationConfig


def launch_command(arguments: Sequence[str], *, module: bool = False) -> list[str]:
    """A command line that starts hf_kd with these arguments in the way in which this process was started.

    With `module` through `-m hf_kd`, where a script takes no subcommand but `distill`.
    """
    world, file = os.environ.get("WORLD_SIZE", "1"), None if module else _script()
    script = [file, *arguments[1:]] if file else ["-m", "hf_kd", *arguments]
    if world == "1" and file is None and not _by_accelerate():
        return ["hf-kd", *arguments]
    if _by_accelerate():
        # On a CPU it starts one process without --multi_gpu.
        several = ["--multi_gpu", "--num_processes", world] if world != "1" else []
        return ["accelerate", "launch", *(_options_of_accelerate() or several), *script]
    if world != "1":
        return ["torchrun", "--nproc_per_node", world, *script]
    return ["python", *script]


def resume_command(folder: str | os.PathLike, only: str | None = None) -> str:
    """The command that goes on with the experiment in a folder, or `only` one run of it, for messages."""
    arguments = ["resume", os.fspath(folder), *(["--only", only] if only else [])]
    return shlex.join(launch_command(arguments, module=True))


def several() -> bool:
    """Whether the launcher has started several processes."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _script() -> str | None:
    """The script that was started, such as examples/run_distill.py; None for `hf-kd` and `python -m hf_kd`."""
    file = sys.argv[0]
    return file if file.endswith(".py") and os.path.basename(file) != "__main__.py" else None


def _by_accelerate() -> bool:
    return "ACCELERATE_MIXED_PRECISION" in os.environ


def _options_of_accelerate() -> list[str]:
    """The options that `accelerate launch` was started with, its configuration file among them; [] if unknown."""
    try:
        launcher = psutil.Process().parent()
        words = launcher.cmdline() if launcher else []
    except psutil.Error:
        return []
    first = next((i for i, word in enumerate(words) if word in ("launch", "accelerate.commands.launch")), None)
    last = next((i for i, word in enumerate(words) if first and i > first and word in (sys.argv[0], "-m")), None)
    return words[first + 1 : last] if first and last else []


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


def check_processes(config: DistillationConfig, resumed: str | os.PathLike | None = None) -> None:
    """Refuses to train with another number of processes than the launcher was asked for.

    `resumed` is the folder of the experiment that is gone on with, if any.
    """
    asked = _asked_of_accelerate() or int(os.environ.get("WORLD_SIZE", 1))
    if asked == config.world_size:
        return
    what = "runs one" if config.world_size == 1 else f"run {config.world_size}"
    script = f"{_script() or '-m hf_kd distill'} ... --use_cpu"
    if resumed:
        script = shlex.join(["-m", "hf_kd", "resume", os.fspath(resumed)])
    raise ValueError(
        f"{asked} processes were asked for, and this {what}. On a CPU several processes are started with: "
        f"accelerate launch --multi_gpu --num_processes {asked} {script}"
    )
