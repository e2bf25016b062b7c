"""Top-k accuracy, calibration error, and agreement with a teacher, whole or streamed.

An evaluation over several ranks gathers `sample_statistics` and feeds them to a `ClassificationMeter`.
"""

from typing import Any

import torch
from torch import Tensor

from ..losses.functional import at_least_float32

IGNORED_LABEL = -100
"""An image with this label counts nowhere (padding of the last batch, unlabelled images)."""

COLUMNS = ("weight", "loss", "top1", "top5", "confidence", "label")
TEACHER_COLUMNS = ("agreement", "kl", "teacher_top1")


def top_k_accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of the images whose class is among the k largest logits, in [0, 1].

    Args:
        logits: (B, C), any float dtype.
        labels: (B,), integers in [0, C), or -100 for an image that is left out.
        k: at least 1; above C it means C. Of equal logits the lower class index ranks first, as in argmax.

    Raises:
        ValueError: the shapes do not fit, k < 1, or no image has a label.
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    logits, labelled = _checked(logits, labels), labels != IGNORED_LABEL
    return _mean(_rank_below(logits[labelled], labels[labelled], k))


def agreement(student_logits: Tensor, teacher_logits: Tensor) -> float:
    """Share of the images, in [0, 1], for which student and teacher predict the same class (Stanton et al. 2021).

    Both logits are (B, C) with the same class order; ValueError if the shapes differ or B is 0.
    """
    student, teacher = _checked_pair(student_logits, teacher_logits)
    return _mean(student.argmax(-1) == teacher.argmax(-1))


def teacher_kl(student_logits: Tensor, teacher_logits: Tensor) -> float:
    """Mean over the images of KL(teacher || student) at temperature 1, in nats (Kullback, Leibler 1951).

    Args and errors as of `agreement`.
    """
    return _mean(_kl(*_checked_pair(student_logits, teacher_logits)))


def expected_calibration_error(logits: Tensor, labels: Tensor, n_bins: int = 15) -> float:
    """Expected calibration error in [0, 1] (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017).

    ECE = sum_b n_b / n · |accuracy_b − confidence_b| over the bins (b/M, (b+1)/M], b = 0 … M−1, of the largest softmax
    probability. The figure depends on M, which is `n_bins`, at least 1. The rest is as of `top_k_accuracy`.
    """
    meter = ClassificationMeter(n_bins)
    meter.update(sample_statistics(logits, labels))
    return meter.compute()["ece"]


@torch.no_grad()
def sample_statistics(
    student_logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None, decoded: Tensor | None = None
) -> Tensor:
    """What one image contributes to every metric, as one row: small enough to be gathered over ranks.

    Args:
        student_logits, labels: as of `top_k_accuracy`; the row of an image without a label is all zero.
        teacher_logits: (B, C) in the student's class order, or None.
        decoded: bool (B,), False for an image that could not be decoded, whose label is -100; None: all were.

    Returns:
        float32 (B, 6): weight (1, or 0 without a label, or -1 if not decoded), cross-entropy (nats), top-1 hit, top-5
        hit (top-C below five classes), largest probability, label. With a teacher (B, 9): also agreement, KL(teacher
        || student) (nats), the teacher's top-1 hit.

    Raises:
        ValueError: the shapes do not fit.
    """
    logits = _checked(student_logits, labels)
    labelled = labels != IGNORED_LABEL
    target = torch.where(labelled, labels, 0)
    columns = [
        labelled,
        -logits.log_softmax(-1).gather(1, target[:, None]).squeeze(1),
        _rank_below(logits, target, 1),
        _rank_below(logits, target, 5),
        logits.softmax(-1).amax(-1),
        target,
    ]
    if teacher_logits is not None:
        _, teacher = _checked_pair(logits, teacher_logits)
        columns += [logits.argmax(-1) == teacher.argmax(-1), _kl(logits, teacher), _rank_below(teacher, target, 1)]
    rows = torch.stack([column.float() for column in columns], dim=1)
    # where, not a product: the logits of a padding row may be NaN.
    rows = torch.where(labelled[:, None], rows, 0.0)
    if decoded is not None:
        rows[:, 0] -= (~decoded).float()
    return rows


class ClassificationMeter:
    """Streams rows of `sample_statistics` into the metrics of a whole dataset.

    `update` stays on the rows' device, never waits for it, and keeps a few vectors however many images come. Sums are
    float64 (on mps float32), so the order of the batches does not matter. `n_bins` is that of
    `expected_calibration_error`.
    """

    def __init__(self, n_bins: int = 15):
        if n_bins < 1:
            raise ValueError(f"n_bins is {n_bins}; it must be at least 1")
        self.n_bins = n_bins
        self._sums: Any = None  # by column
        # n_b / n · |accuracy_b − confidence_b| = |sum of (hit − confidence) in b| / n, so one number per bin will do.
        self._gaps: Any = None
        self._undecodable: Any = 0
        self._repeated: Any = 0  # images on which the student gives the wrong class that the teacher gives
        self._classes: Any = None  # images and top-1 hits by class, (2, C)

    def update(self, stats: Tensor, num_classes: int | None = None) -> None:
        """Adds rows, (B, 6) or (B, 9), of `sample_statistics`; rows whose weight is not positive count nowhere.

        With `num_classes`, C, in every call there is a macro_top1. ValueError for another number of columns than
        before.
        """
        columns = {len(COLUMNS), len(COLUMNS + TEACHER_COLUMNS)} if self._sums is None else {len(self._sums)}
        if stats.ndim != 2 or stats.shape[1] not in columns:
            raise ValueError(
                f"rows have shape {tuple(stats.shape)}, expected (B, {' or '.join(map(str, columns))}): pass what "
                "sample_statistics returns, always with or always without a teacher"
            )
        dtype = torch.float32 if stats.device.type == "mps" else torch.float64
        self._undecodable = self._undecodable + (stats[:, 0] < 0).sum()
        stats = torch.where(stats[:, :1] > 0, stats, 0.0).to(dtype)
        if self._sums is None:
            self._sums, self._gaps = stats.new_zeros(stats.shape[1]), stats.new_zeros(self.n_bins)
        self._sums += stats.sum(0)
        hit, confidence = stats[:, COLUMNS.index("top1")], stats[:, COLUMNS.index("confidence")]
        self._gaps.index_add_(0, calibration_bins(confidence, self.n_bins), hit - confidence)
        if stats.shape[1] > len(COLUMNS):
            agrees, _, teacher_hit = stats[:, len(COLUMNS) :].T
            self._repeated = self._repeated + (agrees * (1 - teacher_hit)).sum()
        if num_classes is not None:
            if self._classes is None:
                self._classes = stats.new_zeros(2, num_classes)
            self._classes.index_add_(1, stats[:, COLUMNS.index("label")].long(), torch.stack([stats[:, 0], hit]))

    def counts(self) -> tuple[int, int]:
        """How many images were counted, and how many could not be decoded."""
        return (0 if self._sums is None else int(self._sums[0])), int(self._undecodable)

    def class_counts(self) -> dict[str, list[int]]:
        """The images and the top-1 hits of each class, in the order of the classes; {} without `num_classes`."""
        if self._classes is None:
            return {}
        images, hits = self._classes.long().tolist()
        return {"images": images, "hits": hits}

    def check_size(self, size: int) -> None:
        """ValueError unless `size` images were counted or could not be decoded."""
        counted, undecodable = self.counts()
        if counted + undecodable != size:
            raise ValueError(
                f"{counted} of {size} images were counted and {undecodable} could not be decoded. The others have no "
                "label (-100, or another below 0), or the data loader leaves images out or repeats them. Evaluate on "
                "labelled images only; predict() also scores those without a label"
            )

    def compute(self) -> dict[str, float]:
        """The metrics of all rows so far; ValueError if none has a positive weight.

        Returns:
            loss (mean cross-entropy, nats), top1, top5, ece (all in [0, 1]), n (images counted); if the rows came with
            a teacher, also agreement (in [0, 1]), kl (nats), teacher_top1 (in [0, 1]) and, if the teacher makes any
            error, teacher_errors_repeated: of the images that the teacher gets wrong, the share in [0, 1] to which the
            student gives the same wrong class. With `num_classes` also macro_top1 in [0, 1]: top-1 of each class that
            has images, averaged over these classes, whatever their numbers of images are (balanced accuracy). It is
            top1 where these numbers are equal.
        """
        if self._sums is None or self._sums[0] == 0:
            raise ValueError("no labelled image was seen: every label is -100, or update() was never called")
        n, *sums = self._sums.tolist()
        metrics = dict(zip((COLUMNS + TEACHER_COLUMNS)[1:], (value / n for value in sums), strict=False))
        del metrics["confidence"], metrics["label"]
        if len(sums) >= len(COLUMNS) and (errors := n - sums[-1]) > 0:
            metrics["teacher_errors_repeated"] = float(self._repeated) / errors
        if self._classes is not None:
            images, hits = self._classes[:, self._classes[0] > 0]
            metrics["macro_top1"] = (hits / images).mean().item()
        return metrics | {"ece": self._gaps.abs().sum().item() / n, "n": n}


def calibration_bins(confidence: Tensor, n_bins: int) -> Tensor:
    """The bin b of each confidence (B,) among (b/M, (b+1)/M], b = 0 … M−1."""
    # Clamped after the cast: 0 belongs to the first bin, and the NaN of a diverged model must not index outside.
    return ((confidence * n_bins).ceil().long() - 1).clamp(0, n_bins - 1)


def hard_labels(labels: Tensor) -> Tensor:
    """Class indices (B,) of labels that may be one value a class, (B, C); -100 for all that are negative."""
    index, largest = (labels.argmax(-1), labels.amax(-1)) if labels.ndim == 2 else (labels, labels)
    return torch.where(largest < 0, IGNORED_LABEL, index)


def _rank_below(logits: Tensor, target: Tensor, k: int) -> Tensor:
    """(B,) bool: is the target among the min(k, C) first classes? Of equal logits the lower index comes first."""
    own = logits.gather(1, target[:, None])
    index = torch.arange(logits.shape[1], device=logits.device)
    # Asked in the negative because NaN compares false: a diverged model must miss, not hit. The target is not ahead
    # of itself, and logits that are all equal are right for one class, not for all.
    ahead = ~((logits < own) | ((logits == own) & (index >= target[:, None])))
    return ahead.sum(1) < min(k, logits.shape[1])


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    """(B,) KL(teacher || student) in nats."""
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    # A class that the teacher rules out (logit −inf) adds 0, whatever the student says.
    terms = torch.where(log_t == -torch.inf, 0.0, log_t.exp() * (log_t - log_s))
    return terms.sum(-1).clamp_min(0)  # rounding can leave −1e-8


def _mean(values: Tensor) -> float:
    if values.numel() == 0:
        raise ValueError("no labelled image: the batch is empty, or every label is -100")
    return values.cpu().double().mean().item()  # mps has no float64


def _checked(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits, at least in float32."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"logits are {tuple(logits.shape)} and labels {tuple(labels.shape)} {labels.dtype}; expected (B, C) and "
            "integers (B,): for soft labels (B, C) pass labels.argmax(-1)"
        )
    return at_least_float32(logits)


def _checked_pair(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits are {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)}; "
            "expected the same (B, C): align the teacher's classes to the student's first"
        )
    return at_least_float32(student_logits), at_least_float32(teacher_logits)
