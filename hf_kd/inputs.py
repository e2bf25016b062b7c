"""What a trainer may be given as data sets and teachers, checked against the student."""

from __future__ import annotations

import datasets
import torch
from torch import nn

from .config import DTYPES, DistillationConfig
from .data import PictureDataset, class_names, find_columns
from .teacher import Teacher, load_teacher, match_classes


def as_pictures(dataset, id2label: dict[int, str] | None, args: DistillationConfig):
    """Decode the rows of a `datasets.Dataset` with an image column; leave any other map-style data set as it is.

    Args:
        dataset: a data set, a dict of them, a name, or None.
        id2label: the student's class names; None: not known, and not checked.
        args: for `image_column`, `label_column` and `data_seed`.

    Raises:
        ValueError: it is empty or streamed, a column is not there, or its classes are not the student's.
    """
    if dataset is None or isinstance(dataset, str):
        return dataset
    if isinstance(dataset, dict):
        return {name: as_pictures(part, id2label, args) for name, part in dataset.items()}
    if isinstance(dataset, (torch.utils.data.IterableDataset, datasets.IterableDataset)):
        raise ValueError("streamed (iterable) data sets are not supported yet: load it without streaming=True.")
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError("the data set is empty.")
    raw = isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom"
    if not raw or "pixel_values" in dataset.column_names or "pixels" in dataset.column_names:
        return dataset
    image, label = find_columns(dataset, args.image_column, args.label_column)
    feature = dataset.features[label]
    if getattr(feature, "dtype", "") == "string":
        raise ValueError(
            f"column {label!r} holds texts: dataset.class_encode_column({label!r}) makes classes of them."
        )
    if id2label and isinstance(feature, datasets.ClassLabel):
        _check_classes(class_names(dataset, label), id2label)
    return PictureDataset(dataset, image, label, seed=args.data_seed)


def _check_classes(data: list[str], student: dict[int, str]) -> None:
    """The i-th class of the data must be the student's i-th: else it learns, and is saved with, wrong names."""
    if len(student) == len(data) and all(name == f"LABEL_{i}" for i, name in student.items()):
        return  # a student without names of its own
    way_out = "load the student with load_student(..., id2label=names), names in the order of the data"
    try:
        order = match_classes(student, dict(enumerate(data)))
    except ValueError as error:
        differ = [(data[i], student.get(i)) for i in range(len(data)) if data[i] != student.get(i)][:5]
        raise ValueError(
            f"the data have {len(data)} classes, the student {len(student)}, and their names differ, as in {differ}: "
            f"{way_out}."
        ) from error
    if order != list(range(len(data))):
        raise ValueError(f"data and student have the same classes in another order: {way_out}.")


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
