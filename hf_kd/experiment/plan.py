"""From the parsed arguments to a frozen plan. Nothing is written, and no weights are loaded."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from transformers.utils import logging

from .. import hub, recipes
from ..config import DistillationConfig
from ..data import ImageData, load_data, overlap
from ..labels import ClassMapping
from ..losses import loss_source
from ..models.loading import adjust_processor, build, load_config, model_family, processor_for
from ..models.preprocessing import Preprocessing
from ..models.student import student_config
from ..push import check_push
from ..quickstart import bundled
from ..reporting.record import RUN_FILE, collect_versions
from ..spec import DataSource, Experiment, ModelSource, RunSpec, run_spec
from .folder import continues, earlier_plan
from .launcher import check_processes
from .variants import run_configs

logger = logging.get_logger(__name__)


def plan(script, config: DistillationConfig, command: str | None = None) -> Experiment:
    """Resolves what the arguments ask for: commits, recipe, runs, data, sizes and the disk space that it takes.

    Args:
        script: the `ScriptArguments` of the command line: what to distil.
        config: the `DistillationConfig`: how to train.
        command: the command line, kept for the record.

    Raises:
        ValueError: arguments that do not fit together, a model or dataset that can't be used, or too little disk
            space; with what to change.
    """
    check_processes(config)
    script.check(config)
    if config.output_dir == "trainer_output":  # transformers' default
        name = default_name(script, config)
        folder = os.path.join("outputs", f"{name}-verdict" if script.verdict else name)
        config = dataclasses.replace(config, output_dir=folder, hub_model_id=config.hub_model_id or name)
    earlier = earlier_plan(config.output_dir, continues(config.output_dir, resumes(config)))
    push = _push_target(script, config)
    student = ModelSource(
        script.student,
        script.student_revision,
        _commit("student", script, earlier),
        script.trust_remote_code,
        script.from_scratch,
        script.image_size,
        script.image_mean,
        script.image_std,
    )
    recipe, preset = _recipe_name(script, student), None
    provenance = recipes.provenance(recipe, config, script.explicit)
    if recipe:
        student = _with_recipe(student, recipe, script.explicit)
        config, changed = recipes.apply(recipe, config, script.explicit)
    asked = run_configs(script, config, recipe)
    if recipe:
        text = recipes.describe(recipe, changed, [(name, run) for name, _, run in asked], script.benchmark)
        preset = {"name": recipe, "source": recipes.load(recipe).source, "changed": changed, "text": text}
    source = _data_source(script, config, earlier)
    data = load_data(**data_arguments(source))
    teacher, teacher_size = None, 0
    if script.teacher:
        commit = _commit("teacher", script, earlier)
        teacher = ModelSource(
            script.teacher, script.teacher_revision, commit, script.trust_remote_code, class_map=script.class_map
        )
        teacher = dataclasses.replace(teacher, seen_evaluation_images=_seen(teacher, data))
        teacher_size = max(_check_teacher(teacher, data.names))
    model, student_size = _blank_student(student, data.names)
    size = config.train_image_size or max(teacher_size, *student_size)
    found: dict[str, Any] = {"image_column": data.image_column, "label_column": data.label_column}
    found["train_image_size"] = size
    runs = tuple(
        run_spec(dataclasses.replace(run, **found), name, folder, loss_source(run.loss)) for name, folder, run in asked
    )
    experiment = Experiment(
        output_dir=config.output_dir,
        student=student,
        teacher=teacher,
        data=dataclasses.replace(source, **_facts(data)),
        train_image_size=size,
        runs=runs,
        preset=preset,
        provenance=provenance,
        command=_pinned(command, student, teacher, source),
        push=push,
        requirements=_requirements(runs, model, len(data.train)),
        versions=collect_versions(),
    )
    return Experiment.from_dict(experiment.to_dict())  # JSON types, as those that are read from plan.json


def resumes(config: DistillationConfig) -> bool | str:
    """`--resume_from_checkpoint`: True for "last" (or "true"), the path of a checkpoint, or False."""
    value = config.resume_from_checkpoint
    return True if str(value).lower() in ("true", "last") else value or False


def default_name(script, config: DistillationConfig) -> str:
    """`STUDENT-LOSS-DATASET`, from the last part of each id."""
    what = "compare" if script.compare else config.loss_class().name
    return "-".join([Path(script.student).name, what, Path(script.dataset).name])


def _push_target(script, config: DistillationConfig) -> dict | None:
    """Where the student of the first seed is pushed to; whether that is allowed is asked now, before training."""
    if not config.push_to_hub:
        return None
    private, folder = config.hub_private_repo, config.output_dir
    repo_id = check_push(config.hub_model_id, config.hub_token, private=private, folder=folder)
    several = [config.loss_class().name, *([f"seed-{(script.seeds or [config.seed])[0]}"] if script.verdict else [])]
    folder = os.path.join(*several) if script.verdict else "."
    return {"repo_id": repo_id, "private": private, "revision": config.hub_revision, "folder": folder}


def _pinned(command: str | None, *sources: ModelSource | DataSource | None) -> str | None:
    """The command with the commits that its revisions stood for."""
    if not command:
        return None
    pairs = zip(("student", "teacher", "dataset"), sources, strict=True)
    return command + "".join(
        f" --{key}_revision {source.commit}"
        for key, source in pairs
        if source and source.commit not in (None, source.revision)
    )


def _commit(key: str, script, earlier: Experiment | None) -> str | None:
    """The commit that a revision stands for: that of the plan in the folder, which is continued, or today's."""
    name, revision = getattr(script, key), getattr(script, f"{key}_revision")
    built = key == "student" and script.from_scratch and name.startswith("timm/")
    on_hub = name and re.fullmatch(r"\w[\w.-]*/[\w.-]+(?<!\.parquet)", name) and not os.path.exists(name)
    if not on_hub or built or bundled(name):
        return None
    before = getattr(earlier, {"dataset": "data"}.get(key, key), None)
    if before is not None and (before.id, before.revision) == (name, revision):
        return before.commit
    return hub.resolve(name, revision, "dataset" if key == "dataset" else "model").resolved


def _recipe_name(script, student: ModelSource) -> str | None:
    """The recipe that fills in what the user does not set; None for none."""
    if script.preset == "none":
        return None
    if script.preset != "auto":
        return script.preset
    options = _hub_options(student)
    config = student_config(student.id, student.from_scratch, student.image_size, options)
    return recipes.choose(model_family(config, student.trust_remote_code), student.from_scratch, script.dataset)


def _with_recipe(student: ModelSource, recipe: str, explicit: set[str]) -> ModelSource:
    values = {key: value for key, value in recipes.load(recipe).student.items() if key not in explicit}
    return dataclasses.replace(student, **values)


def _data_source(script, config: DistillationConfig, earlier: Experiment | None) -> DataSource:
    return DataSource(
        id=script.dataset,
        config_name=script.dataset_config,
        revision=script.dataset_revision,
        commit=_commit("dataset", script, earlier),
        train_split=script.train_split,
        eval_split=script.eval_split,
        eval_fraction=script.eval_fraction,
        image_column=config.image_column,
        label_column=config.label_column,
        max_train_samples=script.max_train_samples,
        max_eval_samples=script.max_eval_samples,
    )


def data_arguments(source: DataSource) -> dict:
    """The arguments of `load_data` that give the data of a plan."""
    keys = "config_name train_split eval_split image_column label_column max_train_samples max_eval_samples".split()
    values = {key: getattr(source, key) for key in keys}
    if source.eval_fraction is not None:
        values["eval_fraction"] = source.eval_fraction
    return {"name": source.id, "revision": source.commit or source.revision, **values}


def _facts(data: ImageData) -> dict:
    known = {f.name for f in dataclasses.fields(DataSource)} - {"id", "config_name", "revision"}
    described = {key: value for key, value in data.describe().items() if key in known}
    return described | {
        "classes": data.names,
        "image_column": data.image_column,
        "label_column": data.label_column,
    }


def _hub_options(source: ModelSource) -> dict:
    return {"revision": source.commit or source.revision, "trust_remote_code": source.trust_remote_code}


def _blank_student(source: ModelSource, names: list[str]) -> tuple[torch.nn.Module, tuple[int, int]]:
    """The student without memory for its weights, and the size of its input."""
    options = _hub_options(source)
    config = student_config(source.id, source.from_scratch, source.image_size, options)
    config.num_labels = len(names)
    with torch.device("meta"):
        model = build(config, source.trust_remote_code)
    processor = processor_for(SimpleNamespace(config=config), source.id, options)
    processor = adjust_processor(processor, source.image_size, source.image_mean, source.image_std)
    return model, Preprocessing(processor).size


def _check_teacher(source: ModelSource, names: list[str]) -> tuple[int, int]:
    """The size of the teacher's input. Raises ValueError for classes that are not those of the data."""
    options = _hub_options(source)
    config = load_config(source.id, options)
    ClassMapping.between(config.id2label, names, source.class_map)
    return Preprocessing(processor_for(SimpleNamespace(config=config), source.id, options)).size


def _seen(teacher: ModelSource, data: ImageData) -> int | None:
    """How many of our evaluation images the teacher was trained on; None if its record does not tell."""
    try:
        file = Path(teacher.id, RUN_FILE)
        if teacher.commit:
            file = Path(hf_hub_download(teacher.id, RUN_FILE, revision=teacher.commit))
        seen = overlap(data.describe(), json.loads(file.read_text("utf-8"))["plan"]["data"])
    except (OSError, ValueError, KeyError, TypeError):  # no record, or none of this version
        return None
    if seen:
        logger.warning(
            f"teacher {teacher.id} was trained on {seen} of the {len(data.eval)} images that are evaluated on: its "
            "own accuracy, and what the student learns from it, look better than they are. Train it on this training "
            "split, or evaluate on another one with --eval_split."
        )
    return seen


def _requirements(runs: tuple[RunSpec, ...], model: torch.nn.Module, train_size: int) -> dict:
    parameters = sum(p.numel() for p in model.parameters())
    run = runs[0]
    batch = run.settings["per_device_train_batch_size"]
    micro_batches = math.ceil(math.ceil(train_size / run.processes) / batch)
    each = max(1, math.ceil(micro_batches / run.settings["gradient_accumulation_steps"]))
    steps = run.schedule.max_steps if run.schedule.max_steps > 0 else math.ceil(each * run.schedule.num_train_epochs)
    # Weights and optimizer state in float32; of most optimizers the state is twice the size of the weights.
    states = 1 if run.settings["optim"].startswith(("sgd", "lion")) else 2
    tensors = sum(_kept(run, steps, each) * (1 + states) + 1 for run in runs)
    return {"steps": steps, "parameters": parameters, "disk_bytes": 4 * parameters * tensors}


def _kept(run: RunSpec, steps: int, each: int) -> int:
    """How many checkpoints a run has on the disk at most."""
    how = run.execution
    if how.save_strategy == "no":
        return 0
    every = each if how.save_strategy == "epoch" else how.save_steps if how.save_steps >= 1 else how.save_steps * steps
    saves = max(1, int(steps / max(every, 1)))
    best = run.settings.get("load_best_model_at_end") or how.save_strategy == "best"
    return min(saves, (how.save_total_limit or saves) + 1 + bool(best))
