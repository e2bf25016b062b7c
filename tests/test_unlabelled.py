"""Training without labels: kl_only gives the same weights with labels and without, wherever the images are from."""

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cli_helpers import distill, images
from tiny import tiny
from torch.utils.data import Dataset
from trainer_helpers import NAMES, config, make_teacher, rows, trainer_for, weights

from hf_kd import DistillationTrainer
from hf_kd.cli import main
from hf_kd.data import load_data
from hf_kd.losses import LOSSES, get_loss
from hf_kd.reporting.record import read_record
from hf_kd.spec import read_plan


class Items(Dataset):
    """Items of any form, from the rows of a dataset."""

    def __init__(self, form):
        self.rows, self.form = rows(), form

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.form(self.rows[index]["image"], index % 6)


def with_labels_of(value):
    return rows().remove_columns("label").add_column("label", [value] * 24, feature=rows().features["label"])


DATA = {
    "no column": lambda: rows().remove_columns("label"),
    "-1": lambda: with_labels_of(-1),
    "None": lambda: with_labels_of(None),
    "images": lambda: Items(lambda image, label: image),
    "pairs of None": lambda: Items(lambda image, label: (image, None)),
    "dicts without": lambda: Items(lambda image, label: {"img": image}),
}


def trained(folder, data, loss="kl_only", evaluation=None, **settings):
    student, processor = tiny("vit", names=NAMES)
    args = config(folder, loss=loss, augment="pad_crop", **settings)
    trainer = DistillationTrainer(
        student, args, make_teacher(), train_dataset=data, eval_dataset=evaluation, processing_class=processor
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("mixing", [{}, {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}])
def test_labels_make_no_difference(tmp_path, kind, mixing):
    expected = trained(tmp_path / "with", rows(), **mixing)
    # Images of datasets are kept decoded, others are not: their augmentation is the same.
    got = trained(tmp_path / "without", DATA[kind](), evaluation=rows(7, seed=5), **mixing)
    assert torch.equal(weights(got), weights(expected))
    assert not torch.equal(weights(got), torch.cat([p.flatten() for p in tiny("vit", names=NAMES)[0].parameters()]))
    assert got.evaluate()["eval_samples"] == 7
    if not mixing:
        with pytest.raises(ValueError, match="0 of 24 images were counted|label"):
            got.evaluate(DATA[kind]())


def test_the_teacher_is_not_checked_without_labels(tmp_path):
    assert trained(tmp_path, DATA["None"](), max_steps=1).state.global_step == 1  # nor is there an evaluation set


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("loss", ["kd", "dkd"])
def test_other_losses_refuse_before_training(tmp_path, kind, loss):
    student, processor = tiny("vit", names=NAMES)
    args, data = config(tmp_path, loss=loss), DATA[kind]()
    with pytest.raises(ValueError, match="label.*kl_only"):
        DistillationTrainer(student, args, make_teacher(), train_dataset=data, processing_class=processor)


def test_a_class_head_needs_labels_and_the_hint_works(tmp_path):
    def trainer(**settings):
        return trainer_for(tmp_path, "distilled deit", "kd", train=with_labels_of(-1), **only, **settings)

    only = {"loss_kwargs": {"ce_weight": 0.0}}
    with pytest.raises(ValueError, match="the class head learns from them; train on labelled images, or with disti"):
        trainer()
    trainer(distillation_alpha=1).train()


def test_a_loss_says_whether_it_needs_labels():
    without = {"kl_only": {}, "hard": {"weight": 1.0}, "kd": {"weight": 3.0, "ce_weight": 0.0}}
    for name in (*LOSSES, *without):
        assert get_loss(name).needs_labels == (name != "kl_only"), name
    for name, numbers in without.items():
        loss = get_loss(name, **numbers)
        terms = loss(torch.randn(3, 6), torch.full((3,), -100), teacher_logits=torch.randn(3, 6))
        assert not loss.needs_labels and terms["ce"] == 0 and sum(terms.values()) > 0
        loss.use_distillation_head(0.5 if name != "hard" else 0.5 + 0.5)
        assert loss.needs_labels == (name != "hard")  # those of the class head


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Datasets whose training split has labels, labels of -1 or None, or no such column."""
    folder = tmp_path_factory.mktemp("unlabelled")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    test = datasets.Dataset.from_dict(images(24, 2), features=features)
    train = datasets.Dataset.from_dict(images(48, 1), features=features)
    labels = {"-1": [-1] * 48, "None": [None] * 48, "some": [-1] * 3 + train["label"][3:]}
    plain = train.remove_columns("label")
    parts = {key: plain.add_column("label", value, feature=features["label"]) for key, value in labels.items()}
    for key, part in {"with": train, "no column": plain, **parts}.items():
        (folder / key).mkdir()
        for split, data in (("train", part), ("test", test)):
            table = data.with_format("arrow")[:].replace_schema_metadata(data.data.schema.metadata)
            pq.write_table(table, folder / key / f"{split}.parquet", row_group_size=8)
    datasets.DatasetDict(train=plain, test=test).save_to_disk(folder / "saved")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["-1", "None", "some", "no column"])
def test_a_split_without_labels_is_loaded_when_that_is_allowed(folders, kind, streaming):
    name = folders / ("saved" if kind == "no column" and not streaming else kind)
    data = load_data(str(name), streaming=streaming, allow_unlabelled=True)
    assert data.names == NAMES and [row["label"] for row in data.eval][:7] == [0, 1, 2, 3, 4, 5, 0]
    assert [data.train[i]["label"] for i in range(48)] == [-1] * 48
    assert len(load_data(str(name), streaming=streaming, allow_unlabelled=True, max_train_samples=9).train) == 9
    if not streaming:
        assert np.array_equal(data.train[5]["image"], load_data(str(folders / "with")).train[5]["image"])
    with pytest.raises(ValueError, match="label.*kl_only"):
        load_data(str(name), streaming=streaming)


def test_evaluation_still_needs_labels(folders):
    for key in ("-1", "None"):
        with pytest.raises(ValueError, match="labels in column 'label'"):
            load_data(str(folders / key), train_split="test", eval_split="train", allow_unlabelled=True)
        with pytest.raises(ValueError, match="labels in column 'label'"):  # of which a part would be held out
            load_data(str(folders / key), eval_split="train", allow_unlabelled=True)


def test_labelled_data_is_the_same_when_labels_may_be_missing(folders):
    for options in ({}, {"streaming": True}, {"eval_split": "train"}, {"max_train_samples": 20}):
        one, two = (load_data(str(folders / "with"), allow_unlabelled=allow, **options) for allow in (False, True))
        assert one.describe() == two.describe()


@pytest.mark.parametrize("streaming", [False, True])
def test_the_command_line_trains_without_labels(things, folders, tmp_path, capsys, undrawn_figures, streaming):
    options = ["--teacher", things / "teacher", "--num_train_epochs", 1, *["--streaming"][: int(streaming)]]
    student = {}
    for key in ("with", "None"):
        loss = ["--loss", "kl_only", "--mixup_alpha", 0.8]
        assert distill(things, *options, *loss, "--dataset", folders / key, "--output_dir", tmp_path / key) == 0
        student[key] = (tmp_path / key / "model.safetensors").read_bytes()
        assert read_record(tmp_path / key)["metrics"]["top1"] >= 0
    assert student["with"] == student["None"] and read_plan(tmp_path / "None").data.allow_unlabelled
    assert main(["resume", str(tmp_path / "None")]) == 0
    capsys.readouterr()
    compared = ["--compare", "kl_only,ce", "--dataset", folders / "None", "--output_dir", tmp_path / "both"]
    assert distill(things, *options, *compared) == 1
    assert "kl_only, with a teacher" in capsys.readouterr().err and not (tmp_path / "both").exists()
