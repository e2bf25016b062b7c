"""What DeepSpeed and FSDP2 need besides what one process and DDP do: accelerate chooses between them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from .adapters import is_adapter
from .models.loading import load_classifier, load_config

logger = logging.get_logger(__name__)

PARTITIONED = (DistributedType.DEEPSPEED, DistributedType.FSDP)


def check_whole(student: nn.Module) -> None:
    """Raises ValueError for a student that was partitioned when it was built, as transformers does under ZeRO-3."""
    if any(hasattr(parameter, "ds_id") for parameter in student.parameters()):
        raise ValueError(
            "the student was built under ZeRO-3, which has partitioned its weights already: build it before the "
            "DistillationConfig, or with load_student()."
        )


def forget_accelerator() -> None:
    """Lets another Accelerator be made in this process, where DeepSpeed and FSDP allow one. Its group stays."""
    if AcceleratorState._shared_state and AcceleratorState().distributed_type in PARTITIONED:
        on_cpu = PartialState()._cpu
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState(cpu=on_cpu)


def fit_for_fsdp(trainer: Any, student: Any) -> None:
    """Under FSDP2, leaves to accelerate only what it can shard by itself: the blocks that the student names.

    It would also shard the input embeddings, which are a part of a block (ViT) or an error (ResNet), and looks for
    blocks that a TimmWrapper names and does not have: this one is one unit. ValueError for a configuration that saves
    no student, or leaves the other processes without the teacher's weights.
    """
    if not trainer.is_fsdp_enabled:
        if trainer.args.engine == "fsdp":
            logger.warning_once("FSDP needs GPUs: on this device accelerate trains with DDP in its place.")
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    for is_wrong, name, value in (
        (plugin.fsdp_version != 2, "version", "2"),
        ("FULL_STATE_DICT" not in str(plugin.state_dict_type), "state_dict_type", "FULL_STATE_DICT"),
        (plugin.cpu_ram_efficient_loading, "cpu_ram_efficient_loading", "false"),
    ):
        if is_wrong:
            raise ValueError(f"FSDP is supported with fsdp_{name}: {value} in fsdp_config: set it so.")
    if hasattr(student, "get_input_embeddings"):
        student.get_input_embeddings = _no_embeddings
        there = {type(module).__name__ for module in student.modules()}
        student._no_split_modules = sorted(there.intersection(student._no_split_modules or ()))


def _no_embeddings() -> None:
    return None


@contextlib.contextmanager
def unused_weights_named():
    """Names the option in DDP's error about weights that get no gradient, such as DINOv2's mask token."""
    try:
        yield
    except RuntimeError as error:
        if "find_unused_parameters" not in str(error):
            raise
        raise ValueError(
            "some of the student's weights get no gradient, which DDP does not expect: freeze them (requires_grad_), "
            "or set ddp_find_unused_parameters=True (--ddp_find_unused_parameters True)."
        ) from error


def non_finite_weights(trainer: Any) -> list[str]:
    """The names of the student's weights that are not finite, found on each process's part of them and shared."""
    named = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    bad = torch.stack([(~torch.isfinite(_local_part(value))).any() for value in named.values()]).float()
    if trainer.args.world_size > 1:
        bad = trainer.accelerator.reduce(bad, "sum")
    return [name for name, is_bad in zip(named, bad.tolist(), strict=True) if is_bad]


def _local_part(parameter: Any) -> torch.Tensor:
    """The part of a parameter that this process keeps; of one that is not partitioned, all of it."""
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3: flat, and the last part is padded
        part = parameter.ds_tensor.detach()
        begin = part.numel() * torch.distributed.get_rank(parameter.ds_process_group)
        return part[: max(0, parameter.ds_numel - begin)]
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def share_buffers(trainer: Any) -> None:
    """Gives all processes the first one's buffers (the running statistics of batch norm), which are what is saved.

    Each process has those of its own batches: DDP shares them before a step in training only, the others never.
    """
    if trainer.args.world_size > 1:
        for buffer in trainer.accelerator.unwrap_model(trainer.model).buffers():
            torch.distributed.broadcast(buffer, 0)


def whole_student(trainer: Any) -> Any:
    """The student to describe and to measure: itself, or where an engine has partitioned or wrapped it, as saved.

    ValueError if it is not saved yet.
    """
    student = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.accelerator.distributed_type not in PARTITIONED:
        return student
    folder = trainer.args.output_dir
    if not hasattr(student, "config") or is_adapter(student) or not Path(folder, SAFE_WEIGHTS_NAME).is_file():
        raise ValueError(f"the student is measured as it is saved, and there is none in {folder}: call save_model().")
    hub: dict[str, Any] = {"revision": None, "trust_remote_code": True}  # its code runs already
    config = load_config(folder, hub)
    saved, _ = load_classifier(folder, config, hub, "student")
    saved.name_or_path, config._commit_hash = student.name_or_path, getattr(student.config, "_commit_hash", None)
    return saved.train(student.training)
