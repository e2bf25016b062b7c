"""A plan in words, for the terminal."""

import dataclasses

from ..reporting.controls import describe_control
from ..spec import Experiment


def introduction(experiment: Experiment) -> str:
    """What is printed before training: the recipe in use and where its values come from."""
    without = f"{len(experiment.runs)} run(s), see plan.json in {experiment.output_dir}"
    return (experiment.preset or {}).get("text", without)


def summary(experiment: Experiment) -> str:
    """The whole plan: runs, steps, sizes, classes, splits, disk space, and what was set by whom."""
    data, needs, first = experiment.data, experiment.requirements or {}, experiment.runs[0]
    evaluated = str(data.eval_split)
    if data.eval_fraction is not None:
        evaluated = f"{data.eval_fraction:g} of {evaluated}, held out"
    names = data.classes or []
    shown = ", ".join([*names[:5], *(["…"] if len(names) > 5 else [])])
    batch = first.settings["per_device_train_batch_size"] * first.settings["gradient_accumulation_steps"]
    lines = [
        f"student   {experiment.student}, {needs.get('parameters', 0):,} parameters",
        f"teacher   {experiment.teacher or 'none'}",
        f"dataset   {data}: {data.train_size:,} images to train on ({data.train_split}), "
        f"{data.eval_size:,} to evaluate on ({evaluated}), {len(names)} classes: {shown}",
        f"images    {experiment.train_image_size} px in training",
        f"training  {needs.get('steps', 0):,} steps a run of {batch * first.processes} images, "
        f"{first.processes} process(es)",
        f"output    {experiment.output_dir}, up to {needs.get('disk_bytes', 0) / 1e9:.2f} GB",
        f"runs      {len(experiment.runs)}",
    ]
    for run in experiment.runs:
        values = ", ".join(f"{key} {value}" for key, value in run.loss.hyperparameters.items())
        lines.append(f"  {run.key}: {run.loss.name}{f' ({values})' if values else ''} in {run.folder}")
        if control := experiment.control(run):
            measured = "" if control.get("ratio", True) else "; how many is to be measured"
            lines[-1] += f"; control: {describe_control(control)}{measured}"
    preset = experiment.preset or {}
    lines += [*_provenance(experiment), preset.get("text", "")]
    if preset.get("deviations"):
        lines.append(f"differs from the paper: {'; '.join(preset['deviations'])}")
    lines.append("dry run: nothing was written.")
    return "\n".join(filter(None, lines))


def _provenance(experiment: Experiment) -> list[str]:
    """A line for each source of settings, with the values in use."""
    run = experiment.runs[0]
    values = {**dataclasses.asdict(experiment.student), **dataclasses.asdict(experiment.data), **run.arguments()}
    by_source: dict[str, list[str]] = {}
    for key, source in (experiment.provenance or {}).items():
        if key in values:
            by_source.setdefault(source, []).append(f"{key} {values[key]}")
    return [f"set by {source}: {', '.join(settings)}" for source, settings in sorted(by_source.items())]
