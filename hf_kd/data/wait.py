"""The share of training's time that the model waits for data."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

logger = logging.get_logger(__name__)

MOST, AFTER = 0.2, 60  # a share, seconds: shorter trainings need no advice


class DataWait:
    """Sums up the time that is spent in `waiting`."""

    def __init__(self) -> None:
        self._begin = self._since = time.perf_counter()
        self._waited, self._warned = 0.0, False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def share(self, workers: int) -> float:
        """The share in [0, 1] since the last call. Above `MOST`, says once what to change, with `workers` in use."""
        now = time.perf_counter()
        share = self._waited / max(now - self._since, 1e-9)
        self._since, self._waited = now, 0.0
        if share > MOST and now - self._begin > AFTER and not self._warned:
            self._warned = True
            logger.warning(
                f"the model waits for images {share:.0%} of the time: raise --dataloader_num_workers (now {workers}) "
                "up to the number of CPU cores; if it is that, store smaller images, or choose a lighter --augment"
            )
        return share
