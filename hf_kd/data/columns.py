"""Which columns of a dataset hold the images and the labels, and labels of any kind as classes."""

from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ..metrics.classification import IGNORED_LABEL

_INTEGERS = ("int", "uint")  # how the names of these types begin
_LABELS = ("labels", "label", "fine_label")  # of which the first that is there is taken
# For the messages about training without labels.
NO_LABELS = "train on labelled images, or with a loss that needs no labels (--loss kl_only, with a teacher)"
INDEX_COLUMN = "__index__"  # the sample key, which `load_data` adds: the row number in the split, in file order


def find_columns(features: Any, image_column: str | None = None, label_column: str | None = None) -> tuple[str, str]:
    """The names of the image and the label column, of `datasets.Features` or a dataset that has them.

    Without a name, `image_column` is the column of images ("image" or "img" if there are several), and `label_column`
    is "labels", "label" or "fine_label", else the only ClassLabel column. ValueError if there is none, or several.
    """
    features = getattr(features, "features", features) or {}
    # A struct with bytes is what parquet files written without datasets' metadata give.
    images = [
        name
        for name, feature in features.items()
        if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)
    ]
    usual = [name for name in ("image", "img") if name in images]
    return (
        _choose("image_column", image_column, usual[:1] or images, features),
        _choose("label_column", label_column, _label_columns(features), features),
    )


def _label_columns(features: dict[str, Any]) -> list[str]:
    """The usual one, or all that hold classes."""
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    return [name for name in _LABELS if name in features][:1] or classes


class _Unlabelled(torch.utils.data.Dataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.dataset[index]
        return {**(item if isinstance(item, dict) else {"image": item}), "labels": IGNORED_LABEL}


def add_missing_labels(dataset, label_column: str | None, by_column: bool):
    """The dataset with -100 for labels if it has none; with `by_column` it is a `datasets.Dataset` to be looked at by
    its columns, else by its first item, which may be an image alone."""
    if by_column:
        columns = [label_column] if label_column else _label_columns(dataset.features)
        if columns and columns[0] in dataset.features:
            return dataset
        return dataset.add_column(label_column or _LABELS[0], [IGNORED_LABEL] * len(dataset))
    item = dataset[0]
    is_pair = isinstance(item, tuple | list) and len(item) == 2
    has_label = isinstance(item, dict) and {label_column, "labels", "label", "skipped"} & item.keys()
    return dataset if is_pair or has_label else _Unlabelled(dataset)


def missing_labels(dataset: datasets.Dataset, label_column: str) -> int:
    """How many labels in a column are None or, of integers, below 0; all if there is no such column."""
    if label_column not in dataset.features:
        return len(dataset)
    values = dataset.select_columns(label_column).with_format("arrow")[:][label_column]
    if not getattr(dataset.features[label_column], "dtype", "").startswith(_INTEGERS):
        return values.null_count
    return pc.sum(pc.less(pc.fill_null(values, -1), 0)).as_py() or 0


def without_labels(
    dataset: datasets.Dataset, image_column: str, label_column: str, names: list[str]
) -> datasets.Dataset:
    """The dataset's images, all with the label -1, which stands for a missing one, of the classes `names`."""
    labels, feature = np.full(len(dataset), -1), datasets.ClassLabel(names=names)
    return dataset.select_columns(image_column).add_column(label_column, labels, feature=feature)


def _choose(option: str, name: str | None, candidates: list[str], features: dict[str, Any]) -> str:
    if name is not None:
        candidates = [name] if name in features else []
    if len(candidates) == 1:
        return candidates[0]
    columns = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in features.items()) or "none"
    found = f"several ({', '.join(candidates)})" if candidates else "none" + (f" named {name!r}" if name else "")
    hint = f"; for training without labels: {NO_LABELS}" if option == "label_column" and not candidates else ""
    raise ValueError(f"looking for the {option}, found {found}; the columns are: {columns}. Pass --{option}{hint}")


def class_names(dataset: datasets.Dataset, label_column: str) -> list[str]:
    """The names of the classes, in the order of their labels; ValueError if the column is no ClassLabel."""
    feature = dataset.features[label_column]
    if not isinstance(feature, datasets.ClassLabel):
        raise ValueError(f"column {label_column!r} is {feature}, which has no class names; load_data adds them")
    return list(feature.names)


def check_unnamed(feature: Any, label_column: str, names: list[str] | None) -> None:
    """ValueError for `names` of classes that have names already."""
    is_integer = getattr(feature, "dtype", "").startswith(_INTEGERS) and not getattr(feature, "names", None)
    if names is not None and not is_integer:
        kind = f"{feature!r:.200}"
        raise ValueError(
            f"class_names are for a column of integers, and column {label_column!r} is {kind}: leave them out"
        )


def encode_labels(
    splits: dict[str, datasets.Dataset], label_column: str, class_names: list[str] | None = None
) -> dict[str, datasets.Dataset]:
    """The splits with `label_column` a ClassLabel of the same names in all of them, every label of it checked.

    Texts become classes in sorted order; integers those of `class_names`, else the classes "0" to the largest.
    """
    feature = next(iter(splits.values())).features[label_column]
    if any(data.features[label_column] != feature for data in splits.values()):
        features = {split: data.features[label_column] for split, data in splits.items()}
        raise ValueError(f"the splits disagree about column {label_column!r}: {features}")
    # Through arrow: no image is read, and nothing is copied to the cache as `cast` would do with the whole dataset.
    tables = {split: data.select_columns(label_column).with_format("arrow")[:] for split, data in splits.items()}
    labels = {split: table[label_column] for split, table in tables.items()}
    dtype = getattr(feature, "dtype", "")
    check_unnamed(feature, label_column, class_names)
    names = getattr(feature, "names", None) or class_names  # of a ClassLabel
    if dtype in ("string", "large_string"):
        names = sorted(set().union(*(values.unique().to_pylist() for values in labels.values())) - {None})
        labels = {split: pc.index_in(values, pa.array(names, values.type)) for split, values in labels.items()}
    elif dtype == "bool":
        labels = {split: values.cast(pa.int64()) for split, values in labels.items()}
    elif not dtype.startswith(_INTEGERS):
        columns = ", ".join(next(iter(splits.values())).column_names)
        raise ValueError(
            f"column {label_column!r} is {feature}: no labels, which are integers, texts or a ClassLabel. Cast it, or "
            f"pass another --label_column, of: {columns}"
        )
    arrays = {split: values.fill_null(-1).to_numpy() for split, values in labels.items()}
    if names is None:
        names = [str(label) for label in range(max(int(array.max()) for array in arrays.values()) + 1)]
    for split, array in arrays.items():
        bad = array[(array < 0) | (array >= len(names))]
        if len(bad):
            raise ValueError(
                f"{len(bad)} of the {len(array)} labels in column {label_column!r} of split {split!r} are outside "
                f"0 … {len(names) - 1}: {np.unique(bad)[:5].tolist()} (a missing label counts as -1). Test sets are "
                "often published without labels: pass another --eval_split (or the training split, of which a part is "
                f"held out), or another --label_column. For training: {NO_LABELS}"
            )
    if isinstance(feature, datasets.ClassLabel):
        return splits
    classes = datasets.ClassLabel(names=names)
    return {
        split: data.remove_columns(label_column).add_column(label_column, arrays[split], feature=classes)
        for split, data in splits.items()
    }
