"""Losses: each a pure function, and a module with its hyperparameters, description and published values."""

from .base import DistillationLoss, Progress
from .ce import CELoss, ce_loss
from .dist import DISTLoss, dist_loss
from .distributed import mean_over_ranks
from .dkd import DKDLoss, dkd_loss
from .hard import HardLoss, hard_loss
from .kd import KDLoss, kd_loss
from .lookup import LOSSES, SETTINGS, get_loss, loss_class, loss_source, named_settings
from .nkd import NKDLoss, nkd_loss
from .standardize import standardize_logits
from .tf_kd import TfKDLoss, tf_kd_loss
from .uskd import USKDLoss, uskd_loss
from .wttm import WTTMLoss, wttm_loss

__all__ = [
    "LOSSES", "SETTINGS", "CELoss", "DISTLoss", "DKDLoss", "DistillationLoss", "HardLoss", "KDLoss", "NKDLoss",
    "Progress", "TfKDLoss", "USKDLoss", "WTTMLoss", "ce_loss", "dist_loss", "dkd_loss", "get_loss", "hard_loss",
    "kd_loss", "loss_class", "loss_source", "mean_over_ranks", "named_settings", "nkd_loss",
    "standardize_logits", "tf_kd_loss", "uskd_loss", "wttm_loss",
]  # fmt: skip
