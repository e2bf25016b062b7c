"""Whole checkpoints, and nothing lost on the way: what is complete, what is loaded, and what Ctrl-C does."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from .hub import is_disk_full
from .models.features import HEAD
from .models.preprocessing import Preprocessing

logger = logging.get_logger(__name__)

HEAD_FILE = "aux_head.safetensors"
_TIMM_DATA = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest complete checkpoint in a folder, or None. One that a kill cut off in writing does not count."""

    def complete(folder: Path) -> bool:
        try:  # written last
            json.loads((folder / TRAINER_STATE_NAME).read_text())
        except (OSError, ValueError):
            return False
        return True

    folders = [f for f in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if f.name.split("-")[-1].isdigit()]
    for folder in sorted(folders, key=lambda f: int(f.name.split("-")[-1]), reverse=True):
        if complete(folder):
            return str(folder)
        logger.warning(f"{folder} is incomplete (the run was cut off while it was written): trying an earlier one.")
    return None


def save_head(student: nn.Module, folder: str | os.PathLike) -> None:
    """Write the auxiliary head beside a checkpoint's model, which does not contain it."""
    head = getattr(student, HEAD, None)
    if head is not None:
        save_file({k: v.contiguous() for k, v in head.state_dict().items()}, os.path.join(folder, HEAD_FILE))


def check_finite(student: nn.Module, output_dir: str, step: int) -> None:
    """Raises FloatingPointError for weights that are not finite, lest they replace the last good ones."""
    bad = [name for name, p in student.named_parameters() if not torch.isfinite(p).all()]
    if bad:
        raise FloatingPointError(
            f"{len(bad)} weights are not finite at step {step}: {bad[:5]}. "
            f"Last checkpoint: {last_checkpoint(output_dir)}."
        )


def weights_to_save(student: nn.Module, processor, state_dict: dict | None = None) -> dict | None:
    """The weights of a plain model, without the auxiliary head; None where save_pretrained knows them by itself.

    Of a timm student, weights and config are made such that timm and transformers both load what is saved. Left
    alone, neither loads the other's: transformers writes the names of the weights under `timm_model.`, and a config
    that lacks what timm builds the model from; timm writes the count of classes where transformers adds its own.

    Args:
        student: if it is a TimmWrapper, its config is changed.
        processor: its image processor, or None for the preprocessing of its config, or of its architecture.
        state_dict: the weights, where they have been gathered already.
    """
    if not isinstance(student, PreTrainedModel) and state_dict is None:
        return {name: value for name, value in student.state_dict().items() if not name.startswith(f"{HEAD}.")}
    if not hasattr(student, "timm_model"):
        return state_dict
    config, architecture = student.config, student.timm_model.pretrained_cfg
    data = _timm_data(processor) if processor is not None else getattr(config, "pretrained_cfg", None) or architecture
    # Not licence, tag and address: those are of the weights that the student started from, or not even of them.
    known = {key: architecture.get(key) for key in ("fixed_input_size", "first_conv", "classifier")}
    config.pretrained_cfg = known | {key: value for key, value in data.items() if key in _TIMM_DATA}
    config.model_args = config.model_args or {}
    config.label_names = [config.id2label[i] for i in range(config.num_labels)]
    state_dict = student.state_dict() if state_dict is None else state_dict
    return {name.removeprefix("timm_model."): value for name, value in state_dict.items()}


def _timm_data(processor) -> dict:
    """timm's description of an image processor's preprocessing."""
    if hasattr(processor, "data_config"):
        return processor.data_config
    preprocessing, size = Preprocessing(processor), dict(getattr(processor, "size", None) or {})
    edge = size.get("shortest_edge") or size.get("height")
    return {
        "input_size": (3, *preprocessing.size),
        "mean": (-preprocessing.offset / preprocessing.scale).flatten().tolist(),
        "std": (1 / preprocessing.scale).flatten().tolist(),
        "interpolation": preprocessing.interpolation.value,
        "crop_pct": preprocessing.size[0] / edge if getattr(processor, "do_center_crop", False) else 1.0,
        "crop_mode": "center" if size.get("shortest_edge") else "squash",
    }


def load_weights(student: nn.Module, folder: str | os.PathLike) -> None:
    """Put a checkpoint's weights into a student, every one of them.

    Saving converts the key names of ViT, DeiT and Swin, and the trainer loads them as they are with strict=False,
    which loses them without an error. Here they pass through the model's own from_pretrained.

    Raises:
        ValueError: if a weight of the student is not in the checkpoint; with the names.
    """
    if isinstance(student, PreTrainedModel):
        config = copy.deepcopy(student.config)
        loaded, info = type(student).from_pretrained(
            folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True
        )
        state = loaded.state_dict()
        missing = set(info["missing_keys"]) | {str(key) for key in info["mismatched_keys"]}
    else:
        state, missing = load_file(os.path.join(folder, SAFE_WEIGHTS_NAME)), set()
    result = student.load_state_dict(state, strict=False)
    missing |= {k for k in result.missing_keys if not k.startswith(f"{HEAD}.")}
    if missing or result.unexpected_keys:
        raise ValueError(
            f"checkpoint {folder} does not fit the student: missing {sorted(missing)[:8]}, "
            f"unexpected {result.unexpected_keys[:8]}."
        )
    head, file = getattr(student, HEAD, None), os.path.join(folder, HEAD_FILE)
    if head is not None:
        if not os.path.isfile(file):
            raise ValueError(f"checkpoint {folder} has no {HEAD_FILE}: its run had no auxiliary head.")
        head.load_state_dict(load_file(file))


@contextlib.contextmanager
def full_disk_named(folder: str | os.PathLike):
    """Raises an OSError with the folder for a full disk, which the writers of weights and optimizers don't name."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(folder)) from error
