"""Training of the classification head alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..adapters import is_adapter
from .loading import head_layers


def freeze_backbone(student: Any) -> None:
    """Freezes all weights of a student but those of its classification head. ValueError if it has none to be found."""
    layers = head_layers(student) if hasattr(student, "config") and not is_adapter(student) else []
    head = {id(parameter) for layer in layers for parameter in layer.parameters()}
    if not head:
        raise ValueError(
            f"freeze_backbone: no classification head is found in {type(student).__name__}. It needs a classifier of "
            "transformers or timm, and no adapter; freeze others by requires_grad_(False)."
        )
    for parameter in student.parameters():
        if id(parameter) not in head:
            parameter.requires_grad_(False)


def hold_statistics(student: nn.Module) -> None:
    """Keeps batch norms in eval mode, in a student that is in training mode: their statistics are frozen too."""
    for module in student.modules():
        if getattr(module, "running_mean", None) is not None:
            module.eval()
