"""What the loss functions share: the reading of labels, masked logits, and the checks of tensors and numbers."""

import functools
import math
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Stands for "not in the softmax". Finite, so that 0 * log-probability is 0 and never NaN, forward and backward.
MASKED_LOGIT = -1e30


class Targets(NamedTuple):
    """The target classes of each row, in K columns: K = 1 for integer labels, 2 for soft ones.

    A row without a second target repeats its first index there, with value 0 and active False.
    """

    index: Tensor  # type: ignore[assignment]  # (B, K) int64, class of the target; not tuple.index
    value: Tensor  # (B, K) float, its label value V
    active: Tensor  # (B, K) bool


def top_targets(labels: Tensor, dtype: torch.dtype) -> Targets:
    """Read integer labels (B,) or soft labels (B, C) as at most two targets per row.

    The largest value is a target; the second-largest if it exceeds the third (with C = 2: 0), which label smoothing's
    uniform background does not. Rows with more than two distinct classes (a teacher's probabilities, say) are warned
    of once: the others are treated as non-targets. Off the CPU only the first batch is looked at.
    """
    if labels.ndim == 1:
        index = labels[:, None]
        return Targets(index, torch.ones_like(index, dtype=dtype), torch.ones_like(index, dtype=torch.bool))
    value, index = labels.to(dtype).topk(min(3, labels.shape[1]), dim=1)
    third = value[:, 2:] if labels.shape[1] > 2 else torch.zeros_like(value[:, :1])
    _warn_if_more_count(labels, third)
    has_second = value[:, 1:2] > third
    active = torch.cat([torch.ones_like(has_second), has_second], dim=1)
    return Targets(torch.where(active, index[:, :2], index[:, :1]), torch.where(active, value[:, :2], 0.0), active)


def at_least_float32(logits: Tensor) -> Tensor:
    """Raise half precision to float32; float64 stays, for numerical checks."""
    return logits if logits.dtype == torch.float64 else logits.float()


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Batch mean of -sum_i V'_i log softmax(logits)_i, V' = (1 - e) V + e / C, for integer and soft labels V."""
    logits = at_least_float32(logits)
    labels = labels if labels.ndim == 1 else labels.to(logits.dtype)
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def mask_targets(logits: Tensor, index: Tensor, temperature: float = 1.0) -> Tensor:
    """Logits (B, C) whose softmax is N(softmax(logits / t)), over the non-target classes: 0 at `index` (B, K)."""
    if temperature != 1:
        logits = logits / temperature
    return logits.scatter(1, index, MASKED_LOGIT)


class DivergedError(ValueError, FloatingPointError):
    """The student's logits are NaN or infinite."""


def check_number(name: str, value: float, low: float, high: float = math.inf, *, above: bool = False) -> None:
    """Raise ValueError unless `value` is a finite number in [low, high], or in (low, high] with `above`."""
    accepted = f"{'>' if above else '>='} {low:g}" + (f" and <= {high:.10g}" if high < math.inf else "")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not (value > low if above else value >= low) or not value <= high or value == math.inf:
        raise ValueError(f"{name}={value!r} is not accepted: pass a finite number {accepted}")


def check_hyperparameters(**numbers: float) -> None:
    """Raise ValueError unless each is a finite number >= 0; a temperature or an exponent > 0."""
    for name, value in numbers.items():
        check_number(name, value, 0, above=name in ("temperature", "exponent"))


def check_inputs(
    student_logits: Tensor, labels: Tensor | None = None, force_values: bool = False, **logits: Tensor
) -> None:
    """Check shapes and dtypes, and values where that needs no device sync (on the CPU) or with `force_values`."""
    shape = tuple(student_logits.shape)
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 2 or not student_logits.is_floating_point():
        raise _unexpected("student_logits", student_logits, "floating point of shape (B, C) with B >= 1 and C >= 2")
    for name, other in logits.items():
        if other.ndim == 2 and other.shape[0] == shape[0] and other.shape[1] != shape[1]:
            problem = f"{name} has {other.shape[1]} classes, student_logits has {shape[1]}"
            raise ValueError(f"{problem}: bring both to the same classes in the same order first")
        if tuple(other.shape) != shape or not other.is_floating_point():
            raise _unexpected(name, other, f"floating point of the student_logits' shape {shape}")
    if labels is not None:
        is_index = labels.dtype == torch.int64 and tuple(labels.shape) == shape[:1]
        if not is_index and not (labels.is_floating_point() and tuple(labels.shape) == shape):
            hint = ": convert them with .long(), or .float() for one-hot and mixed labels"
            raise _unexpected("labels", labels, f"int64 of shape {shape[:1]} or floating point of shape {shape}", hint)
    if torch.compiler.is_compiling() or not (force_values or student_logits.device.type == "cpu"):
        return
    if labels is not None:
        _check_label_values(labels, shape[1])
    for name, tensor in {"student_logits": student_logits, **logits}.items():
        _check_finite(name, tensor)


def readable(tensor: Tensor) -> Tensor:
    """A tensor whose values can be read: within torch.func's transforms (vmap, grad) that below, of all batches."""
    return torch.func.debug_unwrap(tensor)


def _unexpected(name: str, tensor: Tensor, expected: str, hint: str = "") -> ValueError:
    return ValueError(f"{name} must be {expected}, got {tensor.dtype} of shape {tuple(tensor.shape)}{hint}")


def _check_label_values(labels: Tensor, classes: int) -> None:
    values = readable(labels)
    if labels.ndim == 2:
        _check_finite("labels", labels)
        if values.min() < 0:
            negative = f"{(values < 0).sum().item()} negative value(s), the smallest is {values.min().item():g}"
            raise ValueError(f"labels hold {negative}: soft labels are probabilities")
        sums = readable(labels.sum(1, dtype=torch.float32)).flatten()
        if ((sums - 1).abs() > 0.01).any():
            worst = sums[(sums - 1).abs().argmax()].item()
            raise ValueError(
                f"labels of shape (B, C) must have rows that sum to 1, one sums to {worst:g}: images of several "
                "classes at once (multi-label) are not supported; divide each row by its sum if you mean a mix"
            )
        return
    bad = values[(values < 0) | (values >= classes)]
    if bad.numel():
        raise ValueError(
            f"labels hold {bad.numel()} value(s) outside [0, {classes}), the first is {bad[0].item()}: "
            "leave such images out of the batch (there is no ignore index), or give the student more classes"
        )


def _check_finite(name: str, tensor: Tensor) -> None:
    values = readable(tensor).detach()
    # NaN and inf survive a sum, and one sum is many times cheaper than isfinite over all elements.
    if math.isfinite(values.sum(dtype=at_least_float32(values[:0]).dtype).item()):
        return
    bad = ~values.isfinite()
    if bad.any():
        row = readable((~tensor.isfinite()).any(1)).nonzero()[0, -1].item()
        raise (ValueError if name in ("labels", "teacher_logits") else DivergedError)(
            f"{name} holds {bad.sum().item()} NaN or infinite value(s) of {bad.numel()}, the first in row {row}: "
            "look for a diverged model, a too high learning rate, or an overflow in half precision"
        )


def warn_if_no_non_target(targets: Targets, classes: int) -> None:
    """Warn once that the non-target term is 0: C = 2, or C = 3 and a row with two targets (seen on CPU only)."""
    if classes > 3 or torch.compiler.is_compiling():
        return
    if classes == 2 or (targets.active.device.type == "cpu" and readable(targets.active[:, 1:]).any()):
        _warn_no_non_target(classes)


_looked_at: set[str] = set()


def _warn_if_more_count(labels: Tensor, third: Tensor) -> None:
    device = labels.device.type
    if labels.shape[1] < 4 or labels.is_meta or torch.compiler.is_compiling() or device in _looked_at:
        return
    if device != "cpu":  # else every batch would wait for the device
        _looked_at.add(device)
    if (readable(third) > readable(labels.to(third.dtype).amin(1, keepdim=True)) + 1e-6).any():
        _looked_at.add(device)
        warnings.warn(
            "labels have rows with more than two classes above the rest: NKD and USKD take the two with the largest "
            "values as targets and all others as non-targets; cross entropy uses all of them",
            stacklevel=5,
        )


@functools.cache
def _warn_no_non_target(classes: int) -> None:
    rows = "every row has" if classes == 2 else "a row with two targets has"
    warnings.warn(
        f"with {classes} classes {rows} at most one non-target class: the non-target term is 0 there, "
        "and only the target term distils",
        stacklevel=4,
    )
