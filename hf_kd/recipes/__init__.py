"""Settings for a student nobody has set anything for, by its kind, by whether it is pretrained, and by the loss."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import DistillationConfig
from ..losses import loss_class

PAPER = "arXiv 2303.13005"
EVERY_EPOCH = {"eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 1, "logging_steps": 50}
_DEIT = {
    "augment": "deit",
    "mixup_alpha": 0.8,
    "cutmix_alpha": 1.0,
    "label_smoothing_factor": 0.1,
    "optim": "adamw_torch",
    "weight_decay": 0.05,
    "max_grad_norm": 5.0,
    "lr_scheduler_type": "cosine",
}
_SGD = {"optim": "sgd", "optim_args": "momentum=0.9", "max_grad_norm": 0.0}


@dataclass(frozen=True)
class Preset:
    """A recipe.

    Attributes:
        source: where it comes from, in words.
        batch: images in one optimizer step, over all processes.
        values: settings of `DistillationConfig`.
        student: arguments of `load_student`.
    """

    source: str
    batch: int
    values: dict[str, Any]
    student: dict[str, Any] = field(default_factory=dict)


PRESETS = {
    "vit_scratch": Preset(
        f"how {PAPER} trains ViTs on ImageNet: after DeiT (arXiv 2012.12877), here without its repeated augmentation "
        "and stochastic depth",
        1024,
        {**_DEIT, "learning_rate": 1e-3, "num_train_epochs": 300, "warmup_steps": 20 / 300},
    ),
    "vit_finetune": Preset(
        f"augmentation, regularisation and optimizer as {PAPER} trains ViTs; learning rate and epochs for pretrained "
        "weights are hf_kd's own",
        128,
        {**_DEIT, "learning_rate": 1e-4, "num_train_epochs": 30, "warmup_steps": 0.05},
    ),
    "cnn_scratch": Preset(
        f"how {PAPER} trains CNNs on ImageNet",
        256,
        {
            **_SGD,
            "lr_scheduler_type": "constant",
            "augment": "resized_crop",
            "learning_rate": 0.1,
            "weight_decay": 1e-4,
            "num_train_epochs": 100,
            "lr_step_epochs": [30, 60, 90],
            "lr_step_factor": 0.1,
        },
    ),
    "cnn_scratch_cifar": Preset(
        f"how {PAPER} trains CNNs on CIFAR-100; at 128 px a standard ResNet has the feature maps of CIFAR's at 32",
        128,
        {
            **_SGD,
            "lr_scheduler_type": "constant",
            "augment": "pad_crop",
            "learning_rate": 0.1,
            "weight_decay": 5e-4,
            "num_train_epochs": 200,
            "lr_step_epochs": [60, 120, 160],
            "lr_step_factor": 0.2,
        },
        {
            "image_size": 128,
            "image_mean": [0.50707, 0.48655, 0.44092],
            "image_std": [0.26733, 0.25644, 0.27615],
        },
    ),
    "cnn_finetune": Preset(
        f"hf_kd's own, for pretrained weights; optimizer as {PAPER} trains CNNs",
        128,
        {
            **_SGD,
            "augment": "resized_crop",
            "learning_rate": 0.01,
            "weight_decay": 1e-4,
            "num_train_epochs": 30,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.05,
        },
    ),
}


def choose(kind: str, from_scratch: bool, dataset: str) -> str:
    """The name of the preset for a student's kind ("vit" or "cnn"), its start, and the data."""
    if not from_scratch:
        return f"{kind}_finetune"
    cifar = kind == "cnn" and "cifar" in Path(dataset).name.lower()
    return "cnn_scratch_cifar" if cifar else f"{kind}_scratch"


def published_hyperparameters(loss: str, name: str) -> tuple[dict[str, Any], str]:
    """A loss's published numbers that belong to a preset, and the benchmark that they were published for."""
    published = loss_class(loss).published
    wanted = ("imagenet_deit", "imagenet") if name.startswith("vit") else ("imagenet",)
    wanted = ("cifar100",) if name.endswith("cifar") else wanted
    benchmark = next((key for key in wanted if key in published), "")
    return dict(published.get(benchmark, {})), benchmark


def apply(name: str, config: DistillationConfig, given: set[str]) -> tuple[DistillationConfig, list[str]]:
    """The config with a preset's values wherever `given` does not name the setting, and what of it was given.

    The batch is reached by accumulating micro-batches of at most 128 images a process, or of the size or number
    that is given; USKD's batch statistic is that of a micro-batch.

    Raises:
        ValueError: a batch size or a number of accumulation steps below 1.
    """
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if getattr(config, key) < 1:
            raise ValueError(f"{key}={getattr(config, key)} must be at least 1.")
    preset = PRESETS[name]
    values = {**EVERY_EPOCH, **preset.values, "dataloader_num_workers": min(4, os.cpu_count() or 1)}
    each = math.ceil(preset.batch / config.world_size)
    most = config.per_device_train_batch_size if "per_device_train_batch_size" in given else 128
    steps = math.ceil(each / most)
    steps = config.gradient_accumulation_steps if "gradient_accumulation_steps" in given else steps
    values |= {"gradient_accumulation_steps": steps, "per_device_train_batch_size": max(1, each // steps)}
    if "lr_step_epochs" in given:
        values["warmup_steps"] = 0
    elif "lr_step_epochs" in values:  # a shorter run keeps the schedule's shape
        share = config.num_train_epochs / values["num_train_epochs"] if "num_train_epochs" in given else 1
        values["lr_step_epochs"] = [share * epoch for epoch in values["lr_step_epochs"]]
        if {"lr_scheduler_type", "max_steps", "warmup_steps"} & given:  # which steps do not go with
            del values["lr_step_epochs"]
            values["lr_scheduler_type"] = "cosine"
    changed = sorted({*values, *preset.student, "loss_kwargs"} & given)
    return dataclasses.replace(config, **{k: v for k, v in values.items() if k not in given}), changed


def describe(name: str, changed: list[str], arms: list[tuple[str, DistillationConfig]]) -> str:
    """One line: the preset, where it and the losses' numbers come from, and what is not from there."""
    text = f"preset {name}: {PRESETS[name].source}."
    for arm, config in dict(arms).items():
        published, benchmark = published_hyperparameters(config.loss, name)
        kept = [f"{key} {value:g}" for key, value in published.items() if config.loss_kwargs.get(key) == value]
        if kept:
            text += f" {arm}: {', '.join(kept)} (published for {benchmark})."
    if changed:
        text += f" Not from it, but as you set them: {', '.join(changed)}."
    return f"{text} (--preset none: without.)"


def load(name):
    return PRESETS[name]
