"""Datasets and their epochs, batches, columns, and loading of local data."""

import gc
import logging
import pickle
import random

import datasets
import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch
from data_helpers import alone as alone
from data_helpers import encode, photo
from data_helpers import pytestmark as pytestmark
from torch.utils.data import DataLoader

from hf_kd.data import (
    EvaluationCollator,
    ImageDataset,
    Mixer,
    TrainingCollator,
    build_transform,
    cache,
    class_names,
    find_columns,
    load_data,
    loading,
)
from hf_kd.data import dataset as dataset_module
from hf_kd.data.columns import encode_labels

# ---- dataset


def image_table(count=12, broken=(), size=16):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    data = [encode(photo(size, size, seed=i)) for i in range(count)]
    data = [
        {"path": None, "bytes": bytes_[: len(bytes_) // 2] if i in broken else bytes_} for i, bytes_ in enumerate(data)
    ]
    return datasets.Dataset.from_dict({"image": data, "label": [i % 3 for i in range(count)]}, features=features)


class EveryRng(torch.nn.Module):
    """Draws from the three generators, as RandAugment and torchvision do between them."""

    def forward(self, image):
        draws = [random.randrange(256), int(np.random.randint(256)), int(torch.randint(256, ()))]
        return torch.tensor(draws, dtype=torch.uint8).view(3, 1, 1).expand(3, 4, 4)


def epoch_of(loader, dataset, epoch):
    dataset.set_epoch(epoch)
    return torch.cat([batch["pixels"] for batch in loader])


def test_items_depend_on_seed_epoch_and_index_alone():
    table = image_table()
    plain = ImageDataset(table, "image", "label", EveryRng(), seed=5)
    expected = {}
    for epoch in (0, 1):
        plain.set_epoch(epoch)
        expected[epoch] = torch.stack([plain[i]["pixels"] for i in reversed(range(12))]).flip(0)
    assert len({tuple(x[:, 0, 0].tolist()) for epoch in (0, 1) for x in expected[epoch]}) == 24  # all differ
    other = ImageDataset(table, "image", "label", EveryRng(), seed=6)
    assert not torch.equal(other[0]["pixels"], expected[0][0])

    for workers, persistent in ((0, False), (2, False), (2, True)):
        dataset = ImageDataset(table, "image", "label", EveryRng(), seed=5)
        options = {"num_workers": workers, "persistent_workers": persistent}
        loader = DataLoader(dataset, 5, collate_fn=TrainingCollator(), **options)
        for epoch in (0, 1, 0):
            assert torch.equal(epoch_of(loader, dataset, epoch), expected[epoch]), (workers, persistent, epoch)


@pytest.mark.slow
def test_spawned_workers_see_the_epoch():
    dataset = ImageDataset(image_table(4), "image", "label", build_transform("pad_crop"), seed=5)
    loader = DataLoader(
        dataset,
        4,
        collate_fn=TrainingCollator(),
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context="spawn",
    )
    for epoch in (0, 1):
        pixels = epoch_of(loader, dataset, epoch)
        assert dataset._decoded.known.all()  # by the worker, in memory that is shared
        assert torch.equal(pixels, torch.stack([dataset[i]["pixels"] for i in range(4)]))


def odd_table(dense=False):
    """Images of 16 px, a few of another size and a few broken, whose keys are not the positions."""
    table, other = image_table(40, broken=(5, 6, 23)), image_table(40, size=24)
    images = [
        (other if i in (8, 30) else table).cast_column("image", datasets.Image(decode=False))[i]["image"]
        for i in range(40)
    ]
    labels = {"label": [[i / 40, 0.0, 1 - i / 40] for i in range(40)] if dense else table["label"]}
    feature = datasets.Sequence(datasets.Value("float32")) if dense else table.features["label"]
    features = datasets.Features({"image": datasets.Image(), "label": feature, "__index__": datasets.Value("int64")})
    rows = {"image": images, **labels, "__index__": [3 * i + 1 for i in range(40)]}
    return datasets.Dataset.from_dict(rows, features=features)


def batches_of(dataset, collator, workers=0):
    order = np.random.default_rng(0).permutation(len(dataset)).tolist() + [8, 5, 2]  # some twice
    options = {"num_workers": workers, "persistent_workers": workers > 0}
    loader = DataLoader(dataset, 6, sampler=order, collate_fn=collator, **options)
    found = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        found += list(loader)
    return found


def assert_same(batches, expected):
    for batch, other in zip(batches, expected, strict=True):
        assert list(batch) == list(other)
        for key, value in batch.items():
            assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augment", [None, "none", "flip", "pad_crop"])
def test_batches_of_kept_images_are_those_of_images_decoded_each_time(augment, workers, monkeypatch):
    """The null experiment of the memory of decoded images, bit by bit, with broken images and such of another size."""
    for table in (odd_table(), odd_table(dense=True)):
        collator = TrainingCollator(size=20, seed=5, mixer=Mixer(3, 0.8, 1.0) if augment == "flip" else None)

        def images():
            return ImageDataset(table.select(range(40)), seed=5).for_training(augment, 20)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(cache, "MAX_BYTES", 0)
            each = images()
            assert each._decoded is None
            expected = batches_of(each, collator)
        kept = images()
        assert_same(batches_of(kept, collator, workers), expected)
        assert sorted(np.flatnonzero(~kept._decoded.known)) == [5, 6, 8, 23, 30]
        assert_same(batches_of(kept, collator), expected)  # what the workers decoded
        assert_same(batches_of(pickle.loads(pickle.dumps(kept)), collator), expected)


def test_images_are_decoded_once_for_all_who_use_the_dataset(monkeypatch):
    table, decoded = image_table(12), []

    def noted(row, key, *options):
        decoded.append(key)
        return read_item(row, key, *options)

    read_item = dataset_module.read_item
    monkeypatch.setattr(dataset_module, "read_item", noted)
    training, evaluation = ImageDataset(table).for_training("pad_crop", 16), ImageDataset(table)
    assert decoded == [0]  # for its size
    first, again = ([dataset.__getitems__(range(12)) for _ in range(2)][1] for dataset in (training, evaluation))
    assert sorted(decoded) == [0, *range(12)]
    again[3]["pixels"].zero_()  # what a user does with an item is not seen by others
    assert torch.equal(evaluation[3]["pixels"], torch.from_numpy(photo(16, 16, seed=3)).permute(2, 0, 1))
    assert not torch.equal(first[3]["pixels"], evaluation[3]["pixels"])
    assert sorted(decoded) == [0, *range(12)]
    assert all("skipped" in item for item in ImageDataset(table, max_pixels=255).__getitems__([0, 1]))  # another limit
    assert "skipped" not in evaluation[1] and evaluation.__getitems__([]) == []
    count = len(cache._caches)
    del table
    gc.collect()
    assert len(cache._caches) == count - 1  # with the dataset


def test_what_does_not_fit_or_is_drawn_for_each_image_is_not_kept(monkeypatch):
    table = image_table(12)
    monkeypatch.setattr(cache, "MAX_BYTES", 12 * 3 * 16 * 16)
    assert ImageDataset(table)._decoded is not None
    monkeypatch.setattr(cache, "MAX_BYTES", 12 * 3 * 16 * 16 - 1)
    assert ImageDataset(table.select(range(12)))._decoded is None
    assert ImageDataset(image_table(12, broken=range(12)))._decoded is None
    monkeypatch.undo()
    resized = ImageDataset(table).for_training("resized_crop", 8)
    resized.__getitems__([1, 2])
    assert not resized._decoded.known.any()


def test_dataset_and_mixing_leave_the_callers_generators_alone():
    dataset = ImageDataset(image_table(), "image", "label", build_transform("deit", 16))
    collator = TrainingCollator(mixer=Mixer(3, 0.8, 1.0))

    def draws():
        return random.random(), np.random.random(), float(torch.rand(()))

    def seed():
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    seed()
    expected = draws()
    seed()
    batch = collator([dataset[i] for i in range(4)])
    assert draws() == expected
    again = collator([dataset[i] for i in range(4)])
    assert torch.equal(batch["pixels"], again["pixels"]) and torch.equal(batch["labels"], again["labels"])
    dataset.set_epoch(1)
    assert not torch.equal(batch["labels"], collator([dataset[i] for i in range(4)])["labels"])


def test_items_and_undecodable_images():
    table = image_table(broken=(1,))
    dataset = pickle.loads(pickle.dumps(ImageDataset(table, "image", "label")))
    assert len(dataset) == 12
    item = dataset[2]
    assert set(item) == {"pixels", "labels", "index", "epoch"}
    assert (item["labels"], item["index"], item["epoch"]) == (2, 2, 0)
    assert torch.equal(item["pixels"], torch.from_numpy(photo(16, 16, seed=2)).permute(2, 0, 1))
    assert set(dataset[1]) == {"skipped", "kind", "index", "epoch"} and dataset[1]["skipped"].startswith("1: ")
    with pytest.raises(IndexError):
        dataset[12]
    with pytest.raises(ValueError, match="image.*label"):
        ImageDataset(table, "img", "label")


# ---- collator


def test_collator_accepts_every_kind_of_item():
    rgb = photo(8, 8)
    pixels = torch.from_numpy(rgb).permute(2, 0, 1)
    for key in ("pixels", "image", "img"):
        kinds = [pixels, rgb, PIL.Image.fromarray(rgb), {"bytes": encode(rgb), "path": None}]
        for label_key in ("labels", "label"):
            batch = TrainingCollator()([{key: x, label_key: i} for i, x in enumerate(kinds)])
            assert torch.equal(batch["pixels"], torch.stack([pixels] * 4)) and batch["pixels"].is_contiguous()
            assert set(batch) == {"pixels", "labels"}
            assert batch["labels"].dtype == torch.int64 and batch["labels"].tolist() == [0, 1, 2, 3]
    values = torch.randn(2, 3, 8, 8)
    batch = TrainingCollator()([{"pixel_values": values[i], "label": [0.25, 0.75]} for i in range(2)])
    assert torch.equal(batch["pixel_values"], values) and "pixels" not in batch
    assert batch["labels"].dtype == torch.float32 and batch["labels"].tolist() == [[0.25, 0.75]] * 2
    batch = TrainingCollator()([{"pixel_values": values[i].numpy(), "labels": np.int64(i)} for i in range(2)])
    assert torch.equal(batch["pixel_values"], values) and batch["labels"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="photo, kind"):
        TrainingCollator()([{"photo": rgb, "kind": 1}])
    with pytest.raises(ValueError, match="photo, label"):
        TrainingCollator()([{"photo": rgb, "label": 1}])


def test_collator_shapes_and_frames():
    items = [{"image": photo(20 + i, 30), "label": i} for i in range(3)]
    for collator, hint in ((TrainingCollator(), "train_image_size"), (EvaluationCollator(), "processing_class")):
        with pytest.raises(ValueError, match=f"several shapes.*{hint}"):
            collator(items)
    batch = TrainingCollator(size=16)(items)
    assert batch["pixels"].shape == (3, 3, 16, 16) and batch["pixels"].dtype == torch.uint8
    for item, pixels in zip(items, batch["pixels"], strict=True):
        expected = np.asarray(PIL.Image.fromarray(item["image"]).resize((16, 16), PIL.Image.BICUBIC))
        assert np.abs(pixels.permute(1, 2, 0).int().numpy() - expected.astype(int)).max() <= 2
    # An image is brought to the size whatever the others of its batch are.
    alone = TrainingCollator(size=16)(items[:1])["pixels"]
    assert (alone.int() - batch["pixels"][:1].int()).abs().max() <= 1  # a grey level: another batch size rounds freely

    def frame(side):
        return lambda images: torch.stack([image[:, :side, :side] for image in images])

    batch = EvaluationCollator(frame(4), frame(8))(items)
    assert batch["pixels"].shape == (3, 3, 4, 4) and batch["teacher_pixels"].shape == (3, 3, 8, 8)
    assert torch.equal(batch["teacher_pixels"][:, :, :4, :4], batch["pixels"])


def test_collator_drops_or_keeps_what_cannot_be_decoded():
    dataset = ImageDataset(image_table(broken=(0, 2)), "image", "label")
    items = [dataset[i] for i in range(4)] + [{"image": b"broken", "label": 1, "index": 4, "epoch": 0}]
    batch = TrainingCollator()(items)
    assert batch["pixels"].shape == (2, 3, 16, 16) and batch["labels"].tolist() == [1, 0]
    assert [(text.split(":")[0], kind) for text, kind in batch["skipped"].items()] == [
        ("0", "truncated"),
        ("2", "truncated"),
        ("no image file that Pillow knows; it begins with b'broken'", "no image"),
    ]
    kept = EvaluationCollator()(items)
    assert kept["labels"].tolist() == [-100, 1, -100, 0, -100] and kept["skipped"] == batch["skipped"]
    assert kept["pixels"].shape == (5, 3, 16, 16) and kept["pixels"][[0, 2, 4]].sum() == 0
    assert torch.equal(kept["pixels"][[1, 3]], batch["pixels"])

    soft = [{"image": photo(8, 8), "label": [0.5, 0.5]}, {"skipped": "x"}]
    assert EvaluationCollator()(soft)["labels"].tolist() == [[0.5, 0.5], [-100, -100]]
    lost = [{"skipped": "a.png: truncated"}, {"skipped": "b.png: empty"}]
    assert batch["index"].tolist() == [1, 3] and kept["index"].tolist() == [0, 1, 2, 3, 4] and kept["epoch"] == 0
    for collator in (TrainingCollator(), EvaluationCollator()):
        with pytest.raises(ValueError, match="a.png: truncated; b.png: empty"):
            collator(lost)
    batch = EvaluationCollator(lambda images: torch.stack([x[:, :6, :6] for x in images]))(lost)
    assert batch["pixels"].shape == (2, 3, 6, 6) and batch["labels"].tolist() == [-100, -100]


def test_collator_mixes_last():
    items = [{"pixels": photo(8, 8, seed=i), "labels": i, "index": 7 + i, "epoch": 2} for i in range(4)]
    batch = TrainingCollator(mixer=Mixer(4, mixup_alpha=1.0))(items)
    assert batch["index"].tolist() == [7, 8, 9, 10] and batch["epoch"] == 2
    pixels = torch.stack([torch.from_numpy(item["pixels"]).permute(2, 0, 1) for item in items]) / 255
    expected = torch.einsum("bc,chwd->bhwd", batch["labels"], pixels)
    assert 0 < batch["labels"].max() < 1 and torch.allclose(batch["pixels"], expected, atol=1e-5)

    def draw(seed=0, epoch=2, keys=(7, 8, 9, 10)):
        same = [item | {"index": key, "epoch": epoch} for item, key in zip(items, keys, strict=True)]
        return TrainingCollator(mixer=Mixer(4, mixup_alpha=1.0), seed=seed)(same)["labels"]

    assert torch.equal(draw(), batch["labels"]) and torch.equal(draw(keys=(7, 1, 2, 3)), batch["labels"])
    for other in (draw(seed=1), draw(epoch=3), draw(keys=(8, 7, 9, 10))):  # f(seed, epoch, first key) alone
        assert not torch.equal(other, batch["labels"])


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
