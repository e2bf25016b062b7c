"""What the quickstart ships: the right images, a teacher worth learning from, and a config that runs."""

import gzip
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_kd import load_teacher
from hf_kd.cli import main
from hf_kd.data import ImageDataset, load_data

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "examples" / "quickstart"


def test_the_bundle_is_small_and_balanced():
    data = load_data("quickstart")
    assert sum(f.stat().st_size for f in QUICKSTART.glob("*.parquet")) <= 4e6
    assert (QUICKSTART / "teacher" / "model.safetensors").stat().st_size <= 3e6
    for part, per_class in ((data.train, 600), (data.eval, 200)):
        assert np.bincount(part[data.label_column]).tolist() == [per_class] * 10
    assert data.names[9] == "Ankle boot"


def test_the_teacher_is_as_good_as_its_card_says():
    data = load_data("quickstart")
    teacher = load_teacher(str(QUICKSTART / "teacher"), id2label=data.names)
    items = ImageDataset(data.eval, data.image_column, data.label_column).__getitems__(range(0, 2000, 2))
    right = teacher(torch.stack([i["pixels"] for i in items])).argmax(1) == torch.tensor([i["labels"] for i in items])
    card = json.loads((ROOT / "model_cards" / "quickstart-teacher" / "run.json").read_text())["metrics"]["top1"]
    # 1,000 of the 10,000 images of the card: within four standard errors.
    assert right.float().mean().item() == pytest.approx(card, abs=4 * (card * (1 - card) / 1000) ** 0.5)


def test_the_config_runs_and_prints_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    short = ["--max_steps", "2", "--max_eval_samples", "64", "--disable_tqdm", "true", "--use_cpu"]
    config = str(ROOT / "examples" / "configs" / "quickstart.yaml")
    assert main(["distill", "--config", config, "--output_dir", str(tmp_path / "out"), *short]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("teacher", "ce", "nkd", "uskd"):
        assert [line for line in lines if line.startswith(name + " ")], name


def test_the_builder_reads_idx_files(tmp_path):
    spec = importlib.util.spec_from_file_location("build", QUICKSTART / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    images = np.random.default_rng(0).integers(0, 256, (30, 28, 28), np.uint8)
    sizes = b"".join(n.to_bytes(4, "big") for n in images.shape)
    (tmp_path / "x.gz").write_bytes(gzip.compress(bytes([0, 0, 8, 3]) + sizes + images.tobytes()))
    assert np.array_equal(build.read_idx(tmp_path / "x.gz"), images)
    chosen = build.subset(images, np.arange(30) % 10, per_class=2)
    assert np.bincount(chosen["label"]).tolist() == [2] * 10
    originals = {p.tobytes() for p in images}
    assert all(np.array(p.convert("L")).tobytes() in originals for p in chosen["image"])  # lossless
