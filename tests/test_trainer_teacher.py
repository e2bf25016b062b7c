"""The teacher inside a trainer: of its own class order and compute type, and the probability that it drops."""

import numpy as np
import pytest
import torch
from tiny import tiny
from trainer_helpers import NAMES, config, make_teacher, rows, trainer_for
from transformers import CLIPImageProcessor
from transformers.utils import logging

from hf_kd import DistillationTrainer, load_student, load_teacher
from hf_kd.reporting.collect import make_record

MORE = [*NAMES[:3], "other a", *NAMES[3:], "other b"]


def wide_teacher(bias, **kwargs):
    """A teacher of eight classes, of which the data has six; `bias` is added to the logits of the other two."""
    module, processor = tiny("resnet", seed=7, size=48, names=MORE)
    with torch.no_grad():
        module.classifier[-1].bias[[3, 7]] += bias
    return load_teacher(module, processor=processor, **kwargs)


def trained(trainer):
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_one_teacher_for_two_trainers_of_other_orders_is_not_changed_under_the_first(tmp_path):
    teacher = make_teacher()
    before, pixels = teacher.id2label, torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    logits = teacher(pixels)
    alone = trained(trainer_for(tmp_path / "alone", loss="nkd", teacher=make_teacher()))
    first = trainer_for(tmp_path / "first", loss="nkd", teacher=teacher, teacher_dtype="fp32")
    student, processor = load_student(*tiny("vit", names=NAMES[::-1])[:1], processor=tiny("vit")[1])
    second = DistillationTrainer(
        student,
        config(tmp_path / "second", loss="nkd", teacher_dtype="bf16"),
        teacher=teacher,
        processing_class=processor,
    )
    assert first.teacher.model is second.teacher.model is teacher.model
    assert torch.equal(second.teacher.aligned(dtype=torch.float32)(pixels), logits.flip(1))
    assert torch.equal(first.teacher(pixels), logits) and torch.equal(teacher(pixels), logits)
    assert teacher.id2label == before and teacher.dtype is None
    assert torch.equal(trained(first), alone)


@pytest.mark.parametrize(
    ("given", "asked", "expected"),
    [
        (None, {}, torch.float32),
        (None, {"bf16": True}, torch.bfloat16),
        (torch.float16, {}, torch.float16),
        (torch.float16, {"teacher_dtype": "bf16"}, torch.bfloat16),
        (torch.bfloat16, {"teacher_dtype": "fp32"}, torch.float32),
        (None, {"teacher_dtype": "fp32", "bf16": True}, torch.float32),
    ],
)
def test_the_compute_type_that_the_config_names_wins(given, asked, expected, tmp_path):
    teacher = make_teacher().aligned(dtype=given)
    trainer = trainer_for(tmp_path, loss="nkd", teacher=teacher, **asked)
    assert trainer.teacher.dtype is expected and teacher.dtype is given
    assert trainer.eval_teacher is trainer.teacher


def test_weights_of_a_teacher_that_the_user_holds_keep_their_type(tmp_path):
    module, processor = tiny("resnet", names=NAMES)
    teacher = load_teacher(module.bfloat16(), processor=processor)
    trainer = trainer_for(tmp_path, loss="nkd", teacher=teacher)
    assert {p.dtype for p in trainer.teacher.parameters()} == {torch.float32}
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("bias", [-2.0, 6.0])
def test_the_dropped_probability_is_measured_and_warned_about(bias, tmp_path, caplog):
    type(logging.get_logger("hf_kd.trainer")).warning_once.cache_clear()
    teacher, data = wide_teacher(bias), rows(24)
    trainer = trainer_for(tmp_path, loss="nkd", teacher=teacher, evaluation=data)
    assert teacher.mapping.kind == "identity" and trainer.teacher.mapping.kind == "subset"
    images = [torch.from_numpy(np.array(row["image"])).permute(2, 0, 1) for row in data]
    full = teacher(torch.stack(images)).double().softmax(1)
    expected = full[:, [3, 7]].sum(1).mean().item()
    measured = trainer.measure_teacher()
    assert measured["dropped_mass"] == pytest.approx(expected, abs=0.01)
    kept = full[:, [0, 1, 2, 4, 5, 6]]
    labels = torch.tensor(data["label"])
    loss = -(kept / kept.sum(1, keepdim=True))[range(24), labels].log().mean().item()
    assert measured["loss"] == pytest.approx(loss, abs=0.02)
    trainer.train()
    assert ("of its 8 classes that the data does not have" in caplog.text) == (expected > 0.5)
    assert (expected > 0.5) == (bias > 0)
    assert "dropped_mass" not in trainer_for(tmp_path, loss="nkd", evaluation=data).measure_teacher()


def test_the_record_has_the_mapping(tmp_path):
    trainer = trainer_for(tmp_path, loss="nkd", teacher=wide_teacher(0.0), evaluation=rows(), max_steps=1)
    trainer.train()
    record = make_record(trainer)
    mapping = record["teacher"]["class_mapping"]
    assert mapping["kind"] == "subset" and mapping["source_classes"] == 8
    assert mapping["classes"][3] == ["class 3", {"4": "class 3"}]


def test_another_teacher_is_measured_as_its_own_preprocessing_wants_it(tmp_path):
    """It crops another part out of the images than the student and the evaluation teacher see."""
    module, _ = tiny("resnet", seed=3, names=NAMES)
    cropping = CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 24, "width": 24})
    other = load_teacher(module, processor=cropping)
    data = rows(24)
    expected = trainer_for(tmp_path / "own", loss="nkd", teacher=other, evaluation=data).measure_teacher()
    trainer = trainer_for(tmp_path / "other", loss="nkd", evaluation=data)
    before = trainer.eval_teacher
    assert trainer.measure_teacher(teacher=other.aligned()) == pytest.approx(expected)
    assert trainer.eval_teacher is before and "eval_agreement" in trainer.evaluate()
