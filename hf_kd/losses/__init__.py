"""Losses: each a pure function, and a module with its hyperparameters, description and published values."""

from .base import DistillationLoss, Progress
from .ce import CELoss, ce_loss
from .kd import KDLoss, kd_loss
from .lookup import LOSSES, get_loss, loss_class, loss_source
from .nkd import NKDLoss, nkd_loss
from .uskd import USKDLoss, uskd_loss

__all__ = [
    "LOSSES", "CELoss", "DistillationLoss", "KDLoss", "NKDLoss", "Progress", "USKDLoss", "ce_loss", "get_loss",
    "kd_loss", "loss_class", "loss_source", "nkd_loss", "uskd_loss",
]  # fmt: skip
