"""USKD, self-distillation without a teacher by customised soft labels: arXiv 2303.13005."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .base import DistillationLoss
from .functional import (
    Targets,
    at_least_float32,
    check_hyperparameters,
    check_inputs,
    cross_entropy,
    mask_targets,
    readable,
    top_targets,
    warn_if_no_non_target,
)
from .nkd import NKDLoss


def uskd_loss(
    student_logits: Tensor,
    weak_logits: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 0.1,
    mu: float = 0.005,
    target_in_rank: bool = True,
    reduce_mean: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """USKD, without the cross entropy (arXiv 2303.13005): mean over the batch of

        target      -alpha sum_k P_k log S_k       P_k = V_k + S_k^2 - mean_batch(S_k^2), k the targets
        non_target  -beta sum_i N(Z)_i log N(S)_i  Z_i = 1 / position of class i by falling N(W)_i + N(S)_i
        weak        -mu sum_i V'_i log W_i         V' = 0.9 V + 0.1 / C

    S and W are the student's and the auxiliary head's probabilities; N and the targets are those of `nkd_loss` with
    soft_labels="two_hot". P and Z carry no gradient, so the auxiliary head learns from its own term only.

    mean_batch is a batch statistic: the loss of an image changes with batch size, gradient accumulation and number of
    ranks. Of the second target it is over the rows that have one. With integer labels P has batch mean 1, so that
    ce + target is close to twice the cross entropy: compare with a run at doubled cross entropy too.

    Args:
        student_logits, labels: as of `nkd_loss`.
        weak_logits: (B, C), of a linear head on the student's pooled intermediate feature; trained by this loss.
        alpha, beta, mu: >= 0, weights of the three terms.
        target_in_rank: True, as the official code does: all C classes are ranked, so a target in first place leaves 2
            as the best non-target's position. False: only non-targets take positions.
        reduce_mean: averages a 1-D tensor over ranks (an all-reduce mean). It gets the sum of S_k^2 over the batch for
            each target k, and how many rows have it, so that ranks may have unequal batches. All ranks must call with
            the same kind of labels.

    Returns:
        {"target", "non_target", "weak"}: scalars in nats. Errors as of `nkd_loss`.
    """
    check_hyperparameters(alpha=alpha, beta=beta, mu=mu)
    check_inputs(student_logits, labels, weak_logits=weak_logits)
    student = at_least_float32(student_logits)
    weak = weak_logits.to(student.dtype)
    targets = top_targets(labels, student.dtype)
    warn_if_no_non_target(targets, student.shape[1])

    log_s = F.log_softmax(student, dim=1).gather(1, targets.index)
    soft_target = soft_targets(log_s.detach().exp(), targets, reduce_mean)
    if student.shape[1] == 2:
        non_target = (student * 0).sum()
    else:
        zipf = zipf_weights(student.detach(), weak.detach(), targets.index, target_in_rank)
        per_row = F.cross_entropy(mask_targets(student, targets.index), zipf, reduction="none")
        non_target = (per_row / zipf.sum(1)).mean()
    return {
        "target": -alpha * (soft_target * log_s).sum(1).mean(),
        "non_target": beta * non_target,
        "weak": mu * cross_entropy(weak, labels, label_smoothing=0.1),
    }


def soft_targets(s: Tensor, targets: Targets, reduce_mean: Callable[[Tensor], Tensor] | None) -> Tensor:
    """P (B, K) from the student's target probabilities s (B, K); 0 where there is no second target."""
    square = s.square() * targets.active
    # Sums and counts are averaged over ranks, then divided: exact however the rows are spread.
    sums = torch.cat([square.sum(0), targets.active.sum(0, dtype=s.dtype)])
    if reduce_mean is not None:
        sums = reduce_mean(sums)
    squares, rows = sums.chunk(2)
    means = squares / rows.clamp_min(torch.finfo(s.dtype).tiny)
    return torch.where(targets.active, targets.value + square - means, 0.0)


def zipf_weights(student: Tensor, weak: Tensor, index: Tensor, target_in_rank: bool) -> Tensor:
    """Z (B, C): 1 / position of each class by falling N(S) + N(W), 0 at the targets `index` (B, K).

    Of equal classes the one of the lower index comes first.
    """

    def log_n(logits: Tensor) -> Tensor:
        # At a target this is log S_t / (1 - S_t), the place that the official ranking gives it.
        return logits - torch.logsumexp(mask_targets(logits, index), dim=1, keepdim=True)

    # log(N(S) + N(W)) orders as the sum does, and neither overflows at a target nor ties in the tail.
    rank = torch.logaddexp(log_n(student), log_n(weak))
    if not target_in_rank:
        rank = rank.scatter(1, index, -torch.inf)
    if rank.device.type == "cpu" and not torch.compiler.is_compiling() and readable(rank) is rank:
        order = torch.from_numpy(_ascending(-rank.numpy()))
    else:
        order = rank.argsort(dim=1, descending=True, stable=True)
    weight = 1 / torch.arange(1, rank.shape[1] + 1, device=rank.device, dtype=rank.dtype)
    return rank.scatter(1, order, weight.expand_as(rank)).scatter(1, index, 0.0)


def _ascending(values: np.ndarray) -> np.ndarray:
    """Indices (B, C) that sort each row; of equal values the lower index comes first, as in a stable sort.

    numpy's vectorised sort is many times faster than torch's. It is not stable: only rows with ties are sorted again.
    """
    order = np.argsort(values, axis=1)
    ranked = np.take_along_axis(values, order, axis=1)
    tied = (ranked[:, 1:] == ranked[:, :-1]).any(axis=1)
    if tied.any():
        order[tied] = np.argsort(values[tied], axis=1, kind="stable")
    return order


class USKDLoss(DistillationLoss):
    """Cross entropy + `uskd_loss`. alpha, beta, mu >= 0; `reduce_mean` may be set on the module later."""

    name = "uskd"
    requires = frozenset({"aux_logits"})
    title = "universal self-knowledge distillation (USKD)"
    formula = (
        "CE − α · P · log S at the target class + β · CE(N(Z), N(S)) + μ · CE of an auxiliary head, where CE is the "
        "cross entropy, S the student, P its soft target, Z Zipf's law over the ranking by S and by the auxiliary "
        "head, and N renormalises over the other classes."
    )
    paper = NKDLoss.paper
    relations = "With a teacher use NKD. Compare it with twice the cross entropy (2xce) and with label smoothing."
    tags = ("self-distillation",)
    CITATION = NKDLoss.CITATION
    # With integer labels P has batch mean 1, so that ce + target is nearly twice the cross entropy.
    controls = {"2xce": {"loss": "ce", "weight": 2.0}}
    # One set for all ImageNet models.
    published = {
        "imagenet": {"alpha": 1.0, "beta": 0.1, "mu": 0.005},
        "cifar100": {"alpha": 0.1, "beta": 0.1, "mu": 0.1},
    }
    published_results = {
        "imagenet": "MobileNetV1 69.21→70.38, V2 71.86→72.41, ShuffleNetV2 69.55→70.30, R18 69.90→70.79, "
        "R50 76.55→77.07, R101 77.97→78.54, RegNetX-1.6GF 76.84→77.30, Swin-T 81.18→81.49, DeiT-T 74.42→74.97",
        "cifar100": "R18 78.58→79.90",
    }

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 0.1,
        mu: float = 0.005,
        target_in_rank: bool = True,
        reduce_mean: Callable[[Tensor], Tensor] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(label_smoothing)
        check_hyperparameters(alpha=alpha, beta=beta, mu=mu)
        self.alpha, self.beta, self.mu, self.target_in_rank = alpha, beta, mu, target_in_rank
        self.reduce_mean = reduce_mean

    def method_terms(self, student_logits: Tensor, labels: Tensor, aux_logits: Tensor) -> dict[str, Tensor]:
        weights = self.alpha, self.beta, self.mu
        return uskd_loss(student_logits, aux_logits, labels, *weights, self.target_in_rank, self.reduce_mean)
