"""NKD, normalized knowledge distillation with a teacher: arXiv 2303.13005."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import DistillationLoss
from .functional import at_least_float32, check_inputs, check_number, mask_targets, top_targets, warn_if_no_non_target

SOFT_LABELS = ("two_hot", "argmax")


def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    gamma: float = 1.5,
    soft_labels: str = "two_hot",
) -> dict[str, Tensor]:
    """NKD, without the cross entropy (arXiv 2303.13005): mean over the batch of

        target      -sum_k V_k T_k log S_k                                       over the targets k, no temperature
        non_target  -gamma t^2 sum_i N(softmax(T/t))_i log N(softmax(S/t))_i     over the other classes i

    N renormalises over the non-target classes. With C = 2 (or C = 3 and two targets) non_target is exactly 0, which
    is warned of once.

    Args:
        student_logits: (B, C), any floating dtype; computed in float32.
        teacher_logits: (B, C), same classes in the same order; gets no gradient.
        labels: int64 (B,) in [0, C), or floating point (B, C). One-hot rows equal integers.
        temperature: t > 0, of the non-target term only.
        gamma: >= 0, weight of the non-target term.
        soft_labels: how to read (B, C) labels. "two_hot" (default): the largest label value is a target, and so is
            the second-largest if it exceeds the third (of mixup and cutmix both images count, the uniform part of
            label smoothing does not); V_k is the label value. "argmax": the official code's reading, the largest
            alone, with V = 1; the second image of a mixed pair then counts as a non-target.

    Returns:
        {"target", "non_target"}: scalars in nats.

    Raises:
        ValueError: wrong shapes, dtypes, numbers, or (on CPU) values.
    """
    _check_numbers(temperature, gamma, soft_labels)
    check_inputs(student_logits, labels, teacher_logits=teacher_logits)
    student = at_least_float32(student_logits)
    teacher = teacher_logits.detach().to(student.dtype)
    targets = top_targets(_read(labels, soft_labels), student.dtype)
    warn_if_no_non_target(targets, student.shape[1])

    log_s = F.log_softmax(student, dim=1).gather(1, targets.index)
    t = torch.softmax(teacher, dim=1).gather(1, targets.index)
    target = -(targets.value * t * log_s).sum(1).mean()
    if student.shape[1] == 2:
        return {"target": target, "non_target": (student * 0).sum()}
    soft = torch.softmax(mask_targets(teacher, targets.index, temperature), dim=1)
    non_target = F.cross_entropy(mask_targets(student, targets.index, temperature), soft)
    return {"target": target, "non_target": gamma * temperature**2 * non_target}


def _read(labels: Tensor, soft_labels: str) -> Tensor:
    return labels.argmax(1) if soft_labels == "argmax" and labels.ndim == 2 else labels


def _check_numbers(temperature: float, gamma: float, soft_labels: str) -> None:
    check_number("temperature", temperature, 0, above=True)
    check_number("gamma", gamma, 0)
    if soft_labels not in SOFT_LABELS:
        raise ValueError(f"soft_labels={soft_labels!r} is not accepted: pass one of {', '.join(SOFT_LABELS)}")


class NKDLoss(DistillationLoss):
    """Cross entropy + `nkd_loss`. temperature > 0, gamma >= 0, soft_labels "two_hot" or "argmax"."""

    name = "nkd"
    requires = frozenset({"teacher_logits"})
    title = "normalized knowledge distillation (NKD)"
    formula = (
        "CE − T · log S at the target class + γ · t² · CE(N(T), N(S)), where CE is the cross entropy, S the student, "
        "T the teacher, t the temperature of the last term, and N renormalises over the other classes."
    )
    paper = "2303.13005"
    relations = "Compare it with KD of equal weights and temperature. Without a teacher use USKD."
    tags = ("knowledge-distillation",)
    CITATION = """@inproceedings{yang2023knowledge,
  title={From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and
         Customized Soft Labels},
  author={Yang, Zhendong and Zeng, Ailing and Li, Zhe and Zhang, Tianke and Yuan, Chun and Li, Yu},
  booktitle={Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year={2023}
}"""
    # DeiT students have their own gamma.
    published = {
        "imagenet": {"temperature": 1.0, "gamma": 1.5},
        "imagenet_deit": {"temperature": 1.0, "gamma": 1.0},
        "cifar100": {"temperature": 3.0, "gamma": 3.5},
    }
    published_results = {
        "imagenet": "R34→R18 69.90→71.96, R50→MobileNetV1 69.21→72.58",
        "imagenet_deit": "DeiT-III-S→DeiT-T 74.42→76.68, DeiT-III-L→DeiT-B 81.76→84.96",
        "cifar100": "R56→R20 69.06→71.18, R32x4→R8x4 72.50→76.35, W40-2→W16-2 73.26→75.43",
    }

    def __init__(
        self, temperature: float = 1.0, gamma: float = 1.5, soft_labels: str = "two_hot", label_smoothing: float = 0.0
    ) -> None:
        super().__init__(label_smoothing)
        _check_numbers(temperature, gamma, soft_labels)
        self.temperature, self.gamma, self.soft_labels = temperature, gamma, soft_labels

    def diagnostics(self, terms: Mapping[str, Tensor], labels: Tensor, **inputs: Tensor | None) -> dict[str, Tensor]:
        """non_target_kl: non_target without gamma t^2 times the entropy of N(softmax(T/t)), which the student cannot
        change. It is gamma t^2 KL(N(softmax(T/t)) || N(softmax(S/t))), with a distillation head times alpha, and goes
        to 0 where the student learns."""
        teacher = inputs["teacher_logits"]
        assert teacher is not None  # as `forward` has seen
        teacher = at_least_float32(teacher)
        if teacher.shape[1] == 2:
            return {"non_target_kl": terms["non_target"]}
        index = top_targets(_read(labels, self.soft_labels), teacher.dtype).index
        soft = torch.softmax(mask_targets(teacher, index, self.temperature), dim=1)
        entropy = torch.special.entr(soft).sum(1).mean()
        weight = self.method_weight * self.gamma * self.temperature**2
        return {"non_target_kl": terms["non_target"] - weight * entropy}

    def method_terms(self, student_logits: Tensor, labels: Tensor, teacher_logits: Tensor) -> dict[str, Tensor]:
        return nkd_loss(student_logits, teacher_logits, labels, self.temperature, self.gamma, self.soft_labels)
