"""Collators: lists of items to batches."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from ..metrics.classification import IGNORED_LABEL
from .decode import UndecodableImage, decode_rgb
from .transforms import Mixer, forked_rng, seed_rngs

Frame = Callable[[list[Tensor]], Tensor]


class ImageCollator:
    """A list of items to a batch: {"pixels" or "pixel_values", "labels"[, "teacher_pixels"][, "skipped"]}.

    An item holds a label (int, or C floats) and either "pixel_values" (float, normalised: stacked as they are) or a
    image under "pixels", "image" or "img" (anything `decode_rgb` takes). The batch holds "pixels" uint8
    (B, 3, h, w), float32 in [0, 1] after mixing, and "labels" int64 (B,), or float32 (B, C).

    Args:
        frame: list of uint8 (3, H, W) to uint8 (B, 3, h, w), a model's evaluation resize and crop, for "pixels". None:
            images of one shape are stacked, others are resized to (size, size), bicubic.
        teacher_frame: the same for an additional "teacher_pixels".
        size: pixels; needed for images of several shapes if there is no frame.
        mixer: applied last, with randomness from the first "seed" among the items if there is one.
        label_column: a key to look for before "labels" and "label".
        keep_skipped: items that cannot be decoded are dropped, and listed as texts under "skipped", a list that is
            there only if one was. True (for evaluation, where ranks must agree on B) puts a black image with label
            -100 in their place, and still lists them.

    Raises:
        ValueError: a mixer with teacher_frame or keep_skipped; on a call: nothing left of a batch, no label or image
            key, or images of several shapes without frame and size.
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
        self.resize_and_crop, self.teacher_frame, self.size, self.mixer = frame, teacher_frame, size, mixer
        self.label_column, self.keep_skipped = label_column, keep_skipped

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        pairs, skipped = [], []
        for item in items:
            try:
                pairs.append((_image(item), self._label(item)))
            except UndecodableImage as error:
                skipped.append(str(error))
                pairs += [None] * self.keep_skipped
        images, labels = zip(*self._fill(pairs, skipped), strict=True)

        labels = torch.stack(labels)
        labels = labels.long() if labels.ndim == 1 else labels.float()
        if images[0].is_floating_point():
            key, pixels = "pixel_values", torch.stack(images)
        else:
            key, pixels = "pixels", self._stack(images)
        if self.mixer is not None:
            seed = next((item["seed"] for item in items if "seed" in item), None)
            with nullcontext() if seed is None else forked_rng():
                if seed is not None:  # + 1: not the numbers that the transform of that image drew
                    seed_rngs((seed + 1) % 2**32)
                pixels, labels = self.mixer(pixels, labels)
        batch = {key: pixels, "labels": labels}
        if self.teacher_frame is not None and key == "pixels":
            batch["teacher_pixels"] = self.teacher_frame(list(images))
        return batch | ({"skipped": skipped} if skipped else {})

    def _fill(self, pairs: list[tuple[Tensor, Tensor] | None], skipped: list[str]) -> list[tuple[Tensor, Tensor]]:
        """The pairs with a black image for each None, of the shapes of the first that is none."""
        filler = next((pair for pair in pairs if pair is not None), None)
        if filler is None:
            side = self.size or (32 if self.resize_and_crop is not None else None)
            if not pairs or side is None:
                raise ValueError(f"no image of this batch of {len(skipped)} can be decoded: {'; '.join(skipped)}")
            filler = torch.zeros(3, side, side, dtype=torch.uint8), torch.tensor(0)
        filler = torch.zeros_like(filler[0]), torch.full_like(filler[1], IGNORED_LABEL)
        return [pair or filler for pair in pairs]

    def _label(self, item: dict[str, Any]) -> Tensor:
        for key in (self.label_column, "labels", "label"):
            if key in item:
                return torch.as_tensor(item[key])
        raise ValueError(f"an item has no label: its keys are {', '.join(item)}; pass label_column")

    def _stack(self, images: Sequence[Tensor]) -> Tensor:
        if self.resize_and_crop is not None:
            return self.resize_and_crop(list(images))
        shapes = {tuple(image.shape) for image in images}
        if len(shapes) > 1:
            if self.size is None:
                raise ValueError(
                    f"a batch has images of several shapes ({', '.join(map(str, sorted(shapes)))}): pass size or "
                    "frame, or augment with 'resized_crop'"
                )
            bicubic = InterpolationMode.BICUBIC
            images = [resize(image, [self.size, self.size], bicubic, antialias=True) for image in images]
        return torch.stack(list(images))


def _image(item: dict[str, Any]) -> Tensor:
    if "skipped" in item:
        raise UndecodableImage(item["skipped"])
    if "pixel_values" in item:
        return torch.as_tensor(item["pixel_values"])
    for key in ("pixels", "image", "img"):
        if key in item:
            return decode_rgb(item[key])
    raise ValueError(f"an item has no image under pixel_values, pixels, image or img: its keys are {', '.join(item)}")
