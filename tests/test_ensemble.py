"""Several teachers: the oracle of their mean, the null experiments, and what the command line and the record say."""

import json
import re
import shlex

import hub_helpers
import numpy as np
import pytest
import torch
from cli_helpers import NAMES, distill
from hub_helpers import ANNA
from tiny import tiny
from torch import nn
from trainer_helpers import config, make_teacher, rows, trainer_for, weights
from transformers import CLIPImageProcessor
from transformers.utils import logging

from hf_kd import DistillationTrainer, TeacherEnsemble, load_teacher
from hf_kd.cli import main
from hf_kd.experiment.plan import _pinned
from hf_kd.losses import LOSSES
from hf_kd.reporting.card import model_card
from hf_kd.reporting.collect import describe_teacher, make_record
from hf_kd.spec import EnsembleSource, Experiment, ModelSource, differences, read_plan

pytestmark = pytest.mark.usefixtures("undrawn_figures")
hub = hub_helpers.hub


def pixels_of(n=4, size=48):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 3, size, size), np.uint8))


def reordered(seed, order, size, extra=()):
    names = [NAMES[i] for i in order] + list(extra)
    module, processor = tiny("resnet", seed=seed, size=size, names=names)
    return load_teacher(module, processor=processor)


def cropping(seed=3):
    """A teacher that sees another part of an image than the others."""
    processor = CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 24, "width": 24})
    return load_teacher(tiny("resnet", seed=seed, names=NAMES)[0], processor=processor)


class Constant(nn.Module):
    """The same logits for every image."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, pixel_values):
        return self.logits.expand(len(pixel_values), -1)


# ---- the mean, by its definition ----


def test_the_mean_of_probabilities_over_sizes_orders_and_more_classes():
    """In float64, from each teacher's own model and processor."""
    parts = [reordered(1, [3, 1, 5, 0, 2, 4], 48), reordered(2, range(6), 32, ["other"]), cropping()]
    ensemble = TeacherEnsemble(parts, [3, 2, 5], NAMES)
    pixels, expected = pixels_of(), 0.0
    for part, weight in zip(parts, [0.3, 0.2, 0.5], strict=True):
        values = torch.as_tensor(part.processor(images=list(pixels), return_tensors="pt")["pixel_values"])
        with torch.no_grad():
            logits = part.model.double()(values.double()).logits
        part.model.float()
        names = list(part.class_names.values())
        expected = expected + weight * logits[:, [names.index(name) for name in NAMES]].softmax(1)
    logits = ensemble(pixels)
    assert logits.dtype is torch.float32 and ensemble.preprocessing.size == (48, 48)
    torch.testing.assert_close(logits.double(), expected.log(), rtol=0, atol=1e-4)
    views = ensemble.preprocessing.resize_and_crop(list(pixels))
    assert [view.shape[-1] for view in views] == [48, 32, 24]
    torch.testing.assert_close(ensemble(views, cropped=True), logits)
    backwards = ensemble.aligned(NAMES[::-1], dtype=torch.float32)
    torch.testing.assert_close(backwards(pixels), logits.flip(1))


def test_large_logits_stay_finite_and_exact():
    ways = [[1e3, -1e3, 0.0], [-1e3, 1e3, 0.0]]
    shape = {"class_names": list("abc"), "image_size": 8, "image_mean": [0.5], "image_std": [0.5]}
    ensemble = TeacherEnsemble([load_teacher(Constant(logits), **shape) for logits in ways], [1, 3])
    expected = torch.tensor([0.25, 0.75]).log()
    logits = ensemble(pixels_of(1, 8))[0]
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits[:2], expected)
    torch.testing.assert_close(logits[2].double(), torch.tensor(-1000.0).double())


def test_two_equal_teachers_and_weights_of_1_and_0_are_one_teacher():
    one, pixels = make_teacher(), pixels_of()
    expected = one(pixels).log_softmax(1)
    for ensemble in (
        TeacherEnsemble([one, one]),
        TeacherEnsemble([one, make_teacher()], [0.7, 0.3]),
        TeacherEnsemble([one, make_teacher(seed=8)], [1, 0]),
    ):
        torch.testing.assert_close(ensemble(pixels), expected, rtol=0, atol=1e-6)


def test_it_is_a_frozen_teacher_in_eval_mode():
    ensemble = TeacherEnsemble([make_teacher(), make_teacher("vit", size=32)])
    ensemble.train()
    assert not any(module.training for module in ensemble.modules())
    assert not any(parameter.requires_grad for parameter in ensemble.parameters())
    assert not ensemble(pixels_of().float() / 255, cropped=True).requires_grad


@pytest.mark.parametrize(
    ("weights_", "message"),
    [([1], "2 teachers need as many weights"), ([1, -1], "1 -1: "), ([0, 0], "not all 0"), ([1, np.nan], "1 nan")],
)
def test_weights_that_are_none_are_refused(weights_, message):
    with pytest.raises(ValueError, match=message):
        TeacherEnsemble([make_teacher(), make_teacher()], weights_)


def test_what_is_no_ensemble_is_refused():
    with pytest.raises(ValueError, match="no teacher"):
        TeacherEnsemble([])
    with pytest.raises(ValueError, match="not of Linear"):
        TeacherEnsemble([make_teacher(), nn.Linear(1, 1)])
    both = TeacherEnsemble([make_teacher(), make_teacher()])
    with pytest.raises(ValueError, match="not of TeacherEnsemble"):
        TeacherEnsemble([both])
    with pytest.raises(ValueError, match="class_map is for one teacher"):
        both.aligned(NAMES, "by_index")
    other = make_teacher(names=[*NAMES[:5], "another"])
    with pytest.raises(ValueError, match="teacher ResNetForImageClassification: 1 of the data's 6 classes"):
        TeacherEnsemble([make_teacher(), other])


# ---- in a trainer ----


def trained(folder, teacher, **settings):
    trainer = trainer_for(folder, teacher=teacher, evaluation=rows(20, size=40, seed=1), **settings)
    trainer.train()
    metrics = {k: v for k, v in trainer.evaluate().items() if not k.endswith(("runtime", "per_second"))}
    return weights(trainer), metrics, trainer


@pytest.mark.parametrize("loss", [name for name, cls in LOSSES.items() if "teacher_logits" in cls.requires])
def test_two_equal_teachers_train_as_one_with_every_loss(loss, tmp_path):
    alone, metrics, _ = trained(tmp_path / "one", cropping(), loss=loss, learning_rate=1e-3)
    both, again, trainer = trained(tmp_path / "two", [cropping(), cropping()], loss=loss, learning_rate=1e-3)
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-5)
    assert again == pytest.approx(metrics, abs=1e-4) and "eval_agreement" in metrics
    assert isinstance(trainer.teacher, TeacherEnsemble) and trainer.eval_teacher is trainer.teacher


def test_teachers_of_several_sizes_are_measured_as_each_wants_the_images(tmp_path):
    """Agreement, KL and top-1 of the mean, from the definition; and every teacher keeps its own compute type."""
    parts = [cropping(), reordered(1, [3, 1, 5, 0, 2, 4], 48).aligned(dtype=torch.float32)]
    data = rows(20, size=40, seed=1)
    trainer = trainer_for(tmp_path, loss="kd", teacher=TeacherEnsemble(parts, [1, 3]), evaluation=data, bf16=True)
    assert [part.dtype for part in trainer.teacher.teachers] == [torch.bfloat16, torch.float32]
    assert trainer.train_image_size == 48
    trainer = trainer_for(tmp_path, loss="kd", teacher=TeacherEnsemble(parts, [1, 3]), evaluation=data)
    images = torch.stack([torch.from_numpy(np.array(row["image"])).permute(2, 0, 1) for row in data])
    parts = [part.aligned(NAMES) for part in parts]
    teacher = 0.25 * parts[0](images).double().softmax(1) + 0.75 * parts[1](images).double().softmax(1)
    student = trainer.model(trainer.preprocessing(images)).logits.double().log_softmax(1)
    metrics, labels = trainer.evaluate(), torch.tensor(data["label"])
    assert metrics["eval_kl"] == pytest.approx((teacher * (teacher.log() - student)).sum(1).mean().item(), abs=1e-4)
    assert metrics["eval_teacher_top1"] == (teacher.argmax(1) == labels).double().mean().item()
    assert metrics["eval_agreement"] == (teacher.argmax(1) == student.argmax(1)).double().mean().item()
    measured = trainer.measure_teacher()
    assert measured["loss"] == pytest.approx(-teacher.log()[range(20), labels].mean().item(), abs=1e-4)


def test_classes_are_matched_with_the_students_not_with_one_another(tmp_path):
    wide = [reordered(1, range(6), 32, [f"other {i}"]) for i in range(2)]
    with pytest.raises(ValueError, match="other 0"):
        TeacherEnsemble(wide)
    trainer = trainer_for(tmp_path, loss="kd", teacher=wide)
    assert list(trainer.teacher.id2label.values()) == NAMES
    assert {part.mapping.kind for part in trainer.teacher.teachers} == {"subset"}
    lacking = make_teacher(names=[*NAMES[:5], "another"])
    with pytest.raises(ValueError, match="teacher ResNetForImageClassification: 1 of the data's 6 classes"):
        trainer_for(tmp_path, loss="kd", teacher=[make_teacher(), lacking])


def test_the_student_itself_is_no_teacher_of_several(tmp_path):
    student, processor = tiny("vit", names=NAMES)
    with pytest.raises(ValueError, match="share parameters"):
        DistillationTrainer(
            student,
            config(tmp_path, loss="kd"),
            teacher=[make_teacher(), load_teacher(student, processor=processor)],
            processing_class=processor,
        )


def test_each_teacher_near_chance_is_named(tmp_path, caplog):
    type(logging.get_logger("hf_kd.trainer")).warning_once.cache_clear()
    parts = [make_teacher(seed=seed) for seed in (7, 8)]
    parts[0].name, parts[1].name = "first", "second"
    with torch.no_grad():  # always class 0, which a sixth of the images have
        for part in parts:
            part.model.classifier[-1].bias[0] += 100
    trainer_for(tmp_path, loss="kd", teacher=parts, evaluation=rows(24), max_steps=1).train()
    for name in ("first", "second"):
        assert f"the teacher {name} is right on 16.7% of 24 images" in caplog.text


def test_a_trainer_resumes_with_the_same_teachers_and_weights_only(tmp_path):
    def trainer(*weights_, folder="out"):
        teacher = TeacherEnsemble([make_teacher(), make_teacher(seed=8)], weights_)
        return trainer_for(tmp_path / folder, loss="kd", teacher=teacher, save_strategy="steps", save_steps=2)

    whole = trainer(0.7, 0.3)
    whole.train()
    assert not [key for key in whole.model.state_dict() if "teacher" in key]
    again = trainer(7, 3)
    again.train(str(tmp_path / "out" / "checkpoint-2"))
    assert torch.equal(weights(again), weights(whole))
    with pytest.raises(ValueError, match=re.escape("teacher.weights ((0.7, 0.3) there, (0.5, 0.5) here)")):
        trainer(1, 1).train(str(tmp_path / "out" / "checkpoint-2"))


# ---- record and card ----


def test_record_and_card_name_all_teachers_with_their_weights(tmp_path):
    parts = [make_teacher(), reordered(1, range(6), 32, ["other"])]
    parts[0].name, parts[1].name = "first", "second"
    ensemble = TeacherEnsemble(parts, [0.7, 0.3], NAMES)
    trainer = trainer_for(tmp_path, loss="kd", teacher=ensemble, evaluation=rows(), max_steps=1)
    trainer.measure_teacher()
    trainer.train()
    record = make_record(trainer)
    teacher = record["teacher"]
    assert teacher["id"] == "0.7 × first + 0.3 × second" and teacher["image_size"] == [48, 48]
    assert [(each["id"], each["weight"]) for each in teacher["teachers"]] == [("first", 0.7), ("second", 0.3)]
    assert teacher["parameters"] == sum(each["parameters"] for each in teacher["teachers"]) > 0
    assert ["class_mapping" in each for each in teacher["teachers"]] == [False, True]
    assert record["plan"]["teacher"]["weights"] == [0.7, 0.3]
    sources = [ModelSource("quickstart/teacher"), ModelSource("b", seen_evaluation_images=3)]
    planned = describe_teacher(ensemble, sources)  # by the names that were typed
    assert planned["id"] == "0.7 × quickstart/teacher + 0.3 × b"
    assert [each["seen_evaluation_images"] for each in planned["teachers"]] == ["not checked", 3]
    card = model_card(record)
    for text in (
        "from the mean of `first` (weight 0.7) and `second` (weight 0.3), by [hf_kd]",
        "| teacher `0.7 × first + 0.3 × second` ",
        "- Teacher of weight 0.7: `first`",
        "- Teacher of weight 0.3: `second`",
    ):
        assert text in card, text
    weightless = {
        **record,
        "teacher": {**teacher, "teachers": [teacher["teachers"][0], {**teacher["teachers"][1], "weight": 0.0}]},
    }
    lines = [line for line in model_card(weightless).splitlines() if line.startswith("- Teacher of weight")]
    assert ["taught the student" in line for line in lines] == [True, False]
    commits = ["b07c" * 10, "3a5e" * 10]
    for each, commit in zip(teacher["teachers"], commits, strict=True):
        each |= {"id": f"you/{each['id']}", "revision": commit}
    assert "[`you/second`](https://huggingface.co/you/second) (weight 0.3)" in model_card(record)


# ---- the plan ----


def several(*sources, by=(0.5, 0.5)):
    plan = Experiment(teacher=EnsembleSource(sources, by))
    return Experiment.from_dict(json.loads(json.dumps(plan.to_dict())))


def test_the_plan_compares_every_teacher():
    a, b = ModelSource("a", commit="1" * 40), ModelSource("b", seen_evaluation_images=3)
    plan = several(a, b)
    assert plan.teachers == (a, b) and several(a, b) == plan
    assert differences(plan, several(a, ModelSource("b"))) == []  # what is found out about it may differ
    assert differences(plan, several(a, ModelSource("c"))) == ["teacher.teachers[1].id (b there, c here)"]
    assert differences(plan, several(a, b, by=(0.7, 0.3))) == ["teacher.weights ((0.5, 0.5) there, (0.7, 0.3) here)"]
    (found,) = differences(Experiment(teacher=ModelSource("a")), several(a, b))
    assert found == "teacher (a there, 0.5 × a at 111111111111 + 0.5 × b here)"
    assert differences(several(a, b), Experiment(teacher=a)) and differences(several(a, b), several(a, b, b))


def test_the_recorded_command_has_a_revision_for_each_or_none():
    a, b = ModelSource("you/a", commit="1" * 40), ModelSource("folder")
    assert _pinned("hf-kd", teacher=[b, b], student=[]) == "hf-kd"
    assert _pinned("hf-kd", teacher=[a, b]) == f"hf-kd --teacher_revision {'1' * 40} main"


# ---- the command line ----


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A teacher of 48 px whose classes stand in another order."""
    folder = tmp_path_factory.mktemp("large")
    model, processor = tiny("vit", seed=5, size=48, names=NAMES[::-1])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run_json(folder):
    return json.loads((folder / "run.json").read_text())


def test_two_equal_teachers_and_weights_of_1_and_0_are_one_from_the_command_line(things, large, tmp_path):
    more = ["--loss", "nkd", "--train_image_size", 48, "--num_train_epochs", 1, "--teacher"]
    one = things / "teacher"
    for name, teachers in {
        "one": [one],
        "two": [one, one],
        "zero": [one, large, "--teacher_weights", 1, 0],
    }.items():
        assert distill(things, *more, *teachers, "--output_dir", tmp_path / name) == 0
    expected, *others = (run_json(tmp_path / name) for name in ("one", "two", "zero"))
    assert set(expected["plan"]["teacher"]) >= {"id", "commit", "class_map"}  # of one teacher, as it was
    assert "teacher_weights" not in expected["settings"] and expected["settings"]["teacher"] == "teacher"
    for record in others:
        assert record["metrics"] == pytest.approx(expected["metrics"], abs=1e-4)
        assert record["teacher_metrics"] == pytest.approx(expected["teacher_metrics"], abs=1e-4)
        assert record["terms"] == pytest.approx(expected["terms"], abs=1e-4)


def test_a_run_with_two_teachers_is_planned_resumed_and_reported(things, large, tmp_path, capsys):
    out = tmp_path / "out"
    more = ["--compare", "ce,kd", "--teacher", things / "teacher", large, "--teacher_weights", ".7", ".3"]
    more += ["--output_dir", out]
    assert distill(things, *more, "--dry_run") == 0
    printed = capsys.readouterr().out
    assert f"teacher   0.7 × {things / 'teacher'} + 0.3 × {large}\n" in printed and "48 px in training" in printed
    assert distill(things, *more) == 0
    label = f"teacher 0.7 × teacher + 0.3 × {large.name} "
    assert label in capsys.readouterr().out and label in (out / "report.md").read_text()
    record, plan = run_json(out / "kd"), read_plan(out)
    assert plan.teacher.weights == (0.7, 0.3) and [each.id for each in plan.teachers] == [
        str(things / "teacher"),
        str(large),
    ]
    assert record["settings"]["teacher"] == ["teacher", large.name]
    assert record["settings"]["teacher_weights"] == [0.7, 0.3]
    assert [each["seen_evaluation_images"] for each in record["teacher"]["teachers"]] == ["not checked"] * 2
    assert "agreement" in record["metrics"] and record["metrics"].keys() == run_json(out / "ce")["metrics"].keys()
    (out / "kd" / "run.json").unlink()
    (out / "kd" / "checkpoint-6").rename(tmp_path / "checkpoint-6")
    swapped = [*more[:3], large, things / "teacher", *more[5:], "--resume_from_checkpoint", "last"]
    assert distill(things, *swapped) == 1
    error = capsys.readouterr().err
    assert "teacher.teachers[0].id (" in error and "teacher.teachers[1].id (" in error
    hint = re.search("`(hf-kd resume [^`]+)`", error)[1]
    assert main(shlex.split(hint)[1:]) == 0
    assert run_json(out / "kd")["metrics"] == record["metrics"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--teacher_weights", "1"], "2 teachers need as many weights"),
        (["--teacher_weights", "1", "-1"], "not negative and not all 0, such as 1 1"),
        (["--teacher_revision", "main"], "2 teachers need as many revisions, such as main main, or none"),
        (["--class_map", "by_index"], "--class_map is for one teacher, and here are 2"),
    ],
)
def test_options_that_do_not_fit_several_teachers_are_refused(more, message, things, large, tmp_path, capsys):
    teachers = ["--loss", "kd", "--teacher", things / "teacher", large]
    assert distill(things, *teachers, *more, "--output_dir", tmp_path / "out") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_teacher_that_lacks_a_class_is_named_before_training(things, tmp_path, capsys):
    model, processor = tiny("vit", names=[*NAMES[:5], "another"])
    model.save_pretrained(tmp_path / "lacking"), processor.save_pretrained(tmp_path / "lacking")
    teachers = ["--loss", "kd", "--teacher", things / "teacher", tmp_path / "lacking"]
    assert distill(things, *teachers, "--output_dir", tmp_path / "out") == 1
    assert f"teacher {tmp_path / 'lacking'}: 1 of the data's 6 classes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_has_seen_the_evaluation_images_is_named_with_another(things, large, tmp_path, caplog):
    out = tmp_path / "seen"
    assert distill(things, "--max_train_samples", 12, "--num_train_epochs", 1, "--output_dir", out) == 0
    record = run_json(out)
    assert record["plan"]["teacher"] is None
    data = record["plan"]["data"]
    data["split_fingerprints"] = {"train": data["split_fingerprints"]["test"]}
    (out / "run.json").write_text(json.dumps(record))
    teachers = ["--loss", "kd", "--teacher", large, out, "--output_dir", tmp_path / "out", "--dry_run"]
    assert distill(things, *teachers) == 0
    assert f"teacher {out} was trained on" in caplog.text and f"teacher {large} was" not in caplog.text


def test_teachers_of_the_hub_are_pinned_and_linked(things, large, hub, tmp_path, monkeypatch):
    commits = [hub.add_repo(f"anna/{name}", folder) for name, folder in (("a", things / "teacher"), ("b", large))]
    out, run = tmp_path / "out", ["--loss", "kd", "--teacher", "anna/a", "anna/b", "--num_train_epochs", 1]
    push = ["--push_to_hub", "--hub_model_id", "anna/student", "--hub_token", ANNA]
    monkeypatch.setattr("sys.argv", ["hf-kd", "distill", *map(str, run)])
    assert distill(things, *run, *push, "--output_dir", out) == 0
    assert [each.commit for each in read_plan(out).teachers] == commits
    assert run_json(out)["teacher"]["id"] == "0.5 × anna/a + 0.5 × anna/b"
    files = hub.files("anna/student")
    record, card = json.loads(files["run.json"]), files["README.md"].decode()
    assert [each["revision"] for each in record["teacher"]["teachers"]] == commits
    assert record["settings"]["teacher_revision"] == commits
    assert record["command"].endswith(f" --teacher_revision {commits[0]} {commits[1]}")
    link = "[`anna/{0}`](https://huggingface.co/anna/{0}) (weight 0.5)"
    assert f"from the mean of {link.format('a')} and {link.format('b')}, by" in card
    assert [f"- Teacher of weight 0.5: [`anna/{name}`]" in card for name in "ab"] == [True, True]
    pinned = ["--teacher_revision", *commits]
    assert distill(things, *run, *pinned, "--output_dir", tmp_path / "again") == 0
    assert run_json(tmp_path / "again")["metrics"] == record["metrics"]
