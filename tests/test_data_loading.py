"""Columns, and loading of local data."""

import logging

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from data_helpers import alone as alone
from data_helpers import encode, image_table, photo
from data_helpers import pytestmark as pytestmark

from hf_kd.data import (
    class_names,
    find_columns,
    load_data,
    loading,
)
from hf_kd.data.columns import encode_labels

# ---- columns and loading


def test_find_columns():
    image, label, text = datasets.Image(), datasets.ClassLabel(names=["a"]), datasets.Value("string")

    def found(*given, **features):
        return find_columns(datasets.Features(features), *given)

    assert found(image=image, label=label) == ("image", "label")
    assert found(x=text, photo=image, kind=label) == ("photo", "kind")
    assert found(photo=image, img=image, coarse_label=label, fine_label=label) == ("img", "fine_label")
    assert found("photo", "x", x=text, photo=image, img=image, label=label) == ("photo", "x")
    raw = {"bytes": datasets.Value("binary"), "path": text}
    assert found(img=raw, labels=datasets.Value("int64")) == ("img", "labels")
    assert find_columns(image_table(3)) == ("image", "label")
    for given, features, message in (
        ((), {"a": image, "b": image, "label": label}, "several.*a, b.*--image_column"),
        ((), {"image": image, "p": label, "q": label}, "several.*p, q.*--label_column"),
        ((), {"x": text, "label": label}, "none.*x.*label.*--image_column"),
        ((), {"image": image, "x": text}, "none.*image.*x.*--label_column"),
        (("foto",), {"image": image, "label": label}, "'foto'.*image.*label.*--image_column"),
        ((None, "klass"), {"image": image, "label": label}, "'klass'.*image.*label.*--label_column"),
    ):
        with pytest.raises(ValueError, match=message):
            found(*given, **features)
    assert class_names(image_table(3), "label") == ["a", "b", "c"]
    with pytest.raises(ValueError, match="label"):
        class_names(datasets.Dataset.from_dict({"label": [1]}), "label")


def write_parquet(folder, labels_of, column="label", image="img", with_images=True):
    folder.mkdir(exist_ok=True, parents=True)
    for split, labels in labels_of.items():
        columns = {column: labels}
        if with_images:
            columns[image] = [{"bytes": encode(photo(8, 8, seed=i)), "path": None} for i in range(len(labels))]
        table = datasets.Dataset.from_dict(columns)
        if with_images:
            table = table.cast_column(image, datasets.Image())
        table.to_parquet(folder / f"{split}.parquet")
    return str(folder)


def first_pixel(row, image="image"):
    return tuple(np.asarray(row[image])[0, 0].tolist())


def test_load_parquet_folder_with_integer_labels(tmp_path):
    folder = write_parquet(tmp_path / "d", {"train": [0, 1, 2, 3] * 5, "test": [0, 4]})
    data = load_data(folder)
    assert (len(data.train), len(data.eval), data.image_column, data.label_column) == (20, 2, "img", "label")
    assert data.names == list("01234") == data.train.features["label"].names == data.eval.features["label"].names
    assert data.train["label"][:] == [0, 1, 2, 3] * 5 and data.name == folder and data.revision is None
    assert first_pixel(data.train[3], "img") == tuple(photo(8, 8, seed=3)[0, 0])
    assert load_data(folder, eval_split="train", train_split="train", eval_fraction=0.5).train.num_rows == 8


def test_load_text_labels_the_same_way_in_both_splits(tmp_path):
    folder = write_parquet(tmp_path / "d", {"train": ["dog", "cat", "dog", "ant"], "validation": ["eel", "cat"]})
    data = load_data(folder)
    assert data.names == ["ant", "cat", "dog", "eel"]
    assert data.train["label"][:] == [2, 1, 2, 0] and data.eval["label"][:] == [3, 1]


def test_load_holds_out_the_same_stratified_part(tmp_path, caplog):
    path = write_parquet(tmp_path / "d", {"images": [0] * 50 + [1] * 30 + [2] * 20}) + "/images.parquet"
    with caplog.at_level(logging.WARNING, logger=loading.__name__):
        data = load_data(path, eval_fraction=0.2)
    assert len([r for r in caplog.records if r.name == loading.__name__]) == 1 and "held out" in caplog.text
    assert len(data.train) == 80 and np.bincount(data.eval["label"][:]).tolist() == [10, 6, 4]
    pixels = [
        [row["bytes"] for row in part.cast_column("img", datasets.Image(decode=False))["img"]]
        for part in (data.train, data.eval)
    ]
    assert len(set(pixels[0])) == 80 and not set(pixels[0]) & set(pixels[1])
    assert load_data(path, eval_fraction=0.2).eval.to_dict() == data.eval.to_dict()
    for fraction in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"eval_fraction={fraction}.*--eval_fraction"):
            load_data(path, eval_fraction=fraction)


def test_load_fewer_samples(tmp_path):
    folder = write_parquet(tmp_path / "d", {"train": list(range(30)), "test": list(range(30))})
    data = load_data(folder, max_train_samples=6, max_eval_samples=100)
    assert len(data.train) == 6 and len(data.eval) == 30 and len(data.names) == 30
    assert data.train["label"][:] == load_data(folder, max_train_samples=6).train["label"][:]
    assert data.train["label"][:] != list(range(6))
    with pytest.raises(ValueError, match="max_eval_samples"):
        load_data(folder, max_eval_samples=0)


def write_images(folder, classes, count=5):
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            (folder / name / f"{i}.png").write_bytes(encode(photo(8, 8, seed=100 * k + i)))
    return str(folder)


@pytest.mark.parametrize("split", ["test", "val", "valid", "validation"])
def test_load_image_folder_with_splits(tmp_path, split):
    write_images(tmp_path / "d" / "train", ["cat", "dog"])
    write_images(tmp_path / "d" / split, ["cat", "dog"], count=2)
    data = load_data(str(tmp_path / "d"))
    assert (len(data.train), len(data.eval), data.names) == (10, 4, ["cat", "dog"])
    assert sorted(zip([first_pixel(row) for row in data.train], data.train["label"], strict=True)) == sorted(
        (tuple(photo(8, 8, seed=100 * k + i)[0, 0].tolist()), k) for k in (0, 1) for i in range(5)
    )


def test_load_image_folder_without_splits(tmp_path, monkeypatch):
    # load_dataset alone would take "freight train" for the training split, and drop the other classes.
    write_images(tmp_path / "d", ["bus", "eval", "freight train"])
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "d"), "./d", "d"):
        data = load_data(name, eval_fraction=0.2)
        assert (len(data.train), len(data.eval), data.names) == (12, 3, ["bus", "eval", "freight train"])


def test_load_image_folder_with_an_unlabelled_test_set(tmp_path, caplog):
    write_images(tmp_path / "d" / "train", ["cat", "dog"])
    write_images(tmp_path / "d", ["test"])
    with caplog.at_level(logging.WARNING, logger=loading.__name__):
        data = load_data(str(tmp_path / "d"), eval_fraction=0.2)
    assert (len(data.train), len(data.eval), data.names) == (8, 2, ["cat", "dog"])
    assert "test is left out" in caplog.text and "held out" in caplog.text
    write_images(tmp_path / "flat", ["train", "test"])  # no two classes "train" and "test"
    with pytest.raises(ValueError, match="train, test.*folder for each class"):
        load_data(str(tmp_path / "flat"))


def test_load_what_save_to_disk_wrote(tmp_path):
    datasets.DatasetDict(train=image_table(9), test=image_table(3)).save_to_disk(str(tmp_path / "d"))
    data = load_data(str(tmp_path / "d"))
    assert (len(data.train), len(data.eval), data.names) == (9, 3, ["a", "b", "c"])


def test_load_from_the_hub_asks_for_the_right_thing(monkeypatch):
    class Revision(str):
        resolved = "c0ffee" * 6 + "abcd"

    asked, splits = [], datasets.DatasetDict(train=image_table(9), validation=image_table(3))
    splits["test"] = image_table(3).select([])
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: asked.append((names, options)) or splits)
    monkeypatch.setattr(loading, "resolve", lambda name, revision, kind: Revision(f"{revision} of {kind} {name}"))
    data = load_data("owner/name", config_name="small", revision="v1")
    assert asked == [(("owner/name", "small"), {"revision": "v1 of dataset owner/name"})]
    assert (len(data.train), len(data.eval), data.name, data.revision) == (9, 3, "owner/name", Revision.resolved)
    assert (data.train_split, data.eval_split) == ("train", "validation")
    with pytest.raises(ValueError, match=r"'test'.*empty.*train \(9\), validation \(3\), test \(0\)"):
        load_data("owner/name", eval_split="test")


def test_a_local_folder_of_the_same_name_is_reached_by_its_path(tmp_path, monkeypatch):
    write_parquet(tmp_path / "quickstart", {"train": [0, 1], "test": [1]})
    monkeypatch.chdir(tmp_path)
    assert len(load_data("quickstart").train) == 6000
    assert len(load_data("./quickstart").train) == 2


def test_load_errors_say_what_there_is_and_the_way_out(tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError(f"went looking for {args}")

    good = write_parquet(tmp_path / "good", {"train": [0, 1], "test": [1, 0]})
    for options, message in (
        ({"eval_split": "dev"}, "'dev'.*--eval_split.*train.*test"),
        ({"train_split": "all"}, "'all'.*--train_split.*train.*test"),
        ({"label_column": "klass"}, "'klass'.*label.*img.*--label_column"),
        ({"image_column": "foto"}, "'foto'.*label.*img.*--image_column"),
        ({"label_column": "img"}, "img.*no labels"),
    ):
        with pytest.raises(ValueError, match=message):
            load_data(good, **options)
    for number, (splits, message) in enumerate(
        (
            ({"train": [0, 1], "test": [-1, -1]}, r"2 of the 2 labels.*'test'.*\[-1\].*--eval_split"),
            ({"train": [0, None], "test": [1, 0]}, r"1 of the 2 labels.*'train'.*missing"),
            ({"train": ["a", None], "test": ["a", "b"]}, r"1 of the 2 labels.*'train'.*missing"),
            ({"train": [0.5, 1.0], "test": [1.0, 0.0]}, "float64.*no labels.*img"),
        )
    ):
        with pytest.raises(ValueError, match=message):
            load_data(write_parquet(tmp_path / f"bad{number}", splits))
    with pytest.raises(ValueError, match="none.*kind.*img.*--label_column"):
        load_data(write_parquet(tmp_path / "nolabel", {"train": [0, 1]}, column="kind"))
    with pytest.raises(ValueError, match="none.*--image_column"):
        load_data(write_parquet(tmp_path / "no_images", {"train": [0, 1]}, with_images=False))
    pq.write_table(pq.read_table(f"{good}/train.parquet").slice(0, 0), tmp_path / "good" / "validation.parquet")
    with pytest.raises(ValueError, match="validation.parquet.*empty"):
        load_data(good)

    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="void"):
        load_data(str(tmp_path / "void"))
    monkeypatch.setattr(datasets, "load_dataset", never)
    for name in ("./nowhere", "/nowhere/x", "~/nowhere", "nowhere/train.parquet"):
        with pytest.raises(ValueError, match="local path"):
            load_data(name)


def test_labels_beyond_the_names(tmp_path):
    features = image_table(3).features
    table = image_table(3).cast_column("label", datasets.Value("int64"))
    table = datasets.Dataset(table.data.table.set_column(1, "label", [[0, 1, 7]]))
    table = datasets.Dataset(table.data, info=datasets.DatasetInfo(features=features))
    with pytest.raises(ValueError, match=r"1 of the 3 labels.*\[7\]"):
        encode_labels({"train": table}, "label")


def test_a_test_class_without_training_images_is_refused(tmp_path):
    for path in ("train/cat", "train/dog", "test/cat", "test/ferret"):
        (tmp_path / path).mkdir(parents=True)
        for i in range(2):
            (tmp_path / path / f"{i}.png").write_bytes(encode(np.full((4, 4, 3), 40 * i + len(path), np.uint8)))
    with pytest.raises(ValueError, match="'train' has no image of 1 classes that split 'test' has: ferret.*Rename"):
        load_data(str(tmp_path))
