"""Metrics against numpy loops in float64, and the streamed against the whole."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from hf_kd.metrics import (
    ClassificationMeter,
    agreement,
    expected_calibration_error,
    module_path,
    sample_statistics,
    teacher_kl,
    top_k_accuracy,
)

N, C = 211, 13


@pytest.fixture
def batch():
    """Student logits that are right about half the time, labels of which some are -100, teacher logits."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(C - 1, (N,), generator=generator)  # the last class has no image
    student = 2 * torch.randn(N, C, generator=generator)
    student[torch.arange(N), labels] += 2.0
    student *= 0.6  # sure of too much in some bins and of too little in others, so that the bins matter
    teacher = student + torch.randn(N, C, generator=generator)
    labels[::7] = -100
    return student, labels, teacher


def softmax(row):
    shifted = np.exp(row - row.max())
    return shifted / shifted.sum()


def oracle(student, labels, teacher, n_bins=15):
    """Every metric, image by image and bin by bin, from its definition."""
    rows = []
    for s, y, t in zip(student.double().numpy(), labels.tolist(), teacher.double().numpy(), strict=True):
        if y == -100:
            continue
        p, q = softmax(s), softmax(t)
        order = sorted(range(len(s)), key=lambda i, s=s: (-s[i], i))
        rows.append(
            {
                "loss": -np.log(p[y]),
                "top1": order[0] == y,
                "top5": y in order[:5],
                "confidence": p.max(),
                "agreement": order[0] == int(np.argmax(t)),
                "kl": sum(b * np.log(b / a) for a, b in zip(p, q, strict=True)),
                "teacher_top1": int(np.argmax(t)) == y,
                "label": y,
                "repeated": order[0] == int(np.argmax(t)) != y,
            }
        )
    repeated = [row.pop("repeated") for row in rows if not row["teacher_top1"]]
    for row in rows:
        row.pop("repeated", None)
    means = {key: float(np.mean([row[key] for row in rows])) for key in rows[0] if key not in ("confidence", "label")}
    by_class = [[row["top1"] for row in rows if row["label"] == c] for c in {row["label"] for row in rows}]
    means["teacher_errors_repeated"] = float(np.mean(repeated))
    means["macro_top1"] = float(np.mean([np.mean(hits) for hits in by_class]))
    ece = 0.0
    for b in range(n_bins):
        inside = [row for row in rows if b / n_bins < row["confidence"] <= (b + 1) / n_bins]
        if inside:
            accuracy = np.mean([row["top1"] for row in inside])
            ece += len(inside) / len(rows) * abs(accuracy - np.mean([row["confidence"] for row in inside]))
    return {**means, "ece": ece, "n": float(len(rows))}


@pytest.mark.parametrize("n_bins", [1, 10, 15])
def test_meter_matches_the_definitions(batch, n_bins):
    meter = ClassificationMeter(n_bins)
    meter.update(sample_statistics(*batch), C)
    result = meter.compute()
    assert result == pytest.approx(oracle(*batch, n_bins), abs=1e-6)
    assert abs(result["macro_top1"] - result["top1"]) > 1e-3, "the classes have different numbers of images"
    assert all(type(value) is float for value in result.values())


def test_functions_match_the_definitions(batch):
    student, labels, teacher = batch
    expected = oracle(*batch)
    assert top_k_accuracy(student, labels) == pytest.approx(expected["top1"])
    assert top_k_accuracy(student, labels, k=5) == pytest.approx(expected["top5"])
    assert expected_calibration_error(student, labels) == pytest.approx(expected["ece"], abs=1e-6)
    everything = oracle(student, torch.zeros(N, dtype=torch.long), teacher)
    assert agreement(student, teacher) == pytest.approx(everything["agreement"])
    assert teacher_kl(student.double(), teacher.double()) == pytest.approx(everything["kl"], rel=1e-12)


def test_a_teacher_is_optional(batch):
    student, labels, _ = batch
    stats = sample_statistics(student, labels)
    assert stats.shape == (N, 6) and stats.dtype == torch.float32
    meter = ClassificationMeter()
    meter.update(stats)
    assert set(meter.compute()) == {"loss", "top1", "top5", "ece", "n"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_lose_nothing_more(batch, dtype):
    student, labels, teacher = (tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in batch)
    meter = ClassificationMeter()
    meter.update(sample_statistics(student, labels, teacher), C)
    assert meter.compute() == pytest.approx(oracle(student, labels, teacher), abs=1e-6)


def test_streaming_equals_whole_in_any_order(batch):
    stats = sample_statistics(*batch)
    assert stats.shape == (N, 9)
    whole, streamed = ClassificationMeter(), ClassificationMeter()
    whole.update(stats, C)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    for part in stats[order].split(17):
        streamed.update(part, C)
    assert streamed.compute() == pytest.approx(whole.compute(), rel=1e-12)


def test_statistics_of_parts_are_those_of_the_whole(batch):
    student, labels, teacher = batch
    parts = [sample_statistics(student[i::3], labels[i::3], teacher[i::3]) for i in range(3)]
    whole = sample_statistics(*batch)
    for i, part in enumerate(parts):
        torch.testing.assert_close(part, whole[i::3])


@pytest.mark.parametrize("padding", [0.0, -100.0, float("nan")])
def test_rows_without_weight_count_nowhere(batch, padding):
    student, labels, teacher = batch
    kept = labels != -100
    clean, padded = ClassificationMeter(), ClassificationMeter()
    clean.update(sample_statistics(student[kept], labels[kept], teacher[kept]), C)
    student[~kept] = padding
    stats = sample_statistics(student, labels, teacher)
    assert torch.equal(stats[~kept], torch.zeros(int((~kept).sum()), 9))
    # -100 is what gathering over ranks pads uneven batches with.
    padded.update(torch.cat([stats, torch.full((3, 9), -100.0)]), C)
    # Another batch size: the rows' statistics may differ in the last bit of a float32.
    assert padded.compute() == pytest.approx(clean.compute(), rel=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_fewer_than_five_classes(classes):
    logits = torch.randn(20, classes, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(20) % classes
    stats = sample_statistics(logits, labels)
    assert stats[:, 3].tolist() == [1.0] * 20
    assert top_k_accuracy(logits, labels, k=9) == 1.0
    assert top_k_accuracy(logits, labels) == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def test_bins_are_closed_on_the_right():
    # Confidence is exactly 0.5: with two bins it belongs to the first, together with nothing of the 0.88 images.
    even, sure = torch.zeros(1, 2), torch.tensor([[2.0, 0.0]])
    logits, labels = torch.cat([even, sure]), torch.tensor([0, 1])
    confidence = float(sure.softmax(1).max())
    assert expected_calibration_error(logits, labels, n_bins=2) == pytest.approx((0.5 + confidence) / 2)
    # One bin: the two gaps, +0.5 and −0.88, cancel in part.
    assert expected_calibration_error(logits, labels, n_bins=1) == pytest.approx((confidence - 0.5) / 2)


def test_equal_logits_are_right_for_one_class_only():
    logits, labels = torch.zeros(10, 10), torch.arange(10)
    assert top_k_accuracy(logits, labels) == pytest.approx(0.1)
    assert top_k_accuracy(logits, labels, k=5) == pytest.approx(0.5)


def test_the_macro_average_is_that_of_the_classes_and_top_1_where_these_are_equal():
    logits = torch.eye(3)[[0, 0, 0, 0, 0, 0, 0, 1]]
    meter = ClassificationMeter()
    meter.update(sample_statistics(logits, torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])), 3)
    result = meter.compute()
    assert result["top1"] == 7 / 8 and result["macro_top1"] == (6 / 6 + 1 / 2) / 2, "class 2 has no image"
    balanced = ClassificationMeter()
    balanced.update(sample_statistics(logits[2:], torch.tensor([0, 0, 1, 1, 2, 2])), 3)
    assert balanced.compute()["macro_top1"] == pytest.approx(balanced.compute()["top1"], abs=1e-15)


def test_repeated_errors_and_class_counts_by_hand():
    label = torch.tensor([0, 0, 1, 1, 2, -100, -100])
    student = torch.tensor([0, 1, 2, 0, 1, 1, 0])
    teacher = torch.tensor([0, 1, 2, 2, 0, 1, 2])  # wrong on the images 1 to 4; the last two have no label
    decoded = torch.tensor([True] * 6 + [False])
    meter = ClassificationMeter()
    for part in (slice(0, 3), slice(3, 7)):
        rows = sample_statistics(
            torch.eye(4)[student[part]], label[part], torch.eye(4)[teacher[part]], decoded=decoded[part]
        )
        meter.update(rows, 4)
    assert meter.compute()["teacher_errors_repeated"] == 2 / 4  # images 1 and 2
    assert meter.class_counts() == {"images": [2, 2, 1, 0], "hits": [1, 0, 0, 0]} and meter.counts() == (5, 1)
    perfect = ClassificationMeter()
    perfect.update(sample_statistics(torch.eye(4)[student[:5]], label[:5], torch.eye(4)[label[:5]]))
    assert "teacher_errors_repeated" not in perfect.compute() and perfect.class_counts() == {}


@pytest.mark.parametrize("classes", [3, 10])
def test_a_diverged_model_misses_and_shows_it(classes):
    meter = ClassificationMeter()
    meter.update(sample_statistics(torch.full((4, classes), float("nan")), torch.zeros(4, dtype=torch.long)))
    result = meter.compute()
    assert result["top1"] == 0 and result["top5"] == 0
    assert np.isnan(result["loss"]) and np.isnan(result["ece"])


def test_huge_logits_and_ruled_out_classes_stay_finite():
    student = torch.tensor([[1e3, -1e3, 0.0]])
    assert teacher_kl(student, -student) == pytest.approx(2e3)
    assert teacher_kl(student.half(), -student.half()) == pytest.approx(2e3)
    ruled_out = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert teacher_kl(ruled_out, ruled_out) == 0.0
    # KL of (½, ½, 0) to the uniform of three.
    assert teacher_kl(torch.zeros(1, 3), ruled_out) == pytest.approx(np.log(3 / 2), rel=1e-6)
    assert teacher_kl(student, student) == 0.0
    assert torch.isfinite(sample_statistics(student, torch.tensor([1]), -student)).all()


def test_many_small_batches_lose_nothing():
    # In float32 the sum would stop growing at 2^24.
    meter = ClassificationMeter()
    meter.update(torch.tensor([[1.0, 0.1, 1.0, 1.0, 0.7, 3.0]]).repeat(10, 1))
    meter._sums *= 2.0**24
    before = meter._sums[0].item()
    meter.update(torch.tensor([[1.0, 0.1, 1.0, 1.0, 0.7, 3.0]]))
    assert meter._sums[0].item() - before == 1.0


def test_update_never_waits_for_the_device():
    # A meta tensor has no values: anything that needs one on the host raises.
    student, teacher = torch.empty(2, 6, 9, device="meta")
    meter = ClassificationMeter()
    for _ in range(2):
        meter.update(sample_statistics(student, torch.empty(6, dtype=torch.long, device="meta"), teacher), 9)
    assert meter._sums.shape == (9,) and meter._gaps.shape == (15,)


def test_statistics_carry_no_gradient():
    assert not sample_statistics(torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, 2])).requires_grad


def test_nothing_to_measure_is_an_error():
    meter = ClassificationMeter()
    with pytest.raises(ValueError, match="no labelled image"):
        meter.compute()
    ignored = torch.full((3,), -100)
    meter.update(sample_statistics(torch.randn(3, 4), ignored))
    with pytest.raises(ValueError, match="no labelled image"):
        meter.compute()
    with pytest.raises(ValueError, match="no labelled image"):
        top_k_accuracy(torch.randn(3, 4), ignored)
    with pytest.raises(ValueError, match="empty"):
        agreement(torch.empty(0, 4), torch.empty(0, 4))


def test_wrong_input_says_what_to_do():
    logits, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="argmax"):
        sample_statistics(logits, torch.eye(4)[labels])
    with pytest.raises(ValueError, match="argmax"):
        sample_statistics(logits, labels.float())
    with pytest.raises(ValueError, match="align"):
        sample_statistics(logits, labels, torch.randn(3, 5))
    with pytest.raises(ValueError, match="k is 0"):
        top_k_accuracy(logits, labels, k=0)
    with pytest.raises(ValueError, match="n_bins is 0"):
        ClassificationMeter(0)
    meter = ClassificationMeter()
    meter.update(sample_statistics(logits, labels))
    with pytest.raises(ValueError, match="always with or always without a teacher"):
        meter.update(sample_statistics(logits, labels, logits))


EVALUATE = """
import json, socket, sys
import torch
import hf_kd.trainer
early = "evaluate" in sys.modules

def refuse(*args, **kwargs):
    raise AssertionError(f"no network: {args}")
socket.socket.connect = socket.getaddrinfo = refuse

import evaluate
from hf_kd.metrics import module_path

student, labels, teacher = torch.load(sys.argv[1])
kept = labels != -100
def load(name, **more):
    return evaluate.load(module_path(name), **more)
with_labels = {"top1": load("top_k_accuracy"), "top5": load("top_k_accuracy", k=5),
               "ece": load("expected_calibration_error")}
whole = {}
for module in with_labels.values():
    whole |= module.compute(predictions=student, references=labels)
for name in ("teacher_agreement", "teacher_kl"):
    whole |= load(name).compute(predictions=student[kept].numpy(), references=teacher[kept].tolist())
together = evaluate.combine(with_labels)
with_teacher = evaluate.combine([module_path("teacher_agreement"), module_path("teacher_kl")])
for i in range(0, len(labels), 50):
    part = slice(i, i + 50)
    together.add_batch(predictions=student[part].tolist(), references=labels[part].numpy())
    rows = kept[part]
    with_teacher.add_batch(predictions=student[part][rows], references=teacher[part][rows])
streamed = {**together.compute(), **with_teacher.compute()}
chosen = load("top_k_accuracy").compute(predictions=student, references=labels, k=3)
chosen |= load("expected_calibration_error", n_bins=7).compute(predictions=student, references=labels)
print("RESULT" + json.dumps({"early": early, "whole": whole, "streamed": streamed, "chosen": chosen}))
"""


@pytest.mark.slow
def test_evaluate_modules_load_offline_and_say_what_the_trainer_says(batch, tmp_path):
    torch.save(batch, tmp_path / "batch.pt")
    home = {name: str(tmp_path / "home") for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME")}
    environment = {**os.environ, **home, "HF_HUB_OFFLINE": "1"}
    for name in ("HF_MODULES_CACHE", "HF_EVALUATE_CACHE", "HF_METRICS_CACHE", "HF_DATASETS_CACHE", "HF_HUB_CACHE"):
        environment.pop(name, None)
    answer = subprocess.run(
        [sys.executable, "-c", EVALUATE, str(tmp_path / "batch.pt")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr
    result = json.loads(answer.stdout.split("RESULT")[1])
    assert result["early"] is False, "training must not pay for importing evaluate"
    meter = ClassificationMeter()
    meter.update(sample_statistics(*batch))
    trained = {key: value for key, value in meter.compute().items() if key in result["whole"]}
    assert set(trained) == {"top1", "top5", "ece", "agreement", "kl"}
    # Another process and other batch sizes: float32 rows differ in their last bit, their float64 sums hardly more.
    assert result["whole"] == pytest.approx(trained, rel=1e-6)
    assert result["streamed"] == pytest.approx(trained, rel=1e-6)
    chosen = {"top3": top_k_accuracy(*batch[:2], k=3), "ece": expected_calibration_error(*batch[:2], n_bins=7)}
    assert result["chosen"] == pytest.approx(chosen, rel=1e-6)
    assert "warn" not in answer.stderr.lower(), "correct use is silent"


def test_unknown_evaluate_module():
    with pytest.raises(ValueError, match="accuracy.*top_k_accuracy") as error:
        module_path("accuracy")
    assert "teacher_agreement" in str(error.value)
