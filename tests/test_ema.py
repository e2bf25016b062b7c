"""The average of the student's weights: against hand-written loops, and against the same training without it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoints import StopAt
from timm.utils import ModelEmaV3
from torch import nn
from trainer_helpers import config, rows, trainer_for
from transformers import AutoModelForImageClassification, TrainerCallback

from hf_kd import DistillationConfig
from hf_kd.checkpointing import HEAD_FILE
from hf_kd.ema import TRAINED_FILE, StudentAverage

EVERY = {"eval_strategy": "steps", "eval_steps": 1, "evaluation": rows(12, seed=1)}


def state_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items() if "aux_head" not in name}


class Watch(TrainerCallback):
    """Keeps the weights after every step, and gives them to timm's average."""

    def __init__(self, decay=0.9, warmup=False):
        self.steps, self.decay, self.warmup, self.timm = [], decay, warmup, None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append(state_of(model))
        if self.timm is None:
            self.timm = ModelEmaV3(model, decay=self.decay, use_warmup=self.warmup)
        self.timm.update(model, step=state.global_step)


def trained(folder, kind="resnet", loss="ce", watch=None, resume=None, stop=None, **settings):
    trainer = trainer_for(folder, kind, loss, **{"max_steps": 4, "gradient_accumulation_steps": 2, **settings})
    for callback in filter(None, (watch, stop and StopAt(stop))):
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def evaluated(trainer):
    entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    return [{k: v for k, v in e.items() if not k.endswith(("runtime", "per_second", "epoch"))} for e in entries]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize(("loss", "kind"), [("uskd", "resnet"), ("nkd", "vit")])
@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_is_the_hand_written_one_and_training_is_as_without_it(loss, kind, warmup, tmp_path):
    watch, plain_watch = Watch(0.6, warmup), Watch()
    with_average = {"ema_decay": 0.6, "ema_warmup": warmup, **EVERY}
    trainer = trained(tmp_path / "ema", kind, loss, watch, **with_average)
    plain = trained(tmp_path / "plain", kind, loss, plain_watch, **EVERY)
    assert len(watch.steps) == 4, "a step for two micro-batches"
    for one, other in zip(watch.steps, plain_watch.steps, strict=True):
        assert_equal(one, other)
    average = {}
    for t, weights in enumerate(watch.steps, 1):
        decay = min(0.6, 1 - t ** (-2 / 3)) if warmup else 0.6 * (t > 1)
        for name, value in weights.items():
            if value.is_floating_point():
                before = average.get(name, torch.zeros(()))
                average[name] = decay * before + (1 - decay) * value.double()
            else:
                average[name] = value
    found = state_of(trainer.model)
    assert found.keys() == average.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), average[name].double(), rtol=1e-5, atol=1e-7, msg=name)
    moved = [name for name in found if not torch.equal(found[name], watch.steps[-1][name])]
    assert "classifier.weight" in str(moved) or "classifier.1.weight" in moved
    if kind == "resnet":
        assert any("running_var" in name for name in moved)
    timm = watch.timm.module.state_dict()
    for name, value in found.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, timm[name], rtol=1e-5, atol=1e-7, msg=name)
    if trainer.auxiliary_head is not None:
        assert_equal(trainer.auxiliary_head.state_dict(), plain.auxiliary_head.state_dict())
    # What was evaluated after each step is the average then, not the student that was trained.
    assert evaluated(trainer)[0] == evaluated(plain)[0] and evaluated(trainer)[3] != evaluated(plain)[3]
    now = trainer.evaluate()
    assert now["eval_loss"] == evaluated(trainer)[-1]["eval_loss"]


def test_an_average_of_the_last_step_alone_is_the_run_without_one(tmp_path):
    both = {}
    for name, decay in (("plain", None), ("ema", 1e-12)):
        settings = {"save_strategy": "steps", "save_steps": 2, "ema_decay": decay, **EVERY}
        both[name] = trained(tmp_path / name, "resnet", "nkd", **settings)
        both[name].save_model()
    assert_equal(*(state_of(trainer.model) for trainer in both.values()))
    assert evaluated(both["plain"]) == evaluated(both["ema"])
    for file in ("model.safetensors", "checkpoint-2/model.safetensors"):
        assert_equal(*(load_file(tmp_path / name / file) for name in both))
    assert not (tmp_path / "plain" / "checkpoint-2" / TRAINED_FILE).exists()


@pytest.mark.parametrize(("kind", "loss"), [("resnet", "uskd"), ("deit", "ce"), ("timm_resnet", "ce")])
def test_a_resumed_average_is_the_uninterrupted_one(kind, loss, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "ema_decay": 0.8, "optim": "adamw_torch"}
    settings |= {"learning_rate": 1e-3, **EVERY}
    whole = trained(tmp_path / "whole", kind, loss, **settings)
    trained(tmp_path / "cut", kind, loss, stop=2, **settings)
    cut = trained(tmp_path / "cut", kind, loss, resume=True, **settings)
    assert_equal(state_of(whole.model), state_of(cut.model))
    assert evaluated(whole) == evaluated(cut)
    files = ["model.safetensors", TRAINED_FILE, *([HEAD_FILE] if loss == "uskd" else [])]
    for file in files:
        one, other = (load_file(tmp_path / name / "checkpoint-6" / file) for name in ("whole", "cut"))
        assert_equal(one, other)
        assert file == "model.safetensors" or not any(name.startswith("aux_head") for name in one)
    # The model of a checkpoint is what was evaluated at its step.
    opened = AutoModelForImageClassification.from_pretrained(tmp_path / "whole" / "checkpoint-6")
    assert_equal(opened.state_dict(), whole.model.state_dict())


def test_the_best_model_is_the_average_of_its_step(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "ema_decay": 0.7, "load_best_model_at_end": True, **EVERY}
    trainer = trainer_for(tmp_path, "resnet", max_steps=4, **settings)
    accuracy, evaluate = iter([0.2, 0.9, 0.4, 0.3]), trainer.evaluate
    trainer.evaluate = lambda *args, **kwargs: evaluate(*args, **kwargs) | {"eval_top1": next(accuracy)}
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert evaluate()["eval_loss"] == evaluated(trainer)[1]["eval_loss"]
    trainer.save_model()
    assert_equal(load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "checkpoint-2" / "model.safetensors"))
    trained_then = load_file(tmp_path / "checkpoint-2" / TRAINED_FILE)
    assert not torch.equal(trained_then["classifier.1.weight"], trainer.model.classifier[1].weight)


def test_saving_while_training_saves_the_average_and_leaves_the_student(tmp_path):
    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            before = state_of(model)
            trainer.save_model(str(tmp_path / f"{state.global_step}"))
            assert_equal(before, state_of(model))

    trainer = trainer_for(tmp_path, "resnet", ema_decay=0.7)
    trainer.add_callback(Save())
    trainer.train()
    assert_equal(load_file(tmp_path / "3" / "model.safetensors"), state_of(trainer.model))


def test_what_is_stopped_or_frozen(tmp_path):
    """An interrupted training leaves the average in the student; frozen weights are neither averaged nor saved."""
    trainer = trainer_for(tmp_path, "vit", ema_decay=0.7, save_strategy="steps", save_steps=2)
    for parameter in trainer.model.vit.parameters():
        parameter.requires_grad_(False)
    before = state_of(trainer.model)
    trainer.add_callback(StopAt(2))
    trainer.train()
    assert set(load_file(tmp_path / "checkpoint-2" / TRAINED_FILE)) == {"classifier.weight", "classifier.bias"}
    after = state_of(trainer.model)
    assert_equal(*({k: v for k, v in part.items() if k.startswith("vit")} for part in (before, after)))
    opened = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-2")
    assert_equal(opened.state_dict(), after)


def test_a_decay_too_long_for_the_training_is_warned_about(monkeypatch):
    warned = []
    monkeypatch.setattr("hf_kd.ema.logger.warning_once", warned.append)
    average, student = StudentAverage(0.999), nn.Linear(2, 2)
    average.begin(student, 999, None)
    (text,) = warned
    assert "0.999 averages over about 1,000 steps and training has 999" in text
    for quiet in (StudentAverage(0.999), StudentAverage(0.9999, warmup=True), StudentAverage(None)):
        quiet.begin(student, 1001, None)
    assert warned == [text]


def test_what_cannot_be_averaged_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"weights of 32 bits.*weight \(torch.bfloat16\).*bf16=True"):
        StudentAverage(0.9).begin(nn.Linear(2, 2).bfloat16(), 10, None)
    for wrong in (0.0, 1.0, -0.1, 1.5):
        with pytest.raises(ValueError, match="ema_decay="):
            config(tmp_path, ema_decay=wrong)
    with pytest.raises(ValueError, match="no effect without ema_decay"):
        config(tmp_path, ema_warmup=True)
    for engine in ("zero1", "zero2", "zero3", "fsdp"):
        monkeypatch.setattr(DistillationConfig, "engine", property(lambda self, engine=engine: engine))
        with pytest.raises(ValueError, match=f"not with {engine}.*launch with DDP"):
            config(tmp_path, ema_decay=0.9)


def test_another_average_is_not_resumed(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    trained(tmp_path, stop=2, **settings)
    assert json.loads((tmp_path / "plan.json").read_text())["runs"][0]["settings"]["ema_decay"] is None
    with pytest.raises(ValueError, match=r"ema_decay \(None there, 0.9 here\)"):
        trained(tmp_path, resume=True, ema_decay=0.9, **settings)
