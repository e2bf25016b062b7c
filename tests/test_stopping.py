"""SIGTERM, SIGUSR1 and --max_hours end training with the state saved and an exit status of their own."""

import json
import os
import shlex
import signal
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
from cli_helpers import distill
from trainer_helpers import trainer_for
from transformers import TrainerCallback

from hf_kd import stopping
from hf_kd.cli import main
from hf_kd.stopping import TrainingStopped, stop_request
from hf_kd.trainer import DistillationTrainer

pytestmark = pytest.mark.usefixtures("undrawn_figures")


class At(TrainerCallback):
    """Does something at the end of a step, and something else whenever a checkpoint is saved."""

    def __init__(self, step, action, when_saved=lambda: None):
        self.step, self.action, self.when_saved = step, action, when_saved

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()

    def on_save(self, args, state, control, **kwargs):
        self.when_saved()


def send(*names):
    for name in names:
        signal.raise_signal(getattr(signal, name))


@pytest.fixture
def at(monkeypatch):
    """Adds a callback to every trainer of the command."""
    init = DistillationTrainer.__init__

    def add(step, action):
        monkeypatch.setattr(
            DistillationTrainer, "__init__", lambda self, *a, **k: init(self, *a, callbacks=[At(step, action)], **k)
        )

    return add


@pytest.fixture
def clock(monkeypatch):
    """The time that `max_hours` goes by, in seconds since this process was started."""
    clock, start = SimpleNamespace(value=0.0), psutil.Process().create_time()
    monkeypatch.setattr(stopping.time, "time", lambda: start + clock.value)
    return clock


def metrics(folder):
    return json.loads((folder / "run.json").read_text())["metrics"]


@pytest.mark.parametrize("reason", ["SIGTERM", "SIGUSR1", "max_hours"])
def test_the_command_saves_stops_with_its_status_and_is_resumed(reason, things, tmp_path, at, clock, capsys):
    out, more = tmp_path / "out", ["--save_strategy", "no"]
    stop = (lambda: setattr(clock, "value", 3600)) if reason == "max_hours" else lambda: send(reason)
    before = signal.getsignal(signal.SIGTERM)
    at(2, stop)
    more += ["--only", "ce:42"] if reason == "SIGUSR1" else []
    assert distill(things, "--output_dir", out, *more, "--max_hours", 1) == 75
    said = capsys.readouterr().err
    assert f"{reason}: stopped at step 2; the state is saved in {out / 'checkpoint-2'}" in said
    assert shlex.join(["hf-kd", "resume", str(out), *more[2:]]) in said and "Traceback" not in said
    assert signal.getsignal(signal.SIGTERM) is before and not stop_request.listening_now
    at(2, lambda: None)
    clock.value = 0  # of another session
    assert main(["resume", str(out)]) == 0
    assert distill(things, "--output_dir", tmp_path / "whole") == 0
    assert metrics(out) == metrics(tmp_path / "whole")


def test_the_hours_are_those_of_a_whole_comparison(things, tmp_path, clock, capsys):
    """They end with the first run: the second is not begun, and is trained by the resumption."""
    out, spec = tmp_path / "out", '{"a": {"loss": "ce"}, "b": {"loss": "ce"}}'
    more = ["--num_train_epochs", 1, "--max_hours", 2, "--compare", spec, "--output_dir", out]
    evaluate = DistillationTrainer.evaluation_loop

    def late(self, *args, **kwargs):
        clock.value = 7200
        return evaluate(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillationTrainer, "evaluation_loop", late)
        assert distill(things, *more) == 75
    assert "max_hours: stopped before b, seed 42" in capsys.readouterr().err
    assert (out / "a" / "run.json").is_file() and not (out / "b").exists()
    clock.value = 0
    assert main(["resume", str(out)]) == 0
    assert metrics(out / "a") == metrics(out / "b") and (out / "report.md").is_file()


def test_a_signal_before_training_ends_the_command_at_once(things, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hf_kd.cli.commands.plan", lambda *_: send("SIGTERM"))
    assert distill(things, "--output_dir", tmp_path / "out") == 75
    assert capsys.readouterr().err == "\nSIGTERM: stopped before training\n"


def test_no_further_signal_ends_the_saving(tmp_path):
    trainer = trainer_for(tmp_path)
    trainer.add_callback(At(1, lambda: send("SIGTERM", "SIGTERM"), lambda: send("SIGTERM", "SIGINT", "SIGINT")))
    with pytest.raises(TrainingStopped, match="SIGTERM: stopped at step 2; the state is saved in .*-2") as stopped:
        trainer.train()
    assert (stopped.value.reason, stopped.value.code) == ("SIGTERM", 75)
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").is_file()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3


def test_a_press_of_ctrl_c_that_a_launcher_passes_on_counts_once(tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "several", lambda: True)
    now = SimpleNamespace(value=0.0)
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now.value)
    trainer = trainer_for(tmp_path)
    trainer.add_callback(At(1, lambda: send("SIGINT", "SIGINT")))
    with pytest.raises(KeyboardInterrupt, match="the state is saved"):
        trainer.train()

    def twice():
        send("SIGINT")
        now.value += 2
        send("SIGINT")

    trainer = trainer_for(tmp_path / "twice")
    trainer.add_callback(At(1, twice))
    with pytest.raises(KeyboardInterrupt, match="stopped at once"):
        trainer.train()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # of several processes it is ignored from here on


def test_a_handler_that_others_have_set_stays(tmp_path):
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    try:
        trainer = trainer_for(tmp_path)
        trainer.add_callback(At(1, lambda: send("SIGUSR1")))
        trainer.train()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [1] and trainer.state.global_step == 3


def test_workers_outlive_the_signal_that_all_processes_of_a_job_get(tmp_path):
    """Those of torch die of SIGTERM, an error in training. Afterwards these can be ended too."""
    workers = []
    earlier = set(psutil.Process().children())  # of other tests, that nobody has waited for

    def send_to_all():
        workers.extend(set(psutil.Process().children()) - earlier)
        for name in ("-TERM", "-USR1"):  # not by their parent, from which torch expects SIGTERM
            subprocess.run(["kill", name, *(str(worker.pid) for worker in workers)], check=True)
        send("SIGTERM")

    trainer = trainer_for(tmp_path, max_steps=6, dataloader_num_workers=2, dataloader_persistent_workers=True)
    trainer.add_callback(At(1, send_to_all))
    with pytest.raises(TrainingStopped, match="stopped at step 2"):
        trainer.train()
    assert len(workers) == 2
    for worker in workers:
        if worker.is_running():
            worker.terminate()
            worker.wait(30)


@pytest.mark.slow
def test_a_script_that_catches_nothing_ends_with_the_status(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_stopping import At, send
from trainer_helpers import trainer_for
trainer = trainer_for({str(tmp_path)!r})
trainer.add_callback(At(2, lambda: send("SIGTERM")))
trainer.train()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 75, done.stderr[-2000:]
    assert "continue with trainer.train(resume_from_checkpoint=True)" in done.stderr
    assert "Traceback" not in done.stderr
