"""From rows of a data set to batches: the map-style data set and the collator."""

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from .columns import find_columns
from .decode import UndecodableImage, decode_rgb
from .transforms import Mixer, forked_rng, seed_rngs

Frame = Callable[[list[Tensor]], Tensor]
IGNORED_LABEL = -100


class PictureDataset(Dataset):
    """Pictures and labels of a `datasets.Dataset`, decoded and augmented.

    An item is {"pixels": uint8 (3, H, W), "labels": int, "seed": int}, or {"skipped": "<path or index>: <reason>"} if
    the picture cannot be decoded. What the transform draws (from torch's, random's and numpy's global generators)
    depends on seed, epoch and index alone, not on workers, order or what ran before; the caller's generators are left
    as they were.

    Args:
        dataset: with the two columns; a format or transform set on it is ignored.
        image_column: of pictures: Image, bytes, or paths.
        label_column: of integers in [0, C), given out as they are.
        transform: uint8 (3, H, W) to uint8 (3, h, w), as `build_transform` gives; None: the picture as it is.
        seed: not negative.

    Attributes:
        stand_in: True, for training: in a batch without one picture that can be decoded, the next in the data set that
            can be stands in, so that every process has a batch.
    """

    stand_in = False

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
        if self.stand_in and all("skipped" in item for item in items):
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


class PictureCollator:
    """A list of items to a batch: {"pixels" or "pixel_values", "labels"[, "teacher_pixels"][, "skipped"]}.

    An item holds a label (int, or C floats) and either "pixel_values" (float, normalised: stacked as they are) or a
    picture under "pixels", "image" or "img" (anything `decode_rgb` takes). The batch holds "pixels" uint8
    (B, 3, h, w), float32 in [0, 1] after mixing, and "labels" int64 (B,), or float32 (B, C).

    Args:
        frame: list of uint8 (3, H, W) to uint8 (B, 3, h, w), a model's evaluation resize and crop, for "pixels". None:
            pictures of one shape are stacked, others are resized to (size, size), bicubic.
        teacher_frame: the same for an additional "teacher_pixels".
        size: pixels; needed for pictures of several shapes if there is no frame.
        mixer: applied last, with randomness from the first "seed" among the items if there is one.
        label_column: a key to look for before "labels" and "label".
        keep_skipped: items that cannot be decoded are dropped, and listed as texts under "skipped", a list that is
            there only if one was. True (for evaluation, where ranks must agree on B) puts a black picture with label
            -100 in their place, and still lists them.

    Raises:
        ValueError: a mixer with teacher_frame or keep_skipped; on a call: nothing left of a batch, no label or picture
            key, or pictures of several shapes without frame and size.
    """

    def __init__(
        self,
        frame: Frame | None = None,
        teacher_frame: Frame | None = None,
        size: int | None = None,
        mixer: Mixer | None = None,
        label_column: str | None = None,
        keep_skipped: bool = False,
    ) -> None:
        if mixer is not None and (teacher_frame is not None or keep_skipped):
            raise ValueError("a mixer is for training: it would not reach teacher_pixels, nor can it mix label -100")
        self.frame, self.teacher_frame, self.size, self.mixer = frame, teacher_frame, size, mixer
        self.label_column, self.keep_skipped = label_column, keep_skipped

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        pairs, skipped = [], []
        for item in items:
            try:
                pairs.append((_picture(item), self._label(item)))
            except UndecodableImage as error:
                skipped.append(str(error))
                pairs += [None] * self.keep_skipped
        pictures, labels = zip(*self._fill(pairs, skipped), strict=True)

        labels = torch.stack(labels)
        labels = labels.long() if labels.ndim == 1 else labels.float()
        if pictures[0].is_floating_point():
            key, pixels = "pixel_values", torch.stack(pictures)
        else:
            key, pixels = "pixels", self._stack(pictures)
        if self.mixer is not None:
            seed = next((item["seed"] for item in items if "seed" in item), None)
            with nullcontext() if seed is None else forked_rng():
                if seed is not None:  # + 1: not the numbers that the transform of that picture drew
                    seed_rngs((seed + 1) % 2**32)
                pixels, labels = self.mixer(pixels, labels)
        batch = {key: pixels, "labels": labels}
        if self.teacher_frame is not None and key == "pixels":
            batch["teacher_pixels"] = self.teacher_frame(list(pictures))
        return batch | ({"skipped": skipped} if skipped else {})

    def _fill(self, pairs: list[tuple[Tensor, Tensor] | None], skipped: list[str]) -> list[tuple[Tensor, Tensor]]:
        """The pairs with a black picture for each None, of the shapes of the first that is none."""
        filler = next((pair for pair in pairs if pair is not None), None)
        if filler is None:
            side = self.size or (32 if self.frame is not None else None)
            if not pairs or side is None:
                raise ValueError(f"no picture of this batch of {len(skipped)} can be decoded: {'; '.join(skipped)}")
            filler = torch.zeros(3, side, side, dtype=torch.uint8), torch.tensor(0)
        filler = torch.zeros_like(filler[0]), torch.full_like(filler[1], IGNORED_LABEL)
        return [pair or filler for pair in pairs]

    def _label(self, item: dict[str, Any]) -> Tensor:
        for key in (self.label_column, "labels", "label"):
            if key in item:
                return torch.as_tensor(item[key])
        raise ValueError(f"an item has no label: its keys are {', '.join(item)}; pass label_column")

    def _stack(self, pictures: Sequence[Tensor]) -> Tensor:
        if self.frame is not None:
            return self.frame(list(pictures))
        shapes = {tuple(picture.shape) for picture in pictures}
        if len(shapes) > 1:
            if self.size is None:
                raise ValueError(
                    f"a batch has pictures of several shapes ({', '.join(map(str, sorted(shapes)))}): pass size or "
                    "frame, or augment with 'resized_crop'"
                )
            bicubic = InterpolationMode.BICUBIC
            pictures = [resize(picture, [self.size, self.size], bicubic, antialias=True) for picture in pictures]
        return torch.stack(list(pictures))


def _picture(item: dict[str, Any]) -> Tensor:
    if "skipped" in item:
        raise UndecodableImage(item["skipped"])
    if "pixel_values" in item:
        return torch.as_tensor(item["pixel_values"])
    for key in ("pixels", "image", "img"):
        if key in item:
            return decode_rgb(item[key])
    raise ValueError(
        f"an item has no picture under pixel_values, pixels, image or img: its keys are {', '.join(item)}"
    )
