"""Several processes: what they agree on in a step, that they have the same plan, and that each names a failure."""

from __future__ import annotations

import atexit
import contextlib
import functools
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object

from . import hub
from ._compat import default_store
from .launcher import several
from .losses.functional import DivergedError
from .spec import Experiment, differences
from .stopping import stop_request

WAIT = 5.0  # seconds for the reason of a lost connection
_FAILED, _LOST = "hf_kd/failed/{}", "hf_kd/lost/{}"


class RankFailure(RuntimeError):
    """Another process has failed, so that this one cannot go on; the message says which and why."""


@contextlib.contextmanager
def failures_named() -> Iterator[None]:
    """Tells the other processes why this one fails, through the launcher's store.

    A process that waits for one that has failed gets no more than a lost connection: that becomes a RankFailure.
    """
    _forget()
    try:
        yield
    except Exception as error:
        if not _distributed() or isinstance(error, (RankFailure, FloatingPointError)):  # which all of them meet
            raise
        if _lost_connection(error):
            raise RankFailure(_cause()) from error
        with contextlib.suppress(RuntimeError):
            default_store().set(_FAILED.format(dist.get_rank()), hub.user_message(error) or str(error) or repr(error))
        raise


@functools.cache
def end_cleanly() -> None:
    """Keeps one of several processes from aborting when it ends, after all is done.

    A thread of gloo needs Python to release the tensors of the last collectives. If Python is ending by then, the
    thread is killed inside a C++ destructor, and the process with it ("terminate called without an active exception",
    https://github.com/pytorch/pytorch/issues/190489). To destroy the group is not enough: DDP holds it, too.
    """
    if _distributed():
        atexit.register(time.sleep, 0.2)


def prefix() -> str:
    """`rank 1: ` where there are several processes, for messages."""
    return f"rank {os.environ.get('RANK', 0)}: " if several() else ""


def check_same_plan(plan: Experiment) -> None:
    """Raises ValueError, in all processes, if one of them would train something else than the first."""
    if not _distributed():
        return
    first, *others = (Experiment.from_dict(values) for values in gather_object([plan.to_dict()]))
    for rank, other in enumerate(others, start=1):
        if found := differences(first, other):
            raise ValueError(
                f"rank {rank} would train something else than rank 0 ('there'): {'; '.join(found)}. Start all "
                "processes with the same arguments, and give them the same data."
            )


def loss_terms(trainer, logits: torch.Tensor, labels: torch.Tensor, required: dict) -> dict[str, torch.Tensor]:
    """The terms of the loss; NaN where one of several processes trains on logits that are not finite.

    It goes on to the next `agree`, so that no other process waits for it.
    """
    try:
        return trainer.train_loss(logits, labels, **required)
    except DivergedError as error:
        if trainer.args.world_size == 1:
            raise
        trainer._diverged = trainer._diverged or f"rank {trainer.args.process_index}: {error}"
        finite = {name: value if value is None else _finite(value) for name, value in required.items()}
        terms = trainer.train_loss(_finite(logits), labels, **finite)
        return {name: term * math.nan for name, term in terms.items()}


def _finite(logits: torch.Tensor) -> torch.Tensor:
    return logits.nan_to_num(0, 0, 0)


def agree(trainer, count: int, device: torch.device, no_data: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The samples of an optimizer step over all of several processes, and how many of these have no data for it.

    In the same collective they learn of requests to stop, and of logits that one of them has found not to be finite:
    FloatingPointError in all of them.
    """
    diverged = float(trainer._diverged is not None)
    numbers = torch.tensor([count, no_data, diverged, *stop_request.asked()], device=device, dtype=torch.float32)
    numbers = trainer.accelerator.reduce(numbers, "sum")
    # Off the CPU reading waits for the device; there a loss looks for such logits in its first call only.
    if (device.type == "cpu" or trainer.state.global_step == 1) and numbers[2]:
        raise FloatingPointError("; ".join(filter(None, gather_object([trainer._diverged]))))
    trainer._stop.hear(numbers[3:])
    return numbers[0], numbers[1]


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _forget() -> None:
    """Takes back what this process has told of an earlier failure, which was handled."""
    if _distributed():
        with contextlib.suppress(RuntimeError):
            default_store().delete_key(_FAILED.format(dist.get_rank()))


def _lost_connection(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _cause() -> str:
    """Which process ended first, and what it told."""
    rank, world, silent = dist.get_rank(), dist.get_world_size(), list[Any]()
    until = time.monotonic() + WAIT
    try:
        store = default_store()
        store.set(_LOST.format(rank), "")
        while time.monotonic() < until:
            for other in range(world):
                if other != rank and store.check([_FAILED.format(other)]):
                    return f"rank {other} has failed: {store.get(_FAILED.format(other)).decode()}"
            time.sleep(0.1)
        silent = [other for other in range(world) if other != rank and not store.check([_LOST.format(other)])]
    except RuntimeError:
        return "the launcher has ended, and with it the connection to the other processes"
    names = " and ".join(f"rank {other}" for other in silent) or "another process"
    return f"{names} ended without a message: killed, perhaps for lack of memory"
