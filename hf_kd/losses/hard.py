"""Hard-label distillation, as in DeiT: arXiv 2012.12877."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .base import DistillationLoss
from .functional import check_inputs, check_number, cross_entropy


def hard_loss(student_logits: Tensor, teacher_logits: Tensor, weight: float = 0.5) -> dict[str, Tensor]:
    """weight * mean over the batch of -log S at the teacher's most probable class (arXiv 2012.12877, equation 3).

    Args:
        student_logits, teacher_logits: as of `nkd_loss`. Labels are not used: under mixup too, the teacher's class is
            the one that it sees in the mixed image. Of equal logits the class of the lower index is taken.
        weight: >= 0.

    Returns:
        {"hard"}: a scalar in nats, without the cross entropy. Errors as of `nkd_loss`.
    """
    check_number("weight", weight, 0)
    check_inputs(student_logits, teacher_logits=teacher_logits)
    return {"hard": weight * cross_entropy(student_logits, teacher_logits.argmax(1), label_smoothing=0.0)}


class HardLoss(DistillationLoss):
    """(1 - weight) * cross entropy + `hard_loss`, with weight in [0, 1]."""

    name = "hard"
    requires = frozenset({"teacher_logits"})
    title = "hard-label distillation"
    formula = (
        "(1 − weight) · CE + weight · CE(arg max T), the cross entropy with the label and with the teacher's most "
        "probable class."
    )
    paper = "2012.12877"
    relations = "KD and NKD use the teacher's other probabilities too; this needs nothing but its answers."
    tags = ("knowledge-distillation",)
    method_needs_labels = False
    CITATION = """@inproceedings{touvron2021training,
  title={Training Data-Efficient Image Transformers \\& Distillation through Attention},
  author={Touvron, Hugo and Cord, Matthieu and Douze, Matthijs and Massa, Francisco and Sablayrolles, Alexandre and
          J{\\'e}gou, Herv{\\'e}},
  booktitle={International Conference on Machine Learning},
  year={2021}
}"""
    published = {"imagenet_deit": {"weight": 0.5}}

    def __init__(self, weight: float = 0.5, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing)
        check_number("weight", weight, 0, 1)
        self.weight, self.label_weight = weight, 1 - weight

    def use_distillation_head(self, alpha: float | None) -> None:
        if alpha is not None and self.weight not in (0.5, alpha):  # 0.5 is the default
            raise ValueError(
                f"weight={self.weight} has no effect on a student with a distillation head: set "
                f"distillation_alpha={self.weight} (--distillation_alpha {self.weight}), which takes its place"
            )
        super().use_distillation_head(alpha)

    def distillation_head_terms(
        self, student_logits: Tensor, labels: Tensor, teacher_logits: Tensor
    ) -> dict[str, Tensor]:
        return hard_loss(student_logits, teacher_logits, weight=1.0)

    @classmethod
    def describe(cls, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
        description = super().describe(hyperparameters)
        if hyperparameters.get("distillation_alpha") is not None:
            description["formula"] = description["formula"].replace("(1 − weight) · ", "").replace("weight · ", "")
        return description

    def method_terms(self, student_logits: Tensor, labels: Tensor, teacher_logits: Tensor) -> dict[str, Tensor]:
        return hard_loss(student_logits, teacher_logits, self.weight)
