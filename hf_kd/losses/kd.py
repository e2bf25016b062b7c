"""Knowledge distillation of Hinton, Vinyals and Dean, arXiv 1503.02531."""

import torch.nn.functional as F
from torch import Tensor

from .base import DistillationLoss, at_least_float32, check_inputs, check_number


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0, weight: float = 1.0
) -> dict[str, Tensor]:
    """weight * t^2 * KL(softmax(teacher / t) || softmax(student / t)), mean over the batch (arXiv 1503.02531).

    Args:
        student_logits: (B, C), any floating dtype; computed in float32.
        teacher_logits: (B, C), same classes in the same order; gets no gradient.
        temperature: t > 0; t^2 keeps the gradient's size independent of it.
        weight: >= 0.

    Returns:
        {"kd"}: a scalar in nats, without the cross entropy.

    Raises:
        ValueError: wrong shapes, dtypes, numbers, or (on CPU) values.
    """
    check_number("temperature", temperature, 0, above=True)
    check_number("weight", weight, 0)
    check_inputs(student_logits, teacher_logits=teacher_logits)
    student = at_least_float32(student_logits)
    teacher = teacher_logits.detach().to(student.dtype)
    kl = F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return {"kd": weight * temperature**2 * kl}


class KDLoss(DistillationLoss):
    """(1 - weight) * cross entropy + `kd_loss`. temperature > 0, weight and label_smoothing in [0, 1]."""

    name = "kd"
    needs_teacher = True
    requires = frozenset({"teacher_logits"})
    CITATION = """@article{hinton2015distilling,
  title={Distilling the Knowledge in a Neural Network},
  author={Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff},
  journal={arXiv preprint arXiv:1503.02531},
  year={2015}
}"""
    # The numbers that papers of this field report as "KD", not those of arXiv 1503.02531 itself.
    PRESETS = {
        "imagenet": {"temperature": 1.0, "weight": 0.5},
        "cifar100": {"temperature": 4.0, "weight": 0.9},
    }

    def __init__(self, temperature: float = 4.0, weight: float = 0.9, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing)
        check_number("temperature", temperature, 0, above=True)
        check_number("weight", weight, 0, 1)
        self.temperature, self.weight, self.ce_weight = temperature, weight, 1 - weight

    def method_terms(
        self, student_logits: Tensor, labels: Tensor, teacher_logits: Tensor | None, weak_logits: Tensor | None
    ) -> dict[str, Tensor]:
        return kd_loss(student_logits, teacher_logits, self.temperature, self.weight)
