"""Recipes: settings for what the user does not set, one YAML file each.

The hyperparameters of a loss are not in it: they are the loss class's published ones for the recipe's benchmark.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:  # the names of the recipes are part of the help, which needs no torch
    from ..config import DistillationConfig

# What every recipe sets, and thus what is known before one is chosen.
EVERY_EPOCH = {"eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 1}
# The families (see `model_family`) that the recipes with SGD are for: convolutions with batch norm, and BiT. All
# others get AdamW, which trains networks with attention, token mixing or layer norm, and is safer for unknown ones.
SGD_FAMILIES = frozenset(
    """bit byobnet cifar_network cspnet densenet dla dpn efficientnet ghostnet hardcorenas hgnet hgnet_v2 hrnet
    inception_resnet_v2 inception_v3 inception_v4 lcnetv2 mobilenet_v1 mobilenet_v2 mobilenetv3 nasnet pnasnet pp_lcnet
    regnet repghost res2net resnest resnet resnetv2 rexnet selecsls senet sknet tresnet vgg vovnet xception
    xception_aligned""".split()
)


@dataclass(frozen=True)
class Recipe:
    """Settings that belong together."""

    name: str  # of its file, without .yaml
    source: str  # where it comes from, in words
    benchmark: str  # whose published hyperparameters the losses start from
    global_batch_size: int  # images in one optimizer step, over all processes
    settings: dict[str, Any]  # of `DistillationConfig`
    student: dict[str, Any] = field(default_factory=dict)  # arguments of `load_student`
    deviations: list[str] = field(default_factory=list)  # what differs from the paper's own training


def names() -> list[str]:
    return sorted(file.stem for file in Path(__file__).parent.glob("*.yaml"))


@cache
def load(name: str) -> Recipe:
    """The recipe of that name. Raises ValueError if there is none."""
    if name not in names():
        raise ValueError(f"--preset {name} is unknown; there are: {', '.join(names())}.")
    text = Path(__file__).with_name(f"{name}.yaml").read_text("utf-8")
    return Recipe(name=name, **yaml.safe_load(text))


def choose(family: str, from_scratch: bool, dataset: str) -> str:
    """The name of the recipe for a student's family (see `model_family`), its start, and the dataset."""
    kind = "cnn" if family in SGD_FAMILIES else "vit"
    if not from_scratch:
        return f"{kind}_finetune"
    if family == "cifar_network":
        return "cifar_crd"
    cifar = kind == "cnn" and "cifar" in Path(dataset).name.lower()
    return "cnn_scratch_cifar" if cifar else f"{kind}_scratch"


def published_hyperparameters(loss: str, recipe: str) -> tuple[dict[str, Any], str | None]:
    """A loss's published hyperparameters for a recipe's benchmark, and which that is: {} and None without any.

    "imagenet_deit" falls back to "imagenet", for losses with one set for both.
    """
    from ..losses import loss_class, named_settings

    published, benchmark = loss_class(loss).published, load(recipe).benchmark
    for key in (benchmark, benchmark.split("_")[0]):
        if key in published:
            return published[key] | named_settings(loss), key
    return {}, None


def apply(name: str, config: DistillationConfig, explicit: set[str]) -> tuple[DistillationConfig, list[str]]:
    """The config with a recipe's values for all that is not `explicit` (set by the user), and which of them were.

    The global batch size is reached by accumulating micro-batches of at most 128 images a process, or of the size or
    number that is explicit; USKD's batch statistic is that of a micro-batch.
    """
    values = _settings(name, config, explicit)
    changed = sorted({*values, *load(name).student, "loss_kwargs"} & explicit)
    new = {key: value for key, value in values.items() if key not in explicit}
    return dataclasses.replace(config, **new), changed


def _settings(name: str, config: DistillationConfig, explicit: set[str]) -> dict[str, Any]:
    """The recipe's settings, made to fit the explicit ones."""
    recipe = load(name)
    values = {**EVERY_EPOCH, **recipe.settings, "dataloader_num_workers": min(4, os.cpu_count() or 1)}
    per_process = math.ceil(recipe.global_batch_size / config.world_size)
    largest = config.per_device_train_batch_size if "per_device_train_batch_size" in explicit else 128
    steps = math.ceil(per_process / largest)
    if "gradient_accumulation_steps" in explicit:
        steps = config.gradient_accumulation_steps
    values |= {"gradient_accumulation_steps": steps, "per_device_train_batch_size": max(1, per_process // steps)}
    if "lr_step_epochs" in explicit:
        values["warmup_steps"] = 0
    elif "lr_step_epochs" in values:  # a shorter run keeps the schedule's shape
        share = config.num_train_epochs / values["num_train_epochs"] if "num_train_epochs" in explicit else 1
        values["lr_step_epochs"] = [share * epoch for epoch in values["lr_step_epochs"]]
        if {"lr_scheduler_type", "max_steps", "warmup_steps"} & explicit:  # which steps do not go with
            del values["lr_step_epochs"]
            values["lr_scheduler_type"] = "cosine"
    return values


def provenance(name: str | None, config: DistillationConfig, explicit: set[str]) -> dict[str, str]:
    """Where each setting that a recipe (if there is one) or the user has set came from: "you" or "preset NAME"."""
    values = {**_settings(name, config, explicit), **load(name).student} if name else {}
    return {key: "you" if key in explicit else f"preset {name}" for key in sorted({*values, *explicit})}


def describe(name: str, changed: list[str], runs: dict[str, DistillationConfig], why: str = "") -> dict[str, Any]:
    """What plan and record say of a recipe, from `changed` (see `apply`), the arguments of a run with each loss, and
    why it was chosen."""
    source, deviations = load(name).source, load(name).deviations
    text = f"preset {name}{why}: {source}."
    for run, config in runs.items():
        published, found = published_hyperparameters(config.loss, name)
        values = config.loss_kwargs or {}
        kept = [f"{key} {value:g}" for key, value in values.items() if published.get(key) == value]
        if kept:
            text += f" {run}: {', '.join(kept)} (published for {found})."
    if changed:
        text += f" Not from it, but as you set them: {', '.join(changed)}."
    text += " (--preset none: without.)"
    return {"name": name, "source": source, "changed": changed, "deviations": deviations, "text": text}
