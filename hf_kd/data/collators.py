"""Collators: lists of items, as `decode_row` takes them, to batches.

A batch holds "pixels" uint8 (B, 3, h, w), float32 in [0, 1] after mixing, or "pixel_values" stacked as they are;
"labels" int64 (B,), or float32 (B, C); "index" int64 (B,), the sample keys, and "epoch", an int, where the items have
them; "teacher_pixels" where the teacher is shown others, as a permuted teacher is; and "skipped", a dict of a text
about each image that could not be decoded and its kind (see `UndecodableImage`), only if there are any, in evaluation
with "decoded", bool (B,).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from ..config import DistillationConfig
from ..metrics.classification import IGNORED_LABEL
from ..models.forward import num_classes_of
from ..models.preprocessing import Preprocessing
from .decode import UndecodableImage, decode_row
from .transforms import Mixer, forked_rng, sample_seed, seed_rngs

Stack = Callable[[list[Tensor]], Tensor]


@dataclass(eq=False)
class TrainingCollator:
    """A training batch, without the items that cannot be decoded.

    Args:
        size: side in pixels to which every image is brought, or height and width; None: images are stacked and must
            have one shape.
        mixer: applied last. Its draws are a function of `seed` (not negative), the epoch and the first key of the
            batch, or come from torch's global generator where items have no key.
        interpolation: of the resizing; the student's, so that what it is shown looks as in evaluation. None: bicubic.

    A call raises ValueError if nothing is left of a batch, an item has no label or image, or shapes differ without a
    size.
    """

    size: int | tuple[int, int] | None = None
    mixer: Mixer | None = None
    seed: int = 0
    interpolation: InterpolationMode | None = None

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        rows, skipped = _decode(items)
        batch = _batch([row for row in rows if "labels" in row], self._stack, skipped)
        if self.mixer is not None:
            if "teacher_pixels" in batch:
                raise ValueError("mixup and cutmix do not go with images of their own for the teacher.")
            key = "pixels" if "pixels" in batch else "pixel_values"
            with forked_rng() if "index" in batch else nullcontext():
                if "index" in batch:  # the 1: not the numbers that the transform of that image drew
                    seed_rngs(sample_seed(self.seed, batch["epoch"], int(batch["index"][0]), 1))
                labels = batch["labels"]
                unlabelled = labels.ndim == 1 and bool((labels == IGNORED_LABEL).all())
                batch[key], mixed = self.mixer(batch[key], torch.zeros_like(labels) if unlabelled else labels)
                batch["labels"] = labels if unlabelled else mixed
        return batch

    def _stack(self, images: list[Tensor]) -> Tensor:
        if self.size is not None:
            mode = self.interpolation or InterpolationMode.BICUBIC
            shape = [self.size] * 2 if isinstance(self.size, int) else [*self.size]
            if len({image.shape for image in images}) == 1:  # at once; the pixels are the same
                return resize(torch.stack(images), shape, mode, antialias=True)
            images = [resize(image, shape, mode, antialias=True) for image in images]
        return _stack(images, "train_image_size, or augment with 'resized_crop'")


@dataclass(eq=False)
class EvaluationCollator:
    """An evaluation batch, with a black image and label -100 for each that cannot be decoded: ranks must agree on B.

    `resize_and_crop` is a model's `Preprocessing.resize_and_crop`; None: images are stacked and must have one shape.
    `teacher_resize_and_crop` is the same for an additional "teacher_pixels". Errors as of `TrainingCollator`.
    """

    resize_and_crop: Stack | None = None
    teacher_resize_and_crop: Stack | None = None

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        rows, skipped = _decode(items)
        decoded = torch.tensor(["labels" in row for row in rows])
        filler = next((row for row in rows if "labels" in row), None)
        if filler is None and self.resize_and_crop is not None:
            filler = {"pixels": torch.zeros(3, 32, 32, dtype=torch.uint8), "labels": 0}
        if filler is not None:
            blank = {key: torch.zeros_like(value) for key, value in filler.items() if key.startswith("pixel")}
            blank["labels"] = torch.full_like(torch.as_tensor(filler["labels"]), IGNORED_LABEL)
            rows = [blank | row for row in rows]
        batch = _batch([row for row in rows if "labels" in row], self.resize_and_crop or _stack, skipped)
        if skipped:
            batch["decoded"] = decoded
        if self.teacher_resize_and_crop is not None and "pixels" in batch:
            batch["teacher_pixels"] = self.teacher_resize_and_crop([row["pixels"] for row in rows])
        return batch


def training_collator(
    args: DistillationConfig,
    student: nn.Module,
    size: int | tuple[int, int] | None,
    preprocessing: Preprocessing | None,
) -> TrainingCollator:
    """The collator that a trainer's arguments ask for: with mixup and cutmix, and resizing as the student's."""
    alphas = args.mixup_alpha, args.cutmix_alpha
    mixer = Mixer(num_classes_of(student), *alphas) if any(alphas) else None
    return TrainingCollator(size, mixer, args.data_seed or 0, preprocessing and preprocessing.interpolation)


def evaluation_collator(student: Preprocessing | None, teacher: Preprocessing | None) -> EvaluationCollator:
    """The collator of a student's preprocessing, and of a teacher's where that is another."""
    other = teacher if teacher != student else None
    return EvaluationCollator(*(each.resize_and_crop if each is not None else None for each in (student, other)))


def note_skipped(batch: dict[str, Any], skipped: dict[str, str], seen: int, max_fraction: float) -> None:
    """Moves the "skipped" of a batch into a dict; ValueError if that is more than `max_fraction` of `seen` images."""
    skipped.update(batch.pop("skipped", {}))
    if len(skipped) > max_fraction * seen:
        limit = f"more than max_skipped_fraction={max_fraction} allows"
        raise ValueError(
            f"{len(skipped)} of {seen} images could not be decoded ({count_kinds(skipped)}), {limit}: "
            f"{list(skipped)[:5]}."
        )


def kinds_of(skipped: dict[str, str]) -> dict[str, int]:
    """How many images of each kind could not be decoded, the most frequent first."""
    return dict(Counter(sorted(skipped.values())).most_common())


def count_kinds(skipped: dict[str, str]) -> str:
    """`kinds_of` as a text: "2 truncated, 1 empty"."""
    return ", ".join(f"{count} {kind}" for kind, count in kinds_of(skipped).items())


def _decode(items: Sequence[Any]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Decoded items, of those that cannot be decoded only the keys, and the reasons and kinds of these."""
    rows, skipped = [], {}
    for item in items:
        keys = ("index", "epoch", "teacher_pixels") if isinstance(item, dict) else ()
        row = {key: item[key] for key in keys if key in item}
        try:
            row |= decode_row(item)
        except UndecodableImage as error:
            skipped[str(error)] = error.kind
        rows.append(row)
    return rows, skipped


def _batch(rows: list[dict[str, Any]], stack: Stack, skipped: dict[str, str]) -> dict[str, Any]:
    if not rows:
        some = "; ".join(list(skipped)[:5])
        raise ValueError(
            f"no image of this batch of {len(skipped)} can be decoded ({count_kinds(skipped)}), nor one of those "
            f"after it: {some}"
        )
    labels = torch.stack([torch.as_tensor(row["labels"]) for row in rows])
    batch: dict[str, Any] = {"labels": labels.long() if labels.ndim == 1 else labels.float()}
    if "pixel_values" in rows[0]:
        batch["pixel_values"] = torch.stack([row["pixel_values"] for row in rows])
    else:
        for key in ("pixels", *(["teacher_pixels"] if "teacher_pixels" in rows[0] else [])):
            batch[key] = stack([row[key] for row in rows])
    if all("index" in row and "epoch" in row for row in rows):
        batch["index"] = torch.tensor([int(row["index"]) for row in rows])
        batch["epoch"] = int(rows[0]["epoch"])
    if skipped:
        batch["skipped"] = skipped
    return batch


def _stack(images: list[Tensor], hint: str = "processing_class") -> Tensor:
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ValueError(f"a batch has images of several shapes ({', '.join(map(str, sorted(shapes)))}): pass {hint}")
    return torch.stack(images)
