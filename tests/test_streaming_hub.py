"""Streams from the Hub: the same rows as from disk, whatever the connection does."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from hub_helpers import hub as hub
from hub_helpers import told
from hub_records import BODY_FAULTS
from huggingface_hub.errors import HfHubHTTPError
from local_hub import cifar100, imagenet
from test_streaming import small_blocks, wait_for_reads
from tiny import tiny

from hf_kd.cli import main
from hf_kd.data import ImageDataset, load_data, streaming
from hf_kd.data.order import EpochSampler

NAME = "uoft-cs/cifar100"
OPTIONS = {"label_column": "fine_label", "streaming": True}


@pytest.fixture
def cifar(hub, tmp_path, monkeypatch):
    hub.add_repo(NAME, cifar100(tmp_path / "cifar100"), repo_type="dataset")
    monkeypatch.setattr(
        streaming, "time", SimpleNamespace(sleep=lambda seconds: None, monotonic=streaming.time.monotonic)
    )
    return hub


def rows_of(data):
    dataset = ImageDataset(data.train, "img", "fine_label").for_training(None, None)
    batches = [dataset.__getitems__(batch) for batch in EpochSampler(dataset, 16, (1, 0, 0))]
    return sorted((item["index"], item["labels"], item["pixels"].sum().item()) for batch in batches for item in batch)


def test_a_stream_has_the_rows_the_names_and_the_fingerprint_of_the_dataset(cifar):
    streamed, local = load_data(NAME, **OPTIONS), load_data(NAME, label_column="fine_label")
    assert streamed.describe() == local.describe() and streamed.names == local.names
    on_disk = ImageDataset(local.train, "img", "fine_label")
    expected = [
        (item["index"], item["labels"], item["pixels"].sum().item()) for item in map(on_disk.__getitem__, range(200))
    ]
    assert rows_of(streamed) == expected


@pytest.mark.parametrize("kind", [429, 500, 503, "drop", "cut", "slow"])
def test_a_fault_that_passes_loses_no_row_and_repeats_none(cifar, monkeypatch, kind):
    expected = rows_of(load_data(NAME, **OPTIONS))
    data = load_data(NAME, **OPTIONS)
    monkeypatch.setattr(cifar, "delay", 0.0)
    fault = cifar.fail("GET .*/lfs/.*train" if kind in BODY_FAULTS else r"/resolve/.*train", kind, times=8)
    assert rows_of(data) == expected and fault.hits


def test_what_was_read_ahead_covers_an_outage(cifar, tmp_path, monkeypatch):
    """Slow bodies at first, then nothing at all: the row groups that were asked for ahead are given out, no more."""
    cifar.add_repo("lab/imagenet", imagenet(tmp_path / "imagenet", 96), repo_type="dataset")
    monkeypatch.setattr(cifar, "delay", 0.0)
    rows = load_data("lab/imagenet", streaming=True).train
    size = max(group.size for group in rows.groups)
    small_blocks(monkeypatch, ahead=10 * size)
    dataset = ImageDataset(rows).for_training(None, None)
    batches = list(EpochSampler(dataset, 4, (1, 0, 0)))
    slow = cifar.fail("GET .*/(lfs|resolve)/.*train", "slow", times=None)
    dataset.__getitems__(batches[0])
    wait_for_reads(rows)
    asked = len(rows._tables)
    assert slow.hits and 10 <= asked < len(rows.groups)
    monkeypatch.setattr(streaming, "PATIENCE", 0)
    cifar.fail("GET .*train", 503, times=None)
    given, groups = 1, set()
    with pytest.raises(HfHubHTTPError):
        for batch in batches[1:]:
            dataset.__getitems__(batch)
            given, groups = given + 1, groups | set(rows._groups_of(np.array(batch)))
    assert 10 <= len(groups) <= asked and given >= 10
    wait_for_reads(rows)  # none is to outlive the Hub


@pytest.mark.parametrize("kind", [401, 403])
def test_a_fault_that_stays_is_told_at_once(cifar, kind):
    data = load_data(NAME, **OPTIONS)
    fault = cifar.fail(r"/resolve/.*train", kind, times=None)
    assert {401: "does not accept the token", 403: "is gated"}[kind] in told(rows_of, data)
    assert fault.hits <= 2


# ---- ImageNet ----

CONFIGS = sorted(Path(__file__).resolve().parents[1].glob("examples/configs/imagenet_*.yaml"))
SMALL = (
    "--image_size 32 --train_image_size 32 --max_steps 4 --per_device_train_batch_size 4 --use_cpu "
    "--disable_tqdm true --gradient_accumulation_steps 1 --dataloader_num_workers 0 --save_strategy steps "
    "--save_steps 2 --logging_steps 1 --eval_strategy no"
).split()


@pytest.fixture
def imagenet_hub(hub, tmp_path):
    """A gated ImageNet, whose conditions the user who is logged in has accepted, and the teachers."""
    hub.add_repo("ILSVRC/imagenet-1k", imagenet(tmp_path / "imagenet"), repo_type="dataset")
    names = [f"class {i}" for i in range(1000)]
    for name in ("resnet34", "resnet50"):
        for part in tiny("timm_resnet", num_labels=1000, names=names):
            part.save_pretrained(tmp_path / name)
        hub.add_repo(f"timm/{name}.tv_in1k", tmp_path / name)
    return hub


def losses_of(folder):
    record = json.loads((folder / "run.json").read_text())
    return record, {entry["step"]: entry["loss"] for entry in record["history"] if "loss" in entry}


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_an_imagenet_recipe_is_killed_and_resumed_under_a_launcher(imagenet_hub, tmp_path, config, undrawn_figures):
    """It goes as in this process, where it is not interrupted."""
    taught = "teacher" in yaml.safe_load(config.read_text())
    more = ["--class_map", "by_index", "--teacher_check_batches", "0"] if taught else []
    argv = ["--config", str(config), *SMALL, *more]
    assert main(["distill", *argv, "--output_dir", str(tmp_path / "whole")]) == 0
    record, losses = losses_of(tmp_path / "whole")
    assert record["data"]["eval_size"] == 16 and len(losses) == 4
    assert record["data"]["classes"] == 1000 and record["plan"]["data"]["streaming"]

    script = Path(__file__).resolve().parents[1] / "examples" / "run_distill.py"
    environment = os.environ | imagenet_hub.env(tmp_path / "other-cache")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1", "--cpu"]

    def start(*command):
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
        return subprocess.Popen([*launch, *command], env=environment, **options)

    killed = start(str(script), *argv, "--output_dir", str(tmp_path / "out"))
    output = b""
    for line in killed.stdout:
        output += line
        if b"'loss'" in line and (tmp_path / "out" / "checkpoint-2").exists():
            break
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "out" / "run.json").exists(), output.decode()[-2000:]
    resumed = start("-m", "hf_kd", "resume", str(tmp_path / "out"))
    output, _ = resumed.communicate()
    assert resumed.returncode == 0, output.decode()[-2000:]
    record, again = losses_of(tmp_path / "out")
    assert again == pytest.approx(losses, rel=1e-4) and record["data"]["classes"] == 1000
