"""Data: from a name to uint8 batches. It knows no mean and no std; those belong to each model's view."""

from .columns import class_names, find_columns
from .decode import UndecodableImage, decode_rgb
from .loading import ImageData, load_data
from .pictures import PictureCollator, PictureDataset
from .transforms import AUGMENTS, Mixer, build_transform

__all__ = [
    "AUGMENTS",
    "ImageData",
    "Mixer",
    "PictureCollator",
    "PictureDataset",
    "UndecodableImage",
    "build_transform",
    "class_names",
    "decode_rgb",
    "find_columns",
    "load_data",
]
