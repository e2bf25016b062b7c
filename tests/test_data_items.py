"""Items of map-style datasets and the batches that collators make of them."""

import gc
import pickle
import random

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from data_helpers import alone as alone
from data_helpers import encode, image_table, photo
from data_helpers import pytestmark as pytestmark
from torch.utils.data import DataLoader

from hf_kd.data import (
    EvaluationCollator,
    ImageDataset,
    Mixer,
    TrainingCollator,
    build_transform,
    cache,
)
from hf_kd.data import dataset as dataset_module

# ---- dataset


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
