"""A plan in words, for the terminal."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..spec import DataSource, Experiment, ModelSource
from .folder import GIGABYTE


def introduction(experiment: Experiment) -> str:
    """What is printed before training: the recipe in use and where its values come from."""
    return _recipe(experiment) or f"{len(experiment.runs)} run(s), see plan.json in {experiment.output_dir}"


def summary(experiment: Experiment) -> str:
    """The whole plan: runs, steps, sizes, classes, splits, disk space, and what was set by whom."""
    data, needs = experiment.data, experiment.requirements or {}
    names = data.classes or []
    lines = [
        f"student   {_source(experiment.student)}, {needs.get('parameters', 0):,} parameters",
        f"teacher   {_source(experiment.teacher) if experiment.teacher else 'none'}",
        f"dataset   {_source(data)}: {data.train_size:,} images to train on ({data.train_split}), "
        f"{data.eval_size:,} to evaluate on ({_evaluation(data)}), {len(names)} classes: "
        f"{', '.join(names[:5])}{', …' if len(names) > 5 else ''}",
        f"images    {experiment.train_image_size} px in training",
    ]
    first = experiment.runs[0]
    batch = first.settings["per_device_train_batch_size"] * first.settings["gradient_accumulation_steps"]
    lines.append(
        f"training  {needs.get('steps', 0):,} steps a run of {batch * first.processes} images, "
        f"{first.processes} process(es)"
    )
    lines.append(f"output    {experiment.output_dir}, up to {needs.get('disk_bytes', 0) / GIGABYTE:.2f} GB")
    lines.append(f"runs      {len(experiment.runs)}")
    for run in experiment.runs:
        values = ", ".join(f"{key} {value}" for key, value in run.loss.hyperparameters.items())
        lines.append(f"  {run.key}: {run.loss.name}{f' ({values})' if values else ''} in {Path(run.folder)}")
    lines += _provenance(experiment)
    recipe = _recipe(experiment)
    return "\n".join(lines + ([recipe] if recipe else []) + ["dry run: nothing was written."])


def _provenance(experiment: Experiment) -> list[str]:
    """A line for each source of settings, with the values in use."""
    run = experiment.runs[0]
    values = {**dataclasses.asdict(experiment.student), **dataclasses.asdict(experiment.data), **run.arguments()}
    by_source: dict[str, list[str]] = {}
    for key, source in (experiment.provenance or {}).items():
        if key in values:
            by_source.setdefault(source, []).append(f"{key} {values[key]}")
    return [f"set by {source}: {', '.join(settings)}" for source, settings in sorted(by_source.items())]


def _recipe(experiment: Experiment) -> str:
    return (experiment.preset or {}).get("text", "")


def _source(source: ModelSource | DataSource) -> str:
    revision = source.commit or source.revision
    scratch = dataclasses.asdict(source).get("from_scratch")
    return f"{source.id}{f' at {revision[:12]}' if revision else ''}{', from scratch' if scratch else ''}"


def _evaluation(data: DataSource) -> str:
    if data.eval_fraction is None:
        return str(data.eval_split)
    return f"{data.eval_fraction:g} of {data.eval_split}, held out"
