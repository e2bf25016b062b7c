"""From rows of a dataset to batches: the map-style dataset and the collator."""

import itertools
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..config import DistillationConfig
from ..labels import check_class_order
from .columns import class_names, find_columns
from .decode import UndecodableImage, decode_rgb
from .transforms import forked_rng, seed_rngs


class ImageDataset(Dataset):
    """Images and labels of a `datasets.Dataset`, decoded and augmented.

    An item is {"pixels": uint8 (3, H, W), "labels": int, "seed": int}, or {"skipped": "<path or index>: <reason>"} if
    the image cannot be decoded. What the transform draws (from torch's, random's and numpy's global generators)
    depends on seed, epoch and index alone, not on workers, order or what ran before; the caller's generators are left
    as they were.

    Args:
        dataset: with the two columns; a format or transform set on it is ignored.
        image_column: of images: Image, bytes, or paths.
        label_column: of integers in [0, C), given out as they are.
        transform: uint8 (3, H, W) to uint8 (3, h, w), as `build_transform` gives; None: the image as it is.
        seed: not negative.

    Attributes:
        replacement: True, for training: in a batch without one image that can be decoded, the next in the dataset that
            can be stands in, so that every process has a batch.
    """

    replacement = False

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_column: str,
        label_column: str,
        transform: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        find_columns(dataset, image_column, label_column)  # raises if one is missing
        dataset = dataset.with_format(None).select_columns([image_column, label_column])
        self.dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
        self.image_column, self.label_column = image_column, label_column
        self.transform, self.seed = transform, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers must see it change

    def set_epoch(self, epoch: int) -> None:
        """Makes the transform draw anew; takes effect in running workers too."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Several items at once, which torch's DataLoader asks for: one read and one fork for the whole batch."""
        items = self._read(indices)
        if self.replacement and all("skipped" in item for item in items):
            following = (self._read([(indices[-1] + i) % len(self)])[0] for i in range(1, len(self)))
            items += itertools.islice((item for item in following if "skipped" not in item), 1)
        return items

    def _read(self, indices: list[int]) -> list[dict[str, Any]]:
        rows = self.dataset[indices]
        with forked_rng():
            return [
                self._item(*row) for row in zip(indices, rows[self.image_column], rows[self.label_column], strict=True)
            ]

    def _item(self, index: int, source: dict[str, Any] | None, label: int) -> dict[str, Any]:
        try:
            pixels = decode_rgb(source)
        except UndecodableImage as error:
            return {"skipped": f"{(source or {}).get('path') or index}: {error}"}
        key = [self.seed, int(self._epoch), index % len(self)]
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        if self.transform is not None:
            seed_rngs(seed)
            pixels = self.transform(pixels)
        return {"pixels": pixels, "labels": label, "seed": seed}


def as_image_dataset(dataset, id2label: dict[int, str] | None, args: DistillationConfig):
    """Decode the rows of a `datasets.Dataset` with an image column; leave any other map-style dataset as it is.

    Args:
        dataset: a dataset, a dict of them, a name, or None.
        id2label: the student's class names; None: not known, and not checked.
        args: for `image_column`, `label_column` and `data_seed`.

    Raises:
        ValueError: it is empty or streamed, a column is not there, or its classes are not the student's.
    """
    if dataset is None or isinstance(dataset, str):
        return dataset
    if isinstance(dataset, dict):
        return {name: as_image_dataset(part, id2label, args) for name, part in dataset.items()}
    if isinstance(dataset, (torch.utils.data.IterableDataset, datasets.IterableDataset)):
        raise ValueError("streamed (iterable) datasets are not supported yet: load it without streaming=True.")
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError("the dataset is empty.")
    raw = isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom"
    if not raw or "pixel_values" in dataset.column_names or "pixels" in dataset.column_names:
        return dataset
    image, label = find_columns(dataset, args.image_column, args.label_column)
    feature = dataset.features[label]
    if getattr(feature, "dtype", "") == "string":
        raise ValueError(
            f"column {label!r} holds texts: dataset.class_encode_column({label!r}) makes classes of them."
        )
    if id2label and isinstance(feature, datasets.ClassLabel):
        check_class_order(class_names(dataset, label), id2label)
    return ImageDataset(dataset, image, label, seed=args.data_seed)
