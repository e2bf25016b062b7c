"""The trainer's steps against hand-written training, saving and resuming, in one process on the CPU."""

import contextlib
import copy
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny
from torch import nn
from trainer_helpers import NAMES, config, freeze_batch_norm, make_teacher, rows, trainer_for
from transformers import AutoModelForImageClassification, TrainerCallback
from transformers.utils import logging

from hf_kd import DistillationTrainer, load_teacher
from hf_kd.checkpointing import HEAD_FILE, last_checkpoint
from hf_kd.losses import LOSSES
from hf_kd.models.forward import logits_of
from hf_kd.teacher_check import warn_near_chance

FAMILIES = ["vit", "deit", "resnet", "timm_resnet", "timm_vit"]


class Gradients(TrainerCallback):
    """Keeps what the optimizer is about to use, step by step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def train_and_watch(trainer):
    freeze_batch_norm(trainer.model)
    watch = Gradients()
    trainer.add_callback(watch)
    trainer.train()
    return watch.steps, [entry for entry in trainer.state.log_history if "loss" in entry]


# ---- the step itself ----


@pytest.mark.parametrize("kind", FAMILIES)
def test_accumulation_gives_the_same_gradients_and_loss(kind, tmp_path):
    """(16, 1), (4, 4) and uneven micro-batches: 20 rows in batches of 16 and 4, or of 6, 6, 6 and 2."""
    train = rows(20)
    results = {}
    for batch, accumulation, limit in ((16, 1, 16), (4, 4, 16), (20, 1, 20), (6, 4, 20)):
        trainer = trainer_for(
            tmp_path / f"{batch}-{accumulation}",
            kind,
            "nkd",
            train=train.select(range(limit)),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
        )
        results[batch, accumulation] = train_and_watch(trainer)
    for one, other in (((16, 1), (4, 4)), ((20, 1), (6, 4))):
        (steps, logs), (other_steps, other_logs) = results[one], results[other]
        assert len(steps) == len(other_steps) == 2
        for a, b in zip(steps, other_steps, strict=True):
            assert a.keys() == b.keys()
            for name in a:
                torch.testing.assert_close(a[name], b[name], rtol=2e-4, atol=2e-6, msg=f"{kind} {name}")
        for a, b in zip(logs, other_logs, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_first_step_is_the_hand_written_one(tmp_path):
    """One SGD step of NKD, written with nothing of the trainer's."""
    train = rows(8)
    trainer = trainer_for(
        tmp_path, "vit", "nkd", train=train, max_steps=1, loss_kwargs={"gamma": 1.5}, train_image_size=32
    )
    student, processor = tiny("vit", names=NAMES)
    teacher, teacher_processor = tiny("resnet", seed=7, size=48, names=NAMES)
    trainer.train()

    images, labels = train["image"], torch.tensor(train["label"])
    s = student.train()(processor(list(images), return_tensors="pt")["pixel_values"]).logits
    with torch.no_grad():
        t = teacher.eval()(teacher_processor(list(images), return_tensors="pt")["pixel_values"]).logits
    ps, pt = s.softmax(1), t.softmax(1)
    loss = 0.0
    for i, y in enumerate(labels):
        others = [c for c in range(6) if c != y]
        ns, nt = s[i, others].softmax(0), t[i, others].softmax(0)
        loss = loss - ps[i, y].log() - pt[i, y] * ps[i, y].log() - 1.5 * (nt * ns.log()).sum()
    (loss / len(labels)).backward()
    with torch.no_grad():
        for p in student.parameters():
            if p.grad is not None:
                p -= 0.05 * p.grad
    for (name, got), expected in zip(trainer.model.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(got.detach(), expected.detach(), rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("accumulation", [1, 3])
def test_logged_terms_add_up(loss, accumulation, tmp_path):
    trainer = trainer_for(
        tmp_path, loss=loss, gradient_accumulation_steps=accumulation, logging_steps=2, max_steps=4, train=rows(40)
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        terms = {k: v for k, v in entry.items() if k.startswith("loss_")}
        assert len(terms) == {"ce": 1, "nkd": 3, "dkd": 3, "dist": 3, "uskd": 4}.get(loss, 2)
        assert sum(terms.values()) == pytest.approx(entry["loss"], rel=1e-5)


def test_one_teacher_forward_a_step_and_the_teacher_never_changes(tmp_path):
    teacher = make_teacher()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    calls, modes = [], set()

    def watch(module, args, output):
        calls.append(1)
        modes.update(x.training for x in teacher.modules())

    teacher.model.register_forward_hook(watch)
    trainer = trainer_for(
        tmp_path,
        loss="nkd",
        teacher=teacher,
        max_steps=5,
        save_strategy="steps",
        save_steps=5,
        teacher_check_batches=0,
    )
    trainer.model.train()
    trainer.train()
    assert len(calls) == 5
    assert modes == {False}
    for k, v in teacher.state_dict().items():
        assert torch.equal(v, before[k]), k
    assert not any(p.grad is not None for p in teacher.parameters())
    saved = torch.load(tmp_path / "checkpoint-5" / "optimizer.pt", weights_only=False)
    trained = sum(len(group["params"]) for group in saved["param_groups"])
    assert trained == len(list(trainer.model.parameters()))
    assert not [f for f in tmp_path.rglob("*") if "teacher" in f.name]


def test_permuted_teacher_gives_the_same_loss(tmp_path):
    module, processor = tiny("resnet", seed=7, size=48, names=NAMES)
    order = [3, 0, 5, 1, 4, 2]
    shuffled = copy.deepcopy(module)
    with torch.no_grad():
        for old, new in zip(module.classifier.parameters(), shuffled.classifier.parameters(), strict=True):
            new.copy_(old[order])
    shuffled.config.id2label = {i: NAMES[c] for i, c in enumerate(order)}
    losses = []
    for k, m in enumerate((module, shuffled)):
        trainer = trainer_for(tmp_path / str(k), loss="nkd", teacher=load_teacher(m, processor=processor))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_teacher_near_chance_is_warned_about_and_does_not_change_the_run(tmp_path, caplog):
    type(logging.get_logger("hf_kd.trainer")).warning_once.cache_clear()  # another test may have met it
    runs = []
    for batches in (0, 4):
        trainer = trainer_for(tmp_path / str(batches), loss="nkd", teacher_check_batches=batches, augment="pad_crop")
        trainer.train()
        runs.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        assert ("chance is 16.7%" in caplog.text) == bool(batches)
    assert torch.equal(*runs)


@pytest.mark.parametrize("loss", list(LOSSES))
def test_a_step_reads_nothing_back_from_the_device(loss, tmp_path, monkeypatch):
    """Tensors of the meta device have no values: whatever would wait for the device to read one fails on them."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # there is none for meta
    trainer = trainer_for(tmp_path, "resnet", loss)
    trainer.train_loss._values_checked = True  # what reads values does so in the first step only
    trainer.model.to("meta")
    batch = {
        "pixels": torch.empty(8, 3, 32, 32, dtype=torch.uint8, device="meta"),
        "labels": torch.empty(8, dtype=torch.int64, device="meta"),
    }
    if trainer.teacher is not None:
        trainer.teacher.to("meta")
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=8).backward()
    assert all(term.device.type == "meta" for term in trainer._terms._sums.values())
    with pytest.raises(RuntimeError):  # the test can fail
        trainer._terms.means(1, lambda totals, reduction: totals)


# ---- saving and resuming ----


@pytest.mark.parametrize("kind", FAMILIES)
def test_resume_gives_bit_identical_weights(kind, tmp_path):
    """USKD with dropout, augmentation and AdamW: an uninterrupted run is the oracle."""

    def make(folder, **kwargs):
        trainer = trainer_for(
            tmp_path / folder, kind, "uskd", max_steps=7, save_strategy="steps", save_steps=2, optim="adamw_torch",
            learning_rate=1e-3, augment="pad_crop", mixup_alpha=0.2, **kwargs,
        )  # fmt: skip
        for module in trainer.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
        return trainer

    whole = make("whole")
    whole.train()
    make("cut").train()
    for step in (4, 6, 7):  # as if the run had been cut off after step 2, in the middle of an epoch
        for file in sorted((tmp_path / "cut" / f"checkpoint-{step}").rglob("*"), reverse=True):
            file.unlink()
    resumed = make("cut")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 7
    expected, got = whole.model.state_dict(), resumed.model.state_dict()
    assert expected.keys() == got.keys()
    expected |= whole.auxiliary_head.state_dict()
    got |= resumed.auxiliary_head.state_dict()
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


def test_resume_refuses_a_checkpoint_that_does_not_fit(tmp_path):
    trainer = trainer_for(tmp_path, "vit", save_strategy="steps", save_steps=3)
    trainer.train()
    with pytest.raises(ValueError, match="student.id"):
        trainer_for(tmp_path, "resnet").train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="loss.name"):
        trainer_for(tmp_path, "vit", "uskd").train(resume_from_checkpoint=True)


def test_resume_passes_over_a_half_written_checkpoint(tmp_path):
    trainer = trainer_for(tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text('{"global_st')
    assert Path(last_checkpoint(tmp_path)).name == "checkpoint-2"


@pytest.mark.parametrize("kind", ["vit", "timm_vit"])
def test_load_best_model_at_end_really_loads_it(kind, tmp_path):
    trainer = trainer_for(
        tmp_path, kind, evaluation=rows(24, seed=1), max_steps=4, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="loss",
        learning_rate=0.5,
    )  # fmt: skip
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = min(losses, key=losses.get)
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{best}"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)


def test_what_is_saved_is_a_plain_model_without_secrets(tmp_path):
    trainer = trainer_for(tmp_path, loss="uskd", save_strategy="steps", save_steps=3, hub_token="hf_secretsecret")
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "checkpoint-3" / HEAD_FILE).is_file()
    assert not (tmp_path / HEAD_FILE).exists()
    student, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert [student.config.id2label[i] for i in range(6)] == NAMES
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(student.eval()(x).logits, logits_of(trainer.model.eval()(x)))
    for file in tmp_path.rglob("*"):
        if file.is_file():
            assert b"hf_secretsecret" not in file.read_bytes(), file
    assert pickle.loads(pickle.dumps(trainer.args)).hub_token is None


def test_a_plain_module_is_saved_without_the_weak_head(tmp_path):
    from safetensors.torch import load_file

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = tiny("resnet", names=NAMES)[0].config
            self.body, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 6)

        def forward(self, pixel_values):
            return self.head(self.body(pixel_values).mean((2, 3)))

    trainer = DistillationTrainer(
        Plain(), config(tmp_path, loss="uskd", feature_module="body", save_strategy="steps", save_steps=3),
        train_dataset=rows(), processing_class=tiny("resnet")[1],
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    keys = {"body.weight", "body.bias", "head.weight", "head.bias"}
    assert load_file(tmp_path / "model.safetensors").keys() == keys
    assert load_file(tmp_path / "checkpoint-3" / HEAD_FILE).keys() == {"weight", "bias"}


def test_nan_loss_stops_the_run_and_says_where(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=4, save_strategy="steps", save_steps=1)

    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                torch.nn.init.constant_(model.classifier.bias, float("nan"))

    trainer.add_callback(Poison())
    with pytest.raises(FloatingPointError, match="1 weights are not finite at step 2.*checkpoint-1"):
        trainer.train()
    assert Path(last_checkpoint(tmp_path)).name == "checkpoint-1"
    with pytest.raises(FloatingPointError, match="the loss is NaN at step 2"):
        trainer.log({"loss": float("nan")})


def test_ctrl_c_keeps_its_checkpoint_beside_the_best(tmp_path):
    """With one checkpoint to keep, transformers' clean-up at the end of training would keep the best alone."""
    trainer = trainer_for(
        tmp_path, evaluation=rows(24, seed=1), max_steps=6, eval_strategy="steps", eval_steps=1, learning_rate=0.5,
        save_strategy="steps", save_steps=1, save_total_limit=1, load_best_model_at_end=True,
        metric_for_best_model="ece",
    )  # fmt: skip
    assert trainer.args.greater_is_better is False

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    trainer.add_callback(Stop())
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 4; .*checkpoint-4"):
        trainer.train()
    assert (tmp_path / "checkpoint-4").is_dir()
    assert signal.getsignal(signal.SIGINT) is before


def test_the_teacher_that_teaches_is_the_one_that_is_checked(tmp_path):
    student, processor = tiny("vit", names=NAMES)
    teacher, other = make_teacher(seed=7), make_teacher("timm_resnet", seed=8, size=40)
    calls = []
    teacher.model.register_forward_hook(lambda *args: calls.append(1))
    trainer = DistillationTrainer(
        student, config(tmp_path, loss="nkd"), teacher, other, rows(), rows(16), processing_class=processor
    )
    warn_near_chance(trainer)
    assert len(calls) == 2 and "eval_agreement" in trainer.evaluate() and len(calls) == 2


@pytest.mark.slow
def test_bf16_and_compile_train(tmp_path):
    trainer = trainer_for(tmp_path, loss="nkd", bf16=True)
    assert trainer.teacher.dtype is torch.bfloat16
    trainer.train()
    for loss in ("nkd", "uskd"):
        plain = trainer_for(tmp_path / f"{loss}-plain", loss=loss)
        # The graphs are captured, not compiled, which is not ours to test and takes ten times longer.
        compiled = trainer_for(tmp_path / f"{loss}-compiled", loss=loss, torch_compile_backend="eager")
        plain.train(), compiled.train()
        for a, b in zip(plain.state.log_history, compiled.state.log_history, strict=True):
            if "loss" in a:
                assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        compiled.save_model(str(tmp_path / "compiled"))
        AutoModelForImageClassification.from_pretrained(tmp_path / "compiled")


class Signal(TrainerCallback):
    """Sends this process a signal at the end of step 2."""

    def __init__(self, name):
        self.name = name

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), getattr(signal, self.name))


def train_killed(folder, name=None, every=100, resume=None):
    """A run whose weights are returned, and which a signal ends if it is named."""
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": int(every), "augment": "pad_crop"}
    trainer = trainer_for(folder, "deit", "uskd", **options)
    if name:
        trainer.add_callback(Signal(name))
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model.state_dict()


@pytest.mark.parametrize(("name", "every"), [("SIGINT", 100), ("SIGKILL", 1)])
@pytest.mark.slow
def test_a_killed_run_resumes_bit_identically(name, every, tmp_path):
    """The signal comes at the end of step 2: Ctrl-C saves when the next one ends, kill -9 leaves what step 1 saved."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_trainer; test_trainer.train_killed(*sys.argv[2:])"
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "cut"), name, str(every)]
    cut = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert cut.returncode != 0
    if name == "SIGINT":
        assert "the state is saved in" in cut.stderr
    state = json.loads((Path(last_checkpoint(tmp_path / "cut")) / "trainer_state.json").read_text())
    assert state["global_step"] == (3 if name == "SIGINT" else 1)
    a, b = train_killed(tmp_path / "whole"), train_killed(tmp_path / "cut", every=every, resume=True)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_an_evaluation_drops_no_image(tmp_path):
    sizes = {"per_device_train_batch_size": 10, "per_device_eval_batch_size": 10}
    trainer = trainer_for(tmp_path, evaluation=rows(19, seed=1), dataloader_drop_last=True, **sizes)
    whole = trainer_for(tmp_path, evaluation=rows(19, seed=1), per_device_eval_batch_size=19)
    assert trainer.evaluate()["eval_top1"] == pytest.approx(whole.evaluate()["eval_top1"])
    assert trainer.args.dataloader_drop_last and len(trainer.get_train_dataloader()) == 24 // 10


def test_a_second_training_starts_from_the_same_rate(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=-1, num_train_epochs=2, lr_step_epochs=[1], lr_step_factor=0.1)
    rates = []
    for _ in range(2):
        trainer.train()
        rates.append([entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry])
    assert rates[0] == rates[1] and rates[0][0] == pytest.approx(10 * rates[0][-1])


@pytest.mark.parametrize("kind", ["deit", "timm_vit", "resnet"])
def test_tokens_and_positions_are_not_decayed(kind, tmp_path):
    trainer = trainer_for(tmp_path, kind)
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    free = {name for name, _ in trainer.model.named_parameters()} - decayed
    assert all("token" in n or "position" in n or "pos_embed" in n or "bias" in n or "norm" in n for n in free)
    if kind != "resnet":
        assert sum("token" in name for name in free) == (2 if kind == "deit" else 1)
        assert sum("position_embeddings" in name or "pos_embed" in name for name in free) == 1
    assert any("patch_embed" in name or "convolution" in name or "projection" in name for name in decayed)
