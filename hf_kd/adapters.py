"""Students that are adapters of PEFT, such as LoRA: only the adapter is trained, and only it is in checkpoints."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

ADAPTER_FILE = "adapter_model.safetensors"


def is_adapter(student: nn.Module) -> bool:
    """Whether it is a `peft.PeftModel`; imports nothing."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(student, peft.PeftModel)


def check_adapter(student: nn.Module) -> None:
    """ValueError for batch norms that an adapter leaves out: training changes statistics that would not be saved.

    Also for an adapter of `model.add_adapter`, whose checkpoints could not be resumed.
    """
    if getattr(student, "_hf_peft_config_loaded", False):
        raise ValueError(
            "the student has an adapter of its add_adapter(), which is not supported: make it with "
            "peft.get_peft_model(student, LoraConfig(...))."
        )
    if not is_adapter(student):
        return
    kept = ("modules_to_save.", "original_module.")  # a copy that is trained and saved, and what it is a copy of
    lost = [name for name, _ in student.named_buffers() if name.endswith(".running_mean")]
    lost = [name.removesuffix(".running_mean") for name in lost if not any(part in name for part in kept)]
    if lost:
        raise ValueError(
            f"the student's adapter leaves {len(lost)} batch norms out, {lost[0]} first: training changes their "
            "statistics, and the saved adapter would predict something else. Add them in the LoraConfig: "
            f"modules_to_save={list(dict.fromkeys(map(_end, lost)))}, and what else it trains."
        )


def _end(name: str) -> str:
    """The end of a module's name by which PEFT finds it, and not others: "normalization", but "downsample.1"."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def load_adapters(student: Any, folder: str | os.PathLike) -> tuple[set[str], list[str]]:
    """Puts the weights of a checkpoint's adapters into a student; returns the keys that are missing and unexpected."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    missing: set[str] = set()
    unexpected: list[str] = []
    for name in student.peft_config:
        state = load_file(Path(folder, "" if name == "default" else name, ADAPTER_FILE))
        keys = get_peft_model_state_dict(student, adapter_name=name, save_embedding_layers=False).keys()
        missing |= keys - state.keys()
        unexpected += sorted(state.keys() - keys)
        set_peft_model_state_dict(student, state, adapter_name=name)
    return missing, unexpected
