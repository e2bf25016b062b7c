"""Going on with an experiment from the plan in its folder."""

from __future__ import annotations

import os

from ..config import DistillationConfig
from ..spec import PLAN_FILE, read_plan
from .launcher import check_processes
from .run import run


def resume(folder: str | os.PathLike, token: str | None = None) -> list[dict]:
    """Goes on with every run of an experiment that is not finished, from its newest complete checkpoint.

    Args:
        folder: the experiment's output folder, with its plan.json.
        token: for the Hub; default: the one that is logged in.

    Returns:
        The records of the finished runs.

    Raises:
        ValueError: there is no plan, or it is run with another number of processes.
    """
    experiment = read_plan(folder)
    if experiment is None:
        raise ValueError(
            f"there is no {PLAN_FILE} in {os.fspath(folder)}: give the --output_dir of an experiment of hf_kd, as in "
            "`hf-kd resume outputs/quickstart`."
        )
    first = experiment.runs[0]
    config = DistillationConfig(**{**first.arguments(), "output_dir": str(experiment.folder(first))})
    check_processes(config)
    if config.world_size != first.processes:
        raise ValueError(
            f"{folder} was started with {first.processes} processes and is resumed with {config.world_size}: batches "
            f"would differ. Launch as many, as in: accelerate launch --num_processes {first.processes} -m hf_kd "
            f"resume {folder}"
        )
    return run(experiment, resume=True, token=token)
