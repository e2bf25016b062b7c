"""Several teachers as one: the weighted mean of their probabilities."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..config import DTYPES, DistillationConfig
from ..labels import ClassMapping, label_maps
from .teacher import Teacher, load_teacher


class TeacherEnsemble(Teacher):
    """Several frozen teachers that teach, and are measured, as one.

    Its logits are `log(Σ_k w_k softmax(z_k))`: the logarithm of the weighted mean of the probabilities at temperature
    1. A loss with another temperature softens that mean. Each teacher sees the images by its own preprocessing.

    Args:
        teachers: a `Teacher` each, or an id to load it from.
        weights: one for each teacher, not negative; they are divided by their sum. A teacher of weight 0 is not run.
            Default: equal ones.
        id2label: the class names of the data, in label order, by which every teacher's classes are matched; default:
            those of the teacher with the fewest.

    Attributes:
        teachers (`nn.ModuleList`), weights (`tuple[float, ...]`, which add up to 1): as above.

    Raises:
        ValueError: no teacher, other weights, or a teacher that lacks a class, with its name.
    """

    def __init__(self, teachers: Sequence[Teacher | str], weights: Sequence[float] | None = None, id2label=None):
        nn.Module.__init__(self)
        self.weights = normalized_weights(weights, len(teachers))
        loaded = [load_teacher(teacher) if isinstance(teacher, str) else teacher for teacher in teachers]
        for teacher in loaded:
            if not isinstance(teacher, Teacher) or isinstance(teacher, TeacherEnsemble):
                kind = type(teacher).__name__
                raise ValueError(f"an ensemble is made of single teachers (see load_teacher) or ids, not of {kind}.")
        names = min((teacher.id2label for teacher in loaded), key=len) if id2label is None else id2label
        self.id2label = self.class_names = label_maps(names)["id2label"]
        self.class_map, self.dtype, self.processor = None, None, None
        self.mapping = ClassMapping.between(self.id2label, self.id2label)
        self.teachers = nn.ModuleList()
        for teacher in loaded:
            with teacher_named(teacher.name):
                self.teachers.append(teacher.aligned(self.id2label))
        self.name = name_of_mean(self.weights, [teacher.name for teacher in loaded])
        self.preprocessing: Any = _Preprocessings([teacher.preprocessing for teacher in loaded])
        self.eval()

    def aligned(self, id2label=None, class_map=None, dtype: torch.dtype | None = None) -> TeacherEnsemble:
        """As `Teacher.aligned`; each teacher keeps the `class_map` that it was loaded with, and no other is taken."""
        if class_map is not None:
            raise ValueError("class_map is for one teacher: pass it to load_teacher(..., class_map=) of that one.")
        teachers = [teacher.aligned(dtype=dtype) for teacher in members(self)]
        return TeacherEnsemble(teachers, self.weights, self.id2label if id2label is None else id2label)

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor | list[torch.Tensor], cropped: bool = False) -> torch.Tensor:
        """`log(Σ_k w_k softmax(z_k))`: float32 `(B, C)`, without gradient.

        Args:
            pixels, cropped: see `Preprocessing.__call__`; a list has the pixels for each teacher.
        """
        batches = pixels if isinstance(pixels, list) else [pixels] * len(self.teachers)
        parts = zip(self.teachers, batches, self.weights, strict=True)
        logs = [teacher(batch, cropped).log_softmax(1) + math.log(w) for teacher, batch, w in parts if w]
        return torch.stack(logs).logsumexp(0)


class _Preprocessings:
    """What a trainer uses of `Preprocessing`, for several teachers; `size` is the largest."""

    def __init__(self, parts: list):
        self.parts, self.size = parts, max((part.size for part in parts), key=max)

    def __eq__(self, other) -> bool:
        return self.parts == (other.parts if isinstance(other, _Preprocessings) else [other] * len(self.parts))

    __hash__ = None  # type: ignore[assignment]  # as of `Preprocessing`

    def resize_and_crop(self, images) -> list[torch.Tensor]:
        """A batch for each teacher; those that see an image alike share it."""
        batches: list[torch.Tensor] = []
        for part in self.parts:
            first = self.parts.index(part)
            batches.append(batches[first] if first < len(batches) else part.resize_and_crop(images))
        return batches


def normalized_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """The weights of so many teachers, divided by their sum; equal ones for None. ValueError if they are none."""
    if not count:
        raise ValueError("there is no teacher: give at least one (--teacher ID).")
    values = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(values) != count or not all(0 <= value < math.inf for value in values) or not 0 < sum(values) < math.inf:
        raise ValueError(
            f"teacher_weights {' '.join(f'{value:g}' for value in values)}: {count} teachers need as many weights, "
            f"not negative and not all 0, such as {' '.join(['1'] * count)} (they are divided by their sum)."
        )
    return tuple(value / sum(values) for value in values)


def name_of_mean(weights: Sequence[float], names: Sequence[str]) -> str:
    return " + ".join(f"{weight:.4g} × {name}" for weight, name in zip(weights, names, strict=True))


def members(teacher: Teacher) -> list[Teacher]:
    """The teachers of an ensemble, or a list of the single teacher itself."""
    return list(teacher.teachers) if isinstance(teacher, TeacherEnsemble) else [teacher]  # type: ignore[arg-type]


@contextlib.contextmanager
def teacher_named(name: str | None) -> Iterator[None]:
    """Errors inside name the teacher that they are about; None: they are left as they are."""
    try:
        yield
    except ValueError as error:
        if name is None:
            raise
        raise ValueError(f"teacher {name}: {error}") from error


def aligned_teacher(
    teacher: Teacher | str | Sequence[Teacher | str] | None,
    model: nn.Module,
    id2label: dict[int, str] | None,
    args: DistillationConfig,
) -> Teacher | None:
    """A teacher of the trainer's own, with its classes in the student's order; of several their mean.

    It computes with `args.teacher_dtype`, else its own type, else that of the student's training. ValueError if it is
    no teacher, is the student itself, or knows other classes.
    """
    if teacher is None:
        return None
    if isinstance(teacher, list | tuple | TeacherEnsemble):
        several = members(teacher) if isinstance(teacher, TeacherEnsemble) else teacher
        own = [aligned_teacher(each, model, None, args) for each in several]
        return TeacherEnsemble(own, getattr(teacher, "weights", None), id2label)  # type: ignore[arg-type]
    if isinstance(teacher, str):
        teacher = load_teacher(teacher)
    if not isinstance(teacher, Teacher):
        hint = "wrap it with load_teacher(module, processor=...)"
        raise ValueError(f"teacher must be a Teacher or an id, got {type(teacher).__name__}: {hint}.")
    if {id(p) for p in teacher.parameters()} & {id(p) for p in model.parameters()}:
        raise ValueError("teacher and student share parameters: load the teacher as a model of its own.")
    precision = args.teacher_dtype or ("bf16" if args.bf16 else "fp16" if args.fp16 else "fp32")
    dtype = teacher.dtype if teacher.dtype is not None and not args.teacher_dtype else DTYPES[precision]
    return teacher.aligned(id2label, dtype=dtype or torch.float32)
