"""Streams: each row once, in the order and with the images of a map-style run, resumed without reading the past."""

import io
import itertools
import json
import os
import tarfile

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cli_helpers import NAMES, distill, images
from data_helpers import alone as alone
from data_helpers import encode
from data_helpers import pytestmark as pytestmark
from torch.utils.data import DataLoader
from trainer_helpers import trainer_for, weights

from hf_kd.data import ImageDataset, load_data, order, streaming, wait
from hf_kd.data import dataset as dataset_module
from hf_kd.data.collators import EvaluationCollator
from hf_kd.data.order import EpochSampler, RowGroup, batch_sizes, epoch_order
from hf_kd.data.streaming import StreamedRows

FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
SHARDS = {1: [53], 3: [5, 31, 17], 4: [1, 20, 9, 23], 7: [9, 3, 14, 1, 8, 7, 11]}


def write(folder, sizes, split="train", seed=0, rows_per_group=4, features=FEATURES):
    """Parquet files of these numbers of rows. Returns their paths and, for comparison, all rows."""
    folder.mkdir(exist_ok=True)
    table = datasets.Dataset.from_dict(images(sum(sizes), seed), features=features)
    paths = []
    for i, size in enumerate(sizes):
        start = sum(sizes[:i])
        paths.append(str(folder / f"{split}-{i:05d}-of-{len(sizes):05d}.parquet"))
        part = table.select(range(start, start + size)).with_format("arrow")[:]
        pq.write_table(
            part.replace_schema_metadata(table.data.schema.metadata), paths[-1], row_group_size=rows_per_group
        )
    return paths, table


def stream(folder, sizes, **options):
    return ImageDataset(StreamedRows(write(folder, sizes, **options)[0], FEATURES)).for_training(None, None)


def small_blocks(monkeypatch, ahead=1):
    """Blocks of 8 rows, and so many bytes read ahead: of one row group at least."""
    monkeypatch.setattr(order, "BLOCK_ROWS", 8)
    for module in (order, streaming):
        monkeypatch.setattr(module, "READ_AHEAD", ahead)


def wait_for_reads(rows):
    """Until nothing more is read ahead."""
    count = 0
    while count < len(rows._tables):
        count = len(rows._tables)
        for table in list(rows._tables.values()):
            table.exception()


# ---- the order ----


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shards", SHARDS)
def test_each_row_once_a_pass_and_as_many_steps_for_all(tmp_path, processes, workers, shards):
    dataset = stream(tmp_path, SHARDS[shards])
    passes = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        seen, steps = [], []
        for rank in range(processes):
            sampler = EpochSampler(dataset, 8, (processes, rank, workers))
            sampler.set_epoch(epoch)
            loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=list)
            found = [[item["index"] for item in batch] for batch in loader]
            assert found == list(sampler) and all(found)
            steps.append(len(found))
            seen += found
        assert steps == [len(sampler)] * processes
        assert sorted(row for batch in seen for row in batch) == list(range(53))
        passes.append(seen)
    assert passes[0] != passes[1]


@pytest.mark.parametrize(
    ("rows", "batch", "processes", "sizes"),
    [
        (16, 4, 2, [4, 4, 4, 4]),
        (19, 4, 2, [4, 4, 4, 4, 2, 1]),
        (17, 4, 2, [4, 4, 4, 3, 1, 1]),  # someone would have none
        (5, 4, 1, [4, 1]),
        (3, 8, 2, [2, 1]),
    ],
)
def test_the_last_steps_are_shared_evenly(rows, batch, processes, sizes):
    assert batch_sizes(rows, batch, processes) == sizes


@pytest.mark.parametrize(("rows", "batch", "processes"), [(1, 4, 2), (3, 1, 2)])
def test_images_that_cannot_be_shared_are_refused(rows, batch, processes):
    with pytest.raises(ValueError, match=f"{rows} images cannot be shared by {processes} processes"):
        batch_sizes(rows, batch, processes)


def test_blocks_are_shuffled_and_their_row_groups_too(monkeypatch):
    monkeypatch.setattr(order, "BLOCK_ROWS", 10)
    groups = [RowGroup("f", i, 5 * i, 5) for i in range(8)]
    rows = epoch_order(groups, 0, 0)
    blocks = [{row // 5 for row in rows[i : i + 10].tolist()} for i in range(0, 40, 10)]
    assert all(len(block) == 2 for block in blocks) and sorted(g for b in blocks for g in b) == list(range(8))
    assert any(max(block) - min(block) > 1 for block in blocks)  # not neighbours in the file
    assert np.abs(np.diff(rows)).max() > 1
    assert rows.tolist() == epoch_order(groups, 0, 0).tolist() != epoch_order(groups, 1, 0).tolist()
    assert epoch_order(groups, None, 3).tolist() == list(range(40))


def test_a_row_group_is_read_by_few_readers_and_else_the_factor_is_told(tmp_path, monkeypatch, caplog):
    small_blocks(monkeypatch)
    read = []
    keep = StreamedRows._read
    monkeypatch.setattr(StreamedRows, "_read", lambda self, group: read.append(group) or keep(self, group))
    dataset = stream(tmp_path / "many", [96, 96])
    for rank in (0, 1):
        for batch in EpochSampler(dataset, 8, (2, rank, 0)):
            dataset.__getitems__(batch)
    assert sum(group.rows for group in read) <= 1.2 * 192
    assert not caplog.text
    dataset = stream(tmp_path / "one", [40], rows_per_group=40)
    EpochSampler(dataset, 8, (2, 0, 2))
    assert "2 processes with 2 loader workers read 1 row groups, so that each image is read 4.0 times" in caplog.text


# ---- the rows ----


def test_the_items_are_those_of_the_dataset_on_disk(tmp_path):
    paths, table = write(tmp_path, SHARDS[4])
    local, streamed = ImageDataset(table, seed=3), ImageDataset(StreamedRows(paths, FEATURES), seed=3)
    local, streamed = (each.for_training("pad_crop", None) for each in (local, streamed))
    for dataset in (local, streamed):
        dataset.set_epoch(2)
    rows = np.random.default_rng(0).permutation(53).tolist()
    for a, b in zip(local.__getitems__(rows), streamed.__getitems__(rows), strict=True):
        assert a.keys() == b.keys() and (a["index"], a["labels"]) == (b["index"], b["labels"])
        assert torch.equal(a["pixels"], b["pixels"])


def test_what_has_been_read_is_forgotten_and_what_follows_is_read_ahead(tmp_path, monkeypatch):
    """By two readers, each with half of the 100 row groups: 5 of them ahead, and never one of the other's."""
    dataset = stream(tmp_path, [400])
    rows = dataset.dataset
    size, images = rows.groups[0].size, sum(len(row["image"]["bytes"]) for row in rows.__getitems__(range(4)))
    assert images < size < 2 * images  # with the statistics, which hold the first and the last image
    for group in rows.groups:
        object.__setattr__(group, "size", size)
    small_blocks(monkeypatch, ahead=5 * size)
    samplers = [EpochSampler(dataset, 8, (2, rank, 0)) for rank in (0, 1)]
    own = [set(rows._groups_of(np.concatenate(list(sampler)))) for sampler in samplers]
    assert not own[0] & own[1]
    for sampler, groups in zip(samplers, own, strict=True):
        rows._clear()
        batches, used = list(sampler), set()
        for i, batch in enumerate(batches):
            dataset.__getitems__(batch)
            wait_for_reads(rows)
            used |= set(rows._groups_of(np.array(batch)))
            held = set(rows._tables)
            assert held <= groups and sum(rows.groups[place].size for place in held) <= (5 + 2 + 1) * size
            following = list(dict.fromkeys(rows._groups_of(np.concatenate([batch[-1:], *batches[i + 1 :]]))))
            ahead = [place for place in following if place not in used]
            assert set(ahead[:5]) <= held and not set(ahead[6:]) & held


def test_what_cannot_be_read_ahead_is_tried_again_when_it_is_needed(tmp_path, monkeypatch):
    small_blocks(monkeypatch, ahead=10**9)
    dataset = stream(tmp_path, [40])
    keep, faults = StreamedRows._read, [PermissionError("not now")] * 3

    def read(self, group):
        if faults and group.index:
            raise faults.pop()
        return keep(self, group)

    monkeypatch.setattr(StreamedRows, "_read", read)
    dataset.dataset.__getitems__([0], range(10))
    wait_for_reads(dataset.dataset)
    assert 1 < len(dataset.dataset._tables) < 10 and not faults
    assert [row["label"] for row in dataset.dataset.__getitems__(range(40))] == [i % 6 for i in range(40)]


def test_a_failure_of_the_network_is_tried_again_and_others_are_not(tmp_path, monkeypatch):
    waits, faults = [], [ConnectionError("cut"), TimeoutError("slow")]
    monkeypatch.setattr(streaming.time, "sleep", waits.append)
    rows = stream(tmp_path, [9]).dataset
    opened = streaming.fsspec.open

    def open_(*args):
        if faults:
            raise faults.pop()
        return opened(*args)

    monkeypatch.setattr(streaming.fsspec, "open", open_)
    assert rows[8]["label"] == 8 % 6 and waits == [1, 2]
    faults += [PermissionError("no")]
    with pytest.raises(PermissionError):
        rows[0]
    monkeypatch.setattr(streaming, "PATIENCE", 0)
    faults += [ConnectionError("out")]
    with pytest.raises(ConnectionError):
        rows[4]


# ---- loading ----


def test_load_data_streams_a_folder(tmp_path):
    write(tmp_path / "d", [30, 23])
    write(tmp_path / "d", [20], "test", 1)
    local, streamed = (
        load_data(str(tmp_path / "d")),
        load_data(str(tmp_path / "d"), streaming=True, max_train_samples=33),
    )
    assert (len(streamed.train), len(streamed.eval), streamed.names) == (33, 20, local.names)
    assert (streamed.image_column, streamed.label_column) == ("image", "label")
    assert [row["label"] for row in streamed.train.__getitems__(range(33))] == local.train["label"][:33]
    again = load_data(str(tmp_path / "d"), streaming=True)
    assert again.fingerprint == streamed.fingerprint != local.fingerprint
    write(tmp_path / "d", [19], "test", 1)
    assert load_data(str(tmp_path / "d"), streaming=True).fingerprint != again.fingerprint


def test_what_cannot_be_streamed_is_refused(tmp_path):
    write(tmp_path / "one", [9])
    with pytest.raises(ValueError, match="has the splits train: a stream has no hold-out.*--eval_split"):
        load_data(str(tmp_path / "one"), streaming=True)
    (tmp_path / "folder" / "train" / "cat").mkdir(parents=True)
    images(1, 0)["image"][0].save(tmp_path / "folder" / "train" / "cat" / "1.png")
    with pytest.raises(ValueError, match="made of imagefolder files.*leave --streaming out"):
        load_data(str(tmp_path / "folder"), streaming=True)
    write(tmp_path / "unlabelled", [9])
    paths, table = write(tmp_path / "unlabelled", [6], "test")
    part = table.with_format("arrow")[:].set_column(1, "label", [[-1] * 6])
    pq.write_table(part.replace_schema_metadata(table.data.schema.metadata), paths[0])
    with pytest.raises(ValueError, match="split 'test' of .* has labels of -1"):
        load_data(str(tmp_path / "unlabelled"), streaming=True)
    iterable = datasets.load_dataset("parquet", data_files={"train": paths}, split="train", streaming=True)
    with pytest.raises(ValueError, match="streaming=True"):
        trainer_for(tmp_path / "out", train=iterable)


@pytest.mark.parametrize("label", ["cls", "json"])
def test_a_webdataset_is_streamed(tmp_path, monkeypatch, label):
    monkeypatch.setattr(streaming, "TAR_GROUP", 4)
    sources = {"train": (SHARDS[4], images(53, 0)), "test": ([9], images(9, 1))}
    (tmp_path / "d").mkdir()
    for split, (sizes, rows) in sources.items():
        pairs = iter(enumerate(zip(rows["image"], rows["label"], strict=True)))
        for shard, size in enumerate(sizes):
            with tarfile.open(tmp_path / "d" / f"{split}-{shard:04d}.tar", "w") as tar:
                for i, (image, y) in itertools.islice(pairs, size):
                    content = str(y).encode() if label == "cls" else json.dumps({"label": y, "text": "x"}).encode()
                    for name, data in ((f"a/{i:05d}.{label}", content), (f"a/{i:05d}.png", encode(image))):
                        member = tarfile.TarInfo(name)
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
    data = load_data(str(tmp_path / "d"), streaming=True)
    assert (len(data.train), len(data.eval), data.names) == (53, 9, list("012345"))
    assert [group.rows for group in data.train.groups] == [1, *[4] * 5, 4, 4, 1, *[4] * 5, 3]
    dataset = ImageDataset(data.train).for_training(None, None)
    items = [item for batch in EpochSampler(dataset, 8, (1, 0, 0)) for item in dataset.__getitems__(batch)]
    assert sorted(item["index"] for item in items) == list(range(53))
    for item in items:
        expected = np.asarray(sources["train"][1]["image"][item["index"]])
        assert item["labels"] == item["index"] % 6
        assert np.array_equal(item["pixels"].permute(1, 2, 0).numpy(), expected)
    assert len(load_data(str(tmp_path / "d"), streaming=True, max_train_samples=10).train) == 10
    # The index is made once; of a file that has changed again. Names come from a file.
    made, keep = [], streaming._samples
    monkeypatch.setattr(streaming, "_samples", lambda tar, file, **more: made.append(file) or keep(tar, file, **more))
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n")
    again = load_data(str(tmp_path / "d"), streaming=True, class_names=str(tmp_path / "names.txt"))
    assert (again.fingerprint, again.train.groups, again.names) == (data.fingerprint, data.train.groups, NAMES)
    assert not made
    os.utime(tmp_path / "d" / "test-0000.tar", (0, 0))
    load_data(str(tmp_path / "d"), streaming=True)
    assert [os.path.basename(file) for file in made] == ["test-0000.tar"]


# ---- training ----


SETTINGS = {"kind": "vit", "augment": "pad_crop", "max_steps": -1, "num_train_epochs": 2}


def test_a_run_is_that_of_the_data_on_disk_in_the_same_order(tmp_path):
    paths, table = write(tmp_path / "d", SHARDS[7])
    rows, (_, test) = StreamedRows(paths, FEATURES), write(tmp_path / "d", [9, 4], "test", 1)
    local = ImageDataset(table, seed=3)
    local.groups = rows.groups
    found = []
    for train, evaluation in (
        (local, test),
        (rows, StreamedRows(write(tmp_path / "e", [9, 4], "test", 1)[0], FEATURES)),
    ):
        trainer = trainer_for(tmp_path / "out", train=train, evaluation=evaluation, **SETTINGS)
        trainer.train()
        metrics = trainer.evaluate()
        found.append((weights(trainer), metrics["eval_loss"], metrics["eval_top1"]))
    assert trainer.state.global_step == 2 * 7
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


@pytest.mark.parametrize(("step", "workers"), [(3, 0), (7, 0), (10, 2)])
def test_a_run_goes_on_where_it_was_without_the_rows_before(tmp_path, monkeypatch, step, workers):
    rows = StreamedRows(write(tmp_path / "d", SHARDS[4])[0], FEATURES)
    options = SETTINGS | {"dataloader_num_workers": workers, "save_strategy": "steps", "save_steps": step}
    whole = trainer_for(tmp_path / "out", train=rows, **options)
    seen = []

    def noting(trainer):
        keep = trainer._prepare_inputs
        trainer._prepare_inputs = lambda inputs: seen.append(inputs["index"].tolist()) or keep(inputs)

    noting(whole)
    whole.train()
    every, seen[:] = list(seen), []
    decoded = []
    keep = dataset_module.decode_row
    monkeypatch.setattr(dataset_module, "decode_row", lambda *args: decoded.append(1) or keep(*args))
    resumed = trainer_for(tmp_path / "out", train=rows, **options)
    noting(resumed)
    resumed.train(str(tmp_path / "out" / f"checkpoint-{step}"))
    assert seen == every[step:]
    assert torch.equal(weights(resumed), weights(whole))
    if not workers:  # else others decode
        assert len(decoded) == sum(map(len, seen))


def test_where_the_data_is_gone_the_state_is_saved_first(tmp_path, monkeypatch):
    rows = StreamedRows(write(tmp_path / "d", SHARDS[4])[0], FEATURES)
    whole = trainer_for(tmp_path / "whole", train=rows, **SETTINGS)
    whole.train()
    keep, calls = StreamedRows.__getitems__, []

    def fail(self, *args):
        calls.append(args)
        if len(calls) == 5:  # the loader is one batch ahead
            raise PermissionError("access was withdrawn")
        return keep(self, *args)

    monkeypatch.setattr(StreamedRows, "__getitems__", fail)
    with pytest.raises(PermissionError, match="withdrawn") as caught:
        trainer_for(tmp_path / "out", train=rows, **SETTINGS).train()
    assert caught.value.__notes__ == [f"The state of step 3 is saved in {tmp_path / 'out' / 'checkpoint-3'}."]
    resumed = trainer_for(tmp_path / "out", train=rows, **SETTINGS)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.parametrize(("fails_at", "broken"), [(0, False), (3, False), (3, True)])
def test_where_the_data_of_an_evaluation_is_gone_the_state_is_saved_first(fails_at, broken, tmp_path, monkeypatch):
    (train, _), (_, test) = write(tmp_path / "d", SHARDS[4]), write(tmp_path / "d", [20], "test", 1)  # 3 batches
    settings = {"train": StreamedRows(train, FEATURES), "evaluation": test, "loss": "uskd", "ema_decay": 0.7}
    settings |= SETTINGS | {"eval_strategy": "steps", "eval_steps": 5}
    whole = trainer_for(tmp_path / "whole", **settings)
    whole.train()
    keep, calls = EvaluationCollator.__call__, []

    def fail(self, items):
        calls.append(items)
        if len(calls) <= fails_at:
            return keep(self, items)
        if broken:
            return keep(self, items) | {"skipped": {"a.png": "empty"}}
        raise PermissionError("access was withdrawn")

    step, error = 10 if fails_at else 5, ValueError if broken else PermissionError
    monkeypatch.setattr(EvaluationCollator, "__call__", fail)
    cut = trainer_for(tmp_path / "out", **settings)
    with pytest.raises(
        ValueError if broken else PermissionError, match="1 of 20" if broken else "withdrawn"
    ) as caught:
        cut.train()
    assert caught.value.__notes__ == [
        f"The state of step {step} is saved in {tmp_path / 'out' / f'checkpoint-{step}'}."
    ]
    with pytest.raises(error) as caught:
        cut.evaluate()  # not in training: nothing is saved
    assert not hasattr(caught.value, "__notes__")
    monkeypatch.setattr(EvaluationCollator, "__call__", keep)
    resumed = trainer_for(tmp_path / "out", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(weights(resumed), weights(whole))


def test_the_wait_for_data_is_logged_and_warned_of_once(tmp_path, monkeypatch, caplog):
    trainer = trainer_for(tmp_path / "out", train=StreamedRows(write(tmp_path / "d", [24])[0], FEATURES), **SETTINGS)
    trainer.train()
    waits = [entry["data_wait"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(waits) == 6 and all(0 < share < 1 for share in waits) and not caplog.text
    monkeypatch.setattr(wait, "AFTER", 0)
    monkeypatch.setattr(wait, "MOST", 0)
    meter = wait.DataWait()
    for _ in range(2):
        with meter.waiting():
            pass
        assert 0 < meter.share(2) < 1
    assert caplog.text.count("raise --dataloader_num_workers (now 2)") == 1


def test_the_command_line(tmp_path, things, capsys, undrawn_figures):
    def run(*more):
        return distill(things, "--output_dir", tmp_path / "out", "--streaming", *more)

    assert run("--save_steps", "1", "--save_strategy", "steps", "--max_train_samples", "40") == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["data"]["train_size"], record["plan"]["data"]["streaming"]) == (40, True)
    (tmp_path / "out" / "run.json").unlink()
    again = ["--resume_from_checkpoint", "last", "--max_train_samples", "40"]
    assert run(*again, "--dataloader_num_workers", "1") != 0
    assert "data.stream_workers (0 there, 1 here)" in capsys.readouterr().err
    assert run(*again) == 0
    after = json.loads((tmp_path / "out" / "run.json").read_text())
    assert after["metrics"] == record["metrics"]
