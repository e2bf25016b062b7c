"""WTTM, weighted transformed teacher matching: arXiv 2402.11148."""

import torch.nn.functional as F
from torch import Tensor

from .base import DistillationLoss
from .functional import at_least_float32, check_hyperparameters, check_inputs


def wttm_loss(
    student_logits: Tensor, teacher_logits: Tensor, exponent: float = 0.8, weight: float = 1.6
) -> dict[str, Tensor]:
    """weight * mean over the batch of (sum_i T_i^l) KL(q || S), q_i = T_i^l / sum_j T_j^l (arXiv 2402.11148).

    S and T are the student's and the teacher's probabilities. Only the teacher is softened, by the exponent l, which
    is 1 / temperature, and an image counts the more the less sure the teacher is.

    Args:
        student_logits, teacher_logits: as of `nkd_loss`. Labels are not used.
        exponent: l > 0.
        weight: >= 0.

    Returns:
        {"wttm"}: a scalar in nats, without the cross entropy. Errors as of `nkd_loss`.
    """
    check_hyperparameters(exponent=exponent, weight=weight)
    check_inputs(student_logits, teacher_logits=teacher_logits)
    student = at_least_float32(student_logits)
    log_s = F.log_softmax(student, dim=1)
    powers = exponent * F.log_softmax(teacher_logits.detach().to(student.dtype), dim=1)
    log_q = F.log_softmax(powers, dim=1)
    kl = (log_q.exp() * (log_q - log_s)).sum(1)
    return {"wttm": weight * (powers.logsumexp(1).exp() * kl).mean()}


class WTTMLoss(DistillationLoss):
    """Cross entropy + `wttm_loss`. exponent > 0, weight >= 0."""

    name = "wttm"
    requires = frozenset({"teacher_logits"})
    title = "weighted transformed teacher matching (WTTM)"
    formula = (
        "CE + weight · Σ Tˡ · KL(Tˡ / Σ Tˡ ‖ S), where CE is the cross entropy, S the student, T the teacher, l the "
        "exponent, and Σ the sum over the classes."
    )
    paper = "2402.11148"
    relations = "It is KD with a temperature of the teacher alone and weights of the images."
    tags = ("knowledge-distillation",)
    method_needs_labels = False
    CITATION = """@inproceedings{zheng2024knowledge,
  title={Knowledge Distillation Based on Transformed Teacher Matching},
  author={Zheng, Kaixiang and Yang, En-Hui},
  booktitle={The Twelfth International Conference on Learning Representations},
  year={2024}
}"""
    published = {"imagenet": {"exponent": 0.8, "weight": 1.6}}  # R34→R18; R50→MobileNetV1 0.7 and 3.5
    published_results = {
        "imagenet": "R34→R18 69.90→72.19, R50→MobileNetV1 69.21→73.09",
        "cifar100": "R56→R20 69.06→71.92, R32x4→R8x4 72.50→76.06, W40-2→W16-2 73.26→76.37, V13→V8 70.36→74.44",
    }

    def __init__(self, exponent: float = 0.8, weight: float = 1.6, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing)
        check_hyperparameters(exponent=exponent, weight=weight)
        self.exponent, self.weight = exponent, weight

    def method_terms(self, student_logits: Tensor, labels: Tensor, teacher_logits: Tensor) -> dict[str, Tensor]:
        return wttm_loss(student_logits, teacher_logits, self.exponent, self.weight)
