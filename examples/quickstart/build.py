"""Rebuild what `hf_kd/quickstart` holds: images, architectures and the teacher of the quick start.

    apt-get install dataset-fashion-mnist            # Debian's package (MIT), the only thing needed from outside
    python examples/quickstart/build.py --work_dir outputs/quickstart-build

Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747). `train.parquet` and `test.parquet` get 600 and 200
images of each class; the teacher is trained by hf_kd itself (`--loss ce`) on the whole 60,000, and measured on the
whole 10,000 of the test set.
"""

import argparse
import gzip
import io
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from transformers import ResNetConfig, ViTImageProcessor

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "hf_kd" / "quickstart"
NAMES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")
PIXELS = 64  # the stem of a ResNet divides by 4; at 28 px too little is left


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of bytes: magic number (with the number of dimensions in its last byte), sizes, data."""
    data = gzip.decompress(path.read_bytes())
    dimensions = data[3]
    sizes = np.frombuffer(data, ">i4", dimensions, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(sizes)


def as_dataset(images: np.ndarray, labels: np.ndarray, **encoding) -> Dataset:
    def encode(image):
        file = io.BytesIO()
        PILImage.fromarray(image).save(file, **encoding)
        return {"bytes": file.getvalue(), "path": None}

    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    return Dataset.from_dict({"image": [encode(p) for p in images], "label": labels.tolist()}, features=features)


def subset(images: np.ndarray, labels: np.ndarray, per_class: int, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    chosen = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:per_class] for c in range(len(NAMES))])
    chosen = rng.permutation(chosen)
    # Lossless WebP is a third smaller than PNG, and a hundred times slower to write.
    return as_dataset(images[chosen], labels[chosen], format="WEBP", lossless=True, quality=100, method=6)


def architecture(folder: Path, hidden_sizes: list[int], depths: list[int]) -> None:
    """A small ResNet (transformers) and how it looks at an image: `--from_scratch` reads nothing else."""
    names = dict(enumerate(NAMES))
    ResNetConfig(
        architectures=["ResNetForImageClassification"],
        embedding_size=hidden_sizes[0],
        hidden_sizes=hidden_sizes,
        depths=depths,
        layer_type="basic",
        id2label=names,
        label2id={name: i for i, name in names.items()},
    ).save_pretrained(folder)
    ViTImageProcessor(
        size={"height": PIXELS, "width": PIXELS}, image_mean=[0.286] * 3, image_std=[0.353] * 3
    ).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--work_dir", type=Path, required=True, help="for the whole dataset and the teacher's run")
    parser.add_argument("--no_teacher", action="store_true", help="build the images and the architectures only")
    args = parser.parse_args()
    parts = {
        split: [read_idx(args.source / f"{stem}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1")]
        for split, stem in (("train", "train"), ("test", "t10k"))
    }
    for split, per_class in (("train", 600), ("test", 200)):
        subset(*parts[split], per_class).to_parquet(FOLDER / "data" / f"{split}.parquet")
    architecture(FOLDER / "student", [16, 32, 64], [1, 1, 1])
    whole = args.work_dir / "fashion-mnist"
    whole.mkdir(parents=True, exist_ok=True)
    for split, (images, labels) in parts.items():
        if not (whole / f"{split}.parquet").exists():
            as_dataset(images, labels, format="PNG").to_parquet(whole / f"{split}.parquet")
    architecture(args.work_dir / "architecture", [16, 32, 64, 128], [2, 2, 2, 2])
    if args.no_teacher:
        return
    run = args.work_dir / "teacher"
    command = [sys.executable, "-m", "accelerate.commands.launch", "examples/run_distill.py"]
    command += ["--config", "examples/configs/quickstart_teacher.yaml", "--output_dir", str(run)]
    command += ["--student", str(args.work_dir / "architecture"), "--dataset", str(whole)]
    if (run / "plan.json").exists():  # an earlier try
        command += ["--resume_from_checkpoint", "last"]
    subprocess.run(command, cwd=ROOT, check=True)
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (FOLDER / "teacher").mkdir(exist_ok=True)
        shutil.copy(run / name, FOLDER / "teacher" / name)


if __name__ == "__main__":
    main()
