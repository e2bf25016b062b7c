"""From anything that holds an image to a uint8 RGB tensor, and from a row of any dataset to an image and a label."""

from collections.abc import Mapping
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from ..config import MAX_IMAGE_PIXELS

_PNG = b"\x89PNG\r\n\x1a\n"


class UndecodableImage(ValueError):
    """The image is broken, truncated, or of a kind that has no defined conversion to RGB; the text says which.

    `kind` is by what they are counted: "empty", "truncated", "broken", "no image", "no file", "too large" (see
    `decode_rgb`), "unsupported", or "other" where a dataset of the user's own gives only a text.
    """

    def __init__(self, text: str, kind: str = "unsupported") -> None:
        super().__init__(text)
        self.kind = kind

    def __reduce__(self):
        return type(self), (str(self), self.kind)


def decode_rgb(source: Any, max_pixels: int = MAX_IMAGE_PIXELS) -> Tensor:
    """Decodes an image as Pillow does (open, `exif_transpose`, convert to RGB).

    But 16-bit greys are scaled to 8 bits where Pillow clips them. Transparency is dropped, not blended.

    Args:
        source: encoded bytes (any format Pillow reads), a dict with "bytes" or "path" as `Image(decode=False)` of
            datasets gives, a path, a PIL image, a numpy array (H, W[, C]) of uint8, or of uint16 if grey, or a
            tensor (C, H, W) with C of 1, 3 or 4, uint8 or float in [0, 1].
        max_pixels: a file of more pixels is not decoded, however small it is.

    Returns:
        uint8 tensor (3, H, W), which need not be contiguous.

    Raises:
        UndecodableImage: also for a file that is missing or truncated.
    """
    if isinstance(source, Tensor):
        return _from_tensor(source)
    if isinstance(source, dict):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if isinstance(source, str | Path):
        source = read_file(str(source))
    try:
        if isinstance(source, bytes | bytearray | memoryview):
            return _from_bytes(bytes(source), max_pixels)
        if isinstance(source, np.ndarray):
            source = PIL.Image.fromarray(source.squeeze(2) if source.ndim == 3 and source.shape[2] == 1 else source)
        if isinstance(source, PIL.Image.Image):
            _check_size(source.width, source.height, max_pixels)
            return _from_pil(source)
    except UndecodableImage:
        raise
    except Exception as error:  # Pillow's plugins raise errors of any type
        kind = "truncated" if "truncated" in str(error).lower() else "broken"
        raise UndecodableImage(f"{type(error).__name__}: {error}", kind) from error
    raise UndecodableImage(f"no image in a value of type {type(source).__name__}", "no image")


def decode_row(
    row: Any,
    image_column: str | None = None,
    label_column: str | None = None,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> dict[str, Any]:
    """The image and the label of one row of any dataset.

    Args:
        row: a dict, or a pair (image, label) as torchvision's datasets give. The image is anything that `decode_rgb`
            takes, under `image_column`, "pixels", "image" or "img"; or is normalised, under "pixel_values". The label
            is under `label_column`, "labels" or "label".
        max_pixels: see `decode_rgb`.

    Returns:
        {"pixels": uint8 (3, H, W), or "pixel_values": float (3, H, W) as they are; "labels": the label as it is}.

    Raises:
        UndecodableImage: see `decode_rgb`; also for a row that says why it is "skipped".
        ValueError: the row has no image or no label; lists its keys.
    """
    if isinstance(row, tuple | list) and len(row) == 2:
        row = dict(zip(("image", "label"), row, strict=True))
    if not isinstance(row, Mapping):
        raise ValueError(
            f"an item is a {type(row).__name__} alone and has no label: give pairs (image, label) or dicts; only a "
            "loss that needs no labels (kl_only) is trained with images alone"
        )
    if "skipped" in row:
        raise UndecodableImage(row["skipped"], row.get("kind", "other"))
    image = next((key for key in ("pixel_values", image_column, "pixels", "image", "img") if key in row), None)
    label = next((key for key in (label_column, "labels", "label") if key in row), None)
    if image is None or label is None:
        missing = "image under pixel_values, pixels, image or img"
        if image:
            missing = "label; pass label_column, or a loss that needs none (kl_only)"
        raise ValueError(f"an item with the keys {', '.join(row)} has no {missing}")
    if image == "pixel_values":
        return {"pixel_values": torch.as_tensor(row[image]), "labels": row[label]}
    return {"pixels": decode_rgb(row[image], max_pixels), "labels": row[label]}


def read_file(path: str) -> bytes:
    """The bytes of a file here or at an address of fsspec; UndecodableImage if a local one cannot be read."""
    if "://" in path:  # as streamed datasets give: hf://…, zip://…::https://…
        import fsspec

        with fsspec.open(path, "rb") as file:  # errors of the network pass: they do not mean a broken image
            return file.read()
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UndecodableImage(f"cannot read the file: {error}", "no file") from error


def _from_tensor(image: Tensor) -> Tensor:
    if image.is_floating_point() and image.numel() and 0 <= image.min() and image.max() <= 1:
        image = (image * 255).round().to(torch.uint8)
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3, 4):
        raise UndecodableImage(
            f"a tensor must be uint8, or float in [0, 1], of shape (1|3|4, H, W), not {image.dtype} of "
            f"{tuple(image.shape)} (an image that is normalised already belongs under the key pixel_values)"
        )
    return image.expand(3, -1, -1) if image.shape[0] == 1 else image[:3]


def _from_bytes(data: bytes, max_pixels: int) -> Tensor:
    if not data:
        raise UndecodableImage("it has no bytes", "empty")
    size = _size_for_torchvision(data, max_pixels)
    if size is not None:
        _check_size(*size, max_pixels)
        with suppress(ImportError, RuntimeError, Warning):  # Pillow may decode it, or gives the clearer error
            from torchvision.io import ImageReadMode, decode_image  # deprecated; without it Pillow decodes everything

            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return decode_image(encoded, ImageReadMode.RGB, apply_exif_orientation=True)
    return _from_pil(_open(data, max_pixels))


def _open(data: bytes, max_pixels: int) -> PIL.Image.Image:
    """The image with its size read and its pixels not."""
    limit, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, None  # ours is checked here
    try:
        image = PIL.Image.open(BytesIO(data))
    except PIL.UnidentifiedImageError as error:  # whose own text is the address of the BytesIO
        text = f"no image file that Pillow knows; it begins with {data[:8]!r}"
        raise UndecodableImage(text, "no image") from error
    finally:
        PIL.Image.MAX_IMAGE_PIXELS = limit
    _check_size(image.width, image.height, max_pixels)
    return image


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        text = f"{width} × {height} pixels are more than max_image_pixels={max_pixels}"
        raise UndecodableImage(text, "too large")


def _size_for_torchvision(data: bytes, max_pixels: int) -> tuple[int, int] | None:
    """Width and height, if torchvision, which is faster, decodes this to Pillow's pixels.

    It sees no orientation in XMP, nor in PNG one in EXIF behind the pixels.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg_size(data)
    if data.startswith(_PNG):  # byte 24 is the bit depth; torchvision gives uint16 for 16
        tags = (b"eXIf", b"com.adobe.xmp", b"Raw profile type exif")
        if data[24:25] == b"\x10" or any(tag in data for tag in tags):
            return None
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    # The extended form of WebP (VP8X) may hold an orientation or an animation.
    if data[:4] == b"RIFF" and data[8:16] in (b"WEBPVP8 ", b"WEBPVP8L"):
        return _open(data, max_pixels).size
    return None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height from an ordinary header (ITU T.81, annex B) without an orientation in XMP, else None.

    Pillow's open gives the same but takes several times longer.
    """
    at, size = 2, None
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker < 0xC0 or 0xD0 <= marker <= 0xD9 or marker == 0xFF:  # without a length, as the 0xFF of a filling
            return None
        if marker == 0xDA:  # the pixels follow
            return None if data.find(b"tiff:Orientation", 0, at) >= 0 else size
        if marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            if size is not None:
                return None
            size = int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _from_pil(image: PIL.Image.Image) -> Tensor:
    image = PIL.ImageOps.exif_transpose(image)  # loads the pixels, so it also finds a truncated file
    if image.mode == "F":
        raise UndecodableImage("floating-point pixels have no defined range: convert the image to 8 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow clips these at 255. The high byte undoes both usual widenings, x·256 and x·257.
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UndecodableImage(f"pixels of {values.min()} to {values.max()} do not fit 16 bits")
        image = PIL.Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without Pillow's warning
    return pil_to_tensor(image if image.mode == "RGB" else image.convert("RGB"))
