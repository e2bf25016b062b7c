"""Logit standardization, a modifier of losses that compare softened probabilities (arXiv 2403.01427)."""

from torch import Tensor

from .functional import at_least_float32

# Rows that vary less, as those of a head that starts at 0, are left unscaled: their gradient would be 1e6 and more.
_NO_SPREAD = 1e-4


def standardize_logits(logits: Tensor) -> Tensor:
    """(z - mean) / (std + 1e-7) of each row, with the standard deviation over C - 1 (arXiv 2403.01427).

    The gradient flows through mean and standard deviation too. Of a row with a standard deviation of at most 1e-4
    only the mean is subtracted.

    Args:
        logits: (B, C) with C >= 2, any floating dtype.

    Returns:
        (B, C), float32, or float64 for float64.
    """
    logits = at_least_float32(logits)
    std = logits.std(dim=1, keepdim=True)
    scale = (std + 1e-7).where(std > _NO_SPREAD, 1.0)
    return (logits - logits.mean(dim=1, keepdim=True)) / scale
