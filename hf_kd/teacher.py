"""The teacher: frozen, always in eval mode, its classes in the student's order, with its own view of the pixels."""

from __future__ import annotations

import contextlib
import re
from collections import Counter

import torch
from torch import nn
from transformers.integrations import deepspeed as _deepspeed

from .student import check_id, label_maps, load_classifier, load_config, loading_faults, processor_for
from .views import View
from .weak_head import logits_of


def _key(name: str) -> str:
    """Class names are compared without regard to case, underscores, hyphens and surrounding space."""
    return re.sub(r"[\s_\-]+", " ", str(name)).strip().casefold()


def match_classes(teacher_names: dict[int, str], student_names: dict[int, str], class_map=None) -> list[int]:
    """For each class of the student, the teacher's index of it.

    Args:
        teacher_names, student_names: id2label of each.
        class_map: where names alone don't do: `"by_index"` (the i-th class is the i-th class), a list with the
            teacher's index for each class of the student, or a dict from student names to teacher names.

    Raises:
        ValueError: unequal counts, unmatched or ambiguous names; with numbers, names and the way out.
    """
    n_teacher, n_student = len(teacher_names), len(student_names)
    way_out = 'pass class_map= ("by_index", the list of the teacher\'s indices, or a dict {student: teacher} of names)'
    if isinstance(class_map, (list, tuple)):
        order = [int(i) for i in class_map]
        if len(order) != n_student or len(set(order)) != n_student or not all(0 <= i < n_teacher for i in order):
            raise ValueError(
                f"class_map must list {n_student} different teacher indices in [0, {n_teacher}), one for each class "
                f"of the student; it has {len(order)} ({len(set(order))} different)."
            )
        return order
    if n_teacher != n_student:
        raise ValueError(f"the teacher has {n_teacher} classes, the student {n_student}: {way_out}.")
    if class_map == "by_index":
        return list(range(n_student))
    if class_map is not None and not isinstance(class_map, dict):
        raise ValueError(f"class_map={class_map!r} is not understood: {way_out}.")
    renamed = {_key(k): _key(v) for k, v in (class_map or {}).items()}
    unknown = sorted(renamed.keys() - {_key(name) for name in student_names.values()})
    if unknown:
        raise ValueError(f"class_map renames {len(unknown)} classes that the student does not have: {unknown[:8]}.")
    wanted = [renamed.get(_key(student_names[i]), _key(student_names[i])) for i in range(n_student)]
    if wanted == [_key(teacher_names[i]) for i in range(n_student)]:  # names that occur twice are no question then
        return list(range(n_student))
    index: dict[str, int] = {}
    for i, name in teacher_names.items():
        index.setdefault(_key(name), int(i))
    missing = [student_names[i] for i, key in enumerate(wanted) if key not in index]
    if missing:
        theirs = [teacher_names[index[key]] for key in sorted(index.keys() - set(wanted))]
        raise ValueError(
            f"{len(missing)} of the student's {n_student} classes have no class of that name in the teacher: "
            f"{missing[:8]}; the teacher's unmatched ones: {theirs[:8]}. Check that both know the same classes, or "
            f"{way_out}."
        )
    order = [index[key] for key in wanted]
    double = [student_names[order.index(i)] for i, n in Counter(order).items() if n > 1]
    if double:
        raise ValueError(f"class names are not unique, so they can't be matched: {double[:8]}; {way_out}.")
    return order


class Teacher(nn.Module):
    """A frozen classifier that turns pixels into logits in the student's class order.

    Args:
        model: a classifier `(B, 3, H, W) -> logits` (transformers, timm, any module). It is frozen and kept in eval.
        processor: its image processor, from which its `View` is measured.
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
        self.view = View(processor)
        self.name = name
        self.dtype = dtype
        own = getattr(getattr(model, "config", None), "id2label", None)
        if own is None:
            # A module without class names: its outputs are counted, and only an explicit class_map can order them.
            n = self._logits(torch.zeros(1, 3, *self.view.size)).shape[1]
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

    def forward(self, pixels: torch.Tensor, framed: bool = False) -> torch.Tensor:
        """Logits of pictures.

        Args:
            pixels: `(B, 3, H, W)`, uint8 or float in [0, 1], of any size. What comes out is what the model alone gives
                for the picture through its own processor.
            framed: True if the picture shows just what the model is to see (a training crop): resized, not cropped.

        Returns:
            float32 `(B, C)` in the student's class order, without gradient.
        """
        logits = self._logits(self.view(pixels, framed))
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
