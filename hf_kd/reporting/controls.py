"""Controls of a comparison: runs that show how much of a gain is not due to the loss, or to the teacher's knowledge.

A record's `control` has the kind, a key of `CONTROLS`, the variant that it is a control `of` (None: of all that
distil) and, of ce_same_time, the `ratio`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from .record import loss_description

RANDOM, PERMUTED, SAME_TIME = TRAINED_OTHERWISE = "random_teacher", "permuted_teacher", "ce_same_time"
CONTROLS = {
    "2xce": "twice the cross entropy",
    "label_smoothing": "cross entropy with smoothed labels",
    RANDOM: "the same loss with a teacher of the same architecture and random weights",
    PERMUTED: "the same loss with the teacher's outputs for another training image of the same label",
    SAME_TIME: "cross entropy with as many more steps as the slowest variant costs in time",
}
# What a gain with one of these teachers is, as the verdict says it.
REMAINS = {
    RANDOM: "with random weights in place of the teacher's: regularisation, not knowledge",
    PERMUTED: "with the teacher's outputs exchanged within each label: regularisation, not knowledge of the image",
}


def describe_control(control: Mapping[str, Any]) -> str:
    """What a record's `control` is, in words."""
    text, ratio = CONTROLS.get(control.get("kind", ""), ""), control.get("ratio")
    return f"{text} ({ratio:g} times the steps)" if isinstance(ratio, int | float) else text


def controls_of(run: Mapping[str, Any], runs: Iterable[Mapping[str, Any]]) -> list[str]:
    """The variants among the runs that a variant, one of whose runs this is, must beat: those that its loss names,
    and the controls that were switched on."""
    own, named, names = run.get("name"), loss_description(run).get("controls") or (), dict[str, None]()
    for other in runs:
        control, name = other.get("control"), other.get("name")
        if name != own and (name in named or (control and control.get("of") in (None, own))):
            names[str(name)] = None
    return list(names)


def control_names(runs: Iterable[Mapping[str, Any]]) -> set[str]:
    """The variants that are controls of others."""
    runs = list(runs)
    variants = {run.get("name"): run for run in runs}.values()
    return {name for run in variants if not run.get("control") for name in controls_of(run, runs)}
