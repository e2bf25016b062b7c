"""Running a classifier whose output may be of any type."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def in_eval_mode(model: nn.Module):
    """Every module is in eval mode within, and in the mode in which it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield model.eval()
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def dry_run(model: nn.Module, size: tuple[int, int]) -> torch.Tensor:
    """The logits (1, C) of an image of stripes in eval mode; every module's mode is left as it was."""
    parameter = next(model.parameters())
    image = torch.linspace(-2, 2, size[1]).sin().repeat(1, 3, size[0], 1)
    with in_eval_mode(model):
        return logits_of(model(image.to(device=parameter.device, dtype=parameter.dtype)))


def tensor_of(output) -> torch.Tensor:
    """The main tensor of a module's output: itself, or the first of a tuple or ModelOutput."""
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return output


def logits_of(output) -> torch.Tensor:
    """The logits (B, C) of a classifier's output: those called so, or else (as of PP-LCNet) the first tensor; of two
    heads their mean."""
    logits = output["logits"] if isinstance(output, dict) and "logits" in output else tensor_of(output)
    return (logits[0] + logits[1]) / 2 if isinstance(logits, tuple) else logits


def logits_by_head(output) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The logits (B, C) of the class head and of the distillation head, None where an output has the mean only."""
    if not isinstance(output, dict):
        return None, None
    if isinstance(output.get("logits"), tuple):  # of timm in distilled training
        return output["logits"]
    return output.get("cls_logits"), output.get("distillation_logits")


def id2label_of(model: nn.Module) -> dict[int, str] | None:
    """The class names in a model's config; None without a config."""
    id2label = getattr(getattr(model, "config", None), "id2label", None)
    return id2label and {int(i): str(name) for i, name in id2label.items()}


def num_classes_of(student: Any) -> int:
    """The number of classes C in a student's config; ValueError if it has none."""
    if getattr(student, "config", None) is None:
        raise ValueError(f"the student ({type(student).__name__}) needs a config with num_labels and id2label.")
    return student.config.num_labels
