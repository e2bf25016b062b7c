"""Ending training early with the state saved: after Ctrl-C, SIGTERM or SIGUSR1, or when the hours are used up."""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from .checkpointing import last_checkpoint
from .launcher import several
from .spec import PYTHON_RESUME

logger = logging.get_logger(__name__)

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: not done, try again later
REASONS = ("Ctrl-C", "SIGTERM", "SIGUSR1", "max_hours")
_SIGNALS = {
    getattr(signal, name): reason
    for name, reason in {"SIGINT": "Ctrl-C", "SIGTERM": "SIGTERM", "SIGUSR1": "SIGUSR1"}.items()
    if hasattr(signal, name)  # Windows has no SIGUSR1
}


class TrainingStopped(SystemExit):
    """Training was ended early by a signal or by `max_hours`. A process that does not catch it exits with status 75.

    Of several processes each ignores SIGTERM from then on: the launcher sends it to those that have not ended yet.

    Attributes:
        reason (`str`): "SIGTERM", "SIGUSR1" or "max_hours".
    """

    def __init__(self, reason: str, message: str):
        super().__init__(EXIT_STOPPED)
        self.reason, self.message = reason, message

    def __str__(self) -> str:
        return self.message


def stop_error(reason: str, text: str) -> BaseException:
    """What is raised after a stop by one of `REASONS`."""
    return KeyboardInterrupt(text) if reason == "Ctrl-C" else TrainingStopped(reason, f"{reason}: {text}")


class StopRequest:
    """What this process was asked to stop by. There is one for the process, `stop_request`, as for its signals."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._depth = self._held = 0
        self._deadline: float | None = None
        self._previous: dict[int, Any] = {}
        self._training: tuple[Any, Any] | None = None  # arguments and state of the trainer
        self._saving = False
        self._pid, self._asked_at = 0, 0.0
        self._on = mmap.mmap(-1, 1)  # shared with the workers of data loaders

    @property
    def listening_now(self) -> bool:
        """Whether a `listening` block is entered."""
        return self._depth > 0

    @contextlib.contextmanager
    def listening(self, max_hours: float | None = None, since: float | None = None) -> Iterator[None]:
        """Notes signals, and the end of `max_hours` after `since` (seconds of `time.time`; default: now).

        Within another such block, its hours count. Handlers of SIGTERM and SIGUSR1 that others have set stay.
        """
        before, outermost = self._deadline, self._depth == 0
        if max_hours is not None and before is None:
            self._deadline = (time.time() if since is None else since) + 3600 * max_hours
        self._depth += 1
        if outermost:
            self._install()
        try:
            yield
        finally:
            self._depth -= 1
            self._deadline = before
            if outermost:
                self._restore()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """SIGTERM and SIGUSR1 wait until what is computed here is saved."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    def now(self) -> str | None:
        """The first of `REASONS` that this process was asked to stop by, if any."""
        if self._reason is None and self._deadline is not None and time.time() >= self._deadline:
            self._reason = "max_hours"
        return self._reason

    def asked(self) -> list[float]:
        """Of each of `REASONS` 1 if this process was asked to stop by it, else 0."""
        return [float(reason == self.now()) for reason in REASONS]

    def training(self, args, state) -> None:
        """A training begins: from here on signals wait until a step ends."""
        self._training, self._saving = (args, state), False

    def saving(self) -> None:
        """The state is being saved: no further signal interrupts that."""
        self._saving = True

    def trained(self) -> None:
        self._training = None

    def _install(self) -> None:
        self._reason, self._training, self._saving = None, None, False
        if threading.current_thread() is not threading.main_thread():
            return
        self._pid, self._on[0] = os.getpid(), 1
        for number in _SIGNALS:
            if number == signal.SIGINT or signal.getsignal(number) is signal.SIG_DFL:
                self._previous[number] = signal.signal(number, self._handle)

    def _restore(self) -> None:
        self._on[0] = 0
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if signal.SIGTERM in self._previous and self._saving and several():
            # The launcher sends it to the processes that are left when the first has ended, which hides their status.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._previous.clear()

    def _handle(self, number: int, frame) -> None:
        reason = _SIGNALS[number]
        if os.getpid() != self._pid:  # a worker of a data loader: training needs it to its end
            if number != signal.SIGINT and not self._on[0]:
                os._exit(0)  # as torch's workers do when the loader ends them
        elif number == signal.SIGINT and self._training is None:
            raise KeyboardInterrupt
        elif self._training is None and not self._held and not several():
            raise TrainingStopped(reason, f"{reason}: stopped before training")
        elif self._saving:
            logger.warning(f"{reason}: the state is being saved already")
        elif reason == self._reason == "Ctrl-C":
            # A launcher passes Ctrl-C on to processes that have it from the terminal: one press comes twice.
            if not several() or time.monotonic() - self._asked_at > 1:
                raise KeyboardInterrupt(self._lost())
        elif self._reason is None:
            self._reason, self._asked_at = reason, time.monotonic()
            more = " Once more to stop at once." if reason == "Ctrl-C" else ""
            logger.warning(f"{reason}: stopping at the end of a step, with the state saved.{more}")

    def _lost(self) -> str:
        assert self._training is not None
        args, state = self._training
        folder = last_checkpoint(args.output_dir)
        lost = state.global_step - (int(folder.rpartition("-")[2]) if folder else 0)
        since = f"since {folder}" if folder else "(there is no checkpoint)"
        return f"stopped at once, at step {state.global_step}: {lost} step(s) {since} are lost"


stop_request = StopRequest()


def protect_workers(loader: Any) -> Any:
    """The data loader, whose workers now outlive the SIGTERM that a scheduler sends to all processes of a job.

    torch's workers die of it, and training with them. Workers that are not forked still do.
    """
    inner = getattr(loader, "base_dataloader", loader)  # accelerate's iterates over another
    if getattr(inner, "num_workers", 0):
        inner.worker_init_fn = functools.partial(_begin_worker, inner.worker_init_fn)
    return loader


def _begin_worker(then, worker_id: int) -> None:
    for number in _SIGNALS:
        if number != signal.SIGINT:
            signal.signal(number, stop_request._handle)
    if then is not None:
        then(worker_id)


class SaveOnStop(TrainerCallback):
    """Ends training when a step ends, with a checkpoint, if any process was asked to stop. `agreed` is why.

    A second Ctrl-C ends it at once, and says what is lost. Several processes sum up what each was asked with the
    number of samples of a step (`hear`), and thus stop at the same one. Off the CPU they look every `EVERY` steps,
    since looking waits for the device.
    """

    EVERY = 10

    def __init__(self) -> None:
        self.agreed: str | None = None
        self._heard: torch.Tensor | None = None

    def hear(self, asked: torch.Tensor) -> None:
        """Takes what all processes together were asked by each of `REASONS`, (4,)."""
        self._heard = asked

    @contextlib.contextmanager
    def stopping(self, trainer) -> Iterator[None]:
        """The whole of `train()`. Raises KeyboardInterrupt or TrainingStopped at its end if training was stopped."""
        with stop_request.listening(trainer.args.max_hours):
            try:
                yield
            finally:
                stop_request.trained()
        if self.agreed is None:
            return
        folder = last_checkpoint(trainer.args.output_dir)
        text = f"stopped at step {trainer.state.global_step}; the state is saved in {folder}"
        error = stop_error(self.agreed, text)
        if isinstance(error, TrainingStopped) and not stop_request.listening_now:  # else the command says so
            logger.warning(f"{error}; continue with {PYTHON_RESUME}")
        raise error

    def on_train_begin(self, args, state, control, **kwargs):
        self.agreed = self._heard = None
        stop_request.training(args, state)

    def on_step_end(self, args, state, control, **kwargs):
        asked: list[float] = []
        last = state.global_step >= state.max_steps
        if args.world_size == 1:
            asked = stop_request.asked()
        elif self._heard is not None and (args.device.type == "cpu" or last or state.global_step % self.EVERY == 0):
            asked = self._heard.tolist()
        self.agreed = next((reason for reason, number in zip(REASONS, asked, strict=False) if number), None)
        if self.agreed:
            stop_request.saving()
            control.should_save = control.should_log = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.agreed:  # saved already; do not keep the person waiting
            control.should_save = control.should_evaluate = False
