"""How a model sees an image: pixels in, the model's own `pixel_values` out, and back."""

from __future__ import annotations

from typing import Any

import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Pillow's resampling filters, by number, as image processors store them: those that tensors can be resized with.
_PILLOW = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
_NOT_SETTINGS = {"_name_or_path": None, "image_processor_type": None}  # in a processor's to_dict()


class Preprocessing:
    """The preprocessing of one image processor, as a function of pixels.

    It is not read from attributes (each family names and composes them differently) but measured: the processor is run
    on a black, a white and a coloured image, which gives its affine map per channel, and the order of the channels.

    Args:
        processor: an image processor of transformers (the timm wrapper's too) with a fixed output size.

    Attributes:
        size (`tuple[int, int]`): height and width of the model's input.
        channels (`list[int]`): which channel of the pixels becomes which of the model's; [2, 1, 0] for BGR.
        scale, offset (`Tensor`): float32 `(3, 1, 1)`; `pixel_values = pixels[channels] / 255 * scale + offset`.
        mean, std (`list[float]`): the same map in the usual form, of pixels in [0, 1].
        interpolation (`InterpolationMode`): how images are resized.

    Raises:
        ValueError: if the processor's output is not `(3, H, W)` of one size, or not an affine function of the pixels.
    """

    def __init__(self, processor):
        self.processor = processor
        name = type(processor).__name__
        # Another shape each, to see whether the output's is always the same; 51, 102, 204 are 0.2, 0.4, 0.8 of white.
        colours = {(256, 256): (0, 0, 0), (200, 320): (51, 102, 204), (320, 200): (255, 255, 255)}
        black, colour, white = (
            self._process([torch.tensor(rgb, dtype=torch.uint8).view(3, 1, 1).expand(3, *shape).contiguous()])
            for shape, rgb in colours.items()
        )
        shapes = [tuple(x.shape[1:]) for x in (black, colour, white)]
        if len(set(shapes)) > 1 or len(shapes[0]) != 3 or shapes[0][0] != 3:
            raise ValueError(
                f"{name} turns images of the sizes {list(colours)} into tensors of the shapes {shapes}; a fixed size "
                "(3, H, W) is needed. Give it one (`crop_size`, or `size` with height and width)."
            )
        self.size: tuple[int, int] = (black.shape[-2], black.shape[-1])
        # The centre, since a processor may pad the border.
        row, column = self.size[0] // 2, self.size[1] // 2
        low, part, high = (x[0, :, row, column].double() for x in (black, colour, white))
        self.scale, self.offset = (x.float().view(3, 1, 1) for x in (high - low, low))
        self.mean, self.std = ((-self.offset / self.scale).flatten().tolist(), (1 / self.scale).flatten().tolist())
        self._on_device: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        share = (part - low) / (high - low)
        error, nearest = (share[:, None] - torch.tensor([0.2, 0.4, 0.8])).abs().min(dim=1)
        self.channels: list[int] = nearest.tolist()
        if not (error < 1e-4).all() or sorted(self.channels) != [0, 1, 2]:
            raise ValueError(
                f"{name} is not an affine map of each colour channel (0 -> {low.tolist()}, 255 -> {high.tolist()}, "
                f"51, 102, 204 -> {part.tolist()}): it can't be shared between teacher and student."
            )
        # Pillow's number of the filter, torchvision's mode, or timm's name for it.
        resample: Any = getattr(processor, "resample", None)
        if resample is None:
            resample = getattr(processor, "data_config", {}).get("interpolation")
        mode = _PILLOW.get(resample, getattr(resample, "value", resample))
        self.interpolation = InterpolationMode(mode if mode in _PILLOW.values() else "bicubic")

    def __repr__(self) -> str:
        mean, std = (", ".join(f"{v:.4g}" for v in values) for values in (self.mean, self.std))
        return f"Preprocessing(size={self.size}, mean=[{mean}], std=[{std}], interpolation={self.interpolation.value})"

    def __eq__(self, other) -> bool:
        """Whether both show every image alike: processors of one class with the same settings."""
        if not isinstance(other, Preprocessing) or type(self.processor) is not type(other.processor):
            return False
        ours, theirs = ({**item.processor.to_dict(), **_NOT_SETTINGS} for item in (self, other))
        return ours == theirs

    __hash__ = None  # type: ignore[assignment]  # typeshed declares a method

    def _process(self, images) -> torch.Tensor:
        return torch.as_tensor(self.processor(images=images, return_tensors="pt")["pixel_values"])

    def resize_and_crop(self, images) -> torch.Tensor:
        """The processor's own resize and crop of whole images, for evaluation: uint8 `(B, 3, *size)` on the CPU.

        `images` are a list of uint8 `(3, H, W)` of any sizes, or a batch of them. Exact: the processor's output is
        mapped back to whole pixel values.
        """
        return (self.denormalize(self._process([p.cpu() for p in images])) * 255).round_().to(torch.uint8)

    def __call__(self, pixels: torch.Tensor, cropped: bool = False) -> torch.Tensor:
        """`pixel_values` of a batch, as the processor would give them: float32 `(B, 3, *size)` on the same device.

        Args:
            pixels: `(B, 3, H, W)`, uint8, or float in [0, 1] (after mixup or cutmix).
            cropped: False for whole images, which get the processor's resize and crop (through the CPU); True for
                images that show what the model is to see (training crops): they are resized to `size`. They are not
                cropped, but cut to the proportions of `size` if theirs are others, with one warning.
        """
        if not cropped:
            whole = (pixels * 255).round().to(torch.uint8) if pixels.is_floating_point() else pixels.to(torch.uint8)
            pixels = self.resize_and_crop(whole).to(pixels.device)
        elif pixels.shape[-2:] != self.size:
            scale = min(length / own for length, own in zip(pixels.shape[-2:], self.size, strict=True))
            part = [round(scale * own) for own in self.size]  # the largest of the proportions of `size`
            if max(length - kept for length, kept in zip(pixels.shape[-2:], part, strict=True)) > 1:  # not rounding
                logger.warning_once(
                    f"images of {' × '.join(map(str, pixels.shape[-2:]))} pixels are cut to the proportions of "
                    f"{self.size}, which a model takes: teacher and student do not see quite the same."
                )
                pixels = F.center_crop(pixels, part)
            mode = self.interpolation
            if mode == InterpolationMode.LANCZOS and pixels.device.type != "cpu":
                mode = InterpolationMode.BICUBIC  # the nearest that torch has there
            pixels = F.resize(pixels, list(self.size), interpolation=mode, antialias=True)
            if pixels.is_floating_point():
                pixels = pixels.clamp(0, 1)  # bicubic overshoots; torchvision clips bytes by itself
        return self.normalize(pixels)

    def training_shape(self, side: int) -> tuple[int, int]:
        """Height and width of training images whose longer side is `side`, in the proportions of `size`."""
        height, width = (max(1, round(side * length / max(self.size))) for length in self.size)
        return height, width

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """The affine map and the channel order alone: float32 from `(B, 3, H, W)` of any size, uint8 or in [0, 1]."""
        values = pixels.float() if pixels.is_floating_point() else pixels.float() / 255
        scale, offset = self._statistics(values.device)
        return (values if self.channels == [0, 1, 2] else values[:, self.channels]) * scale + offset

    def denormalize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels of normalised `pixel_values`: float32 `(B, 3, H, W)` in [0, 1], on the same device."""
        scale, offset = self._statistics(pixel_values.device)
        pixels = ((pixel_values.float() - offset) / scale).clamp(0, 1)
        return pixels if self.channels == [0, 1, 2] else pixels[:, [self.channels.index(i) for i in range(3)]]

    def _statistics(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self._on_device:  # copied once, not at every step
            self._on_device[device] = (self.scale.to(device), self.offset.to(device))
        return self._on_device[device]
