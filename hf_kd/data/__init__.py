"""Data: from a name to uint8 batches. Mean and std belong to each model's preprocessing."""

from .collators import EvaluationCollator, TrainingCollator
from .columns import class_names, find_columns
from .dataset import ImageDataset, as_image_dataset, augmentation_of, read_item
from .decode import UndecodableImage, decode_rgb, decode_row
from .loading import ImageData, load_data
from .splits import overlap
from .transforms import AUGMENTS, Mixer, augment_image, build_transform

__all__ = [
    "AUGMENTS", "EvaluationCollator", "ImageData", "ImageDataset", "Mixer", "TrainingCollator", "UndecodableImage",
    "as_image_dataset", "augment_image", "augmentation_of", "build_transform", "class_names", "decode_rgb",
    "decode_row", "find_columns", "load_data", "overlap", "read_item",
]  # fmt: skip
