"""The terms of a loss, summed up between two logs."""

from collections.abc import Callable

import torch
from torch import Tensor


class LossTerms:
    """Means of a loss's terms over optimizer steps. `add` stays on the terms' device and never waits for it."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._first_step = 0

    def add(self, terms: dict[str, Tensor], step: int) -> None:
        """Adds a micro-batch's terms, shares of the mean over its optimizer step, with `step` of these done before."""
        if not self._sums:
            self._first_step = step
        for name, term in terms.items():
            self._sums[name] = self._sums.get(name, 0) + term.detach()

    def means(self, step: int, reduce: Callable[[Tensor, str], Tensor]) -> dict[str, float]:
        """The mean of every term over the optimizer steps since the last call, up to `step`; {} if there are none."""
        if not self._sums:
            return {}
        totals = torch.stack([total.float() for total in self._sums.values()])
        means = reduce(totals, "mean") / max(step - self._first_step, 1)
        names, self._sums = list(self._sums), {}
        return dict(zip(names, means.tolist(), strict=True))
