"""DIST, knowledge distillation by correlations: arXiv 2205.10536."""

from collections.abc import Callable

import torch
from torch import Tensor

from .base import DistillationLoss
from .functional import at_least_float32, check_hyperparameters, check_inputs


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    beta: float = 2.0,
    gamma: float = 2.0,
    reduce_sum: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """DIST, without the cross entropy (arXiv 2205.10536):

        inter  beta t^2 (1 - mean over images of r(S_b, T_b))
        intra  gamma t^2 (1 - mean over classes of r(S_c, T_c))

    S and T (B, C) are the student's and the teacher's probabilities at temperature t, S_b one image's, S_c one class's
    over the batch; r(x, y) = a·b / (|a| |b| + 1e-8), with a and b the centred x and y, is Pearson's correlation.

    intra is a batch statistic: it changes with the batch size, and with gradient accumulation it is that of each
    micro-batch, as USKD's mean. Of a single image it is constant.

    Args:
        student_logits, teacher_logits: as of `nkd_loss`. Labels are not used.
        temperature: t > 0.
        beta, gamma: >= 0.
        reduce_sum: sums a tensor over ranks, differentiably; intra is then over the images of all ranks. It is called
            twice: with sums over the images for each class, and the number of images.

    Returns:
        {"inter", "intra"}: scalars in [0, 2 beta t^2] and [0, 2 gamma t^2]. Errors as of `nkd_loss`.
    """
    check_hyperparameters(temperature=temperature, beta=beta, gamma=gamma)
    check_inputs(student_logits, teacher_logits=teacher_logits)
    student = at_least_float32(student_logits)
    s = torch.softmax(student / temperature, dim=1)
    t = torch.softmax(teacher_logits.detach().to(student.dtype) / temperature, dim=1)
    total = (lambda sums: sums) if reduce_sum is None else reduce_sum

    a, b = s - s.mean(1, keepdim=True), t - t.mean(1, keepdim=True)
    inter = _correlation((a * b).sum(1), (a * a).sum(1), (b * b).sum(1))
    # Centred sums do not change with the means to first order, so that the means need no gradient. Sums that are not
    # centred would lose the digits of small probabilities.
    here = torch.stack([s.detach().sum(0), t.sum(0), torch.full_like(t[0], s.shape[0])])
    sum_s, sum_t, images = total(here)
    a, b = s - sum_s / images, t - sum_t / images
    intra = _correlation(*total(torch.stack([(a * b).sum(0), (a * a).sum(0), (b * b).sum(0)])))
    scale = temperature**2
    return {"inter": beta * scale * (1 - inter.mean()), "intra": gamma * scale * (1 - intra.mean())}


def _correlation(product: Tensor, square_a: Tensor, square_b: Tensor) -> Tensor:
    """a·b / (|a| |b| + 1e-8); its gradient at a = 0 is 0."""
    tiny = torch.finfo(product.dtype).tiny
    return product / (square_a.clamp_min(tiny).sqrt() * square_b.clamp_min(tiny).sqrt() + 1e-8)


class DISTLoss(DistillationLoss):
    """Cross entropy + `dist_loss`. temperature > 0; beta, gamma >= 0."""

    name = "dist"
    requires = frozenset({"teacher_logits"})
    title = "distillation by correlations (DIST)"
    formula = (
        "CE + β · t² · (1 − r over the classes of an image) + γ · t² · (1 − r over the images for a class), where CE "
        "is the cross entropy and r Pearson's correlation of the student's and the teacher's probabilities at "
        "temperature t, a mean over images and over classes."
    )
    paper = "2205.10536"
    relations = "Where batches hold few images of a class, its second term says little: use NKD or KD."
    tags = ("knowledge-distillation",)
    method_needs_labels = False
    CITATION = """@inproceedings{huang2022knowledge,
  title={Knowledge Distillation from A Stronger Teacher},
  author={Huang, Tao and You, Shan and Wang, Fei and Qian, Chen and Xu, Chang},
  booktitle={Advances in Neural Information Processing Systems},
  year={2022}
}"""
    # On CIFAR-100 the paper's text has beta and gamma 1; its code's are 2 in effect.
    published = {
        "imagenet": {"temperature": 1.0, "beta": 2.0, "gamma": 2.0},
        "cifar100": {"temperature": 4.0, "beta": 2.0, "gamma": 2.0},
    }
    published_results = {
        "imagenet": "R34→R18 69.90→72.07, R50→MobileNetV1 69.21→73.24",
        "cifar100": "R56→R20 69.06→71.75, R32x4→R8x4 72.50→76.31",
    }

    def __init__(
        self, temperature: float = 1.0, beta: float = 2.0, gamma: float = 2.0, label_smoothing: float = 0.0
    ) -> None:
        super().__init__(label_smoothing)
        check_hyperparameters(temperature=temperature, beta=beta, gamma=gamma)
        self.temperature, self.beta, self.gamma = temperature, beta, gamma

    def method_terms(self, student_logits: Tensor, labels: Tensor, teacher_logits: Tensor) -> dict[str, Tensor]:
        return dist_loss(student_logits, teacher_logits, self.temperature, self.beta, self.gamma, self.reduce_sum)
