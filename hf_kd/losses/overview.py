"""The page about all losses: `hf-kd losses` prints it, docs/losses.md holds it."""

import inspect
from collections.abc import Mapping
from typing import Any

from .base import DistillationLoss
from .lookup import LOSSES, SETTINGS

_INTRODUCTION = """# Losses

Each loss is a function in `hf_kd.losses` and a name for `--loss` and `--compare`; its hyperparameters go into
`--loss_kwargs`. A recipe (`--preset`) takes those that were published for its benchmark. Published results are top-1
in percent of the student without → with the loss, as the papers of this field report them: without error bars, and by
different codebases.

With a teacher, a **student with a distillation head** (DeiT and LeViT `…WithTeacher` of transformers,
`*_distilled`, LeViT and others of timm; arXiv 2012.12877) is trained with (1 − α) · CE on its class head + α · the
loss's other terms on its distillation head, and evaluated by the mean of both logits. α is `--distillation_alpha`,
0.5 unless set. The loss's own cross entropy, with its weight (`ce_weight`, 1 − `weight`), is left out; label
smoothing stays, in CE. Other weights stay: `kd` adds α · `weight` · t² · KL, of which DeiT's own soft distillation
is the case `weight` 1. Only that of `hard` is replaced: it adds α · CE(arg max T), and another `weight` than 0.5 or
α is refused. Losses without a teacher (`ce`, `uskd`, `tf_kd`) train the mean, as it is evaluated: there is nothing
that only the distillation head could learn from. `kd` with `weight` 0 is therefore not `ce` for these students: its
cross entropy trains the class head alone.
"""
_NEEDS = {
    "teacher_logits": "a teacher",
    "aux_logits": "an auxiliary head on an intermediate feature, which is added to the student for training",
}


def overview() -> str:
    """What each loss is, needs and has achieved, as Markdown."""
    parts = [_INTRODUCTION, *map(_section, LOSSES.values())]
    for name, values in SETTINGS.items():
        settings = _values({key: value for key, value in values.items() if key != "loss"})
        parts.append(f"## {name}\n\n`{values['loss']}` with {settings}.\n")
    return "\n".join(parts)


def _section(cls: type[DistillationLoss]) -> str:
    needs = " and ".join(_NEEDS[name] for name in sorted(cls.requires)) or "nothing but labels"
    needs += "; labels for the cross entropy only" if not cls.method_needs_labels else ""
    parameters = inspect.signature(cls).parameters.items()
    lines = [f"Defaults: {_values({name: p.default for name, p in parameters if name != 'reduce_mean'})}."]
    lines += [f"Published for {name}: {_values(values)}." for name, values in cls.published.items() if values]
    lines += [f"Results on {name}: {text}." for name, text in cls.published_results.items()]
    lines += [cls.relations] if cls.relations else []
    paper = f" Paper: arXiv {cls.paper}." if cls.paper else ""
    listed = "\n".join(f"- {line}" for line in lines)
    return f"## {cls.name}: {cls.title}\n\n{_place(cls)} Needs {needs}.{paper}\n\n{cls.formula}\n\n{listed}\n"


def _place(cls: type[DistillationLoss]) -> str:
    if cls is LOSSES["ce"]:
        return "The cross entropy itself."
    weight = cls().label_weight
    return "Added to the cross entropy." if weight == 1 else "Instead of the cross entropy, or of a part of it."


def _values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
