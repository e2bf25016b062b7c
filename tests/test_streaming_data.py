"""Streams of unusual files, and streams with other options of the trainer."""

import io
import json
import struct
import tarfile
import zlib

import datasets
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from cli_helpers import NAMES, images
from data_helpers import alone as alone
from data_helpers import encode, photo
from data_helpers import pytestmark as pytestmark
from test_streaming import SETTINGS, write
from trainer_helpers import trainer_for

from hf_kd import step_data
from hf_kd.batch_of_one import check_batches_of_one
from hf_kd.data import ImageDataset, load_data
from hf_kd.data import dataset as dataset_module
from hf_kd.data.order import EpochSampler
from hf_kd.reporting import make_record


def folder_of(folder, train, test=20, **options):
    for split, size in (("train", train), ("test", test)):
        write(folder / "d", [size], split, **options)
    return str(folder / "d")


def column(folder, values, feature, test=None):
    """A folder whose splits have these labels."""
    folder.mkdir()
    for split, labels, kind in (("train", values, feature), ("test", values, test or feature)):
        features = datasets.Features({"image": datasets.Image(), "label": kind})
        rows = {"image": images(len(labels), 0)["image"], "label": labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return str(folder)


# ---- rows ----


def test_images_that_cannot_be_decoded_are_listed_by_file_and_row(tmp_path):
    """All kinds that are not decoded, and one that is, in two files of 5 rows."""
    good = encode(images(1, 0)["image"][0])
    encoded = [good, b"", b"no image", good[:100], good] * 2
    rows = {"image": [{"bytes": data, "path": "same.png"} for data in encoded], "label": [i % 3 for i in range(10)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    table = datasets.Dataset.from_dict(rows, features=features)
    (tmp_path / "d").mkdir()
    for split, start in (("train-0", 0), ("train-1", 5), ("test-0", 0)):
        table.select(range(start, start + 5)).to_parquet(tmp_path / "d" / f"{split}.parquet")
    data = load_data(str(tmp_path / "d"), streaming=True)
    options = {"augment": "none", "max_steps": -1, "num_train_epochs": 2, "max_skipped_fraction": 0.9}
    trainer = trainer_for(tmp_path / "out", train=data.train, evaluation=data.eval, **options)
    trainer.train()
    trainer.evaluate()
    where = [f"train-{file}.parquet, row {row}: same.png: " for file in (0, 1) for row in (1, 2, 3)]
    assert sorted(text[: len(where[0])] for text in trainer.skipped) == where  # once each in both epochs
    assert [text.split(": ")[0] for text in sorted(trainer.eval_skipped)] == [
        f"test-0.parquet, row {i}" for i in (1, 2, 3)
    ]


def test_images_of_every_kind_are_converted_or_skipped_and_counted(tmp_path):
    rgb, exif = photo(40, 50), PIL.Image.Exif()
    exif[0x0112] = 6
    grey, alpha = rgb[..., 0], np.dstack([rgb, rgb[..., 0]])
    wide = grey.astype(np.uint16) * 257
    images = {mode: PIL.Image.fromarray(rgb).convert(mode) for mode in ("CMYK", "L", "P", "RGB")}
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    converted = [
        encode(images["CMYK"], "JPEG"),
        encode(images["L"], "JPEG"),
        encode(PIL.Image.fromarray(alpha).convert("LA")),
        encode(images["P"], transparency=bytes(range(256))),
        encode(PIL.Image.fromarray(alpha)),
        encode(images["RGB"], "JPEG", exif=exif.tobytes()),
        encode(images["P"], "GIF", save_all=True, append_images=[images["L"]]),
        encode(rgb[:1, :1]),
    ]
    bad = {"truncated": encode(rgb, "JPEG")[:-100], "empty": b"", "no image": b"<html>", "too large": bomb}
    encoded = [*converted, encode(PIL.Image.fromarray(wide)), *bad.values()]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    column = [{"bytes": data, "path": None} for data in encoded]
    table = datasets.Dataset.from_dict({"image": column, "label": [i % 6 for i in range(13)]}, features=features)
    (tmp_path / "d").mkdir()
    for split in ("train", "test"):
        table.to_parquet(tmp_path / "d" / f"{split}.parquet")
    data = load_data(str(tmp_path / "d"), streaming=True)
    items = ImageDataset(data.train).__getitems__(range(13))
    for item, source in zip(items, converted, strict=False):
        image = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(source)))
        image = image.convert("RGBA" if image.mode == "P" else image.mode).convert("RGB")
        assert np.array_equal(item["pixels"].permute(1, 2, 0).numpy(), np.asarray(image))
    assert np.array_equal(items[8]["pixels"][0].numpy(), grey)
    assert [item["kind"] for item in items[9:]] == list(bad)
    found = []
    for part in (data, load_data(str(tmp_path / "d"))):  # map-style: the same path
        options = {"augment": "none", "max_steps": -1, "num_train_epochs": 1, "max_skipped_fraction": 0.9}
        trainer = trainer_for(tmp_path / "out", train=part.train, evaluation=part.eval, **options)
        trainer.train()
        found.append(make_record(trainer)["data"]["skipped"])
        assert found[-1]["kinds"] == found[-1]["eval_kinds"] == dict.fromkeys(sorted(bad), 1)
        assert found[-1]["count"] == len(found[-1]["examples"]) == 4
    assert found[0]["examples"][0].startswith("train.parquet, row ")


def test_a_stream_of_bad_images_ends_early(tmp_path, monkeypatch):
    """Of 5,000 rows none can be decoded but the last: not all of them are read."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    (tmp_path / "d").mkdir()
    for split, count in (("train", 5000), ("test", 1)):
        column = [{"bytes": b"", "path": None}] * (count - 1) + [{"bytes": encode(photo(8, 8)), "path": None}]
        rows = {"image": column, "label": [i % 6 for i in range(count)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "d" / f"{split}.parquet")
    train = load_data(str(tmp_path / "d"), streaming=True).train
    trainer = trainer_for(tmp_path / "out", train=train, max_steps=-1, num_train_epochs=1)
    decoded, keep = [], dataset_module.decode_row
    monkeypatch.setattr(dataset_module, "decode_row", lambda *args: decoded.append(1) or keep(*args))
    with pytest.raises(ValueError, match=r"no image of this batch of 8 can be decoded \(8 empty\)"):
        trainer.train()
    assert len(decoded) < 2100  # the loader is one batch ahead


def test_the_cap_is_relative_to_what_was_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(step_data, "FEWEST", 20)
    trainer = trainer_for(tmp_path / "out", max_skipped_fraction=0.2)  # batches of 8
    trainer.train_dataset = range(100)

    def note(step, *skipped):
        trainer.state.global_step = step
        batch = {"labels": torch.zeros(max(8 - len(skipped), 0)), "skipped": dict.fromkeys(skipped, "empty")}
        return step_data.count_samples(trainer, [batch])

    assert note(0, "a", "b", "c", "d") == 4  # of 20
    assert note(2) == note(3, "a", "e") + 2 == 8  # of 32
    with pytest.raises(ValueError, match=r"9 of 40 images could not be decoded \(9 empty\)"):
        note(4, "f", "g", "h", "i")
    trainer.skipped.clear()
    assert note(40, *"abcdefgh") == 0
    with pytest.raises(ValueError, match="21 of 100 images"):
        note(40, *map(str, range(13)))


def test_a_limit_within_a_row_group_ends_the_rows(tmp_path):
    rows = load_data(folder_of(tmp_path, 53), streaming=True, max_train_samples=33).train
    assert len(list(rows)) == len(rows) == 33
    assert rows[-1]["label"] == rows[32]["label"] == 32 % 6
    for index in (33, -34):
        with pytest.raises(IndexError, match="there are 33 rows"):
            rows[index]


# ---- with other options of the trainer ----


@pytest.mark.parametrize("processes", [1, 2])
def test_drop_last_leaves_the_last_images_out(tmp_path, processes):
    rows = load_data(folder_of(tmp_path, 35), streaming=True).train
    dataset = ImageDataset(rows).for_training(None, None)
    samplers = [EpochSampler(dataset, 8, (processes, i, 0), drop_last=True) for i in range(processes)]
    assert len(samplers[0]) == 4 // processes
    found = [row for sampler in samplers for batch in sampler for row in batch]
    assert all(len(batch) == 8 for batch in samplers[0]) and len(set(found)) == len(found) == 32
    with pytest.raises(ValueError, match="35 images fill no step of 40.*dataloader_drop_last False"):
        EpochSampler(dataset, 40, (1, 0, 0), drop_last=True)


def test_a_stream_with_drop_last_is_trained_without_a_batch_of_one(tmp_path):
    rows = load_data(folder_of(tmp_path, 33), streaming=True).train
    with pytest.raises(ValueError, match="33 images in batches of 8 give a batch of one image"):
        trainer_for(tmp_path / "out", "resnet", train=rows, max_steps=9).train()
    trainer = trainer_for(tmp_path / "out", "resnet", train=rows, max_steps=9, dataloader_drop_last=True)
    trainer.train()
    assert trainer.state.epoch == pytest.approx(9 / 4)


def test_processes_that_share_a_stream_may_have_a_batch_of_one(tmp_path, monkeypatch):
    rows = load_data(folder_of(tmp_path, 19), streaming=True).train
    trainer = trainer_for(tmp_path / "out", "resnet", train=rows, max_steps=9)
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    check_batches_of_one(trainer, trainer.train_dataset, 5)  # 5 + 5, 5 + 4
    with pytest.raises(ValueError, match="19 images in batches of 4 give a batch of one image"):
        check_batches_of_one(trainer, trainer.train_dataset, 4)  # 4 + 4, 4 + 4, 2 + 1


def test_predictions_are_in_the_order_of_the_rows(tmp_path):
    data = load_data(folder_of(tmp_path, 24), streaming=True)
    trainer = trainer_for(tmp_path / "out", train=data.train, dataloader_num_workers=2)
    found = trainer.predict(data.eval)
    assert found.label_ids.tolist() == [row["label"] for row in data.eval]


def test_a_run_from_python_is_not_resumed_with_other_loader_workers(tmp_path):
    rows = load_data(folder_of(tmp_path, 24), streaming=True).train
    options = SETTINGS | {"save_strategy": "steps", "save_steps": 2}
    trainer_for(tmp_path / "out", train=rows, **options).train()
    other = trainer_for(tmp_path / "out", train=rows, dataloader_num_workers=2, **options)
    with pytest.raises(ValueError, match=r"data.stream_workers \(0 there, 2 here\)"):
        other.train(str(tmp_path / "out" / "checkpoint-2"))


def test_a_record_from_python_says_what_was_streamed(tmp_path):
    data = load_data(folder_of(tmp_path, 24), streaming=True, max_train_samples=10, max_eval_samples=8)
    assert data.split_sizes == {"train": 24, "test": 20}  # of the whole splits
    trainer = trainer_for(tmp_path / "out", train=data.train, evaluation=data.eval, max_steps=1)
    trainer.train()
    entry = make_record(trainer)["data"]
    assert entry["id"].endswith("d") and (entry["train_split"], entry["eval_split"]) == ("train", "test")
    assert (entry["train_size"], entry["eval_size"]) == (10, 8)


def test_a_stream_in_the_order_of_its_rows_is_refused(tmp_path):
    rows = load_data(folder_of(tmp_path, 24), streaming=True).train
    trainer = trainer_for(tmp_path / "out", train=rows, train_sampling_strategy="sequential")
    with pytest.raises(ValueError, match="'sequential' is not supported"):
        trainer.train()


# ---- files ----


@pytest.mark.parametrize("streaming", [False, True])
def test_files_that_name_the_classes_differently_are_refused(tmp_path, streaming):
    names = datasets.ClassLabel(names=["cat", "dog"]), datasets.ClassLabel(names=["dog", "cat"])
    folder = column(tmp_path / "d", [0, 1] * 4, *names)
    match = (
        r"train.parquet and .*test.parquet name the classes of column 'label' differently, label 0 is 'cat' and 'dog'"
    )
    with pytest.raises(ValueError, match=match):
        load_data(folder, streaming=streaming)
    assert load_data(column(tmp_path / "e", [0, 1] * 4, names[0]), streaming=streaming).names == ["cat", "dog"]


def test_streams_without_rows_or_classes_or_a_place_are_refused(tmp_path):
    integers = datasets.Value("int64")
    with pytest.raises(ValueError, match=r"has only the class \['0'\]"):
        load_data(column(tmp_path / "one", [0] * 8, integers), streaming=True)
    folder = column(tmp_path / "empty", [0, 1] * 4, integers)
    write(tmp_path / "empty", [0], "test")
    (tmp_path / "empty" / "test.parquet").unlink()
    with pytest.raises(ValueError, match="split 'test' of .* is empty"):
        load_data(folder, streaming=True)
    with pytest.raises(ValueError, match="there is no .*nothing; this reads as a local path"):
        load_data("./nothing", streaming=True)


def tar_of(path, *members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize(
    "odd",
    [
        [("b.cls", b"cat")],
        [("b.json", b"[1]")],
        [("b.json", b'{"label": null}')],
        [("b.cls", b"1"), ("b.jpg", b"another image")],
    ],
)
def test_a_sample_of_a_webdataset_has_one_image_and_one_label(tmp_path, odd):
    (tmp_path / "d").mkdir()
    png = encode(np.zeros((8, 8, 3), np.uint8))
    good = [("x/a.v1.png", b"no image of its own"), ("x/a.png", png), ("x/a.cls", b"1\n"), ("x/a.txt", b"text")]
    tar_of(tmp_path / "d" / "train.tar", *good)
    tar_of(tmp_path / "d" / "test.tar", *good)
    assert [row["label"] for row in load_data(str(tmp_path / "d"), streaming=True).train] == [1]
    tar_of(tmp_path / "d" / "test.tar", *good, ("b.png", png), *odd)
    with pytest.raises(ValueError, match=r"test.tar: /b does not have exactly one image .*, or no number as label"):
        load_data(str(tmp_path / "d"), streaming=True)


def test_a_sample_of_a_webdataset_without_a_label_has_a_missing_one(tmp_path):
    (tmp_path / "d").mkdir()
    image = encode(np.zeros((8, 8, 3), np.uint8))
    labelled = [("a.png", image), ("a.cls", b"1")]
    tar_of(tmp_path / "d" / "train.tar", *labelled, ("b.png", image), ("b.txt", b"1"))
    tar_of(tmp_path / "d" / "test.tar", *labelled)
    with pytest.raises(ValueError, match="'train' of .* labels of -1 or missing ones .* no labels .--loss kl_only"):
        load_data(str(tmp_path / "d"), streaming=True)
    data = load_data(str(tmp_path / "d"), streaming=True, allow_unlabelled=True)
    assert [row["label"] for row in data.train] == [-1, -1] and [row["label"] for row in data.eval] == [1]


@pytest.mark.parametrize("streaming", [False, True])
def test_integers_as_labels_are_named(tmp_path, streaming):
    integers = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for split, size in (("train", 24), ("test", 12)):
        write(tmp_path / "d", [size], split, features=integers)
        write(tmp_path / "named", [size], split)
    names = ["ant", "bee, a", "cat", "dog", "elk", "no"]
    (tmp_path / "names.json").write_text(json.dumps(names))
    (tmp_path / "names.yaml").write_text("".join(f"- {name}\n" for name in names))  # where `no` is a name, not False
    (tmp_path / "names.txt").write_text("\n".join(names), encoding="utf-8-sig")
    for given in (names, *(tmp_path / f"names.{kind}" for kind in ("json", "yaml", "txt"))):
        assert load_data(str(tmp_path / "d"), streaming=streaming, class_names=given).names == names
    with pytest.raises(ValueError, match="class_names are for a column of integers"):
        load_data(str(tmp_path / "named"), streaming=streaming, class_names=names)
    with pytest.raises(ValueError, match="label 5|outside 0 … 4"):
        load_data(str(tmp_path / "d"), streaming=streaming, class_names=names[:5])
    for wrong, match in (
        (["a", "b", "a"], "names a twice"),
        ("nothing.txt", "cannot be read"),
        (["a", ""], "empty"),
        ([1, 2], "1, which is no"),
    ):
        with pytest.raises(ValueError, match=match):
            load_data(str(tmp_path / "d"), streaming=streaming, class_names=wrong)
