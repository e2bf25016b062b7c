"""Controls that are switched on: what they train, that they change nothing else, and what a verdict makes of them."""

import dataclasses
import json
import logging
import os
import re
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from cli_helpers import distill
from data_helpers import image_table, with_broken
from test_checkpoints import StopAt
from tiny import tiny
from trainer_helpers import NAMES, config, make_teacher, rows, trainer_for, weights

from hf_kd import load_teacher
from hf_kd.cli import main
from hf_kd.cli.arguments import parse
from hf_kd.data import ImageDataset, as_image_dataset, load_data
from hf_kd.data.dataset import same_label_partners
from hf_kd.experiment import trainers
from hf_kd.experiment.plan import plan
from hf_kd.spec import Schedule, read_plan

pytestmark = pytest.mark.usefixtures("undrawn_figures")
ALL = ["2xce", "label_smoothing", "random_teacher", "permuted_teacher", "ce_same_time"]


# ---- the permutation ----


@pytest.mark.parametrize("labels", [[0, 1, 2] * 7, [5], [3, 3], list(np.random.default_rng(0).integers(0, 9, 200))])
def test_partners_are_a_cycle_of_the_rows_of_each_label(labels):
    labels = np.array(labels, np.uint8)
    partners = same_label_partners(labels, seed=4)
    assert sorted(partners) == list(range(len(labels))) and (labels[partners] == labels).all()
    for label in set(labels.tolist()):
        (members,) = np.nonzero(labels == label)
        row, seen = members[0], []
        while row not in seen:
            seen.append(row)
            row = partners[row]
        assert sorted(seen) == members.tolist()
    assert (partners == same_label_partners(labels.astype(np.int64), seed=4)).all()
    assert len(labels) < 20 or not (partners == same_label_partners(labels, seed=5)).all()


def with_partners(data, seed=1, augment="pad_crop", size=16):
    dataset = ImageDataset(data, seed=3).with_partners(seed).for_training(augment, size)
    dataset.set_epoch(2)
    return dataset


@pytest.mark.parametrize("augment", ["pad_crop", "resized_crop"])  # of which the images of the first are kept decoded
def test_the_teacher_is_shown_the_partner_as_the_student_would_be(augment):
    dataset = with_partners(image_table(12), augment=augment)
    items = dataset.__getitems__([*range(12)])
    for row, item in enumerate(items):
        partner = items[dataset.partners[row]]
        assert partner["labels"] == item["labels"] and not torch.equal(item["pixels"], item["teacher_pixels"])
        assert torch.equal(item["teacher_pixels"], partner["pixels"])
    assert all("teacher_pixels" not in item for item in ImageDataset(image_table(12)).with_partners(1))


def test_a_partner_that_is_broken_is_replaced_by_the_next_in_the_cycle():
    whole = with_partners(image_table(12))
    (broken, partner), rest = (int(whole.partners[0]), int(whole.partners[whole.partners[0]])), [3, 6, 9]
    items = with_partners(with_broken(image_table(12), broken)).__getitems__([0, partner])
    assert torch.equal(items[0]["teacher_pixels"], items[1]["pixels"])
    alone = with_partners(with_broken(image_table(12), *rest))[0]  # all others of its label
    assert torch.equal(alone["teacher_pixels"], alone["pixels"])


def test_a_class_with_one_image_is_named_and_other_datasets_are_refused(caplog):
    data = image_table(12).select([0, 3, 6, 1, 2])
    with caplog.at_level(logging.WARNING):
        dataset = ImageDataset(data).with_partners(0)
    assert dataset.partners.tolist()[3:] == [3, 4] and 0 not in dataset.partners[[0]]
    assert "2 of 3 classes have a single training image, with which nothing is exchanged: b, c." in caplog.text
    with pytest.raises(ValueError, match=r"need a datasets.Dataset of images with integers"):
        ImageDataset([(torch.zeros(3, 8, 8, dtype=torch.uint8), 0)]).with_partners(0)
    soft = data.remove_columns("label").add_column("label", [[0.5, 0.5, 0.0]] * 5)
    with pytest.raises(ValueError, match="integers as labels"):
        ImageDataset(soft, label_column="label").with_partners(0)


def trained(folder, data=None, stop=None, resume=False, **settings):
    settings = {"max_steps": 6, "augment": "pad_crop", "save_strategy": "steps", "save_steps": 2} | settings
    trainer = trainer_for(folder, "resnet", "nkd", make_teacher("vit"), train=data, **settings)
    if stop:
        trainer.add_callback(StopAt(stop))
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def dataset(partners=None, seed=1):
    images = as_image_dataset(rows(), None, config("unused")).with_partners(seed)
    if partners is not None:
        images.partners = partners
    return images


def test_a_teacher_permuted_by_nothing_is_the_plain_teacher_and_resume_is_exact(tmp_path):
    plain, same = trained(tmp_path / "plain"), trained(tmp_path / "same", dataset(np.arange(24)))
    assert torch.equal(weights(plain), weights(same))
    permuted = trained(tmp_path / "permuted", dataset())
    assert not torch.equal(weights(plain), weights(permuted))
    trained(tmp_path / "cut", dataset(), stop=4)
    assert torch.equal(weights(trained(tmp_path / "cut", dataset(), resume=True)), weights(permuted))
    assert permuted.evaluate(rows())["eval_agreement"] >= 0  # of the teacher with the images themselves


def test_mixing_and_images_of_the_teachers_own_are_refused(tmp_path):
    with pytest.raises(ValueError, match="mixup and cutmix do not go with"):
        trained(tmp_path, dataset(), mixup_alpha=0.2)


# ---- the random teacher ----


def test_a_random_teacher_has_the_architecture_and_weights_of_its_seed_alone(tmp_path):
    model, processor = tiny("resnet", names=NAMES)
    model.save_pretrained(tmp_path), processor.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    first, again, other = (load_teacher(tmp_path, id2label=NAMES[::-1], random_seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    state, trained = first.model.state_dict(), load_teacher(tmp_path)
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in state.items())
    torch.manual_seed(3)
    student = type(model)(model.config).state_dict()  # that starts from the same seed
    for another in (other.model.state_dict(), trained.model.state_dict(), student):
        assert not torch.equal(state["classifier.1.weight"], another["classifier.1.weight"])
    assert state.keys() == trained.model.state_dict().keys() and first.preprocessing == trained.preprocessing
    assert first.mapping.kind == "permutation" and first.id2label == dict(enumerate(NAMES[::-1]))
    with pytest.raises(ValueError, match="not a module"):
        load_teacher(model, processor=processor, random_seed=0)


# ---- the plan ----


def planned(things, out, *more):
    argv = ["--config", things / "config.yaml", "--teacher", things / "teacher", "--output_dir", out, *more]
    return plan(*parse([*map(str, argv)]), "hf-kd distill")


def test_controls_are_runs_of_the_plan(things, tmp_path):
    found = planned(things, tmp_path, "--compare", "ce,kd,uskd", "--controls", *ALL, "--same_time_ratio", "1.5")
    names = ["ce", "kd", "uskd", "2xce", "label_smoothing", "kd-random_teacher", "kd-permuted_teacher", "ce_same_time"]
    assert [run.name for run in found.runs] == names
    kinds = {run.name: (run.variation, found.control(run)) for run in found.runs}
    assert kinds["ce"] == kinds["kd"] == (None, None) and kinds["2xce"] == (None, {"kind": "2xce", "of": None})
    assert kinds["kd-random_teacher"] == ("random_teacher", {"kind": "random_teacher", "of": "kd"})
    assert kinds["ce_same_time"] == ("ce_same_time", {"kind": "ce_same_time", "of": None, "ratio": 1.5})
    by_name = {run.name: run for run in found.runs}
    assert by_name["2xce"].loss.hyperparameters["weight"] == 2
    assert by_name["label_smoothing"].loss.hyperparameters["label_smoothing"] == 0.1
    assert by_name["kd-permuted_teacher"].loss == by_name["kd"].loss
    assert by_name["ce_same_time"].schedule == by_name["ce"].schedule  # as it is compared
    assert found.as_trained(by_name["ce_same_time"]).schedule.num_train_epochs == 3
    assert found.as_trained(by_name["kd"]) == by_name["kd"]
    assert found.command == "hf-kd distill --same_time_ratio 1.5"
    smooth = ["--verdict", "--loss", "nkd", "--loss_kwargs", '{"label_smoothing": 0.2}', "--controls", "2xce"]
    twice = [run for run in planned(things, tmp_path, *smooth).runs if run.name == "2xce"]
    assert {run.loss.hyperparameters["label_smoothing"] for run in twice} == {0.2}
    # The baseline is not tested, and needs no controls of its own.
    kd = ["--verdict", "--loss", "nkd", "--against", "kd", "--controls", "random_teacher"]
    names = [run.name for run in planned(things, tmp_path, *kd).runs]
    assert names[:4] == ["ce", "kd", "nkd", "nkd-random_teacher"] and "kd-random_teacher" not in names


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--controls", "2xce"], "--controls 2xce goes with --verdict or --compare"),
        (
            ["--compare", "ce,nkd", "--controls", "3xce"],
            "--controls 3xce is unknown; there are: 2xce, label_smoothing",
        ),
        (["--compare", "ce,2xce", "--controls", "ce_same_time"], "no variant distils"),
        (["--compare", "ce,uskd", "--controls", "random_teacher"], "losses that learn from a teacher"),
        (["--compare", '{"nkd": {}, "2xce": {"loss": "kd"}}', "--controls", "2xce"], "another variant of --compare"),
        (
            ["--compare", '{"nkd": {}, "ce_same_time": {"loss": "ce"}}', "--controls", "ce_same_time"],
            "the name of a control: rename it",
        ),
        (
            ["--compare", "ce,nkd", "--label_smoothing_factor", "0.1", "--controls", "label_smoothing"],
            "smoothed already",
        ),
        (["--compare", "ce,nkd", "--controls", "permuted_teacher", "--streaming"], "does not go with --streaming"),
        (
            ["--compare", "ce,nkd", "--controls", "permuted_teacher", "--cutmix_alpha", "1"],
            "Add --mixup_alpha 0 --cutmix_alpha 0 (mixup_alpha is 0, cutmix_alpha 1)",
        ),
        (["--compare", "ce,nkd", "--same_time_ratio", "1.4"], "--same_time_ratio goes with --controls ce_same_time"),
        (["--compare", "ce,nkd", "--controls", "ce_same_time", "--same_time_ratio", "0.9"], "same_time_ratio"),
        (
            ["--compare", "ce,nkd", "--controls", "ce_same_time", "--lr_scheduler_type", "reduce_lr_on_plateau"],
            "can't be stretched",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_data_is_loaded(more, message, things, monkeypatch):
    monkeypatch.setattr("hf_kd.experiment.plan.load_data", None)
    if "reduce_lr_on_plateau" in more:
        more = [*more, "--metric_for_best_model", "top1"]
    with pytest.raises(ValueError, match=re.escape(message)):
        planned(things, "unused", *more)


def test_mixing_by_a_preset_is_refused_too(things, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_kd.experiment.plan.load_data", None)
    more = ["--preset", "vit_scratch", "--compare", "ce,nkd", "--controls", "permuted_teacher"]
    with pytest.raises(ValueError, match="mixup_alpha is 0.8, cutmix_alpha 1"):
        planned(things, tmp_path, *more)


SCHEDULE = Schedule(4, -1, 0.1, "cosine", None, None, 0.1, 0)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"warmup_steps": 6},
        {"warmup_steps": 0.25},
        {"num_train_epochs": 1, "max_steps": 24, "lr_scheduler_type": "linear"},
        {"lr_step_epochs": [2, 3]},
        {"lr_scheduler_type": "inverse_sqrt"},
        {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 6},
        {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 8}},
    ],
)
def test_a_stretched_schedule_has_the_same_rates_over_more_steps(change, tmp_path):
    def rates(schedule, folder):
        trainer = trainer_for(tmp_path / folder, **dataclasses.asdict(schedule), per_device_train_batch_size=4)
        steps = schedule.max_steps if schedule.max_steps > 0 else round(6 * schedule.num_train_epochs)
        optimizer = trainer.create_optimizer()
        scheduler, found = trainer.create_scheduler(steps, optimizer), []
        for _ in range(steps):
            found.append(scheduler.get_last_lr()[0])
            optimizer.step(), scheduler.step()
        return np.array(found)

    schedule = dataclasses.replace(SCHEDULE, **change)
    plain, longer = rates(schedule, "plain"), rates(schedule.stretched(2.5), "longer")
    assert len(longer) == 2.5 * len(plain)
    assert longer[::5] == pytest.approx(plain[::2], rel=1e-6)


# ---- carried out ----


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(trainers, "STEPS", 2)


def run_json(folder):
    return json.loads((folder / "run.json").read_text())


def weights_of(folder):
    return {file.parent.name: file.read_bytes() for file in folder.glob("*/model.safetensors")}


def test_a_comparison_with_all_controls(things, tmp_path, capsys, quick, caplog, monkeypatch):
    """Measured, interrupted and resumed; then with the measured ratio given: the same weights, bit by bit."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    out, again = tmp_path / "out", tmp_path / "again"
    # Two epochs of three steps, which become a part of an epoch more.
    more = ["--teacher", things / "teacher", "--compare", "ce,nkd", "--seeds", "7", "--controls", *ALL]
    more += ["--augment", "pad_crop"]
    assert distill(things, *more, "--output_dir", out, "--dry_run") == 0
    assert "how many is to be measured" in capsys.readouterr().out and not out.exists()
    monkeypatch.setattr(trainers, "_step_seconds", slow := Slow())
    assert distill(things, *more, "--output_dir", out, "--only", "nkd-random_teacher:7") == 0
    assert slow.measured == ["ce_same_time", "ce_same_time", "ce", "nkd"] and slow.real > 0
    assert read_plan(out).same_time_ratio == 1.4 and "chance" not in caplog.text
    assert [path.parent.name for path in out.rglob("run.json")] == ["nkd-random_teacher"]
    assert not list((tmp_path / "temporary").iterdir())
    assert main(["resume", str(out)]) == 0
    (out / "ce_same_time" / "run.json").unlink()
    (out / "report.md").unlink()
    longest = max((out / "ce_same_time").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert longest.name == "checkpoint-9"  # 2.8 epochs of 3 steps
    assert main(["resume", str(out)]) == 0  # from its last step
    assert slow.measured == ["ce_same_time", "ce_same_time", "ce", "nkd"], "the plan is read, not measured again"
    printed = capsys.readouterr().out
    report, runs = (out / "report.md").read_text(), {run["name"]: run for run in run_json(out)["runs"]}
    for text in (printed, report):
        assert "nkd-random_teacher (control)" in text and "(1.4 times the steps)" in text
    assert runs["ce_same_time"]["history"][-1]["step"] == 9 and runs["ce"]["history"][-1]["step"] == 6
    assert runs["ce_same_time"]["control"] == {"kind": "ce_same_time", "of": None, "ratio": 1.4}
    # All evaluations are with the true teacher.
    assert len({run["metrics"]["teacher_top1"] for run in runs.values()}) == 1
    card = (out / "ce_same_time" / "README.md").read_text()
    assert "This model is a control" in card and "(1.4 times the steps)" in card
    card = (out / "nkd-random_teacher" / "README.md").read_text()
    assert "from the architecture of `teacher` with random weights" in card and "taught the student" not in card
    assert "shown another image of the same label" in (out / "nkd-permuted_teacher" / "README.md").read_text()
    assert "control" not in (out / "nkd" / "README.md").read_text().split("## Results")[0]

    assert distill(things, *more, "--output_dir", again, "--same_time_ratio", "1.4") == 0
    first, second = weights_of(out), weights_of(again)
    assert first == second and len(first) == 7 and len(set(first.values())) == 7
    # An earlier comparison gets controls later; another ratio is refused, none is not.
    assert distill(things, *more, "--output_dir", out, "--resume_from_checkpoint", "last") == 0
    last = ["--output_dir", out, "--resume_from_checkpoint", "last", "--same_time_ratio", "2"]
    capsys.readouterr()
    assert distill(things, *more, *last) == 1
    assert "ce_same_time has 1.4 times the steps. Leave it out" in capsys.readouterr().err


class Slow:
    """Measures, and then says that nkd takes 1.4 times as long as ce."""

    def __init__(self):
        self.measured, self.real, self.measure = [], 0.0, trainers._step_seconds

    def __call__(self, experiment, spec, *arguments):
        self.measured.append(spec.name)
        self.real = self.measure(experiment, spec, *arguments)
        return 1.4 if spec.name == "nkd" else 1.0


def test_controls_are_added_to_a_finished_comparison(things, tmp_path, capsys):
    out = tmp_path / "out"
    more = [
        "--teacher",
        things / "teacher",
        "--compare",
        "ce,nkd,2xce",
        "--output_dir",
        out,
        "--num_train_epochs",
        "1",
    ]
    assert distill(things, *more) == 0
    assert run_json(out / "2xce")["control"] is None
    again = [*more, "--controls", "2xce", "random_teacher", "--resume_from_checkpoint", "last"]
    assert distill(things, *again) == 0
    assert run_json(out / "2xce")["control"] == {"kind": "2xce", "of": None}
    assert [run["name"] for run in run_json(out)["runs"]] == ["ce", "nkd", "2xce", "nkd-random_teacher"]
    assert "2xce (control)" in capsys.readouterr().out


def test_ctrl_c_while_steps_are_measured_leaves_nothing(things, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(trainers._Clock, "on_step_end", lambda *args, **kwargs: os.kill(os.getpid(), 2))
    more = ["--teacher", things / "teacher", "--compare", "ce,nkd", "--controls", "ce_same_time"]
    assert distill(things, *more, "--output_dir", tmp_path / "out") == 130
    assert "stopped before training" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list((tmp_path / "temporary").iterdir())


def test_a_permuted_teacher_needs_labels(things, tmp_path):
    """All images that have none would else be exchanged as one class."""
    data = datasets.load_dataset("parquet", data_dir=str(things / "data"))
    feature, labels = data["train"].features["label"], data["train"]["label"]
    for missing in (labels[:-3] + [-1] * 3, [None] * 48):
        train = data["train"].remove_columns("label").add_column("label", missing, feature=feature)
        with pytest.raises(
            ValueError, match=f"need labels, and {3 if missing[0] == 0 else 48} of 48 images have none"
        ):
            ImageDataset(train).with_partners(0)
    datasets.DatasetDict(train=train, test=data["test"]).save_to_disk(tmp_path / "data")
    more = ["--compare", "kl_only", "--dataset", tmp_path / "data", "--controls"]
    assert len(planned(things, tmp_path / "out", *more, "random_teacher").runs) == 2
    with pytest.raises(ValueError, match="permuted_teacher exchanges images of the same label, and 48 of the 48"):
        planned(things, tmp_path / "out", *more, "permuted_teacher")


@pytest.mark.parametrize(("against", "number"), [("label_smoothing", 0.1), ("2xce", 2.0), ("ce", 0.0)])
def test_ce_same_time_is_the_baseline_for_longer(things, tmp_path, against, number):
    more = ["--compare", "ce,label_smoothing,2xce,kd", "--against", against, "--controls", "ce_same_time"]
    by_name = {run.name: run.loss.hyperparameters for run in planned(things, tmp_path, *more).runs}
    assert by_name["ce_same_time"] == by_name[against] and number in by_name["ce_same_time"].values()


def test_random_teachers_differ_between_members_and_seeds(things, tmp_path):
    several = ["--teacher", things / "teacher", things / "teacher", "--compare", "ce,kd"]
    found = planned(things, tmp_path, *several)
    data = load_data(**found.data.load_arguments)
    members = [member for seed in (0, 1) for member in trainers.teacher_of(found, data, seed).teachers]
    heads = {tuple(member.model.classifier[1].weight.flatten().tolist()) for member in members}
    assert len(heads) == 4


def test_measuring_the_time_says_nothing_about_the_average(things, tmp_path, quick, caplog):
    more = ["--teacher", things / "teacher", "--compare", "ce,kd", "--controls", "ce_same_time"]
    more += ["--ema_decay", "0.8", "--output_dir", tmp_path]  # of 5 steps, of which there are 6, and 4 to measure
    assert distill(things, *more) == 0
    assert "averages over" not in caplog.text


@pytest.mark.slow
def test_two_processes_have_one_ratio(things, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "hf_kd"]
    command += ["distill", "--config", str(things / "config.yaml"), "--teacher", str(things / "teacher")]
    command += ["--compare", "ce,nkd", "--controls", "ce_same_time", "permuted_teacher", "--num_train_epochs", "4"]
    command += ["--per_device_train_batch_size", "8", "--output_dir", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ce_same_time has") == 1
    ratio, record = read_plan(out).same_time_ratio, run_json(out / "ce_same_time")
    assert ratio >= 1 and record["control"]["ratio"] == ratio
    assert record["history"][-1]["step"] == np.ceil(round(3 * 4 * ratio, 6))
