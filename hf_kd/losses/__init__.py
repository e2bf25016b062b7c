"""Losses: each a pure function, and a module with its numbers, citation and presets."""

import difflib
import inspect
from typing import Any

from .base import DistillationLoss
from .ce import CELoss, ce_loss
from .kd import KDLoss, kd_loss
from .nkd import NKDLoss, nkd_loss
from .uskd import USKDLoss, uskd_loss

LOSSES: dict[str, type[DistillationLoss]] = {"ce": CELoss, "kd": KDLoss, "nkd": NKDLoss, "uskd": USKDLoss}


def get_loss(name: str, **kwargs: Any) -> DistillationLoss:
    """Build the loss `name`, a key of `LOSSES`, with its constructor's arguments.

    Raises:
        ValueError: unknown name (the nearest are named), unknown argument, or a number out of its range.
    """
    if name not in LOSSES:
        near = difflib.get_close_matches(str(name).lower(), LOSSES, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown loss {name!r}: {hint}pass one of {', '.join(LOSSES)}")
    accepted = inspect.signature(LOSSES[name]).parameters
    unknown = [key for key in kwargs if key not in accepted]
    if unknown:
        key = unknown[0]
        raise ValueError(f"{name} takes no argument {key}={kwargs[key]!r}: it accepts {', '.join(accepted)}")
    return LOSSES[name](**kwargs)


def loss_source(name):
    return None


__all__ = [
    "LOSSES",
    "CELoss",
    "DistillationLoss",
    "KDLoss",
    "NKDLoss",
    "USKDLoss",
    "ce_loss",
    "get_loss",
    "kd_loss",
    "nkd_loss",
    "uskd_loss",
]
