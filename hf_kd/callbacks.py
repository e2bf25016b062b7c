"""Callbacks of the trainer: a call when training begins, and logs of a short run."""

from __future__ import annotations

from collections.abc import Callable

from transformers import TrainerCallback


class OnTrainBegin(TrainerCallback):
    """Calls a function when training begins, after everything is loaded."""

    def __init__(self, function: Callable[[], None]):
        self.function = function

    def on_train_begin(self, args, state, control, **kwargs):
        self.function()


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
