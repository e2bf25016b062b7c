"""The teacher: frozen, always in eval mode, its classes in the student's order, with its own preprocessing."""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from transformers.integrations import deepspeed as _deepspeed

from ..config import DTYPES, DistillationConfig
from ..labels import label_maps, match_classes
from .forward import logits_of
from .loading import check_id, load_classifier, load_config, loading_faults, processor_for
from .preprocessing import Preprocessing


class Teacher(nn.Module):
    """A frozen classifier that turns pixels into logits in the student's class order.

    Args:
        model: a classifier `(B, 3, H, W) -> logits` (transformers, timm, any module). It is frozen and kept in eval.
        processor: its image processor, from which its `Preprocessing` is measured.
        id2label: the student's class names, in label order; default: the teacher's own order.
        class_map: see `match_classes`.
        dtype: compute type under autocast (`torch.bfloat16`, `torch.float16`), or None for the weights' own.
        name: how reports call it.

    `train()` keeps it in eval mode whatever a wrapper asks for, and gradients are off: its parameters never need them.
    """

    def __init__(self, model: nn.Module, processor, id2label=None, class_map=None, dtype=None, name: str = "teacher"):
        super().__init__()
        self.model = model.requires_grad_(False)
        self.eval()
        self.processor = processor
        self.preprocessing = Preprocessing(processor)
        self.name = name
        self.dtype = dtype
        own = getattr(getattr(model, "config", None), "id2label", None)
        if own is None:
            # A module without class names: its outputs are counted, and only an explicit class_map can order them.
            n = self._logits(torch.zeros(1, 3, *self.preprocessing.size)).shape[1]
            own = {i: f"LABEL_{i}" for i in range(n)}
        self._own_names = {int(k): v for k, v in own.items()}
        self.id2label = self._own_names
        self.class_map = class_map
        self.register_buffer("order", torch.arange(len(own)), persistent=False)
        if id2label is not None:
            self.align(id2label, class_map)

    def align(self, id2label: list[str] | dict[int, str], class_map=None) -> None:
        """Put the outputs in the order of these class names; see `match_classes` for what is refused.

        `class_map` defaults to the one that the teacher was made with.
        """
        self.class_map = class_map if class_map is not None else self.class_map
        names = label_maps(id2label)["id2label"]
        if self.class_map is not None or names != self.id2label:
            order = match_classes(self._own_names, names, self.class_map)
            self.order = torch.tensor(order, device=self.order.device)
            self.id2label = names

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode: `model.train()` on a wrapper must not reach it."""
        return super().train(False)

    def _logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        parameter = next(self.model.parameters())
        enabled = self.dtype in (torch.bfloat16, torch.float16)  # otherwise an autocast around this one is off here
        cast = torch.autocast(parameter.device.type, dtype=self.dtype if enabled else None, enabled=enabled)
        with torch.no_grad(), cast:
            return logits_of(self.model(pixel_values.to(device=parameter.device, dtype=parameter.dtype))).float()

    def forward(self, pixels: torch.Tensor, cropped: bool = False) -> torch.Tensor:
        """Logits of images.

        Args:
            pixels: `(B, 3, H, W)`, uint8 or float in [0, 1], of any size. What comes out is what the model alone gives
                for the image through its own processor.
            cropped: True if the image shows just what the model is to see (a training crop): resized, not cropped.

        Returns:
            float32 `(B, C)` in the student's class order, without gradient.
        """
        logits = self._logits(self.preprocessing(pixels, cropped))
        if logits.shape[1] != len(self._own_names):
            raise ValueError(f"{self.name} names {len(self._own_names)} classes and gives {logits.shape[1]} logits.")
        return logits.index_select(1, self.order)


@contextlib.contextmanager
def _outside_deepspeed():
    """Under ZeRO-3, from_pretrained would partition the teacher too, which nothing gathers again: load it outside."""
    held = _deepspeed._hf_deepspeed_config_weak_ref
    _deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        _deepspeed._hf_deepspeed_config_weak_ref = held


def load_teacher(
    model,
    id2label: list[str] | dict[int, str] | None = None,
    processor=None,
    class_map=None,
    dtype=None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Teacher:
    """A teacher from a Hub id, a `timm/...` id, a local folder, or a module.

    Args:
        model: as for `load_student`; a `Teacher` is only aligned.
        id2label: the class names of the data, in label order; the teacher's outputs are put in that order by name.
        processor: default: the one saved beside the model. Needed for a module.
        class_map, dtype: see `Teacher`.
        revision, trust_remote_code: as in transformers.

    Raises:
        ValueError: weights are missing or do not fit (a freshly initialised head teaches noise), or the classes
            can't be matched; with names and counts.
    """
    if isinstance(model, Teacher):
        if id2label is not None:
            model.align(id2label, class_map)
        return model
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        name = check_id(model)
        hub = {"revision": revision, "trust_remote_code": trust_remote_code}
        with _outside_deepspeed():
            module, info = load_classifier(name, load_config(name, hub), hub)
        bad = sorted(loading_faults(info))
        if bad:
            raise ValueError(
                f"teacher {name}: {len(bad)} weights are missing from its checkpoint or have another shape, and would "
                f"be random: {bad[:8]}. Use a checkpoint with its trained classification head."
            )
        model, processor = module, processor or processor_for(module, name, hub)
    elif processor is None:
        raise ValueError("a teacher given as a module needs its image processor: load_teacher(module, processor=...).")
    return Teacher(model, processor, id2label, class_map, dtype, name)


def aligned_teacher(
    teacher: Teacher | str | None, model: nn.Module, id2label: dict[int, str] | None, args: DistillationConfig
) -> Teacher | None:
    """The teacher with its classes in the student's order and the compute type that `args` ask for.

    Raises:
        ValueError: it is no teacher, is the student itself, or knows other classes.
    """
    if teacher is None:
        return None
    if isinstance(teacher, str):
        teacher = load_teacher(teacher, id2label=id2label)
    if not isinstance(teacher, Teacher):
        raise ValueError(
            f"teacher must be a Teacher or an id, got {type(teacher).__name__}: "
            "wrap it with load_teacher(module, processor=...)."
        )
    if {id(p) for p in teacher.parameters()} & {id(p) for p in model.parameters()}:
        raise ValueError("teacher and student share parameters: load the teacher as a model of its own.")
    if id2label is not None:
        teacher.align(id2label)
    precision = args.teacher_dtype or ("bf16" if args.bf16 else "fp16" if args.fp16 else "fp32")
    if teacher.dtype is None:
        teacher.dtype = DTYPES[precision]
    return teacher.float() if precision == "fp32" else teacher
