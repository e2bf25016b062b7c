"""The record and the repository of a trainer that was built in Python."""

import json
import re

import datasets
import hub_helpers
import numpy as np
import pytest
from hub_helpers import ANNA
from local_hub import cifar100
from tiny import tiny
from torch.utils.data import Subset
from trainer_helpers import NAMES, config, make_teacher, rows

from hf_kd import DistillationTrainer
from hf_kd.data import ImageDataset
from hf_kd.reporting.card import model_card
from hf_kd.reporting.collect import make_record, write_record
from hf_kd.reporting.origin import dataset_origin, weights_license

pytestmark = pytest.mark.usefixtures("undrawn_figures")

hub = hub_helpers.hub


def named(name, split, n=24, seed=0):
    """Rows of a dataset that knows its name, as `load_dataset` leaves them."""
    data = rows(n, seed=seed)
    data.info.dataset_name, data.info.builder_name, data.info.config_name = name, "parquet", "default"
    return datasets.Dataset(data.data, info=data.info, split=datasets.NamedSplit(split))


def trainer(folder, evaluation, name="flowers", **settings):
    student, processor = tiny("vit", names=NAMES)
    student.config.name_or_path = student.name_or_path = "own/tiny_vit"
    return DistillationTrainer(
        student,
        config(folder, loss="nkd", **settings),
        teacher=make_teacher(),
        train_dataset=named(name, "train"),
        eval_dataset=evaluation,
        processing_class=processor,
    )


def test_a_push_has_the_datas_name_the_metrics_the_teacher_and_a_name(hub, tmp_path):
    made = trainer(tmp_path / "out", named("flowers", "test", seed=1), hub_token=ANNA, push_to_hub=True)
    assert made.hub_model_id == "anna/tiny-vit-nkd-flowers"
    made.train()
    url = made.push_to_hub()
    assert url == f"{hub.endpoint}/anna/tiny-vit-nkd-flowers"
    files = hub.files("anna/tiny-vit-nkd-flowers")
    record, card = json.loads(files["run.json"]), files["README.md"].decode()
    data = record["data"]
    assert [data[key] for key in ("id", "revision", "train_split", "eval_split")] == ["flowers", None, "train", "test"]
    measured = made.evaluate()
    assert record["metrics"]["top1"] == measured["eval_top1"] and record["metrics"]["agreement"] is not None
    teacher = made.measure_teacher()
    assert record["teacher_metrics"] == pytest.approx(teacher)
    assert "trained on `flowers` with" in card and "trained on –" not in card
    assert re.search(rf"\| teacher .*? \| +{100 * teacher['top1']:.2f} \|", card)
    assert "24 images (split `test`)" in card


def test_an_evaluation_on_other_images_is_not_taken_for_that_of_the_record(tmp_path):
    made = trainer(tmp_path / "out", named("flowers", "test"))
    made.train()
    expected = made.evaluate()["eval_loss"]
    assert made.evaluate(rows(12, seed=5))["eval_loss"] != expected
    made.create_model_card()
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["metrics"]["loss"] == pytest.approx(expected, rel=1e-6) and record["data"]["eval_size"] == 24


def test_several_evaluation_sets_are_in_the_record(tmp_path):
    sets = {"clean": named("flowers", "test", 18), "foggy": named("flowers", "foggy", 12, seed=3)}
    made = trainer(tmp_path / "out", sets, eval_strategy="steps", eval_steps=2)
    made.train()
    made.create_model_card()
    record, measured = json.loads((tmp_path / "out" / "run.json").read_text()), made.evaluate()
    found = record["evaluation_sets"]
    assert {name: part["size"] for name, part in found.items()} == {"clean": 18, "foggy": 12}
    for name, part in found.items():
        assert part["metrics"]["top1"] == measured[f"eval_{name}_top1"]
        assert part["metrics"]["loss"] == pytest.approx(measured[f"eval_{name}_loss"])
    assert record["metrics"] == found["clean"]["metrics"] and record["data"]["eval_size"] == 18
    assert record["data"]["eval_split"] == "clean"
    assert "| `foggy` " in (tmp_path / "out" / "README.md").read_text()


def test_a_dataset_of_the_hub_tells_its_repository_and_commit(hub, tmp_path):
    commit = hub.add_repo("own/Cifar-100", cifar100(tmp_path / "files", 12, 6), repo_type="dataset")
    data = datasets.load_dataset("own/Cifar-100", split="test[:50%]")
    expected = {"name": "own/Cifar-100", "config_name": "cifar100", "split": "test[:50%]"}
    origin = dataset_origin(ImageDataset(data.select([0, 1]), label_column="fine_label"))
    revision = origin.pop("revision")
    assert origin == expected and len(revision) == 40 and (commit is None or revision == commit)


def test_what_does_not_know_its_name_gets_none():
    plain = rows(6)
    assert set(dataset_origin(plain).values()) == {None}
    assert set(dataset_origin(Subset(plain, [0])).values()) == {None}
    assert set(dataset_origin(np.zeros(3)).values()) == {None}
    folder = named("imagefolder", "train")
    folder.info.builder_name = "imagefolder"
    assert dataset_origin(folder)["name"] is None


def test_the_license_is_that_of_the_card_beside_the_weights_or_timms(hub, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: mine\ntags: [x]\n---\n# A card\n")
    model, _ = tiny("timm_resnet")
    assert weights_license(model, str(tmp_path)) == {"license": "other", "license_name": "mine"}
    assert weights_license(model, str(tmp_path / "nowhere")) == {}
    model.config.pretrained_cfg = {**model.config.pretrained_cfg, "license": "apache-2.0"}
    assert weights_license(model, str(tmp_path / "nowhere")) == {"license": "apache-2.0"}


def test_without_names_the_folder_names_the_repository(hub, tmp_path):
    made = trainer(tmp_path / "my-run", rows(), name=None, hub_token=ANNA, push_to_hub=True)
    assert made.hub_model_id == "anna/my-run"
    assert "trained on –" in model_card({"data": {}})


def test_a_training_that_diverged_has_a_record_without_metrics_and_no_card(tmp_path):
    made = trainer(tmp_path / "out", named("flowers", "test"))
    made.train()
    diverged = make_record(made, {"eval_loss": 1e5, "eval_top1": 0.2})
    assert diverged["metrics"] == {} and diverged["diverged"].startswith("the evaluation loss is 1e+05; guessing")
    write_record(diverged, tmp_path / "out")
    assert (tmp_path / "out" / "run.json").is_file() and not (tmp_path / "out" / "README.md").exists()
    assert make_record(made, {"eval_loss": 1.5, "eval_top1": 0.2})["diverged"] is None
