"""Callbacks of the trainer: a call when training begins, saving on Ctrl-C, and logs of a short run."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from .checkpointing import last_checkpoint

logger = logging.get_logger(__name__)


class OnTrainBegin(TrainerCallback):
    """Calls a function when training begins, after everything is loaded."""

    def __init__(self, function: Callable[[], None]):
        self.function = function

    def on_train_begin(self, args, state, control, **kwargs):
        self.function()


class SaveOnInterrupt(TrainerCallback):
    """Ctrl-C ends training when a step ends, with a checkpoint (then `agreed` is True); a second one ends it at once,
    and says what is lost.

    Several processes get the signal at different steps, or only one of them gets it: they agree every `EVERY` steps.
    """

    EVERY = 10

    def __init__(self):
        self.agreed = self._requested = False
        self._previous = self._pid = None

    def _request(self, signum, frame):
        if os.getpid() != self._pid:  # a worker of the data loader inherits the handler
            return
        if self._requested:
            raise KeyboardInterrupt(self._lost())
        self._requested = True
        logger.warning("Ctrl-C: saving at the end of this step. Once more to stop at once.")

    def _lost(self) -> str:
        args, state = self._training
        folder = last_checkpoint(args.output_dir)
        lost = state.global_step - (int(folder.rpartition("-")[2]) if folder else 0)
        since = f"since {folder}" if folder else "(there is no checkpoint)"
        return f"stopped at once, at step {state.global_step}: {lost} step(s) {since} are lost"

    def on_train_begin(self, args, state, control, **kwargs):
        self.agreed = self._requested = False
        self._training = args, state
        if self._previous is None and threading.current_thread() is threading.main_thread():
            self._pid, self._previous = os.getpid(), signal.signal(signal.SIGINT, self._request)

    def restore(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size == 1:
            self.agreed = self._requested
        elif state.global_step % self.EVERY == 0 or state.global_step >= state.max_steps:
            flag = torch.tensor(int(self._requested), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self.agreed = bool(flag)
        if self.agreed:
            control.should_save = control.should_log = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.agreed:  # saved already; do not keep the person waiting
            control.should_save = control.should_evaluate = False


class LogSteps(TrainerCallback):
    """Logs the last step whatever `logging_steps` is, so that every run has its terms.

    Where `logging_steps` is the default, 500, a run of fewer than 25,000 steps is logged about 50 times.
    """

    DEFAULT, TIMES = 500, 50

    def on_step_end(self, args, state, control, **kwargs):
        every = max(1, state.max_steps // self.TIMES)
        often = args.logging_strategy == "steps" and args.logging_steps == self.DEFAULT and every < self.DEFAULT
        last = state.global_step >= state.max_steps and args.logging_strategy != "no"
        if last or (often and state.global_step % every == 0):
            control.should_log = True
