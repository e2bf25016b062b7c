"""The auxiliary head of USKD: a linear classifier on a pooled intermediate feature of the student.

While the student is trained it is a submodule of it, fed by a forward hook at the feature layer, and its logits leave
through a forward hook on the student: its parameters are used inside the student's own forward, as DDP, FSDP and
torch.compile need. It is kept out of the saved model, and can be taken off and put back.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from .features import HEAD, FeatureLayer, find_feature_layer
from .forward import logits_by_head, logits_of


@dataclass
class StudentOutput(ModelOutput):
    """A student's output in training: `logits` (B, C) and the auxiliary head's `aux_logits` (B, C); where the student
    has a distillation head, also what `logits_by_head` gives of its own output."""

    logits: torch.Tensor | None = None
    aux_logits: torch.Tensor | None = None
    cls_logits: torch.Tensor | None = None
    distillation_logits: torch.Tensor | None = None


class AuxiliaryHead(nn.Linear):
    """`W = softmax(Linear(pooled feature))`, arXiv 2303.13005: from features (B, D) to the logits (B, C) of W."""

    def __init__(self, layer: FeatureLayer, num_classes: int):
        super().__init__(layer.channels, num_classes)
        self.layer = layer
        self._handles: list[Any] = []  # of the hooks on the student
        self._logits: torch.Tensor | None = None

    def add_to(self, student: nn.Module) -> None:
        """Makes it the student's submodule `aux_head`, with its hooks, before compiling or wrapping.

        ValueError if the student has another submodule of this name.
        """
        _check_free(student, self)
        _reset_compiled_code()
        if not hasattr(student, HEAD):
            student.add_module(HEAD, self.to(next(student.parameters())))
            _ignored_when_saving(student).update(self._keys())
        if not self._handles:
            layer = _innermost(student.get_submodule(self.layer.name))
            self._handles = [
                layer.register_forward_hook(self._read_feature),
                student.register_forward_hook(self._add_aux_logits),
            ]

    def remove_from(self, student: nn.Module, hooks_only: bool = False) -> None:
        """Makes the student the plain model that it was before. `hooks_only` leaves the submodule where it is."""
        _reset_compiled_code()
        for handle in self._handles:
            handle.remove()
        self._handles, self._logits = [], None
        if getattr(student, HEAD, None) is self and not hooks_only:
            delattr(student, HEAD)
            _ignored_when_saving(student).difference_update(self._keys())

    def _keys(self) -> set[str]:
        return {f"{HEAD}.{name}" for name in self.state_dict()}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_logits": None}  # recomputing a checkpoint may leave some, which can't be copied

    def _read_feature(self, module, args, output) -> None:
        if torch.is_grad_enabled():
            self._logits = self(_pooled(output, self.layer))

    def _add_aux_logits(self, module, args, output):
        if not torch.is_grad_enabled():  # evaluation and saving see the plain model
            return None
        aux_logits, self._logits = self._logits, None
        if aux_logits is None:
            raise RuntimeError(
                f"the auxiliary head got no differentiable feature from {self.layer.name!r}. With activation "
                "checkpointing set use_reentrant to False in activation_checkpointing_kwargs (before transformers "
                "5.23: gradient_checkpointing_kwargs), or choose a module that runs with feature_module= "
                "(--feature_module)."
            )
        of_class, of_distillation = logits_by_head(output)
        return StudentOutput(logits_of(output), aux_logits, of_class, of_distillation)


def _pooled(output, layer: FeatureLayer) -> torch.Tensor:
    """The feature (B, D) in the output of the feature layer."""
    if layer.item is not None:
        output = (output.to_tuple() if isinstance(output, ModelOutput) else output)[layer.item]
    if layer.pooling == "class_token":
        return output[:, 0]
    if layer.pooling == "mean_token":
        return output[:, layer.skipped :].mean(1)
    if layer.pooling == "none":
        return output
    return output.mean((2, 3) if layer.pooling == "nchw" else (1, 2))


def _innermost(module: nn.Module) -> nn.Module:
    """The last module of a sequence, whose output is the same. timm checkpoints blocks, not the stage around them."""
    while type(module).forward is nn.Sequential.forward and len(module):  # type: ignore[arg-type]
        module = module[-1]  # type: ignore[index]
    return module


def _check_free(student: nn.Module, head: AuxiliaryHead) -> None:
    other = getattr(student, HEAD, None)
    if other is None or other is head:
        return
    if not isinstance(other, AuxiliaryHead):
        raise ValueError(f"the student has a submodule {HEAD} of its own, where the auxiliary head goes: rename it.")
    raise ValueError(
        f"the student has the auxiliary head of another trainer, on {other.layer.name}, which stays until that one's "
        f"train() returns. To replace it, take it off first: student.{HEAD}.remove_from(student)"
    )


def auxiliary_head_of(student: nn.Module) -> AuxiliaryHead | None:
    """The head that the student carries now, if any; not a submodule of its own that has the name."""
    head = getattr(student, HEAD, None)
    return head if isinstance(head, AuxiliaryHead) else None


def without_head(student: nn.Module, values: dict[str, Any]) -> dict[str, Any]:
    """Of values by the names of the student's parameters and buffers, those that are not of the head it carries."""
    head = auxiliary_head_of(student)
    return {key: value for key, value in values.items() if head is None or not key.startswith(f"{HEAD}.")}


def _ignored_when_saving(student: Any) -> set[str]:
    """The keys that save_pretrained leaves out, to be changed in place; of a model that has none, a new set."""
    return set() if (keys := getattr(student, "_keys_to_ignore_on_save", None)) is None else keys


def _reset_compiled_code() -> None:
    if "torch._dynamo" in sys.modules:
        # Dynamo does not guard on hooks: it would give a student with the auxiliary head the code of one without.
        torch.compiler.reset()


def add_auxiliary_head(
    student: nn.Module, num_classes: int, size: tuple[int, int], feature_module: str | None = None, seed: int = 0
) -> AuxiliaryHead:
    """Make an auxiliary head for a student and add it, see `AuxiliaryHead.add_to`.

    `seed` is that of its weights; the global generator is left alone: a run with the head draws the same numbers as
    one without. See `find_feature_layer` for `size` and `feature_module`.
    """
    layer = find_feature_layer(student, size, feature_module)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds the GPU's too
        head = AuxiliaryHead(layer, num_classes)
    head.add_to(student)
    return head
