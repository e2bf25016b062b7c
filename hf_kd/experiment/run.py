"""Carrying out a plan, or going on with one: the runs that are to be trained, the comparison, cards and push."""

import dataclasses
import os
import shlex
from pathlib import Path
from typing import Any

import psutil
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers.utils import logging

from .. import hub
from ..checkpointing import last_checkpoint
from ..config import DistillationConfig
from ..data import ImageData, load_data
from ..data.collators import count_kinds
from ..launcher import check_processes, resume_command
from ..models.teacher import Teacher
from ..push import publish
from ..ranks import check_same_plan, failures_named
from ..reporting.card import write_card
from ..reporting.classes import read_counts
from ..reporting.collect import describe_teacher, last_with, make_record, write_record
from ..reporting.comparison import write_comparison
from ..reporting.controls import SAME_TIME
from ..reporting.record import CURVES_FILE, REPORT_FILE, RESULTS_FILE, RUN_FILE, results, write_json
from ..reporting.significance import shared_errors, verdicts
from ..reporting.tables import comparison_table, pairwise_table, teacher_row_of
from ..spec import (
    DATA_OPTIONS,
    PLAN_FILE,
    PYTHON_RESUME,
    STUDENT_OPTIONS,
    EnsembleSource,
    Experiment,
    RunSpec,
    options,
    read_plan,
)
from ..stopping import stop_error, stop_request
from ..trainer import DistillationTrainer
from .folder import check_continuation, check_disk, continues, finished_record, open_folder
from .lock import RunLock
from .progress import ComparisonProgress
from .trainers import config_of, make_trainer, measured_same_time_ratio, teacher_of
from .variants import check_only

logger = logging.get_logger(__name__)


class ExperimentError(ValueError):
    """Runs that diverged, or a push that failed. What was computed is in the output folder."""


def run(
    experiment: Experiment, resume: bool | str = False, token: str | None = None, only: str | None = None
) -> list[dict]:
    """Trains the runs of a plan, and writes models, records, curves and cards; pushes if the plan says so.

    `resume` goes on with each run from its newest complete checkpoint (True), or with the only run from a path's;
    False trains the runs that nobody has started. `only`, "variant:seed", takes one run, and leaves table and push to
    a `resume` of all. Returns the records of the finished runs that this process knows.
    Raises ExperimentError after all else, if runs diverged or the push failed; TrainingStopped and KeyboardInterrupt
    where `DistillationTrainer.train` does; RankFailure where another process has failed.
    """
    configs = [config_of(experiment, spec) for spec in experiment.runs]  # which are wrong before anything is written
    if only is not None:
        check_only(only, [spec.name_and_seed for spec in experiment.runs])
    specs = [spec for spec in experiment.runs if only in (None, spec.name_and_seed)]
    hours = configs[0].max_hours
    with stop_request.listening(hours, since=psutil.Process().create_time()), failures_named():
        check_same_plan(experiment)
        experiment, loaded = _open(experiment, resume, len(specs))
        records = _train_all(experiment, specs, resume, token, loaded)
        state = PartialState()
        problems = [_conclude(experiment, records, token, only) if state.is_main_process else ""]
        broadcast_object_list(problems)  # also since a rank that leaves early takes the others' connections with it
    if problems[0]:
        raise ExperimentError(problems[0])
    return list(records.values())


def _open(
    experiment: Experiment, resume: bool | str, runs: int
) -> tuple[Experiment, tuple[ImageData, Teacher | None] | None]:
    """Writes the plan, of which `runs` are to be trained, or finds it in the folder. Returns it with the ratio of
    ce_same_time that is kept there, and data and teacher, if they were needed to measure that."""
    main, resume_here = PartialState().is_main_process, continues(experiment.output_dir, resume)
    checkpoints, loaded = [_checkpoint(experiment, spec, resume) for spec in experiment.runs], None
    if main and not resume_here:
        check_disk(experiment, runs)
    ratio = experiment.same_time_ratio
    if ratio is None and any(spec.variation == SAME_TIME for spec in experiment.runs):
        if main:
            check_continuation(experiment, resume_here, checkpoints)
        loaded = _load(experiment)
        ratio = measured_same_time_ratio(experiment, *loaded)
    ratios = [ratio]
    if main:
        ratios = [open_folder(experiment.with_same_time_ratio(ratio), resume_here, checkpoints).same_time_ratio]
    broadcast_object_list(ratios)
    return experiment.with_same_time_ratio(ratios[0]), loaded


def _train_all(
    experiment: Experiment,
    specs: list[RunSpec],
    resume: bool | str,
    token: str | None,
    loaded: tuple[ImageData, Teacher | None] | None,
) -> dict[str, dict]:
    """Trains what is to be trained of these runs. Returns the records of those that are finished then."""
    state, resume_here = PartialState(), continues(experiment.output_dir, resume)
    records: dict[str, dict] = {}
    progress = ComparisonProgress(dataclasses.replace(experiment, runs=tuple(specs)))
    if state.is_main_process and len(specs) > 1:
        print(progress.plan())
    for spec in specs:
        folder = experiment.folder(spec)
        lock, claim = RunLock(folder), list[Any]([None])
        if state.is_main_process:
            claim = [_claim(experiment, spec, lock, resume_here)]
        broadcast_object_list(claim)
        if isinstance(claim[0], dict):
            records[spec.key] = claim[0]
        elif isinstance(claim[0], str):
            raise stop_error(claim[0], f"stopped before {spec.key}")
        elif claim[0]:
            loaded = loaded or _load(experiment)
            try:
                checkpoint = _checkpoint(experiment, spec, resume)
                measured = next((r["teacher_metrics"] for r in records.values() if r.get("teacher_metrics")), None)
                if resume and checkpoint is None:
                    logger.warning(f"no checkpoint in {folder}: starting from the beginning")
                with stop_request.held():
                    config = config_of(experiment, spec, token)
                    record = _train(experiment, spec, config, *loaded, measured, checkpoint, progress)
                records[spec.key] = record
                if state.is_main_process:
                    print(progress.finish(record))
            finally:
                lock.release()
        elif len(specs) < len(experiment.runs) and not resume_here:
            raise ValueError(
                f"{spec.key} has been started already, in {folder}. Continue it with: "
                f"{resume_command(experiment.output_dir, spec.name_and_seed)}"
            )
    return records


def resume(folder: str | os.PathLike, only: str | None = None) -> list[dict]:
    """`run` for every unfinished run, or `only` one, of the experiment whose plan.json is in a folder."""
    experiment = read_plan(folder)
    if experiment is None:
        raise ValueError(f"there is no {PLAN_FILE} in {folder}: give the --output_dir of an experiment of hf_kd.")
    if not experiment.data.id:
        raise ValueError(f"{folder} was trained by a trainer built in Python: go on with {PYTHON_RESUME} there.")
    first = experiment.runs[0]
    config = config_of(experiment, first)
    check_processes(config, folder)
    if config.world_size != first.processes:
        raise ValueError(
            f"{folder} was started with {first.processes} processes and is resumed with {config.world_size}: batches "
            f"would differ. Launch as many, as in: accelerate launch --multi_gpu --num_processes {first.processes} -m "
            f"hf_kd resume {shlex.quote(os.fspath(folder))}"
        )
    if config.engine != first.engine:
        raise ValueError(
            f"{folder} was trained by {first.engine} and is resumed with {config.engine}, which does not read its "
            "checkpoints: launch it with the same configuration of accelerate."
        )
    return run(experiment, resume=True, only=only)


def _checkpoint(experiment: Experiment, spec: RunSpec, resume: bool | str) -> str | None:
    """What a run goes on from; see `run`."""
    return last_checkpoint(experiment.folder(spec)) if resume is True else resume or None


def _claim(experiment: Experiment, spec: RunSpec, lock: RunLock, resume: bool) -> dict | str | bool:
    """The record of a run that is finished; else by what we were asked to stop; else whether it is ours to train."""
    record = finished_record(experiment, spec)
    claim = record or stop_request.now() or lock.acquire(new=not resume)
    if resume and record and not record.get("diverged"):
        logger.warning(f"{spec.key}: already finished, see {experiment.folder(spec) / RUN_FILE}")
    elif resume and not claim:
        logger.warning(f"{spec.key} is being trained by {lock.holder()}: left to it")
    return claim


def _load(experiment: Experiment) -> tuple[ImageData, Teacher | None]:
    """The plan's images, as it knew them, and its teacher."""
    data = load_data(**experiment.data.load_arguments)
    if data.fingerprint != experiment.data.fingerprint:
        raise ValueError(
            f"the images of {experiment.data.id} are not those of the plan in {experiment.output_dir}: their "
            f"fingerprint is {data.fingerprint[:16]}, there it is {str(experiment.data.fingerprint)[:16]}. Restore "
            "the dataset, or start again in another --output_dir."
        )
    return data, teacher_of(experiment, data)


def _train(
    experiment: Experiment,
    spec: RunSpec,
    config: DistillationConfig,
    data: ImageData,
    teacher: Teacher | None,
    teacher_metrics: dict | None,
    checkpoint: str | None,
    progress: ComparisonProgress,
) -> dict:
    """Trains, evaluates and saves one student; returns its record."""
    source, trainer = experiment.student, make_trainer(experiment, spec, config, data, teacher)
    where = progress.start(spec, trainer)
    if config.process_index == 0:
        print(f"\n{where}: {trainer.train_loss}")
        if trainer.auxiliary_head is not None:
            print(f"auxiliary head on {trainer.auxiliary_head.layer}")
        if (alpha := trainer.train_loss.distillation_alpha) is not None:
            print(f"distillation head: distillation_alpha={alpha:g} of its terms, {1 - alpha:g} of cross entropy")
    if teacher is not None and teacher_metrics is None:
        teacher_metrics = trainer.measure_teacher()
    trainer.teacher_metrics = teacher_metrics
    diverged = None
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except FloatingPointError as error:  # the other runs go on
        diverged = str(error)
        trainer.callback_handler.on_train_end(config, trainer.state, trainer.control)  # closes the trackers
    trainer.save_model()  # before anything else can go wrong
    metrics = None if diverged else _final_metrics(trainer)
    skipped, eval_skipped = (
        dict(sorted(gather_object(list(part.items())))) for part in (trainer.skipped, trainer.eval_skipped)
    )
    if config.process_index:
        return {"teacher_metrics": teacher_metrics}  # the record is the first process's
    if skipped or eval_skipped:
        print(
            f"skipped {len(skipped)} images in training and {len(eval_skipped)} in evaluation "
            f"({count_kinds(skipped | eval_skipped)}; up to --max_skipped_fraction {config.max_skipped_fraction:g}), "
            f"see {RUN_FILE}: {[*skipped, *eval_skipped][0]}"
        )
    record = make_record(
        trainer,
        metrics,
        data,
        {"id": source.id, "from_scratch": source.from_scratch},
        (skipped, eval_skipped),
        name=spec.name,
        settings={**_source_options(experiment), **config.to_dict()},
        command=experiment.command,
        preset=experiment.preset,
        teacher=teacher and describe_teacher(teacher, experiment.teachers),
        control=experiment.control(spec),
        diverged=diverged,
    )
    write_record(record, config.output_dir)
    del record["class_counts"]  # which have a file of their own
    return record


def _final_metrics(trainer: DistillationTrainer) -> dict[str, float]:
    """The trained student's metrics. An evaluation that training has made after its last step is not repeated."""
    last = last_with("eval_loss", trainer.state.log_history)
    same_step = last.get("step") == trainer.state.global_step
    if same_step and trainer.class_counts and not trainer.args.load_best_model_at_end:
        return {key: value for key, value in last.items() if key.startswith("eval_")}
    return trainer.evaluate()


def _source_options(experiment: Experiment) -> dict:
    """Models and data of the plan by the names of their options."""
    student, teacher, data = experiment.student, experiment.teacher, experiment.data
    values = options(student, STUDENT_OPTIONS) | options(data, DATA_OPTIONS) | {"dataset_config": data.config_name}
    values |= {"student": student.id, "student_revision": student.commit}
    values |= {"dataset": data.id, "dataset_revision": data.commit}
    values |= dict.fromkeys(("teacher", "teacher_revision", "class_map"))
    if isinstance(teacher, EnsembleSource):
        ids, commits = [each.id for each in teacher.teachers], [each.commit for each in teacher.teachers]
        values |= {"teacher": ids, "teacher_revision": commits, "teacher_weights": teacher.weights}
    elif teacher is not None:
        values |= {"teacher": teacher.id, "teacher_revision": teacher.commit, "class_map": teacher.class_map}
    return values


def _conclude(experiment: Experiment, records: dict[str, dict], token: str | None, only: str | None) -> str:
    """What needs all runs: table, verdicts, cards and push. Left to whoever finishes the last of them, without `only`.
    Returns what went wrong."""
    for spec in experiment.runs if only is None else ():
        if spec.key not in records and (record := finished_record(experiment, spec)):
            records[spec.key] = record
    diverged = [spec for spec in experiment.runs if records.get(spec.key, {}).get("diverged")]
    problems = []
    missing = [spec.key for spec in experiment.runs if spec.key not in records]
    if only is not None:
        print(f"\nThe table follows when all runs are finished, with: {resume_command(experiment.output_dir)}")
    elif missing:
        print(
            f"\n{len(missing)} of {len(experiment.runs)} runs are not finished: {'; '.join(missing)}. The table "
            f"follows when they are; go on with interrupted ones with: {resume_command(experiment.output_dir)}"
        )
    elif len(diverged) < len(experiment.runs):
        _report(experiment, [records[spec.key] for spec in experiment.runs])
        to = experiment.push
        if to and to["folder"] not in [spec.folder for spec in diverged]:
            problems += _push(experiment, to, token)
    if diverged:
        reasons = "; ".join(f"{spec.key}: {records[spec.key]['diverged'].rstrip('.')}" for spec in diverged)
        problems.append(
            f"{len(diverged)} of {len(experiment.runs)} runs diverged and are no results: {reasons}. Records "
            f"and weights are in {experiment.output_dir}. Try a lower --learning_rate in another --output_dir."
        )
    return "\n".join(problems)


def _report(experiment: Experiment, records: list[dict]) -> None:
    """Prints the table and the verdicts, and writes the comparison and the cards."""
    output_dir, against = Path(experiment.output_dir), experiment.against
    marks = [experiment.control(spec) for spec in experiment.runs]  # of older runs, too, that were none before
    runs = [{**record, "control": mark} for record, mark in zip(records, marks, strict=True)]
    found = verdicts(runs, against)
    sentences = [verdict["sentence"] for verdict in found]
    shared = [test["sentence"] for test in shared_errors(runs, against).values()]
    table = comparison_table(runs, teacher_row_of(runs[0]), against=against)
    parts = [table, *sentences, pairwise_table(runs), "\n".join(shared)]
    print("\n" + "\n\n".join(filter(None, parts)))
    if len(runs) > 1:
        counts = [read_counts(experiment.folder(spec)) for spec in experiment.runs]
        comparison = write_comparison(runs, output_dir, experiment.command, against, counts)
        keys = ("name", "seed", "loss", "loss_description", "control", "metrics", "timings")
        brief = [{key: record[key] for key in keys if key in record} for record in results(runs)]
        verdict_of = {verdict["loss"]: {**verdict, "runs": brief} for verdict in found}
        for spec, record, before in zip(experiment.runs, runs, records, strict=True):
            own = {"verdict": verdict_of.get(record["name"]), "control": record["control"]}
            if changes := comparison["class_changes"].get(record["name"]):
                own["class_changes"] = changes
            if any(before.get(key) != value for key, value in own.items()):
                record |= {**own, "command": comparison["command"]}
                write_json(experiment.folder(spec) / RUN_FILE, record)
    for spec, record in zip(experiment.runs, runs, strict=True):
        if not record.get("diverged"):
            write_card(experiment.folder(spec))
    several = f"{REPORT_FILE}, {RESULTS_FILE}, " if len(runs) > 1 else ""
    print(f"\nModels, cards, {several}{RUN_FILE} and {CURVES_FILE} are in {output_dir}")


def _push(experiment: Experiment, to: dict[str, Any], token: str | None) -> list[str]:
    """Pushes one student. Returns what went wrong."""
    folder = str(Path(experiment.output_dir) / to["folder"])
    try:
        url = publish(folder, to["repo_id"], token=token, private=to["private"], revision=to["revision"])
    except Exception as error:  # the model is safe on disk, and nothing that the Hub answers may hide that
        branch = ["--revision", to["revision"]] if to["revision"] else []
        private = ["--private"] if to["private"] else []
        again = shlex.join(["hf-kd", "push", os.path.normpath(folder), to["repo_id"], *branch, *private])
        return [
            f"the push to {to['repo_id']} failed: {hub.user_message(error) or error}\n"
            f"The model is in {folder}. Push it with: {again}"
        ]
    print(f"Pushed to {url}")
    return []
