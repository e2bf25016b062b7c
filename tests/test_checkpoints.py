"""Checkpoints are whole or not there, and the last one is of the course that the run took last."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from trainer_helpers import NAMES, rows, trainer_for
from transformers import TrainerCallback

from hf_kd.checkpointing import ABANDONED, STAGING, last_checkpoint
from hf_kd.cli import main
from hf_kd.spec import read_plan
from hf_kd.trainer import DistillationTrainer

pytestmark = pytest.mark.usefixtures("undrawn_figures")


def steps(folder):
    return sorted(int(path.name.split("-")[1]) for path in Path(folder).glob("checkpoint-*"))


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def saving(folder, max_steps, stop=None, **settings):
    """A trainer that saves every second step; `stop`: the step after which it is stopped before its end."""
    settings = {"save_strategy": "steps", "save_steps": 2, "loss": "ce"} | settings
    trainer = trainer_for(folder, "resnet", max_steps=max_steps, **settings)
    if stop:
        trainer.add_callback(StopAt(stop))
    return trainer


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_what_would_not_go_on_as_it_was_is_refused(tmp_path, capsys):
    saving(tmp_path, 4, stop=2, save_only_model=True).train()
    with pytest.raises(ValueError, match="without the state of the optimizer"):
        saving(tmp_path, 4, save_only_model=True).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"`trainer.train\(resume_from_checkpoint=True\)`"):
        saving(tmp_path, 4, learning_rate=0.5).train(resume_from_checkpoint=True)
    assert main(["resume", str(tmp_path)]) == 1
    assert "by a trainer built in Python" in capsys.readouterr().err
    assert read_plan(tmp_path).train_image_size == saving(tmp_path, 4).train_image_size


def test_going_back_and_on_resumes_from_there(tmp_path, caplog):
    straight = saving(tmp_path, 8)
    straight.train()
    assert steps(tmp_path) == [2, 4, 6, 8] and not (tmp_path / STAGING).exists()
    kept = (tmp_path / "checkpoint-8" / "optimizer.pt").read_bytes()
    caplog.clear()
    saving(tmp_path, 8, stop=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert Path(last_checkpoint(tmp_path)).name == "checkpoint-4"
    assert steps(tmp_path) == [2, 4] and steps(tmp_path / f"{ABANDONED}-1") == [4, 6, 8]
    assert (tmp_path / f"{ABANDONED}-1" / "checkpoint-8" / "optimizer.pt").read_bytes() == kept
    (message,) = (r.getMessage() for r in caplog.records if ABANDONED in r.getMessage())
    assert "checkpoint-2: moved checkpoint-4, checkpoint-6, checkpoint-8 of an earlier one to" in message
    again = saving(tmp_path, 8)
    again.train(resume_from_checkpoint=True)
    assert steps(tmp_path) == [2, 4, 6, 8]
    for name, value in weights(again).items():
        assert torch.equal(value, straight.model.state_dict()[name]), name


def test_going_back_holds_although_nothing_was_saved_since(tmp_path):
    saving(tmp_path, 6).train()
    saving(tmp_path, 6, stop=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert Path(last_checkpoint(tmp_path)).name == "checkpoint-2"


def test_a_training_that_starts_anew_keeps_what_was_there(tmp_path, caplog):
    saving(tmp_path, 4).train()
    saving(tmp_path, 2).train()
    assert steps(tmp_path) == [2] and steps(tmp_path / f"{ABANDONED}-1") == [2, 4]
    assert "this training starts from the beginning: moved checkpoint-2, checkpoint-4" in caplog.text
    elsewhere = tmp_path / "elsewhere"
    saving(elsewhere, 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    saving(tmp_path, 6).train(resume_from_checkpoint=str(elsewhere / "checkpoint-4"))  # not the course of the 2 here
    assert steps(tmp_path) == [6] and steps(tmp_path / f"{ABANDONED}-2") == [2]


KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
from test_checkpoints import saving
trainer = saving({folder!r}, 6)
save = trainer._save_rng_state
def killed(*args):
    if trainer.state.global_step == 4:
        os._exit(9)
    return save(*args)
trainer._save_rng_state = killed
trainer.train()
"""


def test_a_run_killed_while_it_saves_leaves_no_half_checkpoint(tmp_path):
    whole = saving(tmp_path / "whole", 6)
    whole.train()
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "cut"))
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ)).returncode == 9
    assert steps(tmp_path / "cut") == [2]
    assert (tmp_path / "cut" / STAGING / "checkpoint-4" / "model.safetensors").is_file()
    resumed = saving(tmp_path / "cut", 6)
    resumed.train(resume_from_checkpoint=True)
    assert steps(tmp_path / "cut") == [2, 4, 6] and not (tmp_path / "cut" / STAGING).exists()
    for name, value in weights(resumed).items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


def test_a_save_that_fails_keeps_the_last_checkpoint_and_cleans_up(tmp_path, monkeypatch):
    trainer = saving(tmp_path, 4, save_total_limit=1)
    save = DistillationTrainer._save_rng_state

    def full(self, output_dir):
        if self.state.global_step == 4:
            raise OSError(28, "No space left on device")
        save(self, output_dir)

    monkeypatch.setattr(DistillationTrainer, "_save_rng_state", full)
    with pytest.raises(OSError) as error:
        trainer.train()
    assert error.value.filename == str(tmp_path)
    assert steps(tmp_path) == [2] and not (tmp_path / STAGING).exists()


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = saving(tmp_path, 8, evaluation=rows(12, seed=1), save_total_limit=2, **best)
    accuracy = iter([0.2, 0.9, 0.4, 0.3])
    evaluate, seen = trainer.evaluate, []

    def measured(*args, **kwargs):
        seen.append(steps(tmp_path))
        return evaluate(*args, **kwargs) | {"eval_top1": next(accuracy)}

    trainer.evaluate = measured
    trainer.train()
    assert seen == [[], [2], [2, 4], [4, 6]]
    assert steps(tmp_path) == [4, 8]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    for step in (4, 8):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-4")


def test_rotation_counts_only_this_course(tmp_path):
    saving(tmp_path, 8).train()
    resumed = saving(tmp_path, 8, stop=6, save_total_limit=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert steps(tmp_path) == [4, 6] and steps(tmp_path / f"{ABANDONED}-1") == [4, 6, 8]


def test_saving_a_step_twice_replaces_it(tmp_path):
    trainer = saving(tmp_path, 2)
    trainer.train()
    (tmp_path / "checkpoint-2" / "checkpoint-is-incomplete.txt").touch()  # of transformers' save on SIGTERM
    trainer._save_checkpoint(trainer.model, None)
    assert steps(tmp_path) == [2] and not (tmp_path / "checkpoint-2" / "checkpoint-is-incomplete.txt").exists()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2") and not (tmp_path / STAGING).exists()


def test_the_card_is_ours_when_transformers_asks_for_one(tmp_path, caplog):
    trainer = saving(tmp_path, 1)
    trainer.create_model_card(model_name="x")  # nothing to evaluate on, thus no record
    assert "no card is written" in caplog.text and not (tmp_path / "README.md").exists()
    trainer = saving(tmp_path, 1, evaluation=rows(12, seed=1))
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="x", tags=["y"])
    card = (tmp_path / "README.md").read_text()
    assert "by [hf_kd]" in card and "automatically" not in card  # as transformers' own card says
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["data"]["classes"] == len(NAMES) and f"{100 * record['metrics']['top1']:.2f}" in card


def test_images_that_could_not_be_decoded_before_are_counted_after_resuming(tmp_path):
    broken = rows().cast_column("image", datasets.Image(decode=False))
    broken = broken.map(lambda row, i: {"image": {"bytes": b"", "path": f"{i}.png"}} if i in (3, 11) else row, True)
    broken = broken.cast_column("image", datasets.Image())
    settings = {"train": broken, "evaluation": broken, "max_skipped_fraction": 0.5, "eval_strategy": "steps"}
    settings |= {"max_steps": 3, "eval_steps": 1, "save_steps": 3}  # one epoch
    trainer = saving(tmp_path, **settings)
    trainer.train()
    assert len(trainer.skipped) == len(trainer.eval_skipped) == 2
    resumed = saving(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)  # has nothing left to do
    assert (resumed.skipped, resumed.eval_skipped) == (trainer.skipped, trainer.eval_skipped)
