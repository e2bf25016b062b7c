"""Map-style datasets of decoded and augmented images, and the reading of one row, which they share with streams."""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from transformers.utils import logging

from ..config import MAX_IMAGE_PIXELS, DistillationConfig
from ..labels import check_class_order
from ..losses import DistillationLoss
from ..metrics.classification import IGNORED_LABEL
from .cache import DecodedImages, decoded_images
from .columns import INDEX_COLUMN, NO_LABELS, add_missing_labels, find_columns, missing_labels
from .decode import UndecodableImage, decode_row
from .order import Upcoming, epoch_order, groups_of
from .streaming import StreamedRows
from .transforms import CropAndFlip, augment_image, build_transform, forked_rng, sample_draws, sample_seed, seed_rngs

logger = logging.get_logger(__name__)


def read_item(
    row: Any,
    key: int,
    epoch: int,
    transform: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> dict[str, Any]:
    """One item from one row, decoded and, if it is an image, augmented; within `forked_rng` if there is a transform.

    Args:
        row, image_column, label_column, max_pixels: see `decode_row`.
        key: of the sample: its row number in the split in file order, before hold-out, subset and shuffling.
        transform: uint8 (3, H, W) to uint8 (3, h, w). What it draws depends on seed, epoch and key alone.

    Returns:
        What `decode_row` gives with "index" (the key) and "epoch"; for an image that cannot be decoded these two,
        "skipped", "<path or key>: <reason>", and "kind", see `UndecodableImage`.
    """
    keys: dict[str, Any] = {"index": key, "epoch": epoch}
    if isinstance(row, dict) and "skipped" in row:
        return row | keys
    try:
        item = decode_row(row, image_column, label_column, max_pixels)
    except UndecodableImage as error:
        source = row.get(image_column) if isinstance(row, dict) else None
        path = source.get("path") if isinstance(source, dict) else None
        return keys | {"skipped": f"{path or key}: {error}", "kind": error.kind}
    if transform is not None and "pixels" in item:
        item["pixels"] = augment_image(item["pixels"], transform, seed, epoch, key)
    return item | keys


class ImageDataset(Dataset):
    """Images and labels of a map-style dataset, decoded and augmented: the items are what `read_item` gives.

    What the transform or the dataset itself draws from the global generators of torch, random and numpy depends on
    seed, epoch and sample key alone; the caller's generators are left as they were. The key is the row number that
    `load_data` has noted, else the position in `dataset`.

    Args:
        dataset: a `datasets.Dataset` with an image column, read undecoded whatever its format is; or any other dataset
            (a Subset, torchvision's, your own, one `with_transform`) whose items are what `decode_row` takes.
        image_column, label_column, transform, max_pixels: see `find_columns` and `read_item`.
        seed: not negative.

    `labelled` is False where `as_image_dataset` has put -100 in the place of missing labels.

    `groups` are the row groups of a stream, in whose order it is read (see `hf_kd.data.order`); set on another
    dataset, they make it be read in the same order.

    `order_seed` is that of the order in which a stream is read, None for the order of its rows.

    Images of one size of a `datasets.Dataset` are decoded once and kept, if all rows of that size fit in 1.5 GB and
    the transform is none or a `CropAndFlip`, which is then applied to whole batches. Items are the same bit by bit.

    A label that is None is -100; in training without labels (`for_training`) every label is.

    With `replacement` (for training), a batch without one image that can be decoded gets the next in the dataset that
    can be, if one of the next 1,000 can, so that every process has a batch.

    With `partners`, a permutation of the rows (see `with_partners`), items for training have "teacher_pixels": the
    item of the row's partner, or, if that cannot be decoded, of the next in its cycle that can be.
    """

    partners: np.ndarray | None = None
    replacement = False
    labelled = True
    _ignore_labels = False
    order_seed: int | None = None
    reader_ends: Any = (np.iinfo(int).max,)  # see `Upcoming`; those of its sampler
    _upcoming: tuple[int, Upcoming] | None = None  # of an epoch

    def __init__(
        self,
        dataset,
        image_column: str | None = None,
        label_column: str | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
        max_pixels: int = MAX_IMAGE_PIXELS,
    ) -> None:
        self._undecoded, self._keys, source = _has_image_rows(dataset), None, dataset
        if isinstance(dataset, datasets.Dataset) and INDEX_COLUMN in dataset.column_names:
            self._keys = dataset.select_columns(INDEX_COLUMN).with_format("numpy")[:][INDEX_COLUMN]
        if self._undecoded:
            image_column, label_column = find_columns(dataset, image_column, label_column)
            if isinstance(dataset, datasets.Dataset):
                dataset = dataset.with_format(None).select_columns([image_column, label_column])
                dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
        self.dataset, self.image_column, self.label_column = dataset, image_column, label_column
        self.transform, self.seed, self.max_pixels = transform, seed, max_pixels
        self.groups = groups_of(dataset)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers must see it change
        self._decoded: DecodedImages | None = None
        if self._undecoded and isinstance(dataset, datasets.Dataset):
            self._decoded = decoded_images(source, cast(str, image_column), max_pixels, self._first_image)
        if self._decoded is not None:  # as a row gives them
            self._labels = dataset.select_columns(label_column).with_format("arrow")[:][label_column].combine_chunks()

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that augmentation depends on; takes effect in running workers too."""
        self._epoch.fill_(epoch)
        if hasattr(self._source, "set_epoch"):
            self._source.set_epoch(epoch)

    def for_training(
        self,
        augment: str | None,
        size: int | tuple[int, int] | None,
        order_seed: int | None = 0,
        with_labels: bool = True,
    ) -> "ImageDataset":
        """A copy with `replacement`, the same epoch and, if `augment` is not None, what `build_transform` gives."""
        dataset = copy.copy(self)
        dataset.replacement, dataset.order_seed, dataset._upcoming = True, order_seed, None
        dataset._ignore_labels = not with_labels
        if augment is not None:
            dataset.transform = build_transform(augment, size)
        return dataset

    def with_partners(self, seed: int) -> "ImageDataset":
        """A copy whose `partners` have the same label: a random cycle of all rows of each, a function of `seed`, not
        negative, alone. The only row of a label is its own partner, with a warning. ValueError for other datasets than
        a `datasets.Dataset` of images with integers as labels, and for missing labels."""
        column = None
        if self._undecoded and isinstance(self.dataset, datasets.Dataset):
            column = self.dataset.select_columns(self.label_column).with_format("arrow")[:][self.label_column]
        if column is None or not pa.types.is_integer(column.type):
            raise ValueError("partners of the same label need a datasets.Dataset of images with integers as labels.")
        if missing := missing_labels(self.dataset, cast(str, self.label_column)):
            raise ValueError(f"partners of the same label need labels, and {missing} of {len(self)} images have none.")
        labels, dataset = column.to_numpy(), copy.copy(self)
        dataset.partners = same_label_partners(labels, seed)
        classes, counts = np.unique(labels, return_counts=True)
        if alone := classes[counts == 1].tolist():
            names = getattr(self.dataset.features[self.label_column], "names", None)
            named = ", ".join(names[label] if names else str(label) for label in alone[:5])
            logger.warning_once(
                f"permuted teacher: {len(alone)} of {len(classes)} classes have a single training image, with which "
                f"nothing is exchanged: {named}{', …' * (len(alone) > 5)}."
            )
        return dataset

    @property
    def _source(self):
        """The dataset below any subsets."""
        source = self.dataset
        while isinstance(source, Subset):
            source = source.dataset
        return source

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Several items at once, which torch's DataLoader asks for: one read and one fork for the whole batch."""
        items = self._read(indices)
        if self.replacement and all("skipped" in item for item in items):
            tries = range(1, min(len(self), 1000))
            following = (self._read([(indices[-1] + i) % len(self)])[0] for i in tries)
            items += itertools.islice((item for item in following if "skipped" not in item), 1)
        for item in items:
            if "labels" in item and (self._ignore_labels or item["labels"] is None):
                item["labels"] = IGNORED_LABEL
        return items

    def _following(self, index: int) -> list[int]:
        """The row groups that are read after a row, as far as they are read ahead."""
        if self._upcoming is None or self._upcoming[0] != int(self._epoch):
            assert self.groups is not None
            order = epoch_order(self.groups, self.order_seed, int(self._epoch))
            self._upcoming = int(self._epoch), Upcoming(self.groups, order, self.reader_ends)
        return self._upcoming[1].after(index)

    def _first_image(self) -> Tensor | None:
        items = (self._read_each([row], None)[0] for row in range(min(len(self), 10)))
        return next((item["pixels"] for item in items if "pixels" in item), None)

    def _read(self, indices: list[int]) -> list[dict[str, Any]]:
        """The items of these rows, for training with the pixels of their partners."""
        items = self._read_rows(indices)
        if self.partners is None or not self.replacement:
            return items
        found: dict[int, Tensor] = {}  # by the place in the batch
        left = {place: index for place, index in enumerate(indices) if "pixels" in items[place]}
        while left:
            left = {place: int(self.partners[index]) for place, index in left.items()}
            for place, partner in zip([*left], self._read_rows([*left.values()]), strict=True):
                if "pixels" in partner:  # of the row itself, at last
                    found[place] = partner["pixels"]
                    del left[place]
        return [item | {"teacher_pixels": found[i]} if i in found else item for i, item in enumerate(items)]

    def _read_rows(self, indices: list[int]) -> list[dict[str, Any]]:
        """The items of these rows: those of decoded images at once, any other by itself."""
        by_batch = self.transform is None or isinstance(self.transform, CropAndFlip)
        if self._decoded is None or not by_batch or not all(0 <= row < len(self) for row in indices):
            return self._read_each(indices, self.transform)
        new, others = [row for row in indices if not self._decoded.known[row]], dict[int, dict[str, Any]]()
        for row, item in zip(new, self._read_each(new, None), strict=True):
            if not self._decoded.add(row, item.get("pixels")):  # broken, or of another shape
                others[row] = item
                if self.transform is not None and "pixels" in item:
                    pixels = augment_image(item["pixels"], self.transform, self.seed, item["epoch"], item["index"])
                    others[row] = item | {"pixels": pixels}
        batch = iter(self._read_batch([row for row in indices if row not in others]))
        return [others[row] if row in others else next(batch) for row in indices]

    def _read_batch(self, rows: list[int]) -> list[dict[str, Any]]:
        """The items of rows whose images are decoded."""
        assert self._decoded is not None
        keys = np.asarray(rows) if self._keys is None else self._keys[rows]
        pixels, epoch = self._decoded.pixels[rows], int(self._epoch)
        if isinstance(self.transform, CropAndFlip):
            pixels = self.transform.batch(pixels, sample_draws(self.seed, epoch, keys))
        labels = self._labels.take(pa.array(rows, pa.int64())).to_pylist()
        return [
            {"pixels": image, "labels": label, "index": key, "epoch": epoch}
            for image, label, key in zip(torch.from_numpy(pixels).unbind(), labels, keys.tolist(), strict=True)
        ]

    def _read_each(self, indices: list[int], transform: Callable[[Tensor], Tensor] | None) -> list[dict[str, Any]]:
        if not indices:
            return []
        options = (int(self._epoch), transform, self.seed, self.image_column, self.label_column, self.max_pixels)
        with forked_rng():
            items = [read_item(row, key, *options) for key, row in self._rows(indices)]
        for item in items if isinstance(self.dataset, StreamedRows) else ():
            if "skipped" in item:
                item["skipped"] = f"{self.dataset.place(item['index'])}: {item['skipped']}"
        return items

    def _rows(self, indices: list[int]) -> Iterator[tuple[int, Any]]:
        keys = [index % len(self) if self._keys is None else int(self._keys[index]) for index in indices]
        if self._undecoded:
            ahead = isinstance(self.dataset, StreamedRows) and len(indices) > 1  # as a loader asks
            following = [self._following(indices[-1])] if ahead else []
            yield from zip(keys, self.dataset.__getitems__(indices, *following), strict=True)
            return
        for index, key in zip(indices, keys, strict=True):
            seed_rngs(sample_seed(self.seed, int(self._epoch), key, 2))  # 2: not the numbers of our own transform
            row = self.dataset[index]
            if isinstance(row, dict):  # of a Subset, say, whose rows have a key already
                key = int(row.get("index" if isinstance(self._source, ImageDataset) else INDEX_COLUMN, key))
            yield key, row


def same_label_partners(labels: np.ndarray, seed: int) -> np.ndarray:
    """A permutation of the rows, int64 (N,), that maps each of integer `labels` (N,) to another row of its label: a
    random cycle of all of its rows."""
    order = np.random.default_rng((seed, 2)).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    ordered = labels[order]
    first = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))  # of each label
    following = np.roll(order, -1)
    following[np.append(first[1:], len(order)) - 1] = order[first]
    partners = np.empty_like(order)
    partners[order] = following
    return partners


def _has_image_rows(dataset) -> bool:
    if isinstance(dataset, StreamedRows):
        return True
    if not isinstance(dataset, datasets.Dataset) or dataset.format["type"] == "custom":
        return False
    return not {"pixel_values", "pixels"} & set(dataset.column_names)


def as_image_dataset(
    dataset, id2label: dict[int, str] | None, args: DistillationConfig, wrap: bool = True, labelled: bool = True
):
    """The `ImageDataset` of a map-style dataset, or of each in a dict; a name or None stays as it is.

    Args:
        id2label: the student's class names, with which those of the data must agree; None: not known.
        args: for `image_column`, `label_column` and `data_seed`.
        wrap: False, for a data_collator of the user's own: only a `datasets.Dataset` with an image column is decoded.
        labelled: False: labels may be missing, and items may be images alone.

    Raises:
        ValueError: it is empty or iterable only, a column is not there, or its classes are not the student's.
    """
    if dataset is None or isinstance(dataset, str | ImageDataset):
        return dataset
    if isinstance(dataset, dict):
        return {name: as_image_dataset(part, id2label, args, wrap, labelled) for name, part in dataset.items()}
    if isinstance(dataset, (torch.utils.data.IterableDataset, datasets.IterableDataset)):
        raise ValueError(
            "iterable datasets are not supported: pass load_data(NAME, streaming=True).train, whose rows are numbered."
        )
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError("the dataset is empty.")
    if not wrap and not _has_image_rows(dataset):
        return dataset
    source, columns, seed = dataset, (args.image_column, args.label_column), args.data_seed or 0
    if not labelled:
        dataset = add_missing_labels(dataset, args.label_column, _has_image_rows(dataset))
    images = ImageDataset(dataset, *columns, seed=seed, max_pixels=args.max_image_pixels)
    images.labelled = dataset is source
    if images._undecoded:
        feature = dataset.features[images.label_column]
        if getattr(feature, "dtype", "") == "string":
            hint = f"dataset.class_encode_column({images.label_column!r}) makes classes of them"
            raise ValueError(f"column {images.label_column!r} holds texts: {hint}.")
        if id2label and isinstance(feature, datasets.ClassLabel):
            check_class_order(feature.names, id2label)
    return images


def check_labels(dataset, loss: DistillationLoss) -> None:
    """ValueError for a dataset to train on of which a column of integers, or else the first item, lacks labels."""
    if not isinstance(dataset, ImageDataset) or isinstance(dataset.dataset, StreamedRows):
        return  # of a stream, `load_data` has looked at the labels
    if dataset._undecoded:
        missing = missing_labels(dataset.dataset, cast(str, dataset.label_column))
        where = f"{missing} of the {len(dataset)} labels in column {dataset.label_column!r}"
    else:
        label = dataset[0].get("labels", 0)
        missing = int(not isinstance(label, str) and bool(torch.as_tensor(label).amax() < 0))
        where = "the label of the first image"
    if missing:
        hint = NO_LABELS
        if loss.distillation_alpha is not None and not loss.method_needs_labels:  # its own words would name it
            hint = "the class head learns from them; train on labelled images, or with distillation_alpha=1"
        raise ValueError(f"loss={loss.name!r} learns from labels, and {where} is missing (below 0, or None): {hint}.")


def augmentation_of(dataset, args: DistillationConfig) -> str | None:
    """`args.augment` if it applies to a training dataset; else None, or a ValueError if it was asked for."""
    if not isinstance(dataset, ImageDataset):
        reason = "your data_collator receives its items unchanged"
    elif dataset.transform or (isinstance(dataset._source, ImageDataset) and dataset._source.transform):
        reason = "it has a transform of its own"
    elif not dataset._undecoded and "pixel_values" in dataset[0]:
        reason = "its pixel_values are normalised already; give images, under the key image"
    else:
        return args.augment
    if args.augment_given and args.augment != "none":
        raise ValueError(f"augment={args.augment!r} cannot be applied here: {reason}; or pass augment='none'.")
    return None
