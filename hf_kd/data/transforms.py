"""Augmentation of one image (uint8 to uint8), mixing of a batch, and randomness that can be repeated."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..config import AUGMENTS


def build_transform(augment: str, size: int | tuple[int, int] | None = None) -> Callable[[Tensor], Tensor]:
    """The augmentation of one training image, uint8 (3, H, W) to uint8 (3, h, w).

    Args:
        augment: one of `AUGMENTS`:
            "none": the image as it is;
            "flip": a horizontal flip, half of the time;
            "pad_crop": the flip, and a crop of the image's own size out of the image padded with black by an eighth
            (the CIFAR standard);
            "resized_crop": the flip, and a random part of the image (8 to 100 % of its area, of 3/4 to 4/3 the
            proportions of `size`), resized to `size`, bicubic (the ImageNet standard);
            "deit": that, RandAugment (timm's rand-m9-mstd0.5-inc1, bicubic), and random erasing with noise (p .25).
        size: side h = w of the result in pixels, or h and w, which "resized_crop" and "deit" need; the others keep
            the image's.

    Raises:
        ValueError: an unknown augment, or no size where one is needed.
    """
    if augment not in AUGMENTS:
        raise ValueError(f"unknown augment {augment!r}: choose one of {', '.join(AUGMENTS)}")
    if augment in ("none", "flip", "pad_crop"):
        return CropAndFlip(crop=augment == "pad_crop", flip=augment != "none")
    if not size:
        hint = "pass train_image_size, or processing_class; for images of one small size take 'pad_crop'"
        raise ValueError(f"augment {augment!r} needs a size in pixels: {hint}")
    height, width = (size, size) if isinstance(size, int) else size
    crop = ResizedCrop(height, width)
    if augment == "resized_crop":
        return crop
    from timm.data.auto_augment import rand_augment_transform  # slow to import

    settings = {  # as in timm's own ImageNet training transform
        "translate_const": int(min(height, width) * 0.45),
        "img_mean": tuple(round(255 * m) for m in IMAGENET_DEFAULT_MEAN),
        "interpolation": Image.Resampling.BICUBIC,  # by default a random filter
    }
    rand_augment = rand_augment_transform("rand-m9-mstd0.5-inc1", settings)
    for op in rand_augment.ops:
        if op.name.startswith("Posterize"):
            op.aug_fn = _posterize
    return v2.Compose([crop, v2.ToPILImage(), rand_augment, v2.PILToTensor(), NoiseErasing(p=0.25)])


def _posterize(image, bits: int, **kwargs):
    from timm.data.auto_augment import posterize

    # The strongest level keeps 0 bits, which Pillow made black up to version 12 and refuses since.
    return posterize(image, bits, **kwargs) if bits > 0 else image.point(lambda value: 0)


def augment_image(pixels: Tensor, transform: Callable[[Tensor], Tensor], seed: int, epoch: int, key: int) -> Tensor:
    """The augmentation of one image, a function of seed, epoch and sample key alone; call it within `forked_rng`."""
    if isinstance(transform, CropAndFlip):
        return torch.from_numpy(transform.batch(pixels.numpy()[None], sample_draws(seed, epoch, [key]))[0])
    seed_rngs(sample_seed(seed, epoch, key))
    return transform(pixels)


class CropAndFlip(nn.Module):
    """Images of one shape, whole batches at once: a crop of an image's own size after padding each side with black by
    an eighth of it, and a horizontal flip half of the time.

    Called with one image, uint8 (3, H, W), it draws from torch's global generator.
    """

    def __init__(self, crop: bool, flip: bool) -> None:
        super().__init__()
        self.crop, self.flip = crop, flip

    def forward(self, image: Tensor) -> Tensor:
        draws = torch.randint(2**32, (1, 3)).numpy().astype(np.uint64)
        return torch.from_numpy(self.batch(image.numpy()[None], draws)[0])

    def batch(self, images: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Images, uint8 (B, 3, H, W), by `draws`, uint64 (B, 3) below 2³²: of offsets from top and left, and flip."""
        if self.crop:
            count, channels, height, width = images.shape
            pads = height // 8, width // 8
            padded = np.zeros((count, channels, height + 2 * pads[0], width + 2 * pads[1]), images.dtype)
            padded[:, :, pads[0] : pads[0] + height, pads[1] : pads[1] + width] = images
            # To whole numbers up to 2 pad, all equally likely (to one in 10⁷).
            top, left = (draws[:, i] * np.uint64(2 * pad + 1) >> np.uint64(32) for i, pad in enumerate(pads))
            crops = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
            images = crops[np.arange(count), :, top.astype(np.int64), left.astype(np.int64)]
        if self.flip:
            flipped = draws[:, 2] < 2**31
            images = np.where(flipped[:, None, None, None], images[..., ::-1], images)
        return images


class ResizedCrop(nn.Module):
    """A random part of the image, resized to height × width, bicubic, and flipped half of the time.

    The part has 8 to 100 % of the image's area and 3/4 to 4/3 the proportions of the result: the distribution of
    torchvision's RandomResizedCrop, drawn from `random`, which costs less than tensors of one number.
    """

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.size = [height, width]
        self.ratio = (3 / 4 * (width / height), 4 / 3 * (width / height))  # of a square exactly the usual one

    def forward(self, image: Tensor) -> Tensor:
        top, left, height, width = self.draw(*image.shape[-2:])
        rows = image.permute(1, 2, 0)[top : top + height, left : left + width]
        part = rows[None].permute(0, 3, 1, 2)  # strides that torch takes for channels_last, and then does not repack
        part = nn.functional.interpolate(part, self.size, mode="bicubic", antialias=True)[0]
        return part.flip(-1) if random.random() < 0.5 else part

    def draw(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of a part of an image; its middle if ten draws do not fit."""
        least, most = self.ratio
        for _ in range(10):
            area = height * width * random.uniform(0.08, 1)
            ratio = math.exp(random.uniform(math.log(least), math.log(most)))
            h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < h <= height and 0 < w <= width:
                return random.randint(0, height - h), random.randint(0, width - w), h, w
        h, w = min(height, max(1, round(width / least))), min(width, max(1, round(height * most)))
        return (height - h) // 2, (width - w) // 2, h, w


class NoiseErasing(v2.RandomErasing):
    """Random erasing of a uint8 image with noise that is standard normal after ImageNet normalisation, as DeiT's."""

    def __init__(self, p: float) -> None:
        super().__init__(p=p, value="random")

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        params = super().make_params(flat_inputs)
        if params["v"] is not None:
            mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
            params["v"] = ((params["v"] * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        return params


class Mixer:
    """Mixup and CutMix of a batch; with both on, each batch gets one of them with equal probability.

    Called with pixels, uint8 (B, 3, H, W) or float, and labels, int64 (B,) in [0, C) or float (B, C), it gives float32
    pixels in [0, 1] and float32 labels (B, C) whose rows sum to 1. It draws from torch's global generator alone. Each
    image is mixed with its neighbour in the batch.

    Args:
        num_classes: C.
        mixup_alpha: of Beta(α, α), from which mixup draws its weight (arXiv 1710.09412); 0 turns it off.
        cutmix_alpha: the same for the area that CutMix keeps (arXiv 1905.04899). Not both are 0.
    """

    def __init__(self, num_classes: int, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0) -> None:
        if min(mixup_alpha, cutmix_alpha) < 0 or mixup_alpha == cutmix_alpha == 0:
            alphas = f"mixup_alpha={mixup_alpha}, cutmix_alpha={cutmix_alpha}"
            raise ValueError(f"{alphas}: none may be negative and one must be positive, else use no mixer")
        kinds = [(v2.MixUp, mixup_alpha), (v2.CutMix, cutmix_alpha)]
        self._mix = v2.RandomChoice([kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha > 0])

    def __call__(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if pixels.dtype == torch.uint8:
            pixels = v2.functional.to_dtype(pixels, torch.float32, scale=True)
        return self._mix(pixels, labels)


def sample_seed(*numbers: int) -> int:
    """A seed in [0, 2**32) from numbers that are not negative, such as seed, epoch and sample key."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def sample_draws(seed: int, epoch: int, keys: Sequence[int] | np.ndarray) -> np.ndarray:
    """Three random numbers, uint64 (B, 3) below 2³², of each sample: a function of seed, epoch and its key alone.

    The counter-based generator SplitMix64 (doi 10.1145/2660193.2660195), whose numbers 3 k to 3 k + 2 are those of key
    k; it starts from seed and epoch, mixed by numpy's SeedSequence.
    """
    start = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
    counts = np.asarray(keys, np.uint64)[:, None] * np.uint64(3) + np.arange(1, 4, dtype=np.uint64)
    bits: np.ndarray = start + counts * np.uint64(0x9E3779B97F4A7C15)  # modulo 2⁶⁴, as all that follows
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ bits >> np.uint64(shift)) * np.uint64(factor)
    return (bits ^ bits >> np.uint64(31)) >> np.uint64(32)


@contextmanager
def forked_rng() -> Iterator[None]:
    """Restores the CPU generators of torch, random and numpy on leaving."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def seed_rngs(seed: int) -> None:
    """Seeds the CPU generators of torch, random and numpy with `seed`, in [0, 2**32)."""
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds accelerators too
    random.seed(seed)
    np.random.seed(seed)
