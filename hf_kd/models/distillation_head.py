"""Students with a second head that learns from the teacher, as DeiT with its distillation token: arXiv 2012.12877."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from ..config import DistillationConfig
from ..losses import DistillationLoss


def has_distillation_head(student: Any) -> bool:
    """Whether it is a `…WithTeacher` of transformers (DeiT, LeViT), or a distilled model of timm in its wrapper."""
    timm_model = getattr(student, "timm_model", None)
    if timm_model is not None:  # many have the method, and the head only if built so
        heads = (name for name, _ in timm_model.named_parameters() if re.search(r"\bheads?_dist\b", name))
        return hasattr(timm_model, "set_distilled_training") and any(heads)
    model = student.get_base_model() if hasattr(student, "get_base_model") else student  # of PEFT
    return any(cls.__name__.endswith("ForImageClassificationWithTeacher") for cls in type(model).__mro__)


def separate_heads(student: Any, enable: bool) -> None:
    """Makes a model of timm give the logits of both heads in training, or their mean again; others give all three."""
    if hasattr(student, "timm_model"):
        student.timm_model.set_distilled_training(enable)


def use_distillation_head(loss: DistillationLoss, student: nn.Module, args: DistillationConfig) -> bool:
    """Whether the loss is of the two heads' logits apart; if it learns from a teacher, tells it `distillation_alpha`.

    Any other loss is of their mean. ValueError for a loss or an argument that needs such a student, and for one that
    does not agree with it.
    """
    has_head, alpha = has_distillation_head(student), args.distillation_alpha
    default = DistillationConfig.__dataclass_fields__["distillation_alpha"].default
    kind = f"the student ({type(student).__name__}) has no distillation head"
    if "distillation_logits" in loss.requires and not has_head:
        raise ValueError(
            f"loss {loss.name!r} requires distillation_logits, and {kind}: use another loss, or a student such as "
            "facebook/deit-tiny-distilled-patch16-224 (--student)."
        )
    if alpha != default and not has_head:
        raise ValueError(f"distillation_alpha={alpha:g} has no effect, because {kind}: leave it out.")
    composed = has_head and "teacher_logits" in loss.requires and "distillation_logits" not in loss.requires
    loss.use_distillation_head(alpha if composed else None)
    return composed or "distillation_logits" in loss.requires
