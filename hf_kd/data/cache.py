"""Decoded images of a dataset that fits in memory: each is decoded once, whatever the epochs, workers and runs."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable
from multiprocessing import context, reduction
from typing import Any

import datasets
import numpy as np
from torch import Tensor

MAX_BYTES = 1_500_000_000  # CIFAR has 154 MB, Tiny ImageNet 1.2 GB

_caches: weakref.WeakKeyDictionary[datasets.Dataset, dict[tuple[str, int], DecodedImages | None]] = (
    weakref.WeakKeyDictionary()
)


class DecodedImages:
    """The images of a dataset that have one shape, by row: `pixels`, uint8 (N, 3, H, W), where `known`, bool (N,).

    The memory is shared with loader workers, forked or spawned, and taken only as it is filled. Any other pickled copy
    is empty.
    """

    def __init__(self, rows: int, shape: tuple[int, ...], file: Any = None) -> None:
        size = rows * math.prod(shape)
        if file is None:  # not torch's shared memory: a container often has 64 MB of that, and using more is a crash
            named = hasattr(os, "memfd_create")
            file = open(os.memfd_create("images"), "r+b") if named else tempfile.TemporaryFile()  # noqa: SIM115
            file.truncate(rows + size)
        memory, self._file = mmap.mmap(file.fileno(), rows + size), file
        weakref.finalize(self, file.close)
        self.known = np.frombuffer(memory, bool, rows)
        self.pixels = np.frombuffer(memory, np.uint8, size, rows).reshape(rows, *shape)

    def __reduce__(self):
        arguments = len(self.known), self.pixels.shape[1:]
        if context.get_spawning_popen() is None:
            return DecodedImages, arguments
        return _opened, (*arguments, reduction.DupFd(self._file.fileno()))

    def add(self, row: int, image: Tensor | None) -> bool:
        """Keeps an image of the shape of the others; False for another, or none."""
        if image is None or image.shape != self.pixels.shape[1:]:
            return False
        self.pixels[row] = image.numpy()
        self.known[row] = True  # last: another process may look
        return True


def _opened(rows: int, shape: tuple[int, ...], descriptor: Any) -> DecodedImages:
    return DecodedImages(rows, shape, open(descriptor.detach(), "r+b"))


def decoded_images(
    dataset: datasets.Dataset, column: str, max_pixels: int, first: Callable[[], Tensor | None]
) -> DecodedImages | None:
    """The decoded images of a column, the same for all who ask while the dataset lives; None if it is too large.

    Args:
        max_pixels: see `decode_rgb`.
        first: decodes one of the first images, whose shape is the one that is kept; None if none can be decoded.
    """
    caches = _caches.setdefault(dataset, {})
    if (column, max_pixels) not in caches:
        image = first()
        if image is None or len(dataset) * image.numel() > MAX_BYTES:
            caches[column, max_pixels] = None
        else:
            caches[column, max_pixels] = DecodedImages(len(dataset), tuple(image.shape))
    return caches[column, max_pixels]
