"""Input speed, as ratios measured in one run: from encoded photographs to augmented training batches.

    python benchmarks/input.py --rounds 7
    python benchmarks/input.py --rounds 7 --workers 2

The images have ImageNet's usual size: JPEGs of 500 × 375 px, quality 90, made from photographs of foolbox.
In every round each contender makes the same batches in turn, in one process with one thread, or in loader workers of
one thread each, whose start is not measured; the ratio is the median over rounds. Contenders:

- hf_kd, resized_crop / deit: decoding, RandomResizedCrop(224), flip (and RandAugment, erasing), to a uint8 batch.
- example: what transformers' image classification example does, Pillow to a normalised float batch.
- timm, plain / deit: timm's training transform with the same augmentation, on Pillow images.
- stream: hf_kd on parquet files through `load_data(..., streaming=True)`; map-style: the same rows with datasets.
- cifar: PNGs of 32 px, pad_crop, batches of 128, after the first epoch. Images that are kept once they are decoded,
  augmented by the batch, against decoding and augmenting each.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import timm.data
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

from hf_kd.data import ImageDataset, TrainingCollator, cache
from hf_kd.data.order import EpochSampler
from hf_kd.data.streaming import StreamedRows
from hf_kd.reporting.record import collect_versions

SIZE, BATCH = 224, 32
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=1000)})


def photographs(n: int) -> list[bytes]:
    folder = resources.files("foolbox") / "data"
    files = sorted(
        file.name for file in folder.iterdir() if file.name.startswith("imagenet") and file.name.endswith("jpg")
    )
    encoded = []
    for i in range(n):
        with Image.open(folder / files[i % len(files)]) as image:
            size = (500, 375) if i % 4 else (375, 500)
            buffer = io.BytesIO()
            image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    return encoded


def rows(encoded: list[bytes]) -> datasets.Dataset:
    columns = {
        "image": [{"bytes": data, "path": None} for data in encoded],
        "label": [i % 1000 for i in range(len(encoded))],
    }
    return datasets.Dataset.from_dict(columns, features=FEATURES)


def loading(workers: int) -> dict[str, Any]:
    return {"num_workers": workers, "persistent_workers": workers > 0}  # their start is not measured


def ours(dataset, augment: str, workers: int, sampler=None) -> Callable[[], None]:
    images = ImageDataset(dataset).for_training(augment, SIZE)
    order = {"batch_sampler": sampler(images)} if sampler else {"batch_size": BATCH}
    loader = DataLoader(images, collate_fn=TrainingCollator(SIZE), **order, **loading(workers))

    def run() -> None:
        for batch in loader:
            assert batch["pixels"].dtype == torch.uint8

    return run


def pillow(encoded: list[bytes], transform: Callable, workers: int) -> Callable[[], None]:
    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(encoded)

        def __getitem__(self, i):
            return transform(Image.open(io.BytesIO(encoded[i])).convert("RGB")), i

    loader = DataLoader(Images(), BATCH, **loading(workers))

    def run() -> None:
        for _ in loader:
            pass

    return run


def contenders(encoded: list[bytes], folder: Path, workers: int) -> dict[str, Callable[[], None]]:
    data = rows(encoded)
    mean, std = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
    steps = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    plain = {"interpolation": "bicubic", "color_jitter": None, "mean": mean, "std": std}
    deit = plain | {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25, "re_mode": "pixel"}
    pq.write_table(
        data.with_format("arrow")[:].replace_schema_metadata(None), folder / "a.parquet", row_group_size=100
    )

    def sampler(images):
        return EpochSampler(images, BATCH, (1, 0, 0))

    return {
        "example": pillow(encoded, transforms.Compose([*steps, transforms.Normalize(mean, std)]), workers),
        "timm, plain": pillow(encoded, timm.data.create_transform(SIZE, is_training=True, **plain), workers),
        "timm, deit": pillow(encoded, timm.data.create_transform(SIZE, is_training=True, **deit), workers),
        "hf_kd, resized_crop": ours(data, "resized_crop", workers),
        "hf_kd, deit": ours(data, "deit", workers),
        "map-style": ours(data, "resized_crop", workers),
        "stream": ours(StreamedRows([str(folder / "a.parquet")], FEATURES), "resized_crop", workers, sampler),
    }


def small_images(n: int) -> list[bytes]:
    """Photographs at CIFAR's size, as its files on the Hub are encoded."""
    encoded, large = [], photographs(20)
    for i in range(n):
        with Image.open(io.BytesIO(large[i % len(large)])) as image:
            left, top = np.random.default_rng(i).integers(0, 150, 2).tolist()
            part = image.resize((32, 32), Image.Resampling.BICUBIC, (left, top, left + 200, top + 200))
        part.save(buffer := io.BytesIO(), "PNG")
        encoded.append(buffer.getvalue())
    return encoded


def compare_cifar(rounds: int, images: int = 2560) -> str:
    """Lines of the table, of the loader in the process and with two workers that persist."""
    data, lines = rows(small_images(images)), []

    def loader(limit: int, workers: int) -> DataLoader:
        cache.MAX_BYTES, before = limit, cache.MAX_BYTES
        dataset = ImageDataset(data.select(range(images))).for_training("pad_crop", 32)
        cache.MAX_BYTES = before
        options = {"num_workers": workers, "persistent_workers": workers > 0}
        return DataLoader(dataset, 128, shuffle=True, collate_fn=TrainingCollator(32), **options)

    for workers, asked in ((0, "at least 5.0"), (2, "")):
        loaders, seconds = [loader(cache.MAX_BYTES, workers), loader(0, workers)], []
        for round_ in range(rounds + 1):
            for each in loaders:
                start = time.perf_counter()
                assert sum(len(batch["pixels"]) for batch in each) == images
                seconds += [time.perf_counter() - start] if round_ else []
        ratios = [b / a for a, b in zip(seconds[::2], seconds[1::2], strict=True)]
        name = f"cifar, batch ({workers} workers, {images / statistics.median(seconds[::2]):.0f}/s)"
        spread = f"{statistics.median(ratios):.2f} | {min(ratios):.2f}–{max(ratios):.2f}"
        lines.append(f"| {name} | cifar, per image | {spread} | {asked} |")
    return "\n".join(lines)


RATIOS = [  # contender, against, asked
    ("hf_kd, resized_crop", "example", "at least 2.0"),
    ("hf_kd, resized_crop", "timm, plain", "at least 1.4"),
    ("hf_kd, deit", "timm, deit", "at least 1.2"),
    ("stream", "map-style", "at least 0.95"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    np.random.seed(0)
    encoded, times = photographs(arguments.images), {}
    with tempfile.TemporaryDirectory() as folder:
        runs = contenders(encoded, Path(folder), arguments.workers)
        for round_ in range(arguments.rounds + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                if round_:  # the first warms up
                    times.setdefault(name, []).append(time.perf_counter() - start)
    print("| contender | against | ratio of speeds | min–max | asked |\n|---|---|---|---|---|")
    for name, against, asked in RATIOS:
        ratios = [b / a for a, b in zip(times[name], times[against], strict=True)]
        middle = statistics.median(ratios)
        print(f"| {name} | {against} | {middle:.2f} | {min(ratios):.2f}–{max(ratios):.2f} | {asked} |")
    print(compare_cifar(arguments.rounds))
    speeds = {name: f"{arguments.images / statistics.median(seconds):.0f}/s" for name, seconds in times.items()}
    versions = {
        key: value for key, value in collect_versions().items() if key in ("python", "torch", "torchvision", "timm")
    }
    setting = (
        f"{arguments.rounds} rounds of {arguments.images} images, {arguments.workers} loader workers, 1 thread each"
    )
    print(f"\nimages a second: {speeds}; {setting}, {versions}")


if __name__ == "__main__":
    main()
