"""An exponential moving average of the student's weights, which is what is evaluated and saved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback
from transformers.utils import logging

from .models.auxiliary_head import without_head

logger = logging.get_logger(__name__)

TRAINED_FILE = "trained_weights.safetensors"  # in a checkpoint, beside the averaged student


class StudentAverage(TrainerCallback):
    """A_1 = W_1 and A_t = d_t A_{t−1} + (1 − d_t) W_t, of the weights W_t after the optimizer step t.

    d_t is `decay`; with `warmup` it is min(decay, 1 − t^(−2/3)), as timm's ModelEmaV3 has it. Buffers (the running
    statistics of batch norm) are averaged too, those of integers copied; frozen weights and the auxiliary head are
    not. While the student is trained it has W_t, but in an evaluation and while it is saved A_t, and when training
    ends A_t stays in it. Without a decay nothing happens.
    """

    def __init__(self, decay: float | None, warmup: bool = False):
        self.decay, self.warmup = decay, warmup
        self._student: Any = None  # while it is trained
        self._average: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def begin(self, student: nn.Module, steps: int, checkpoint: str | None) -> None:
        """Begins with the student's weights, or those of a checkpoint whose model, the average, it has now.

        ValueError for weights of less than 32 bits, on which small changes are lost.
        """
        if self.decay is None:
            return
        floats = {name: value for name, value in _changing(student).items() if value.is_floating_point()}
        if coarse := [f"{name} ({value.dtype})" for name, value in floats.items() if value.element_size() < 4]:
            raise ValueError(
                f"ema_decay={self.decay} needs weights of 32 bits, since an average changes in small steps, and "
                f"{len(coarse)} have fewer: {coarse[0]}. Load the student with dtype=torch.float32, and set bf16=True."
            )
        if not self.warmup and 1 / (1 - self.decay) > steps:
            logger.warning_once(
                f"ema_decay={self.decay:g} averages over about {1 / (1 - self.decay):,.0f} steps and training has "
                f"{steps:,}: the average is mostly of early weights. Set ema_warmup=True (--ema_warmup), or a lower "
                "ema_decay."
            )
        self._student = student
        self._average = {name: value.clone() for name, value in _changing(student).items()}
        if checkpoint:
            trained = load_file(Path(checkpoint, TRAINED_FILE))
            for name, value in _changing(student).items():
                value.copy_(trained[name])

    def decay_at(self, step: int) -> float:
        """d_t of the optimizer step t = 1, 2, …."""
        assert self.decay is not None
        if self.warmup:
            return min(self.decay, 1 - step ** (-2 / 3))
        return self.decay if step > 1 else 0.0

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        if self._student is None:
            return
        pairs = [(self._average[name], value) for name, value in _changing(self._student).items()]
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        get_ema_multi_avg_fn(self.decay_at(state.global_step))(*map(list, zip(*floats, strict=True)), 0)
        for average, value in pairs:
            if not average.is_floating_point():
                average.copy_(value)

    @contextlib.contextmanager
    def in_student(self) -> Iterator[None]:
        """Lends the average to the student."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def save_trained(self, folder: str) -> None:
        """Writes the weights that are trained beside a checkpoint's model, which is the average."""
        if self._student is not None:
            trained = {name: value.detach().clone() for name, value in _changing(self._student).items()}
            save_file(trained, Path(folder, TRAINED_FILE))

    def end(self) -> None:
        """Leaves the average in the student."""
        self._exchange()
        self._student, self._average = None, {}

    @torch.no_grad()
    def _exchange(self) -> None:
        # In place: DDP, compiled code and the optimizer hold on to the student's tensors.
        for name, value in _changing(self._student).items() if self._student is not None else ():
            held = value.clone()
            value.copy_(self._average[name])
            self._average[name].copy_(held)


def _changing(student: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that are trained and the buffers, without the auxiliary head."""
    trained = {name: value for name, value in student.named_parameters() if value.requires_grad}
    return without_head(student, {**trained, **dict(student.named_buffers())})
