"""Decoupled knowledge distillation, arXiv 2203.08679."""

import math

import torch.nn.functional as F
from torch import Tensor

from .base import DistillationLoss
from .functional import at_least_float32, check_hyperparameters, check_inputs, mask_targets, top_targets


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    alpha: float = 1.0,
    beta: float = 0.5,
) -> dict[str, Tensor]:
    """DKD, without the cross entropy (arXiv 2203.08679): mean over the batch of

        target      alpha t^2 KL(b(T) || b(S))  b: the target's probability and the sum of all others'
        non_target  beta t^2 KL(N(T) || N(S))   N: the probabilities of the other classes, divided by their sum

    S and T are the student's and the teacher's probabilities at temperature t. The original is defined for integer
    labels. A soft label of two classes (mixup, cutmix) has two targets here, as in `nkd_loss`: b then has their two
    probabilities and the rest, and N leaves both out. With beta = 1 - (the targets' probability under T) and
    alpha = 1 the sum of both terms is `kd_loss`, for any number of targets.

    Args:
        student_logits, teacher_logits, labels: as of `nkd_loss`.
        temperature: t > 0.
        alpha, beta: >= 0.

    Returns:
        {"target", "non_target"}: scalars in nats, without a warm-up factor. Errors as of `nkd_loss`.
    """
    check_hyperparameters(temperature=temperature, alpha=alpha, beta=beta)
    check_inputs(student_logits, labels, teacher_logits=teacher_logits)
    student = at_least_float32(student_logits)
    teacher = teacher_logits.detach().to(student.dtype)
    targets = top_targets(labels, student.dtype)

    log_s, log_t = (F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
    target_s, target_t = (log_p.gather(1, targets.index) for log_p in (log_s, log_t))
    masked_s, masked_t = (mask_targets(log_p, targets.index) for log_p in (log_s, log_t))
    rest_s, rest_t = (masked.logsumexp(1) for masked in (masked_s, masked_t))  # of log(1 - p), finite at any margin
    target = (targets.active * target_t.exp() * (target_t - target_s)).sum(1) + rest_t.exp() * (rest_t - rest_s)
    others_s, others_t = (F.log_softmax(masked, dim=1) for masked in (masked_s, masked_t))
    soft = others_t.exp().scatter(1, targets.index, 0.0)  # all 0 where no other class is left
    non_target = (soft * (others_t - others_s)).sum(1)
    scale = temperature**2
    return {"target": alpha * scale * target.mean(), "non_target": beta * scale * non_target.mean()}


class DKDLoss(DistillationLoss):
    """Cross entropy + w(e) * `dkd_loss`, with w(e) = min(e / warmup_epochs, 1) in epoch e, counted from 1.

    temperature > 0; alpha, beta, warmup_epochs >= 0; without warmup_epochs w is 1. With `logit_standardization` the
    teacher terms see `standardize_logits` of both.
    """

    name = "dkd"
    requires = frozenset({"teacher_logits"})
    title = "decoupled knowledge distillation (DKD)"
    formula = (
        "CE + w · (α · t² · KL(b(T) ‖ b(S)) + β · t² · KL(N(T) ‖ N(S))), both softened by the temperature t, where CE "
        "is the cross entropy, S the student, T the teacher, b the probability of the target class and that of all "
        "others, N renormalises over the other classes, and w grows to 1 over the first epochs of a warm-up."
    )
    paper = "2203.08679"
    relations = "NKD takes the label's term without temperature and has one weight less to tune."
    tags = ("knowledge-distillation",)
    CITATION = """@inproceedings{zhao2022decoupled,
  title={Decoupled Knowledge Distillation},
  author={Zhao, Borui and Cui, Quan and Song, Renjie and Qiu, Yiyu and Liang, Jiajun},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2022}
}"""
    # On ImageNet beta is 2 for R50→MobileNetV1; on CIFAR-100 2 for R56→R20 and R110→R32, 6 for W40-2→* and V13→*.
    published = {
        "imagenet": {"temperature": 1.0, "alpha": 1.0, "beta": 0.5},
        "cifar100": {"temperature": 4.0, "alpha": 1.0, "beta": 8.0, "warmup_epochs": 20},
    }
    published_results = {
        "imagenet": "R34→R18 69.90→71.70, R50→MobileNetV1 69.21→72.05",
        "cifar100": "R56→R20 69.06→71.97, R32x4→R8x4 72.50→76.32, W40-2→W16-2 73.26→76.24, V13→V8 70.36→74.68; "
        "with logit standardization R32x4→R8x4 77.01",
    }

    def __init__(
        self,
        temperature: float = 1.0,
        alpha: float = 1.0,
        beta: float = 0.5,
        warmup_epochs: int = 0,
        label_smoothing: float = 0.0,
        logit_standardization: bool = False,
    ) -> None:
        super().__init__(label_smoothing)
        check_hyperparameters(temperature=temperature, alpha=alpha, beta=beta, warmup_epochs=warmup_epochs)
        self.temperature, self.alpha, self.beta, self.warmup_epochs = temperature, alpha, beta, warmup_epochs
        self.logit_standardization = logit_standardization

    def method_terms(self, student_logits: Tensor, labels: Tensor, teacher_logits: Tensor) -> dict[str, Tensor]:
        epoch = math.floor(self.progress.epoch) + 1
        factor = min(epoch / self.warmup_epochs, 1.0) if self.warmup_epochs else 1.0
        terms = dkd_loss(student_logits, teacher_logits, labels, self.temperature, self.alpha, self.beta)
        return {name: factor * term for name, term in terms.items()}
