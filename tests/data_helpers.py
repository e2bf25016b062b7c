"""Images for the data tests, and the fixture and the mark that hold for all of them."""

import io

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

# torchvision 0.29 announces the end of its decoders at each call; decode_rgb goes to Pillow where they fail.
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """The same draws in every run; nothing that load_data converts stays behind, and nothing is asked of the Hub."""
    torch.manual_seed(0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def photo(height=37, width=53, channels=3, seed=0):
    """A smooth image, which JPEG keeps well, without any symmetry."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, channels), dtype=np.uint8)
    planes = [PIL.Image.fromarray(coarse[..., c]).resize((width, height), 3) for c in range(channels)]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def encode(image, kind="PNG", **options):
    if not isinstance(image, PIL.Image.Image):
        image = PIL.Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def image_table(count=12, broken=(), size=16):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    data = [encode(photo(size, size, seed=i)) for i in range(count)]
    data = [
        {"path": None, "bytes": bytes_[: len(bytes_) // 2] if i in broken else bytes_} for i, bytes_ in enumerate(data)
    ]
    return datasets.Dataset.from_dict({"image": data, "label": [i % 3 for i in range(count)]}, features=features)


def with_broken(data, *broken):
    """The dataset with these images undecodable."""
    data = data.cast_column("image", datasets.Image(decode=False))
    data = data.map(lambda row, i: {"image": {"bytes": b"", "path": None}} if i in broken else row, with_indices=True)
    return data.cast_column("image", datasets.Image())
