"""Streams from the Hub: the same rows as from disk, whatever the connection does."""

from types import SimpleNamespace

import pytest
import torch
from hub_helpers import hub as hub
from hub_helpers import told
from hub_records import BODY_FAULTS
from local_hub import cifar100

from hf_kd.data import ImageDataset, load_data, streaming
from hf_kd.data.order import StreamSampler

NAME = "uoft-cs/cifar100"
OPTIONS = {"label_column": "fine_label", "streaming": True}


@pytest.fixture
def cifar(hub, tmp_path, monkeypatch):
    hub.add_repo(NAME, cifar100(tmp_path / "cifar100"), repo_type="dataset")
    monkeypatch.setattr(streaming, "time", SimpleNamespace(sleep=lambda seconds: None, monotonic=streaming.time.monotonic))
    return hub


def rows_of(data):
    dataset = ImageDataset(data.train, "img", "fine_label").for_training(None, None)
    batches = [dataset.__getitems__(batch) for batch in StreamSampler(dataset, 16, (1, 0, 0))]
    return sorted((item["index"], item["labels"], item["pixels"].sum().item()) for batch in batches for item in batch)


def test_a_stream_has_the_rows_the_names_and_the_fingerprint_of_the_dataset(cifar):
    streamed, local = load_data(NAME, **OPTIONS), load_data(NAME, label_column="fine_label")
    assert streamed.describe() == local.describe() and streamed.names == local.names
    on_disk = ImageDataset(local.train, "img", "fine_label")
    expected = [(item["index"], item["labels"], item["pixels"].sum().item()) for item in map(on_disk.__getitem__, range(200))]
    assert rows_of(streamed) == expected


@pytest.mark.parametrize("kind", [429, 500, 503, "drop", "cut", "slow"])
def test_a_fault_that_passes_loses_no_row_and_repeats_none(cifar, monkeypatch, kind):
    expected = rows_of(load_data(NAME, **OPTIONS))
    data = load_data(NAME, **OPTIONS)
    monkeypatch.setattr(cifar, "delay", 0.0)
    fault = cifar.fail("GET .*/lfs/.*train" if kind in BODY_FAULTS else r"/resolve/.*train", kind, times=8)
    assert rows_of(data) == expected and fault.hits


@pytest.mark.parametrize("kind", [401, 403])
def test_a_fault_that_stays_is_told_at_once(cifar, kind):
    data = load_data(NAME, **OPTIONS)
    fault = cifar.fail(r"/resolve/.*train", kind, times=None)
    assert {401: "does not accept the token", 403: "is gated"}[kind] in told(rows_of, data)
    assert fault.hits <= 2
