"""How a model sees a picture: pixels in, the model's own `pixel_values` out, and back.

The data side delivers plain pixels; each model owns a `View` of them, measured off its own image processor. A teacher
at 384 px with mean 0.5 and a student at 224 px with ImageNet statistics then look at the same picture, each as it was
trained to, and nothing has to be un-normalised on the way.
"""

from __future__ import annotations

import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F


# Pillow's resampling filters, by number, as image processors store them.
_INTERPOLATION = {
    0: InterpolationMode.NEAREST,
    1: InterpolationMode.LANCZOS,
    2: InterpolationMode.BILINEAR,
    3: InterpolationMode.BICUBIC,
}


class View:
    """The preprocessing of one image processor, as a function of pixels.

    Mean and standard deviation are not read from attributes (each family names and composes them differently) but
    measured: the processor is run on a black, a white and a grey picture, which gives its affine map per channel.

    Args:
        processor: an image processor of transformers (the timm wrapper's too) with a fixed output size.

    Attributes:
        size (`tuple[int, int]`): height and width of the model's input.
        scale, offset (`Tensor`): float32 `(3, 1, 1)`; `pixel_values = pixels / 255 * scale + offset`.

    Raises:
        ValueError: if the processor's output is not `(3, H, W)` or not an affine function of the pixels.
    """

    def __init__(self, processor):
        self.processor = processor
        black, grey, white = (self._process([torch.full((3, 256, 256), v, dtype=torch.uint8)]) for v in (0, 51, 255))
        if black.ndim != 4 or black.shape[1] != 3:
            raise ValueError(
                f"{type(processor).__name__} turns one RGB picture into a tensor of shape {tuple(black.shape)}; "
                "a view needs (1, 3, H, W)."
            )
        self.size: tuple[int, int] = tuple(black.shape[-2:])
        self._on_device: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        # The centre, since a processor may pad the border.
        row, column = self.size[0] // 2, self.size[1] // 2
        low, fifth, high = (x[0, :, row, column].double() for x in (black, grey, white))
        self.scale = (high - low).float().view(3, 1, 1)
        self.offset = low.float().view(3, 1, 1)
        if not torch.allclose(low + 0.2 * (high - low), fifth, atol=1e-4) or (self.scale == 0).any():
            raise ValueError(
                f"{type(processor).__name__} is not an affine map of the pixels (0 -> {low.tolist()}, 51 -> "
                f"{fifth.tolist()}, 255 -> {high.tolist()}): it can't be shared between teacher and student."
            )
        resample = getattr(processor, "resample", None)
        if resample is not None:
            self.interpolation = _INTERPOLATION.get(int(resample), InterpolationMode.BICUBIC)
        else:  # timm
            name = getattr(processor, "data_config", {}).get("interpolation", "bicubic")
            self.interpolation = {m.value: m for m in InterpolationMode}.get(name, InterpolationMode.BICUBIC)

    def __repr__(self) -> str:
        mean, std = (x.flatten().tolist() for x in (-self.offset / self.scale, 1 / self.scale))
        numbers = ", ".join(f"{name}=[{', '.join(f'{v:.4g}' for v in x)}]" for name, x in (("mean", mean), ("std", std)))
        return f"View(size={self.size}, {numbers}, interpolation={self.interpolation.value})"

    def __eq__(self, other) -> bool:
        """Whether both show every picture alike (as far as size, statistics and the processor's settings tell)."""
        return (
            isinstance(other, View)
            and self.size == other.size
            and torch.allclose(self.scale, other.scale)
            and torch.allclose(self.offset, other.offset)
            and self.interpolation == other.interpolation
            and type(self.processor) is type(other.processor)
            and _settings(self.processor) == _settings(other.processor)
        )

    __hash__ = None

    def _process(self, pictures: list[torch.Tensor]) -> torch.Tensor:
        try:
            return torch.as_tensor(self.processor(images=pictures, return_tensors="pt")["pixel_values"])
        except (RuntimeError, ValueError) as error:
            shapes = sorted({tuple(p.shape) for p in pictures})
            raise ValueError(
                f"{type(self.processor).__name__} could not make one batch of pictures of the shapes {shapes}: "
                f"{error}. Give it a fixed output size (`crop_size`, or `size` with height and width)."
            ) from error

    def frame(self, pictures) -> torch.Tensor:
        """The processor's own resize and crop of whole pictures, for evaluation.

        Args:
            pictures: list of uint8 `(3, H, W)` of any sizes, or one uint8 batch `(B, 3, H, W)`.

        Returns:
            uint8 `(B, 3, *size)` on the CPU. Exact: the processor's output is mapped back to whole pixel values.
        """
        values = self._process([p.cpu() for p in pictures])
        return ((values - self.offset) / self.scale * 255).round_().clamp_(0, 255).to(torch.uint8)

    def __call__(self, pixels: torch.Tensor, framed: bool = False) -> torch.Tensor:
        """`pixel_values` of a batch, as the processor would give them.

        Args:
            pixels: `(B, 3, H, W)`, uint8, or float in [0, 1] (after mixup or cutmix).
            framed: False for whole pictures, which get the processor's resize and crop (through the CPU); True for
                pictures that show what the model is to see (training crops): they are resized to `size` on the
                device they are on, nothing is cut off.

        Returns:
            float32 `(B, 3, *size)` on the device of `pixels`.
        """
        if not framed:
            whole = pixels if pixels.dtype == torch.uint8 else (pixels * 255).round().to(torch.uint8)
            pixels = self.frame(whole).to(pixels.device)
        elif pixels.shape[-2:] != self.size:
            pixels = F.resize(pixels, list(self.size), interpolation=self.interpolation, antialias=True)
        values = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
        scale, offset = self._statistics(values.device)
        return values * scale + offset

    def invert(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels of normalised `pixel_values`: float32 `(B, 3, H, W)` in [0, 1], on the same device."""
        scale, offset = self._statistics(pixel_values.device)
        return ((pixel_values.float() - offset) / scale).clamp(0, 1)

    def _statistics(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self._on_device:  # copied once, not at every step
            self._on_device[device] = (self.scale.to(device), self.offset.to(device))
        return self._on_device[device]


def _settings(processor) -> dict:
    return {k: v for k, v in processor.to_dict().items() if k not in ("_name_or_path", "image_processor_type")}
