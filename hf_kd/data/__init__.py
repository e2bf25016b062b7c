"""Data: from a name to uint8 batches. It knows no mean and no std; those belong to each model's preprocessing."""

from .collators import ImageCollator
from .columns import class_names, find_columns
from .dataset import ImageDataset, as_image_dataset
from .decode import UndecodableImage, decode_rgb
from .loading import ImageData, load_data
from .transforms import AUGMENTS, Mixer, build_transform

__all__ = [
    "AUGMENTS",
    "ImageData",
    "Mixer",
    "ImageCollator",
    "ImageDataset",
    "UndecodableImage",
    "as_image_dataset",
    "build_transform",
    "class_names",
    "decode_rgb",
    "find_columns",
    "load_data",
]
