"""What the quickstart ships: the right images, a teacher worth learning from, and a config that runs."""

import gzip
import importlib.util
import json
import tomllib
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_kd import load_student, load_teacher, recipes
from hf_kd.cli import main
from hf_kd.data import ImageDataset, load_data
from hf_kd.quickstart import FOLDERS, bundled

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = files("hf_kd")


def test_the_bundle_is_small_and_balanced():
    data = load_data("quickstart")
    assert sum(f.stat().st_size for f in bundled("quickstart").glob("*.parquet")) <= 4e6
    assert (bundled("quickstart/teacher") / "model.safetensors").stat().st_size <= 3e6
    for part, per_class in ((data.train, 600), (data.eval, 200)):
        assert np.bincount(part[data.label_column]).tolist() == [per_class] * 10
    assert data.names[9] == "Ankle boot"


def test_the_teacher_is_as_good_as_its_card_says():
    data = load_data("quickstart")
    teacher = load_teacher("quickstart/teacher", id2label=data.names)
    items = ImageDataset(data.eval, data.image_column, data.label_column).__getitems__(range(0, 2000, 2))
    right = teacher(torch.stack([i["pixels"] for i in items])).argmax(1) == torch.tensor([i["labels"] for i in items])
    card = json.loads((ROOT / "model_cards" / "quickstart-teacher" / "run.json").read_text())["metrics"]["top1"]
    # 1,000 of the 10,000 images of the card: within four standard errors.
    assert right.float().mean().item() == pytest.approx(card, abs=4 * (card * (1 - card) / 1000) ** 0.5)


def test_what_the_package_reads_at_run_time_is_in_a_wheel():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["hf_kd"]
    found = {path for pattern in patterns for path in Path(str(PACKAGE)).glob(pattern) if path.is_file()}
    packed = {path for path in found if path.suffix != ".pyc"}
    needed = {file for folder in FOLDERS.values() for file in folder.iterdir()}
    needed |= {Path(str(PACKAGE)) / f"recipes/{name}.yaml" for name in recipes.names()}
    assert len(needed) == 13 and needed <= packed
    # Whatever else lies beside the modules is meant to be there too.
    others = {path for path in Path(str(PACKAGE)).rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others == packed


def test_the_bundle_is_known_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student, processor = load_student("quickstart/student", from_scratch=True)
    assert student.config.num_labels == 10 and processor.size["height"] == 64
    student.save_pretrained("saved")
    assert str(Path(str(PACKAGE))) not in Path("saved/config.json").read_text()
    with pytest.raises(ValueError, match="no such folder: ./quickstart/student"):
        load_student("./quickstart/student", from_scratch=True)


def test_the_config_runs_and_prints_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = ["--seeds", "0", "--max_steps", "2", "--max_eval_samples", "64", "--disable_tqdm", "true", "--use_cpu"]
    config = str(ROOT / "examples" / "configs" / "quickstart.yaml")
    assert main(["distill", "--config", config, "--output_dir", str(tmp_path / "out"), *short]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("teacher", "ce", "nkd", "uskd"):
        assert [line for line in lines if line.startswith(name + " ")], name
    for file in (tmp_path / "out").rglob("*.json"):
        assert str(Path(str(PACKAGE))) not in file.read_text(), file  # where hf_kd is installed is nobody's business
    run = json.loads((tmp_path / "out" / "nkd" / "run.json").read_text())
    assert (run["student"]["id"], run["teacher"]["id"]) == ("quickstart/student", "quickstart/teacher")
    assert Image.open(tmp_path / "out" / "curves.png").size[0] > 500
    card = (tmp_path / "out" / "nkd" / "README.md").read_text()
    assert "`quickstart/teacher`" in card and "huggingface.co/quickstart" not in card


def test_the_builder_reads_idx_files(tmp_path):
    spec = importlib.util.spec_from_file_location("build", ROOT / "examples" / "quickstart" / "build.py")
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
