"""Class names: which class of one list is which of another."""

from __future__ import annotations

import re
from collections import Counter


def label_maps(names: list[str] | dict[int, str]) -> dict:
    """`id2label` and `label2id` of a config, from class names in order (or an id2label)."""
    id2label = {int(i): str(n) for i, n in (names.items() if isinstance(names, dict) else enumerate(names))}
    if sorted(id2label) != list(range(len(id2label))):
        raise ValueError(f"id2label must number its {len(id2label)} classes from 0 on, it has {sorted(id2label)[:8]}.")
    id2label = dict(sorted(id2label.items()))
    return {"id2label": id2label, "label2id": {name: i for i, name in id2label.items()}}


def name_classes(config, id2label) -> None:
    for key, value in label_maps(id2label).items():
        setattr(config, key, value)
    if config.model_type == "timm_wrapper":  # timm's own key, which is the one that is saved
        config.label_names = list(config.id2label.values())


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


def check_class_order(data: list[str], student: dict[int, str]) -> None:
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
