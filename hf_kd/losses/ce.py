"""Cross entropy with hard or soft labels: the plain baseline, and the first term of every other loss."""

from torch import Tensor

from .base import DistillationLoss
from .functional import check_inputs, check_number, cross_entropy


def ce_loss(
    student_logits: Tensor, labels: Tensor, weight: float = 1.0, label_smoothing: float = 0.0
) -> dict[str, Tensor]:
    """Cross entropy, weight * mean_batch(-sum_i V_i log S_i).

    Args:
        student_logits, labels: as of `nkd_loss`; V are the labels as they stand.
        weight: >= 0.
        label_smoothing: e in [0, 1]; V becomes (1 - e) V + e / C (Szegedy et al. 2016), soft labels too.

    Returns:
        {"ce"}: a scalar in nats. Errors as of `nkd_loss`.
    """
    check_number("weight", weight, 0)
    check_number("label_smoothing", label_smoothing, 0, 1)
    check_inputs(student_logits, labels)
    return {"ce": weight * cross_entropy(student_logits, labels, label_smoothing)}


class CELoss(DistillationLoss):
    """`ce_loss` as a module: training without distillation. weight >= 0, label_smoothing in [0, 1]."""

    name = "ce"
    title = "plain cross entropy"
    formula = "weight · CE, where CE is the cross entropy."
    relations = "The baseline of every comparison; 2xce is twice its weight, label_smoothing its smoothing by 0.1."
    CITATION = """@inproceedings{szegedy2016rethinking,
  title={Rethinking the Inception Architecture for Computer Vision},
  author={Szegedy, Christian and Vanhoucke, Vincent and Ioffe, Sergey and Shlens, Jon and Wojna, Zbigniew},
  booktitle={Proceedings of the IEEE Conference on Computer Vision and Pattern Recognition},
  year={2016}
}"""
    published = {"imagenet": {}, "cifar100": {}}  # the baselines of arXiv 2303.13005 are plain cross entropy

    def __init__(self, weight: float = 1.0, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing)
        check_number("weight", weight, 0)
        self.weight = self.label_weight = weight
