"""Batches of one image: batch norm in training has no statistics of a channel with a single value."""

from __future__ import annotations

import contextlib
from functools import partial

import torch
from torch import nn

from .data import ImageDataset
from .data.order import batch_sizes
from .models.forward import dry_run, in_eval_mode

_HINTS = (
    "set dataloader_drop_last=True (--dataloader_drop_last True), which leaves the last image of each epoch out",
    "set another per_device_train_batch_size (--per_device_train_batch_size)",
)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
_TORCH_SAYS = "Expected more than 1 value per channel"


def check_batches_of_one(trainer, dataset, batch_size: int) -> None:
    """ValueError before training if it has a batch of one image in which a batch norm gets one value per channel."""
    args, preprocessing = trainer.args, trainer.preprocessing
    micro_batches = args.max_steps * args.gradient_accumulation_steps
    ends_before = 0 < micro_batches <= len(dataset) // batch_size // args.world_size
    has_one = 1 in batch_sizes(len(dataset), batch_size, args.world_size, args.dataloader_drop_last)
    if batch_size > 1 and (ends_before or not has_one):
        return
    values = dataset[0].get("pixel_values") if isinstance(dataset, ImageDataset) else None
    if values is None and preprocessing is None:
        return
    name = _norm_of_one_value(trainer.model, preprocessing.size if values is None else tuple(values.shape[-2:]))
    if name is not None:
        hints = _HINTS if batch_size > 1 else _HINTS[1:]
        raise ValueError(_message(f"{len(dataset)} images in batches of {batch_size} give", name, hints))


@contextlib.contextmanager
def batch_of_one_named():
    """Names the options in torch's error, where one image is left of a batch because the others are broken, say."""
    try:
        yield
    except ValueError as error:
        if _TORCH_SAYS not in str(error):
            raise
        raise ValueError(_message("the images that could be decoded give", "the student", _HINTS)) from error


def _message(why: str, name: str, hints: tuple[str, ...]) -> str:
    return (
        f"{why} a batch of one image, and batch norm in {name} then has one value per channel, of which there are no "
        f"statistics: {', or '.join(hints)}."
    )


def _norm_of_one_value(student: nn.Module, size: tuple[int, int]) -> str | None:
    """The first batch norm that one image of this size gives one value per channel, if it is trained."""
    found: list[str] = []

    def note(module: nn.Module, args: tuple[torch.Tensor], name: str) -> None:
        if args[0].numel() == args[0].shape[1]:
            found.append(name)

    with in_eval_mode(student):
        student.train()  # of a frozen one this changes nothing
        norms = [(name, m) for name, m in student.named_modules() if isinstance(m, _NORMS) and m.training]
        handles = [norm.register_forward_pre_hook(partial(note, name=name)) for name, norm in norms]
        try:
            dry_run(student, size)
        finally:
            for handle in handles:
                handle.remove()
    return found[0] if found else None
