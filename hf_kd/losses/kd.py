"""Knowledge distillation of Hinton, Vinyals and Dean, arXiv 1503.02531."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .base import DistillationLoss
from .functional import at_least_float32, check_hyperparameters, check_inputs


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0, weight: float = 1.0
) -> dict[str, Tensor]:
    """weight * t^2 * KL(softmax(teacher / t) || softmax(student / t)), mean over the batch (arXiv 1503.02531).

    Args:
        student_logits, teacher_logits: as of `nkd_loss`.
        temperature: t > 0; t^2 keeps the gradient's size independent of it.
        weight: >= 0.

    Returns:
        {"kd"}: a scalar in nats, without the cross entropy. Errors as of `nkd_loss`.
    """
    check_hyperparameters(temperature=temperature, weight=weight)
    check_inputs(student_logits, teacher_logits=teacher_logits)
    student = at_least_float32(student_logits)
    teacher = teacher_logits.detach().to(student.dtype)
    log_s = F.log_softmax(student / temperature, dim=1)
    log_t = F.log_softmax(teacher / temperature, dim=1)
    kl = (log_t.exp() * (log_t - log_s)).sum(1).mean()  # F.kl_div is no faster, and vmap has no rule for it
    return {"kd": weight * temperature**2 * kl}


class KDLoss(DistillationLoss):
    """ce_weight * cross entropy + `kd_loss`. temperature > 0, label_smoothing in [0, 1].

    Without `ce_weight` it is 1 - weight, with weight in [0, 1]; with it, both are any numbers >= 0. With
    `logit_standardization` the teacher term sees `standardize_logits` of both.
    """

    name = "kd"
    requires = frozenset({"teacher_logits"})
    title = "knowledge distillation (KD)"
    formula = (
        "(1 − weight) · CE + weight · t² · KL(teacher ‖ student), both softened by the temperature t, where CE is the "
        "cross entropy."
    )
    paper = "1503.02531"
    relations = (
        "NKD and DKD weigh the label's class and the others apart. Papers of this field report as KD what differs in "
        "weights and temperature. kl_only is KD without the cross entropy."
    )
    tags = ("knowledge-distillation",)
    method_needs_labels = False
    CITATION = """@article{hinton2015distilling,
  title={Distilling the Knowledge in a Neural Network},
  author={Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff},
  journal={arXiv preprint arXiv:1503.02531},
  year={2015}
}"""
    # What papers of this field report as "KD", not arXiv 1503.02531 itself.
    published = {
        "imagenet": {"temperature": 1.0, "weight": 0.5},
        "cifar100": {"temperature": 4.0, "weight": 0.9},
    }
    published_results = {
        "imagenet": "R34→R18 70.66 to 71.81 in six codebases, from baselines of 69.8 to 70.3",
        "cifar100": "R56→R20 69.06→70.66, R32x4→R8x4 72.50→73.33, W40-2→W16-2 73.26→74.92, V13→V8 70.36→72.98; with "
        "logit standardization 71.43, 76.62, 76.11, 74.36",
    }

    def __init__(
        self,
        temperature: float = 4.0,
        weight: float = 0.9,
        label_smoothing: float = 0.0,
        ce_weight: float | None = None,
        logit_standardization: bool = False,
    ) -> None:
        super().__init__(label_smoothing)
        check_hyperparameters(temperature=temperature, weight=weight)
        if ce_weight is not None:
            check_hyperparameters(ce_weight=ce_weight)
        elif weight > 1:
            raise ValueError(
                f"weight={weight!r} is not accepted without ce_weight, which is then 1 - weight: pass a number >= 0 "
                "and <= 1, or ce_weight= too"
            )
        self.temperature, self.weight, self.ce_weight = temperature, weight, ce_weight
        self.logit_standardization = logit_standardization
        self.label_weight = 1 - weight if ce_weight is None else ce_weight

    def method_terms(self, student_logits: Tensor, labels: Tensor, teacher_logits: Tensor) -> dict[str, Tensor]:
        return kd_loss(student_logits, teacher_logits, self.temperature, self.weight)

    @classmethod
    def describe(cls, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
        description = super().describe(hyperparameters)
        if hyperparameters.get("ce_weight") is not None:
            description["formula"] = description["formula"].replace("(1 − weight)", "ce_weight")
        return description
