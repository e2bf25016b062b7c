"""What a training logs: often enough to see a curve, and what its loss says beside its terms."""

import math
from types import SimpleNamespace

import pytest
import torch
from trainer_helpers import rows, trainer_for

from hf_kd.callbacks import LogSteps
from hf_kd.losses import CELoss, NKDLoss
from hf_kd.metrics.loss_terms import LossTerms


def non_target_kl(student, teacher, targets, temperature, gamma):
    """From its definition, image by image."""
    total = 0.0
    for s, t, own in zip(student.tolist(), teacher.tolist(), targets, strict=True):
        others = [i for i in range(len(s)) if i not in own]
        p, q = ([math.exp(x[i] / temperature) for i in others] for x in (t, s))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return gamma * temperature**2 * total / len(targets)


@pytest.mark.parametrize(("temperature", "gamma"), [(1.0, 1.5), (4.0, 0.5)])
@pytest.mark.parametrize("kind", ["hard", "mixed", "argmax"])
def test_nkds_diagnostic_is_the_kl_divergence_of_the_non_targets(kind, temperature, gamma):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    labels, targets = torch.tensor([0, 3, 6, 2, 2]), [(0,), (3,), (6,), (2,), (2,)]
    if kind != "hard":
        labels = 0.6 * torch.eye(7, dtype=torch.float64)[labels] + 0.4 * torch.eye(7, dtype=torch.float64)[5]
    if kind == "mixed":
        targets = [(*own, 5) for own in targets]
    loss = NKDLoss(temperature, gamma, "argmax" if kind == "argmax" else "two_hot")
    terms = loss(student, labels, teacher_logits=teacher)
    found = loss.diagnostics(terms, labels, teacher_logits=teacher)
    expected = non_target_kl(student, teacher, targets, temperature, gamma)
    assert {name: value.item() for name, value in found.items()} == {"non_target_kl": pytest.approx(expected)}
    same = loss(teacher, labels, teacher_logits=teacher)
    assert loss.diagnostics(same, labels, teacher_logits=teacher)["non_target_kl"].item() == pytest.approx(
        0, abs=1e-12
    )
    assert same["non_target"] > 0.1, "of the term itself the teacher's entropy is left"


@pytest.mark.filterwarnings("ignore:with 2 classes")
@pytest.mark.parametrize("labels", [torch.tensor([0, 1]), torch.tensor([[0.6, 0.4], [0.3, 0.7]])])
def test_two_classes_have_no_non_target(labels):
    logits = torch.randn(2, 2, generator=torch.Generator().manual_seed(0))
    loss = NKDLoss()
    terms = loss(logits, labels, teacher_logits=2 * logits)
    assert loss.diagnostics(terms, labels, teacher_logits=2 * logits)["non_target_kl"] == 0
    assert CELoss().diagnostics({}, labels) == {}


def test_terms_and_diagnostics_are_means_over_the_micro_batches():
    terms = LossTerms()
    terms.add({"ce": torch.tensor(4.0)}, {"kl": torch.tensor(8.0)}, 0.25, 0)
    terms.add({"ce": torch.tensor(8.0)}, {"kl": torch.tensor(0.0)}, 0.75, 0)
    assert terms.means(1, lambda total, _: total) == {"loss_ce": 7.0, "diagnostic_kl": 2.0}
    assert terms.means(2, lambda total, _: total) == {}


def test_the_diagnostic_is_logged_and_no_part_of_the_loss(tmp_path):
    trainer = trainer_for(
        tmp_path, loss="nkd", gradient_accumulation_steps=2, max_steps=2, per_device_train_batch_size=4
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        parts = [value for key, value in entry.items() if key.startswith("loss_")]
        assert len(parts) == 3 and entry["loss"] == pytest.approx(sum(parts), rel=1e-5)
        assert 0 <= entry["diagnostic_non_target_kl"] < entry["loss_non_target"]


@pytest.mark.parametrize(("settings", "steps"), [({}, 24), ({"logging_steps": 500}, 24), ({"logging_steps": 10}, 3)])
def test_a_short_run_is_logged_often_unless_it_is_told_how_often(tmp_path, settings, steps):
    trainer = trainer_for(tmp_path, train=rows(8), max_steps=24, **{"logging_steps": 500} | settings)
    trainer.train()
    logged = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == steps and logged[-1] == 24


@pytest.mark.parametrize("max_steps", [7, 60, 160, 1000, 24_999, 50_000])
def test_a_run_of_any_length_has_20_points_at_least(max_steps):
    callback, args, logged = LogSteps(), SimpleNamespace(logging_strategy="steps", logging_steps=500), 0
    for step in range(1, max_steps + 1):
        control = SimpleNamespace(should_log=step % 500 == 0)  # as transformers does
        callback.on_step_end(args, SimpleNamespace(global_step=step, max_steps=max_steps), control)
        logged += control.should_log
    assert min(20, max_steps) <= logged <= 110
