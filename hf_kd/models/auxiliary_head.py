"""The auxiliary head of USKD: a linear classifier on a pooled intermediate feature of the student.

It is a submodule of the student, fed by a forward hook at the feature layer, and its logits leave through a forward
hook on the student: its parameters are used inside the student's own forward, as DDP, FSDP and torch.compile need.
It is kept out of the saved model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput

from .features import HEAD, FeatureLayer, find_feature_layer
from .forward import logits_of


@dataclass
class StudentOutput(ModelOutput):
    """A student's output in training: `logits` (B, C) and the auxiliary head's `aux_logits` (B, C)."""

    logits: torch.Tensor | None = None
    aux_logits: torch.Tensor | None = None


class AuxiliaryHead(nn.Module):
    """`W = softmax(Linear(pooled feature))`, arXiv 2303.13005: gives the logits (B, C) of W."""

    def __init__(self, layer: FeatureLayer, num_classes: int):
        super().__init__()
        self.layer = layer
        self.fc = nn.Linear(layer.channels, num_classes)
        self._logits: torch.Tensor | None = None

    def forward(self, output) -> torch.Tensor:
        feature, pooling = _part(output, self.layer.item), self.layer.pooling
        if pooling == "class_token":
            feature = feature[:, 0]
        elif pooling == "mean_token":
            feature = feature[:, self.layer.skipped :].mean(1)
        elif pooling != "none":
            feature = feature.mean((2, 3) if pooling == "nchw" else (1, 2))
        return self.fc(feature)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_logits": None}  # recomputing a checkpoint may leave some, which can't be copied

    def _read_feature(self, module, args, output) -> None:
        if torch.is_grad_enabled():
            self._logits = self(output)

    def _add_aux_logits(self, module, args, output):
        if not torch.is_grad_enabled():  # evaluation and saving see the plain model
            return None
        aux_logits, self._logits = self._logits, None
        if aux_logits is None:
            raise RuntimeError(
                f"the auxiliary head got no differentiable feature from {self.layer.name!r}. With activation "
                "checkpointing set use_reentrant to False in activation_checkpointing_kwargs (before transformers "
                "5.23: gradient_checkpointing_kwargs); where that passes the module by (in timm), choose its last "
                f"block with feature_module= (--feature_module): {self.layer.name}.N."
            )
        return StudentOutput(logits=logits_of(output), aux_logits=aux_logits)


def _part(output, item: int | None) -> torch.Tensor:
    if item is None:
        return output
    return (output.to_tuple() if isinstance(output, ModelOutput) else output)[item]


def add_auxiliary_head(
    student: nn.Module, num_classes: int, size: tuple[int, int], feature_module: str | None = None, seed: int = 0
) -> AuxiliaryHead:
    """Add the auxiliary head to a student as its submodule `aux_head`, with its hooks, before compiling or wrapping.

    `seed` is that of its weights; the global generator is left alone: a run with the head draws the same numbers as
    one without. See `find_feature_layer` for `size` and `feature_module`.
    """
    if hasattr(student, HEAD):
        return getattr(student, HEAD)
    layer = find_feature_layer(student, size, feature_module)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds the GPU's too
        head = AuxiliaryHead(layer, num_classes)
    student.add_module(HEAD, head.to(next(student.parameters())))
    ignored = {f"{HEAD}.{name}" for name in head.state_dict()}
    student._keys_to_ignore_on_save = ignored.union(getattr(student, "_keys_to_ignore_on_save", None) or ())  # type: ignore[assignment]
    student.get_submodule(layer.name).register_forward_hook(head._read_feature)
    student.register_forward_hook(head._add_aux_logits)
    return head
