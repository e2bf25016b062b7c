"""From the parsed arguments to a frozen plan. Nothing is written, and no weights are loaded."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from transformers.utils import logging

from .. import hub, recipes
from ..config import DistillationConfig, check_optim_args
from ..data import ImageData, load_data, overlap
from ..data.columns import missing_labels
from ..labels import ClassMapping, name_classes
from ..launcher import check_processes
from ..losses import loss_source
from ..models.ensemble import normalized_weights, teacher_named
from ..models.loading import adjust_processor, build, check_architecture, load_config, model_family, processor_for
from ..models.preprocessing import Preprocessing
from ..models.student import student_config
from ..push import check_push
from ..quickstart import bundled
from ..reporting.controls import PERMUTED
from ..reporting.record import RUN_FILE, collect_versions
from ..reporting.significance import BASELINE
from ..spec import (
    DATA_OPTIONS,
    STUDENT_OPTIONS,
    DataSource,
    EnsembleSource,
    Experiment,
    ModelSource,
    RunSpec,
    options,
    run_spec,
)
from .folder import check_writable, continues, earlier_plan
from .variants import controls, run_configs, variant_name

logger = logging.get_logger(__name__)


def plan(script, config: DistillationConfig, command: str | None = None) -> Experiment:
    """Resolves what the arguments ask for: commits, recipe, runs, data, sizes and the disk space that it takes.

    `script` (`ScriptArguments`, checked) says what to distil, `config` how, and `command` is kept for the record.
    """
    check_processes(config)
    if config.output_dir == "trainer_output":  # transformers' default
        trained_with = "compare" if script.compare else config.loss_class().name
        name = "-".join([Path(script.student).name, trained_with, Path(script.dataset).name])
        folder = os.path.join("outputs", f"{name}-verdict" if script.verdict else name)
        repo_id = config.hub_model_id or hub.repo_name(name)
        config = dataclasses.replace(config, output_dir=folder, hub_model_id=repo_id)
    check_writable(config.output_dir)
    earlier = earlier_plan(config.output_dir, continues(config.output_dir, resumes(config)))
    ratio, ratio_there = script.same_time_ratio, earlier.same_time_ratio if earlier else None
    if ratio_there and ratio not in (None, ratio_there):
        raise ValueError(
            f"--same_time_ratio {ratio:g}: in {config.output_dir} ce_same_time has {ratio_there:g} times the "
            "steps. Leave it out, or choose another --output_dir."
        )
    dataset_origin = _origin("dataset", script.dataset, script.dataset_revision, earlier.data if earlier else None)
    if dataset_origin.get("commit"):
        hub.check_access(script.dataset, "dataset")
    push = _push_target(script, config)
    before = earlier.student if earlier else None
    origin = _origin("model", script.student, script.student_revision, before, script.from_scratch)
    student = ModelSource(**origin, **options(script, STUDENT_OPTIONS))
    config_of_student = _config(student)
    recipe, why = _recipe_name(script, student, config_of_student)
    provenance, changed = recipes.provenance(recipe, config, script.explicit), list[str]()
    if recipe:
        side_before = student.image_size
        student, kept = _with_recipe(student, config_of_student, recipe, script.explicit)
        if student.image_size != side_before:
            config_of_student = _config(student)
        config, changed = recipes.apply(recipe, config, script.explicit)
        if kept:
            why += f" (but the student keeps its {kept} px)"
            del provenance["image_size"]
    if "optim_args" in script.explicit:
        check_optim_args(config)
    if config.freeze_backbone and student.from_scratch:
        logger.warning("freeze_backbone with from_scratch: the backbone's weights are random, and stay so.")
    asked = run_configs(script, config, recipe)
    marks = {name: mark for name, (_, mark) in controls(script, config).items()}
    losses = {name: run for name, _, run in asked if name not in marks}
    preset = recipes.describe(recipe, changed, losses, why) if recipe else None
    data_options = {key: value for key, value in (vars(config) | vars(script)).items() if key in DATA_OPTIONS}
    needs_labels = any(run.build_loss().needs_labels for _, _, run in asked)
    source = DataSource(
        **dataset_origin, config_name=script.dataset_config, allow_unlabelled=not needs_labels, **data_options
    )
    side = _input_side(student, config_of_student)
    teachers = _teachers(script, earlier)
    configs_of_teachers = [load_config(teacher.id, teacher.hub) for teacher in teachers]
    side = max([side, *map(_input_side, teachers, configs_of_teachers)])
    data = load_data(**source.load_arguments)
    if any(mark["kind"] == PERMUTED for mark in marks.values()):
        _check_all_labelled(data)
    source = _with_facts(source, data)
    if source.streaming:
        source = dataclasses.replace(source, stream_workers=config.dataloader_num_workers)
    for teacher, config_of_teacher in zip(teachers, configs_of_teachers, strict=True):
        with teacher_named(teacher.id if len(teachers) > 1 else None):
            ClassMapping.between(config_of_teacher.id2label, data.names, teacher.class_map)
    teachers = [dataclasses.replace(teacher, seen_evaluation_images=_seen(teacher, data)) for teacher in teachers]
    parameters = _count_parameters(config_of_student, data.names, student)
    found: dict[str, Any] = options(data, ("image_column", "label_column"))
    found["train_image_size"] = config.train_image_size or side
    runs = tuple(
        run_spec(dataclasses.replace(run, **found), name, folder, loss_source(run.loss), control=marks.get(name))
        for name, folder, run in asked
    )
    experiment = Experiment(
        output_dir=config.output_dir,
        student=student,
        teacher=_together(teachers, script.teacher_weights),
        data=source,
        train_image_size=found["train_image_size"],
        runs=runs,
        preset=preset,
        provenance=provenance,
        command=_pinned(command, student=[student], teacher=teachers, dataset=[source]),
        against=variant_name(script.against or BASELINE),
        push=push,
        requirements=_requirements(runs, parameters, len(data.train)),
        versions=collect_versions(),
    ).with_same_time_ratio(ratio or ratio_there)
    return Experiment.from_dict(experiment.to_dict())  # JSON types, as those that are read from plan.json


def resumes(config: DistillationConfig) -> bool | str:
    """`--resume_from_checkpoint`: True for "last" (or "true"), the path of a checkpoint, or False."""
    value = config.resume_from_checkpoint
    return True if str(value).lower() in ("true", "last") else value or False


def _push_target(script, config: DistillationConfig) -> dict | None:
    """Where the student of the first seed is pushed to; whether that is allowed is asked now, before training."""
    if not config.push_to_hub:
        return None
    private, folder = config.hub_private_repo, "."
    repo_id = check_push(config.hub_model_id, config.hub_token, private=private, folder=config.output_dir)
    if script.verdict:
        folder = os.path.join(config.loss_class().name, f"seed-{(script.seeds or [config.seed])[0]}")
    return {"repo_id": repo_id, "private": private, "revision": config.hub_revision, "folder": folder}


def _teachers(script, earlier: Experiment | None) -> list[ModelSource]:
    names, before = script.teacher or [], dict(enumerate(earlier.teachers if earlier else ()))
    revisions = script.teacher_revision or [None] * len(names)
    pairs = zip(names, revisions, strict=True)
    origins = [_origin("model", *pair, before.get(i)) for i, pair in enumerate(pairs)]
    shared = options(script, ("trust_remote_code", "class_map"))
    return [ModelSource(**origin, **shared) for origin in origins]


def _together(teachers: list[ModelSource], weights: list[float] | None) -> ModelSource | EnsembleSource | None:
    if len(teachers) > 1:
        return EnsembleSource(tuple(teachers), normalized_weights(weights, len(teachers)))
    return teachers[0] if teachers else None


def _pinned(command: str | None, **sources: Sequence[ModelSource | DataSource]) -> str | None:
    """The command with the commits that its revisions stood for."""
    if not command:
        return None
    for key, several in sources.items():
        if any(source.commit not in (None, source.revision) for source in several):
            # A local model has no commit, and its revision is not looked at.
            commits = [source.commit or source.revision or "main" for source in several]
            command += f" --{key}_revision {' '.join(commits)}"
    return command


def _origin(
    kind: str, name: str, revision: str | None, before: ModelSource | DataSource | None, from_scratch: bool = False
) -> dict[str, Any]:
    """Id, revision and commit of a model or dataset; a local path is made absolute, to resume from anywhere.

    The commit is that of the plan in the folder (`before`), which is continued, or today's.
    """
    origin = {"id": name, "revision": revision, "commit": None}
    built = from_scratch and name.startswith(("timm/", "cifar/"))
    path = Path(name).expanduser()
    if bundled(name):
        return origin
    if path.exists():
        return origin | {"id": str(path.absolute())}
    if built or not re.fullmatch(r"\w[\w.-]*/[\w.-]+(?<!\.parquet)", name):
        return origin
    if before is not None and (before.id, before.revision) == (name, revision):
        return origin | {"commit": before.commit}
    return origin | {"commit": hub.resolve(name, revision, kind).resolved}


def _recipe_name(script, student: ModelSource, config) -> tuple[str | None, str]:
    """The recipe that fills in what the user does not set (None for none), and why that one, where it is chosen."""
    if script.preset == "none":
        return None, ""
    if script.preset != "auto":
        return script.preset, ""
    family = model_family(config)
    return recipes.choose(family, student.from_scratch, script.dataset), f", chosen for the family {family or '-'}"


def _with_recipe(student: ModelSource, config, recipe: str, explicit: set[str]) -> tuple[ModelSource, int | None]:
    """The student with a recipe's input size and statistics; and its own size in pixels, if it keeps that."""
    new = {key: value for key, value in recipes.load(recipe).student.items() if key not in explicit}
    side = _input_side(student, config) if "image_size" in new else 0
    kept = side if side < new.get("image_size", 0) else None
    if kept:
        del new["image_size"]
    return dataclasses.replace(student, **new), kept


def _config(student: ModelSource) -> Any:
    return student_config(student.id, student.from_scratch, student.image_size, student.hub, student.model_kwargs)


def _with_facts(source: DataSource, data: ImageData) -> DataSource:
    """The source with what was found by loading it."""
    found = {key: value for key, value in vars(data).items() if key in vars(source) and key != "revision"}
    found |= {"train_size": len(data.train), "eval_size": len(data.eval), "classes": data.names}
    return dataclasses.replace(source, **found)


def _check_all_labelled(data: ImageData) -> None:
    """Raises ValueError where a permuted teacher has no labels to exchange images by."""
    if missing := missing_labels(data.train, data.label_column):
        raise ValueError(
            f"--controls {PERMUTED} exchanges images of the same label, and {missing} of the {len(data.train)} images "
            "to train on count as unlabelled: drop it, or train on labelled images."
        )


def _count_parameters(config, names: list[str], student: ModelSource) -> int:
    """The student's number of parameters, without memory for them."""
    name_classes(config, names)
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in build(config, student.trust_remote_code).parameters())
    except TypeError as error:
        if not student.model_kwargs:
            raise
        raise ValueError(f"--model_kwargs {student.model_kwargs}: {error}") from error


def _input_side(source: ModelSource, config) -> int:
    """The longer side of a model's input. Raises ValueError if the model gives no logits for images of that size."""
    processor = processor_for(SimpleNamespace(config=config), source.id, source.hub)
    processor = adjust_processor(processor, source.image_size, source.image_mean, source.image_std)
    size = Preprocessing(processor).size
    check_architecture(source.id, config, size, source.trust_remote_code)
    return max(size)


def _seen(teacher: ModelSource, data: ImageData) -> int | None:
    """How many of our evaluation images the teacher was trained on; None if its record does not tell."""
    name, commit = teacher.id, teacher.commit
    try:
        file = Path(hf_hub_download(name, RUN_FILE, revision=commit) if commit else Path(name, RUN_FILE))
        seen = overlap(data.describe(), json.loads(file.read_text("utf-8"))["plan"]["data"])
    except (OSError, ValueError, KeyError, TypeError):  # no record, or none of this version
        return None
    if seen:
        logger.warning(
            f"teacher {name} was trained on {seen} of the {len(data.eval)} images that are evaluated on: its "
            "own accuracy, and what the student learns from it, look better than they are. Train it on this training "
            "split, or evaluate on another one with --eval_split."
        )
    return seen


def _requirements(runs: tuple[RunSpec, ...], parameters: int, train_size: int) -> dict:
    run, schedule = runs[0], runs[0].schedule
    rounded = math.floor if run.settings["dataloader_drop_last"] else math.ceil
    micro_batches = rounded(train_size / (run.processes * run.settings["per_device_train_batch_size"]))
    per_epoch = max(1, math.ceil(micro_batches / run.settings["gradient_accumulation_steps"]))
    steps = schedule.max_steps if schedule.max_steps > 0 else math.ceil(per_epoch * schedule.num_train_epochs)
    # Weights, optimizer state and average in float32; of most optimizers the state is twice the size of the weights.
    states = 1 if run.settings["optim"].startswith(("sgd", "lion")) else 2
    states += run.settings["ema_decay"] is not None
    tensors = sum(_kept(run, steps, per_epoch) * (1 + states) + 1 for run in runs)
    return {"steps": steps, "parameters": parameters, "disk_bytes": 4 * parameters * tensors}


def _kept(run: RunSpec, steps: int, steps_per_epoch: int) -> int:
    """How many checkpoints a run has on the disk at most."""
    strategy, every, limit = (run.execution[key] for key in ("save_strategy", "save_steps", "save_total_limit"))
    if strategy == "no":
        return 0
    if strategy == "epoch":
        every = steps_per_epoch
    elif every < 1:
        every *= steps
    saves = max(1, int(steps / max(every, 1)))
    best = run.settings.get("load_best_model_at_end") or strategy == "best"
    return min(saves, (limit or saves) + 1 + bool(best))
