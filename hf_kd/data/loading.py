"""Finds, reads and checks a dataset: two splits of images with labels in [0, C) and the names of the C classes."""

import logging
from collections.abc import Mapping, Sized
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from ..hub import resolve
from ..labels import name_key, read_class_names
from ..quickstart import bundled
from .columns import (
    INDEX_COLUMN,
    NO_LABELS,
    check_unnamed,
    encode_labels,
    find_columns,
    missing_labels,
    without_labels,
)
from .columns import class_names as class_names_of
from .splits import content_fingerprint, fingerprint, image_hashes, sort_rows
from .streaming import StreamedRows, check_class_names, stream_features, stream_splits

logger = logging.getLogger(__name__)

EVAL_SPLITS = ("validation", "valid", "val", "test")


@dataclass(frozen=True)
class ImageData:
    """What `load_data` gives: `train` and `eval`, whose `label_column` is a ClassLabel of `names` in both.

    Their column `__index__` is the sample key, the row number in the whole split. `eval_fraction` is None unless
    images are held out. `split_sizes` and `split_fingerprints` are those of the whole splits, by name; `fingerprint`
    is that of both with their names.
    """

    train: Dataset | StreamedRows
    eval: Dataset | StreamedRows
    image_column: str
    label_column: str
    names: list[str]
    name: str
    revision: str | None = None
    train_split: str = "train"
    eval_split: str = "test"
    config_name: str | None = None
    eval_fraction: float | None = None
    split_sizes: dict[str, int] = field(default_factory=dict)
    split_fingerprints: dict[str, str] = field(default_factory=dict)
    fingerprint: str = ""

    def describe(self) -> dict[str, Any]:
        """What plan and record say of the data, as plain values; `overlap` compares two of these."""
        objects = ("train", "eval", "names", "image_column", "label_column")
        facts = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in objects}
        return facts | {"train_size": len(self.train), "eval_size": len(self.eval), "classes": len(self.names)}


def load_data(
    name: str,
    config_name: str | None = None,
    revision: str | None = None,
    train_split: str | None = None,
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    eval_fraction: float = 0.1,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    streaming: bool = False,
    class_names: list[str] | str | None = None,
    allow_unlabelled: bool = False,
) -> ImageData:
    """Loads an image classification dataset and checks every label of it.

    Args:
        name: "quickstart" (bundled), a local folder of parquet files, or of images in a folder for each class (with or
            without train/ and test/, val/, valid/ or validation/ above them), a local parquet file, a folder that
            `save_to_disk` wrote, or the id of a dataset on the Hub. What starts with ".", "/" or "~", ends with
            ".parquet", or exists is local and never looked for on the Hub.
        config_name, revision: of the dataset on the Hub; the revision is a commit, tag or branch.
        train_split: None: "train", or the only split there is.
        eval_split: None: the first of validation, valid, val, test. If there is none, or if it is the training split
            itself, a part of that is held out: of a class's n different images the ⌈eval_fraction·n⌉ (but not all)
            whose encoded bytes have the smallest hashes. Equal images are on one side, and a larger fraction holds
            out the same images and others.
        image_column, label_column: see `find_columns`; labels without names become classes as in `encode_labels`.
        eval_fraction: of the training split to hold out, between 0 and 1.
        max_train_samples, max_eval_samples: at most so many images, each class in proportion, by the same hashes: the
            largest to train on, the smallest to evaluate on.
        streaming: read the images while training, from parquet or webdataset files here or on the Hub, without
            downloading them first. Nothing can be held out, labels are integers, and the limits take the first rows.
        class_names: of integers as labels, in their order, or a file of them; see `read_class_names`.
        allow_unlabelled: take a training split of which labels are missing (no column, None or below 0), for a loss
            that needs none; all its labels are then -1, and the classes are those of the evaluation split.

    Raises:
        ValueError: nothing to load there, a missing or empty split, no such column, or labels missing or out of range.
    """
    for option, limit in (("max_train_samples", max_train_samples), ("max_eval_samples", max_eval_samples)):
        if limit is not None and limit < 1:
            raise ValueError(f"{option} must be at least 1, not {limit}; leave it out to take all")
    given_names = read_class_names(class_names)
    if streaming:
        columns, first = (image_column, label_column), (max_train_samples, max_eval_samples)
        origin = (name, config_name, revision)
        return _load_stream(*origin, train_split, eval_split, columns, first, given_names, allow_unlabelled)
    splits, commit = _read(name, config_name, revision)
    sizes = ", ".join(f"{split} ({len(data)})" for split, data in splits.items())
    train_split, eval_split = _choose_splits(name, splits, sizes, train_split, eval_split)
    # Where the training split may have no labels, its columns are those of the evaluation split.
    first_split, other = (eval_split, train_split) if allow_unlabelled else (train_split, eval_split)
    image_column, label_column = find_columns(splits[first_split], image_column, label_column)
    may_lack = allow_unlabelled and train_split != eval_split
    unlabelled = may_lack and missing_labels(splits[train_split], label_column) > 0
    if not unlabelled:
        find_columns(splits[other], image_column, label_column)
    labelled = (eval_split,) if unlabelled else (train_split, eval_split)
    chosen = encode_labels({split: splits[split] for split in labelled}, label_column, given_names)
    names = class_names_of(chosen[eval_split], label_column)
    if unlabelled:
        chosen[train_split] = without_labels(splits[train_split], image_column, label_column, names)
    _check_several(name, names, label_column)
    held_out = eval_split == train_split
    limits = {train_split: max_train_samples, eval_split: max_eval_samples}
    labels, rows, fingerprints, present = {}, {}, {}, {}
    for split, data in chosen.items():
        labels[split] = np.asarray(data.select_columns(label_column).with_format("numpy")[:][label_column])
        rows[split] = np.arange(len(data))
        if commit:  # the images are read only where they are to be chosen among
            fingerprints[split] = fingerprint(name, commit, config_name, split, image_column, label_column)
        if held_out or limits[split] is not None or not commit:
            hashes = image_hashes(data, image_column)
            rows[split], positions = sort_rows(hashes, labels[split])
            fingerprints.setdefault(split, content_fingerprint(hashes, labels[split]))
        if INDEX_COLUMN in data.column_names:  # of another split, saved and read again
            data = data.remove_columns(INDEX_COLUMN)
        chosen[split] = data.add_column(INDEX_COLUMN, np.arange(len(data)))
        present[split] = set(np.unique(labels[split]).tolist())
    train, evaluation = rows[train_split], rows[eval_split]
    unseen = [names[label] for label in sorted(present[eval_split] - present[train_split])]
    # As if one class had two names. A whole dataset may name classes that it has no images of.
    folders = not unlabelled and splits[train_split].info.builder_name == "imagefolder"
    if folders and unseen and present[train_split] - present[eval_split]:
        raise ValueError(
            f"{name}: split {train_split!r} has no image of {len(unseen)} classes that split {eval_split!r} has: "
            f"{', '.join(unseen[:10])}. Rename those that are meant to be one class, or choose another --eval_split"
        )
    if held_out:
        count = int((positions < eval_fraction).sum())
        evaluation, train = train[:count], train[count:]
        if not len(train) or not len(evaluation):
            part = f"eval_fraction={eval_fraction} of {len(labels[train_split])} images"
            raise ValueError(f"{part} leaves none to train or to evaluate on: pass another --eval_fraction")
        message = (
            f"{name}: evaluating on {len(evaluation)} images held out of split {train_split!r}, training on its "
            f"other {len(train)} (eval_fraction={eval_fraction}); for another split pass --eval_split, one of {sizes}"
        )
        logger.warning(message)
    train, evaluation = np.sort(train[::-1][:max_train_samples]), np.sort(evaluation[:max_eval_samples])
    without = {"train on": np.setdiff1d(range(len(names)), labels[train_split][train])} if not unlabelled else {}
    if held_out:
        without["evaluate on"] = np.setdiff1d(list(present[eval_split]), labels[eval_split][evaluation])
    _warn_about_classes(name, names, without)
    return _image_data(
        (chosen[train_split].select(train), chosen[eval_split].select(evaluation)),
        (train_split, eval_split),
        fingerprints,
        image_column=image_column,
        label_column=label_column,
        names=names,
        name=name,
        revision=commit,
        config_name=config_name,
        eval_fraction=eval_fraction if held_out else None,
        split_sizes={split: len(data) for split, data in chosen.items()},
    )


def _image_data(parts: tuple[Any, Any], splits: tuple[str, str], fingerprints: dict[str, str], **known) -> ImageData:
    """The two parts, of the splits of these names, with what is known of them and the fingerprint of both."""
    both = [text for split in splits for text in (split, fingerprints[split])]
    known |= {"train_split": splits[0], "eval_split": splits[1], "split_fingerprints": fingerprints}
    return ImageData(*parts, fingerprint=fingerprint(*both), **known)


def _choose_splits(
    name: str, splits: Mapping[str, Sized], sizes: str, train_split: str | None, eval_split: str | None
) -> tuple[str, str]:
    """The splits to train and to evaluate on: those asked for, or the usual ones; of a single split twice that."""
    train_split = train_split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    eval_split = eval_split or next((split for split in EVAL_SPLITS if split in splits), train_split)
    for option, split in (("train_split", train_split), ("eval_split", eval_split)):
        if not len(splits.get(split, ())):
            problem = "is empty" if split in splits else f"is not there: pass --{option}"
            raise ValueError(f"split {split!r} of {name!r} {problem}; there are: {sizes}")
    return train_split, eval_split


def _load_stream(
    name: str,
    config_name: str | None,
    revision: str | None,
    train_split: str | None,
    eval_split: str | None,
    columns: tuple[str | None, str | None],
    limits: tuple[int | None, int | None],
    given_names: list[str] | None,
    allow_unlabelled: bool,
) -> ImageData:
    """`load_data` with `streaming`: from the files' footers alone."""
    rows_class, splits, features, commit = stream_splits(name, _local_path(name), config_name, revision)
    train_split, eval_split = _choose_splits(name, splits, ", ".join(splits), train_split, eval_split)
    if eval_split == train_split:
        raise ValueError(
            f"{name} has the splits {', '.join(splits)}: a stream has no hold-out, so pass --eval_split with another "
            "than the training split, or leave --streaming out"
        )
    features = features or stream_features(splits[eval_split if allow_unlabelled else train_split][0])
    image_column, label_column = find_columns(features, *columns)
    features = datasets.Features({key: features[key] for key in (image_column, label_column)})
    rows, fingerprints, largest = {}, {}, {}
    for split, limit in zip((train_split, eval_split), limits, strict=True):
        optional = allow_unlabelled and split == train_split
        there = not optional or rows_class is not StreamedRows or label_column in stream_features(splits[split][0])
        read = features if there else datasets.Features({image_column: features[image_column]})
        rows[split] = rows_class(splits[split], read, limit)
        if not len(rows[split]):
            raise ValueError(f"split {split!r} of {name!r} is empty: its files have no rows")
        rows[split].origin = {"name": name, "revision": commit, "config_name": config_name, "split": split}
        low, largest[split] = rows[split].label_range(label_column) if there else (-1, -1)
        if low < 0 and optional:
            rows[split].without_labels(label_column)
            largest[split] = -1
        elif low < 0:
            raise ValueError(
                f"split {split!r} of {name} has labels of -1 or missing ones in column {label_column!r}: it is "
                f"published without labels. Pass another --eval_split or --label_column. For training: {NO_LABELS}"
            )
        origin = [name, commit, config_name] if commit else rows[split].describe()
        fingerprints[split] = fingerprint(*origin, split, image_column, label_column)
    check_class_names(rows[train_split].schemas() | rows[eval_split].schemas())
    check_unnamed(features[label_column], label_column, given_names)
    names = getattr(features[label_column], "names", None) or given_names
    names = names or [str(i) for i in range(max(largest.values()) + 1)]
    _check_several(name, names, label_column)
    for split, label in largest.items():
        if label >= len(names):
            raise ValueError(
                f"split {split!r} of {name} has the label {label}, and there are {len(names)} class names"
            )
    return _image_data(
        (rows[train_split], rows[eval_split]),
        (train_split, eval_split),
        fingerprints,
        image_column=image_column,
        label_column=label_column,
        names=names,
        name=name,
        revision=commit,
        config_name=config_name,
        split_sizes={split: part.total for split, part in rows.items()},
    )


def _check_several(name: str, names: list[str], label_column: str) -> None:
    if len(names) < 2:
        raise ValueError(f"{name} has only the class {names}: a classifier needs two (--label_column {label_column})")


def _warn_about_classes(name: str, names: list[str], without: dict[str, np.ndarray]) -> None:
    """Names classes that may be meant as one, and those that have no image for a use."""
    alike: dict[str, list[str]] = {}
    for class_name in names:
        alike.setdefault(name_key(class_name), []).append(class_name)
    if several := [group for group in alike.values() if len(group) > 1]:
        logger.warning(f"{name} has classes whose names differ only in case or spaces: {several[:5]}")
    for use, classes in without.items():
        if len(classes):
            shown = ", ".join(names[label] for label in classes[:10])
            hint = "; do its labels start at 1?" if list(classes) == [0] and names[0] == "0" else ""
            logger.warning(f"{name}: {len(classes)} of {len(names)} classes have no image to {use}: {shown}{hint}")


def _local_path(name: str) -> Path | None:
    """Where a dataset is on this machine; None for one on the Hub."""
    path = bundled(name) or Path(name).expanduser()
    if path.exists():
        return path
    if name.startswith((".", "/", "~")) or name.endswith(".parquet"):
        hint = "this reads as a local path; a dataset on the Hub is written owner/name"
        raise ValueError(f"dataset {name!r}: there is no {path.absolute()}; {hint}")
    return None


def _read(name: str, config_name: str | None, revision: str | None) -> tuple[dict[str, Dataset], str | None]:
    """All splits by name, and the commit on the Hub that they came from; None if from this machine."""
    path, commit = _local_path(name), None
    try:
        if path is None:
            revision = resolve(name, revision, "dataset")
            commit = revision.resolved
            found = datasets.load_dataset(name, config_name, revision=revision)
        elif path.is_file():
            found = datasets.load_dataset("parquet", data_files={"train": str(path)})
        else:
            found = _read_folder(path, config_name)
    except ConnectionError:  # an OSError, but the name may be right
        raise
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        where = path.absolute() if path else "the Hub (and there is no such path here)"
        cause = f": {error.__cause__}" if error.__cause__ else ""
        raise ValueError(f"dataset {name!r} cannot be read from {where}: {error}{cause}") from error
    return dict(found) if isinstance(found, dict) else {"train": found}, commit


def _read_folder(folder: Path, config_name: str | None) -> Any:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return datasets.load_from_disk(str(folder))
    files = [path for path in folder.rglob("*") if path.name != "metadata.parquet"]  # which belongs to image folders
    tables = [path for path in files if path.suffix == ".parquet"]
    empty = [path.name for path in tables if pq.read_metadata(path).num_rows == 0]
    if empty:
        raise ValueError(f"no rows in {', '.join(empty)}: an empty split; remove the file")
    if tables:
        data_files = datasets.load_dataset_builder(str(folder), config_name).config.data_files or {}
        used = [str(file) for files in data_files.values() for file in files if str(file).endswith(".parquet")]
        check_class_names({file: pq.read_schema(file) for file in used})
    if tables or not {path.suffix.lower() for path in files} & set(ImageFolder.EXTENSIONS):
        return datasets.load_dataset(str(folder), config_name)
    # Left to itself, load_dataset takes any folder with train, test or eval as a word in its name for a split (a class
    # "freight train", say) and leaves all others out, and it gives no labels at all where one split has none.
    subfolders = {path.name for path in folder.iterdir() if path.is_dir()}
    splits = [split for split in ("train", *EVAL_SPLITS) if split in subfolders]
    labelled = {path.parent.name for path in folder.glob("*/*") if path.is_dir() or path.name.startswith("metadata.")}
    data_files = {"train": "**"}
    if "train" in labelled:
        data_files = {split: f"{split}/**" for split in splits if split in labelled}
        for split in set(splits) - labelled:
            logger.warning(f"{folder / split} is left out: it has no folders of classes")
    elif splits and subfolders == set(splits):
        raise ValueError(f"{', '.join(splits)} should hold a folder for each class, or a metadata.csv, and do not")
    if not any(file.name.startswith("metadata.") for file in files):
        _check_folders(folder, files, len(data_files) > 1)
    return datasets.load_dataset("imagefolder", data_dir=str(folder), data_files=data_files)


def _check_folders(folder: Path, files: list[Path], has_splits: bool) -> None:
    """The class of an image is the last part of its folder's path: names folders that become one class by that.

    Raises ValueError for a single class, to whose images datasets gives no labels.
    """
    found: dict[tuple, set[str]] = {}
    for parent in {file.parent.relative_to(folder) for file in files if file.suffix.lower() in ImageFolder.EXTENSIONS}:
        found.setdefault((parent.parts[0] if has_splits else "", parent.name), set()).add(str(parent))
    names = {name for _, name in found}
    if len(names) == 1:
        raise ValueError(
            f"all images are in folders named {names.pop()!r}: a classifier needs one for each of its classes"
        )
    merged = [sorted(paths) for paths in found.values() if len(paths) > 1]
    if merged:
        logger.warning(f"{folder}: folders of the same name are one class: {', '.join(map(str, sorted(merged)[:5]))}")
