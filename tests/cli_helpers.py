"""What the tests of the command line share: a folder with data, models and a config, and a call of the command."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import tiny

from hf_kd.cli import main

NAMES = [f"class {i}" for i in range(6)]
REPOSITORY = Path(__file__).resolve().parents[1]


def images(n, seed):
    """Each class is a colour, with noise: something that can be learned in a few steps."""
    rng = np.random.default_rng(seed)
    colours = np.random.default_rng(0).integers(40, 216, (6, 1, 1, 3))
    labels = np.arange(n) % 6
    noisy = (colours[labels] + rng.normal(0, 20, (n, 32, 32, 3))).clip(0, 255).astype(np.uint8)
    return {"image": [Image.fromarray(p) for p in noisy], "label": labels.tolist()}


@pytest.fixture(scope="session")
def things(tmp_path_factory):
    """A folder with a dataset (parquet), an architecture (`student`), a trained-looking `teacher`, and a config."""
    folder = tmp_path_factory.mktemp("things")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    (folder / "data").mkdir()
    for split, n, seed in (("train", 48, 1), ("test", 24, 2)):
        datasets.Dataset.from_dict(images(n, seed), features=features).to_parquet(folder / "data" / f"{split}.parquet")
    for name, kind, seed in (("student", "vit", 0), ("teacher", "resnet", 7)):
        model, processor = tiny(kind, seed=seed, names=NAMES)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    config = {
        "student": str(folder / "student"), "dataset": str(folder / "data"), "from_scratch": True, "loss": "ce",
        "augment": "none", "num_train_epochs": 2, "per_device_train_batch_size": 16, "learning_rate": "1e-3",
        "use_cpu": True, "disable_tqdm": True, "eval_strategy": "epoch", "logging_steps": 1, "save_strategy": "epoch",
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def undrawn_figures(monkeypatch):
    """Figures are made but not drawn, which would take longer than training a tiny model; test_report draws them."""

    def save(figure, path, **options):
        Image.new("RGB", (1, 1)).save(path, format="png")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)


def distill(things, *more):
    return main(["distill", "--config", str(things / "config.yaml"), *map(str, more)])
