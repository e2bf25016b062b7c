"""Where a comparison is, in lines for the terminal: what is trained, the result of each run, and the time left."""

import statistics
import sys
import time
from typing import Any

from huggingface_hub.utils import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.utils import logging

from ..reporting.record import RUN_FILE
from ..spec import Experiment, RunSpec

STEPS = 10  # after which the time is estimated


class ComparisonProgress(TrainerCallback):
    """Prints lines, and where standard error is no terminal no bars. A callback of every trainer of the experiment.

    Times are those of this process and of runs without a record: others that train runs of the same experiment shorten
    them.
    """

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.quiet = not sys.stderr.isatty()
        self._seconds: dict[str, list[float]] = {}  # of the finished runs, by variant
        self._spec, self._since = experiment.runs[0], 0.0
        self._first: tuple[int, float] | None = None  # the first step of the run, and when it ended
        if self.quiet:
            logging.disable_progress_bar()

    def plan(self) -> str:
        runs, steps = self.experiment.runs, (self.experiment.requirements or {}).get("steps")
        names, seeds = dict.fromkeys(run.name for run in runs), dict.fromkeys(run.seed for run in runs)
        length = f" of {steps:,} steps" if steps else ""
        return f"{len(runs)} runs{length}: {', '.join(names)}; seeds {', '.join(map(str, seeds))}"

    def start(self, spec: RunSpec, trainer: Any) -> str:
        """Follows the trainer of a run. Returns its number, out of several, and its key."""
        self._spec, self._since, self._first = spec, time.perf_counter(), None
        trainer.add_callback(self)
        if self.quiet:
            trainer.remove_callback(ProgressCallback)
        return self._where()

    def finish(self, record: dict) -> str:
        """The result of the run that was started last, and the time that the others will take."""
        seconds = time.perf_counter() - self._since
        before_too = (record.get("timings") or {}).get("train_seconds") or 0.0  # of a run that was resumed
        self._seconds.setdefault(self._spec.name, []).append(max(seconds, before_too))
        top1 = (record.get("metrics") or {}).get("top1")
        result = "diverged" if record.get("diverged") else "no result" if top1 is None else f"top-1 {100 * top1:.2f} %"
        text = f"{self._where()}: {result} after {duration(seconds)}"
        left = self._left()
        return f"{text}; {len(left)} left, about {duration(self._estimate(left))}" if left else text

    def on_step_end(self, args, state, control, **kwargs):
        if self._first is None:
            self._first = state.global_step, time.perf_counter()  # what is set up once is part of the first step
        elif state.global_step == self._first[0] + STEPS and not self._seconds:
            step, runs = (time.perf_counter() - self._first[1]) / STEPS, 1 + len(self._left())
            several = f" for {runs} runs" if runs > 1 else ""
            steps = state.max_steps * runs - (self._first[0] - 1)
            text = f"about {duration(step * steps)}{several}, evaluations not counted"
            self._write(state, text)

    def on_evaluate(self, args, state, control, **kwargs):
        top1 = next((value for key, value in kwargs["metrics"].items() if key.endswith("_top1")), None)
        if self.quiet and not args.disable_tqdm and top1 is not None:  # else the trainer prints all metrics
            where = f"{self._where()}: step {state.global_step} of {state.max_steps}"
            self._write(state, f"{where}, top-1 {100 * top1:.2f} %")

    def _write(self, state, text: str) -> None:
        if state.is_world_process_zero:
            tqdm.write(text)  # above a bar

    def _where(self) -> str:
        runs = self.experiment.runs
        return f"[{runs.index(self._spec) + 1}/{len(runs)}] {self._spec.key}" if len(runs) > 1 else self._spec.key

    def _left(self) -> list[RunSpec]:
        after = self.experiment.runs[self.experiment.runs.index(self._spec) + 1 :]
        return [spec for spec in after if not (self.experiment.folder(spec) / RUN_FILE).is_file()]

    def _estimate(self, runs: list[RunSpec]) -> float:
        every = [value for values in self._seconds.values() for value in values]
        return sum(statistics.fmean(self._seconds.get(spec.name, every)) for spec in runs)


def duration(seconds: float) -> str:
    """`45 s`, `3 min 5 s` or `2 h 10 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    return f"{seconds // 60} min {seconds % 60} s" if seconds < 3600 else f"{minutes // 60} h {minutes % 60} min"
