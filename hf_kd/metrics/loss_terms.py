"""The terms and diagnostics of a loss, summed up between two logs."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

TERM, DIAGNOSTIC = "loss_", "diagnostic_"  # how the names begin under which they are logged


class LossTerms:
    """Means of a loss's terms and diagnostics over optimizer steps, as `loss_NAME` and `diagnostic_NAME`.

    `add` stays on the terms' device and never waits for it.
    """

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._first_step = 0

    def add(self, terms: Mapping[str, Tensor], diagnostics: Mapping[str, Tensor], share: float, step: int) -> None:
        """Adds those of a micro-batch, which is a `share` of its optimizer step, with `step` of these done before."""
        if not self._sums:
            self._first_step = step
        for prefix, values in ((TERM, terms), (DIAGNOSTIC, diagnostics)):
            for name, value in values.items():
                key = f"{prefix}{name}"
                self._sums[key] = self._sums.get(key, 0) + value.detach() * share

    def means(self, step: int, reduce: Callable[[Tensor, str], Tensor]) -> dict[str, float]:
        """The mean of every term over the optimizer steps since the last call, up to `step`; {} if there are none."""
        if not self._sums:
            return {}
        totals = torch.stack([total.float() for total in self._sums.values()])
        means = reduce(totals, "mean") / max(step - self._first_step, 1)
        names, self._sums = list(self._sums), {}
        return dict(zip(names, means.tolist(), strict=True))
