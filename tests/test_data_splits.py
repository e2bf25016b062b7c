"""The hold-out and the subsets by hashes of the images, fingerprints, and the overlap of two runs' data."""

import logging
import math

import datasets
import numpy as np
import pytest
from data_helpers import alone as alone
from data_helpers import encode, photo
from data_helpers import pytestmark as pytestmark

from hf_kd.data import decode, load_data, loading, overlap, splits
from hf_kd.data.columns import INDEX_COLUMN
from hf_kd.data.splits import image_hashes, sort_rows


def add_images(folder, name, seeds, prefix=""):
    (folder / name).mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        (folder / name / f"{prefix}{seed}.png").write_bytes(encode(photo(8, 8, seed=seed)))


def image_bytes(part):
    rows = part.cast_column("image", datasets.Image(decode=False))["image"]
    return {open(row["path"], "rb").read() if row["bytes"] is None else row["bytes"] for row in rows}


def table(labels, images=None):
    images = range(len(labels)) if images is None else images
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abc"))})
    source = [{"path": None, "bytes": encode(photo(8, 8, seed=i))} for i in images]
    return datasets.Dataset.from_dict({"image": source, "label": labels}, features=features)


def hold_out(labels, images, fraction):
    """Row numbers, by the rule itself."""
    hashes = image_hashes(table(labels, images), "image").tolist()
    held = set()
    for label in set(labels):
        different = sorted({h for h, other in zip(hashes, labels, strict=True) if other == label})
        held |= set(different[: min(math.ceil(fraction * len(different)), len(different) - 1)])
    return [row for row, h in enumerate(hashes) if h in held]


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3, 0.5, 0.9])
def test_the_rule(fraction):
    # Copies within a class (0 and 30), copies in two classes (5 and 12), and a class of one image.
    labels = [0] * 10 + [1] * 20 + [2]
    images = [0, 0, *range(2, 10), *range(10, 30), 30]
    images[12] = images[5]
    data = table(labels, images)
    order, positions = sort_rows(image_hashes(data, "image"), np.array(labels))
    held = sorted(order[: (positions < fraction).sum()].tolist())
    assert held == hold_out(labels, images, fraction) and 30 not in held
    assert (0 in held) == (1 in held) and (5 in held) == (12 in held)


def test_one_more_file_moves_one_image_of_its_class_at_most(tmp_path):
    for k, name in enumerate(("ant", "bee", "cat")):
        add_images(tmp_path / "d", name, range(100 * k, 100 * k + 12))
    before = load_data(str(tmp_path / "d"), eval_fraction=0.25)
    held, kept = image_bytes(before.eval), image_bytes(before.train)
    assert (len(held), len(kept)) == (9, 27)
    for seed in range(5):  # first or last in the folder, here
        add_images(tmp_path / "d", "bee", [1000 + seed], prefix="0" if seed % 2 else "z")
        after = load_data(str(tmp_path / "d"), eval_fraction=0.25)
        now = image_bytes(after.eval)
        moved = (held - now) | (image_bytes(after.train) & held) | (now & kept)
        bees = {encode(photo(8, 8, seed=s)) for s in [*range(100, 112), *range(1000, 1000 + seed)]}
        assert len(moved) <= 1 and moved <= bees
        held, kept = now, image_bytes(after.train)
    add_images(tmp_path / "d", "bee", range(100, 112), prefix="copy")  # which change nothing but their own side
    after = load_data(str(tmp_path / "d"), eval_fraction=0.25)
    assert image_bytes(after.eval) == held and image_bytes(after.train) == kept and len(after.train) > len(kept)


def test_names_order_and_container_of_the_files_do_not_matter(tmp_path):
    labels = [i % 3 for i in range(30)]
    add_folder = [add_images(tmp_path / "files", "abc"[label], [i]) for i, label in enumerate(labels)]
    order = np.random.default_rng(0).permutation(30).tolist()
    shuffled = table([labels[i] for i in order], order)
    shuffled.to_parquet(tmp_path / "rows.parquet")
    files = load_data(str(tmp_path / "files"), eval_fraction=0.2, max_train_samples=9)
    rows = load_data(str(tmp_path / "rows.parquet"), eval_fraction=0.2, max_train_samples=9)
    assert len(add_folder) == 30 and files.fingerprint == rows.fingerprint
    assert image_bytes(files.eval) == image_bytes(rows.eval) and image_bytes(files.train) == image_bytes(rows.train)
    relabelled = table([labels[i] for i in order[:-1]] + [(labels[order[-1]] + 1) % 3], order)
    relabelled.to_parquet(tmp_path / "other.parquet")
    assert load_data(str(tmp_path / "other.parquet")).fingerprint != rows.fingerprint
    # The sample key is the row in file order, before hold-out and subset.
    for part in (rows.train, rows.eval):
        for row in part.cast_column("image", datasets.Image(decode=False)):
            assert row["image"]["bytes"] == encode(photo(8, 8, seed=order[row[INDEX_COLUMN]]))


def test_larger_fractions_and_samples_nest_and_overlap_counts_them(tmp_path):
    table([i % 3 for i in range(60)], range(60)).to_parquet(tmp_path / "d.parquet")
    both = tmp_path / "both"
    both.mkdir()
    table([i % 3 for i in range(60)], range(60)).to_parquet(both / "train.parquet")
    table([0, 1, 2, 0], range(100, 104)).to_parquet(both / "test.parquet")
    table([0, 1, 2] * 3, range(200, 209)).to_parquet(tmp_path / "unrelated.parquet")

    def load(name, **options):
        return load_data(str(tmp_path / name), **options)

    options = [{"eval_fraction": f} for f in (0.1, 0.2, 0.45)]
    options += [{"eval_fraction": 0.2, "max_eval_samples": 5}, {"eval_fraction": 0.1, "max_train_samples": 50}]
    options += [{"eval_fraction": 0.1, "max_train_samples": 20}]
    runs = [load("d.parquet", **each) for each in options]
    runs += [load("both"), load("both", train_split="test", eval_split="train", max_eval_samples=30)]
    for ours in runs:
        for theirs in runs:
            expected = len(image_bytes(ours.eval) & image_bytes(theirs.train))
            assert overlap(ours.describe(), theirs.describe()) == expected, (ours.describe(), theirs.describe())
    assert overlap(runs[2].describe(), runs[0].describe()) == 27 - 6 and len(runs[3].eval) == 5
    assert image_bytes(runs[5].train) < image_bytes(runs[4].train)
    assert not image_bytes(runs[5].train) & image_bytes(runs[2].eval)  # a subset keeps away from every hold-out
    assert sorted(np.bincount(runs[5].train["label"][:])) == [6, 7, 7]
    assert overlap(runs[0].describe(), load("unrelated.parquet", eval_fraction=0.4).describe()) is None
    assert overlap(runs[0].describe(), {"id": "old/record", "train_size": 3}) is None
    assert runs[6].eval_fraction is None and runs[0].eval_fraction == 0.1
    assert runs[0].fingerprint == runs[2].fingerprint != runs[6].fingerprint


def test_classes_of_one_image_are_trained_on_and_named(tmp_path, caplog):
    table([0] * 10 + [1] + [2] * 10).to_parquet(tmp_path / "d.parquet")
    with caplog.at_level(logging.WARNING, logger=loading.__name__):
        data = load_data(str(tmp_path / "d.parquet"), eval_fraction=0.2)
    assert np.bincount(data.train["label"][:]).tolist() == [8, 1, 8]
    assert np.bincount(data.eval["label"][:], minlength=3).tolist() == [2, 0, 2]
    messages = [r.getMessage() for r in caplog.records if r.name == loading.__name__]
    assert len(messages) == 2 and messages[1].endswith("1 of 3 classes have no image to evaluate on: b")
    table([0, 1, 2]).to_parquet(tmp_path / "e.parquet")
    with pytest.raises(ValueError, match="eval_fraction=0.5 of 3 images leaves none"):
        load_data(str(tmp_path / "e.parquet"), eval_fraction=0.5)


def test_files_are_read_once_and_again_when_they_change(tmp_path, monkeypatch):
    add_images(tmp_path / "d", "ant", range(6))
    add_images(tmp_path / "d", "bee", range(10, 16))
    read = []
    monkeypatch.setattr(splits, "read_file", lambda path: read.append(path) or decode.read_file(path))
    first = load_data(str(tmp_path / "d"))
    assert len(read) == 12
    assert load_data(str(tmp_path / "d")).fingerprint == first.fingerprint and len(read) == 12
    (tmp_path / "d" / "ant" / "3.png").write_bytes(encode(photo(9, 9, seed=77)))
    assert load_data(str(tmp_path / "d")).fingerprint != first.fingerprint and len(read) == 13
    for file in (tmp_path / "cache" / "hf_kd_image_hashes").iterdir():
        file.write_bytes(b"damaged")
    load_data(str(tmp_path / "d"))
    assert len(read) == 25


def test_a_dataset_of_the_hub_is_known_by_its_commit(monkeypatch):
    class Revision(str):
        resolved = "c0ffee" * 6 + "abcd"

    found = datasets.DatasetDict(train=table([0, 1, 2] * 5), test=table([0, 1, 2], range(50, 53)))
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: found)
    monkeypatch.setattr(loading, "resolve", lambda name, revision, kind: Revision(revision))
    monkeypatch.setattr(splits, "_hash", None)  # no image is read
    prints = {load_data("owner/name", revision="main").fingerprint for _ in range(2)}
    prints.add(load_data("owner/other").fingerprint)
    prints.add(load_data("owner/name", config_name="small").fingerprint)
    prints.add(load_data("owner/name", eval_split="train", train_split="test").fingerprint)
    Revision.resolved = "0" * 40
    prints.add(load_data("owner/name").fingerprint)
    assert len(prints) == 5


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([1, 2, 3] * 4, {}, "1 of 4 classes have no image to train on: 0; do its labels start at 1?"),
        (["cat", "Cat ", "dog"] * 4, {}, r"differ only in case or spaces: [['Cat ', 'cat']]"),
        (list("abcdef"), {"max_train_samples": 5}, "1 of 6 classes have no image to train on: "),
        (["cat", "dog"] * 4, {}, None),
    ],
)
def test_classes_that_look_wrong_are_named_once(tmp_path, caplog, labels, options, message):
    for split, shift in (("train", 0), ("test", 100)):
        encoded = [{"bytes": encode(photo(4, 4, seed=shift + i)), "path": None} for i in range(len(labels))]
        data = datasets.Dataset.from_dict({"image": encoded, "label": labels}).cast_column("image", datasets.Image())
        (tmp_path / "d").mkdir(exist_ok=True)
        data.to_parquet(tmp_path / "d" / f"{split}.parquet")
    with caplog.at_level(logging.WARNING, logger=loading.__name__):
        load_data(str(tmp_path / "d"), **options)
    messages = [r.getMessage() for r in caplog.records if r.name == loading.__name__]
    assert len(messages) == (message is not None)
    assert message is None or message in messages[0]


def test_folders_of_one_name_are_named(tmp_path, caplog):
    for path in ("left/eye", "right/eye", "left/ear"):
        add_images(tmp_path / "d", path, range(4), prefix=path.split("/")[0])
    with caplog.at_level(logging.WARNING, logger=loading.__name__):
        data = load_data(str(tmp_path / "d"), eval_fraction=0.25)
    assert data.names == ["ear", "eye"]
    assert "folders of the same name are one class: ['left/eye', 'right/eye']" in caplog.text


def test_one_class_is_refused(tmp_path):
    add_images(tmp_path / "d", "ant", range(6))
    with pytest.raises(ValueError, match="all images are in folders named 'ant': a classifier needs one for each"):
        load_data(str(tmp_path / "d"))
    data = table([0, 0, 0]).remove_columns("label").add_column("label", ["ant"] * 3)
    data.to_parquet(tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r"has only the class \['ant'\]: a classifier needs two"):
        load_data(str(tmp_path / "d.parquet"))
