"""Teacher-free knowledge distillation by a designed teacher (Tf-KD_reg): arXiv 1909.11723."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import DistillationLoss
from .functional import at_least_float32, check_inputs, check_number


def tf_kd_loss(
    student_logits: Tensor,
    labels: Tensor,
    temperature: float = 20.0,
    alpha: float = 0.1,
    multiplier: float = 100.0,
    confidence: float = 0.99,
) -> dict[str, Tensor]:
    """Tf-KD_reg, without the cross entropy (arXiv 1909.11723), as in its code for CIFAR-100:

        alpha m / (B C) sum_b sum_i q_i (log q_i - log S_i)    q = softmax(u / t)

    The designed teacher u has the probability a at the label and (1 - a) / (C - 1) elsewhere; q softens these
    probabilities, not logits. The student has temperature 1, there is no t^2, and the sum is divided by C too. A soft
    label has the mixture of its classes' q.

    Args:
        student_logits, labels: as of `nkd_loss`.
        temperature: t > 0.
        alpha: in [0, 1].
        multiplier: m >= 0.
        confidence: a in [0, 1].

    Returns:
        {"tf_kd"}: a scalar in nats. Errors as of `nkd_loss`.
    """
    _check_numbers(temperature, alpha, multiplier, confidence)
    check_inputs(student_logits, labels)
    log_s = F.log_softmax(at_least_float32(student_logits), dim=1)
    batch, classes = log_s.shape
    labels = torch.zeros_like(log_s).scatter(1, labels[:, None], 1.0) if labels.ndim == 1 else labels
    designed = log_s.new_full((classes,), (1 - confidence) / (classes - 1) / temperature)
    designed[0] = confidence / temperature
    high, low = torch.softmax(designed, dim=0)[:2]  # with the label, and with another class
    q = low + (high - low) * labels.to(log_s.dtype)
    kl = -(torch.special.entr(q) + q * log_s).sum()
    return {"tf_kd": alpha * multiplier * kl / (batch * classes)}


def _check_numbers(temperature: float, alpha: float, multiplier: float, confidence: float) -> None:
    check_number("temperature", temperature, 0, above=True)
    check_number("alpha", alpha, 0, 1)
    check_number("multiplier", multiplier, 0)
    check_number("confidence", confidence, 0, 1)


class TfKDLoss(DistillationLoss):
    """(1 - alpha) * cross entropy + `tf_kd_loss`, with the same ranges."""

    name = "tf_kd"
    title = "teacher-free knowledge distillation (Tf-KD, regularisation)"
    formula = (
        "(1 − α) · CE + α · m / C · KL(q ‖ S), where CE is the cross entropy, S the student, C the number of classes, "
        "and q a designed teacher that is a little surer of the label than of the other classes."
    )
    paper = "1909.11723"
    relations = (
        "At the defaults and 100 classes q is nearly uniform, 0.0105 at the label and 0.01 elsewhere: it is "
        "practically label smoothing of 0.1, for which ce with label_smoothing is enough."
    )
    tags = ("self-distillation",)
    CITATION = """@inproceedings{yuan2020revisiting,
  title={Revisiting Knowledge Distillation via Label Smoothing Regularization},
  author={Yuan, Li and Tay, Francis EH and Li, Guilin and Wang, Tao and Feng, Jiashi},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2020}
}"""
    # Of ResNet-18. temperature, alpha, multiplier of others: MobileNetV2 40, .95, 1; ShuffleNetV2 10, .95, 1;
    # GoogLeNet 40, .1, 50.
    published = {"cifar100": {"temperature": 20.0, "alpha": 0.1, "multiplier": 100.0}}

    def __init__(
        self,
        temperature: float = 20.0,
        alpha: float = 0.1,
        multiplier: float = 100.0,
        confidence: float = 0.99,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(label_smoothing)
        _check_numbers(temperature, alpha, multiplier, confidence)
        self.temperature, self.alpha, self.multiplier, self.confidence = temperature, alpha, multiplier, confidence
        self.label_weight = 1 - alpha

    def method_terms(self, student_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return tf_kd_loss(student_logits, labels, self.temperature, self.alpha, self.multiplier, self.confidence)
