"""The output folder of an experiment: its plan, which runs are finished, and the room on its disk."""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..launcher import resume_command
from ..reporting.record import RUN_FILE, read_record, redact, write_json
from ..spec import PLAN_FILE, Experiment, RunSpec, check_same, continue_plan, differences, read_plan
from .lock import RunLock


def check_continuation(
    experiment: Experiment, resume: bool, checkpoints: Sequence[str | None] = ()
) -> Experiment | None:
    """The plan that is in the output folder, if any. Raises ValueError if this one, or one of the `checkpoints` that
    the runs go on from, does not continue it."""
    folder = Path(experiment.output_dir)
    old = earlier_plan(folder, resume)
    if old is not None:
        check_same(old, experiment, folder)
    for run, checkpoint in zip(experiment.runs, checkpoints, strict=False):
        if checkpoint and not finished_record(experiment, run):
            continue_plan(experiment.of(run), checkpoint)
    return old


def open_folder(experiment: Experiment, resume: bool, checkpoints: Sequence[str | None] = ()) -> Experiment:
    """Writes plan.json into the output folder, or holds the plan against the one that is there. Returns what is there.

    A later process with an equal plan joins the experiment. Only a continuation (`resume`) may add runs, and change
    what is resumable. `checkpoints` are what the runs go on from: what is refused leaves the folder as it was.
    """
    folder = Path(experiment.output_dir)
    old = check_continuation(experiment, resume, checkpoints)
    if old is None:
        old = _create_plan(experiment)
        if old is None:
            return experiment
        check_same(old, experiment, folder)
    there, here = ({run.key: run for run in plan.runs} for plan in (old, experiment))
    for key in there.keys() & here.keys():
        if there[key].folder != here[key].folder:
            raise ValueError(
                f"{folder} has the run {key!r} in {there[key].folder!r}, and this command would train it in "
                f"{here[key].folder!r}: give --compare and --seeds as before, or choose another --output_dir."
            )
    if resume:
        runs = tuple((there | here).values())
        if len(runs) > 1 and any(run.folder == "." for run in runs):
            raise ValueError(
                f"{folder} itself is the folder of one run, and the records of others would replace its own: choose "
                "another --output_dir for a comparison."
            )
        write_json(folder / PLAN_FILE, dataclasses.replace(experiment, runs=runs).to_dict())
        return experiment
    if there.keys() != here.keys():
        raise ValueError(
            f"{folder} holds a comparison of other runs ({'; '.join(there)}). Add runs to it with "
            "--resume_from_checkpoint last, or choose another --output_dir."
        )
    if all(RunLock(experiment.folder(run)).started for run in experiment.runs):
        raise ValueError(
            f"output_dir {folder} is in use: all of its {len(old.runs)} runs have been started. Continue those that "
            f"were interrupted with `{resume_command(folder)}`, choose another --output_dir, or remove it."
        )
    return old


def continues(folder: str | os.PathLike, resume: bool | str) -> bool:
    """Whether `resume` is True or a checkpoint in this folder; one of another folder starts a new run in this one."""
    return resume is True or bool(resume and Path(resume).resolve().parent == Path(folder).resolve())


def earlier_plan(folder: str | os.PathLike, resume: bool) -> Experiment | None:
    """The plan that is in an output folder already; None where the folder is empty or missing, if not to `resume`."""
    folder = Path(folder)
    old = read_plan(folder)
    if old is None and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"output_dir {folder} is in use and has no {PLAN_FILE}: choose another, or remove it.")
    if old is None and resume:
        raise ValueError(f"no {PLAN_FILE} in {folder}: nothing to resume; leave --resume_from_checkpoint out.")
    return old


def _create_plan(experiment: Experiment) -> Experiment | None:
    """Creates plan.json, whole or not at all; if another process was faster, returns its plan."""
    file = Path(experiment.output_dir) / PLAN_FILE
    temporary = file.with_name(f".{PLAN_FILE}.{os.getpid()}.new")
    write_json(temporary, experiment.to_dict())
    try:
        os.link(temporary, file)  # unlike a rename it fails if the file is there
    except OSError:
        if file.exists():
            return read_plan(file.parent)
        os.replace(temporary, file)  # a file system without hard links
    finally:
        temporary.unlink(missing_ok=True)
    return None


def finished_record(experiment: Experiment, spec: RunSpec) -> dict | None:
    """The record of a run that was trained to the plan's end, or None. Raises ValueError for that of another run."""
    record = read_record(experiment.folder(spec))
    if "runs" in record or not record.get("plan"):
        return None
    there = Experiment.from_dict(record["plan"]).runs[0]
    ours = Experiment.from_dict(redact(experiment.of(spec).to_dict())).runs[0]  # as the record keeps it
    if differences(dataclasses.replace(there, schedule=ours.schedule), ours):
        file = experiment.folder(spec) / RUN_FILE
        raise ValueError(f"{file} is the record of another run than {PLAN_FILE} says: move it elsewhere.")
    return record if there.schedule == ours.schedule else None


def check_disk(experiment: Experiment, runs: int) -> None:
    """Raises OSError where the file system of the output folder has less room than so many of the plan's runs need."""
    needed = ((experiment.requirements or {}).get("disk_bytes") or 0) * runs / max(1, len(experiment.runs))
    free = shutil.disk_usage(_existing(experiment.output_dir)).free
    if free < needed:
        raise OSError(
            f"{needed / 1e9:.1f} GB are needed in {experiment.output_dir} and {free / 1e9:.1f} GB are free: "
            "choose another --output_dir, or keep fewer checkpoints with --save_total_limit 1 or --save_strategy no."
        )


def check_writable(folder: str | os.PathLike) -> None:
    """Raises OSError where the output folder can't be made or written to. Leaves nothing there."""
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            pass
    except OSError as error:
        raise OSError(f"output_dir {folder} can't be written to ({error}): choose another --output_dir.") from error


def _existing(folder: str | os.PathLike) -> Path:
    """The folder, or of one that is to be made the nearest that there is."""
    folder = Path(folder).absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())
