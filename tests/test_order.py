"""The order of map-style training: each image once an epoch, in the same steps for any number of processes.

Streams, whose order is read in row groups, are in test_streaming.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data_helpers import alone as alone
from data_helpers import pytestmark as pytestmark
from trainer_helpers import noted, rows, trainer_for, weights

from hf_kd.data import ImageDataset
from hf_kd.data.collators import TrainingCollator
from hf_kd.data.order import EpochSampler
from hf_kd.spec import SCHEMA_VERSION

N = 53
SETTINGS = {"kind": "vit", "augment": "pad_crop", "max_steps": -1, "num_train_epochs": 2}


class Own(torch.utils.data.Dataset):
    """A dataset that hf_kd does not wrap, where it comes with a collator of its own."""

    groups = ["field", "studio"]  # not the row groups of a stream

    def __len__(self):
        return N

    def __getitem__(self, i):
        pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        return {"pixels": pixels, "labels": i % 6, "index": i, "epoch": 0}


def steps(processes, batch_size=16, seed=0, epoch=0, workers=0, n=N):
    """The rows of each step, of all processes, which have as many."""
    samplers = [
        EpochSampler(range(n), batch_size // processes, (processes, i, workers), seed=seed) for i in range(processes)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [sum(batches, []) for batches in zip(*samplers, strict=True)]


@pytest.mark.parametrize("n", [16, 37, 53])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_images_of_a_step_are_those_of_one_process(n, workers):
    expected = steps(1, n=n)
    assert sorted(sum(expected, [])) == list(range(n))
    for processes in (2, 4):
        assert steps(processes, n=n, workers=workers) == expected


def test_only_a_stream_has_row_groups(tmp_path):
    assert ImageDataset(Own()).groups is None
    trainer_for(tmp_path / "out", train=Own(), evaluation=Own(), max_steps=1).train()


def test_another_epoch_and_another_seed_have_another_order():
    assert len({str(steps(1, seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert steps(2, seed=None, epoch=3) == [list(range(N))[i : i + 16] for i in range(0, N, 16)]


def trainer_of(folder, own=False, **options):
    collate, data = (TrainingCollator(), Own()) if own else (None, rows(N))
    settings = SETTINGS | ({"augment": "none"} if own else {}) | {"save_strategy": "steps", "save_steps": 3} | options
    return trainer_for(folder, train=data, collate=collate, **settings)


@pytest.mark.parametrize(
    ("own", "workers", "accumulation", "step", "batch"),
    [(False, 0, 1, 3, 3), (True, 0, 1, 9, 9), (False, 2, 2, 6, 7 + 4)],
)
def test_a_run_goes_on_without_the_images_before(tmp_path, monkeypatch, own, workers, accumulation, step, batch):
    options = {"dataloader_num_workers": workers, "gradient_accumulation_steps": accumulation}
    whole = trainer_of(tmp_path / "out", own, **options)
    every = noted(whole)
    whole.train()
    assert [sorted(sum(every[i : i + 7], [])) for i in (0, 7)] == [list(range(N))] * 2 and every[:7] != every[7:]
    read, keep = [], ImageDataset.__getitems__
    monkeypatch.setattr(ImageDataset, "__getitems__", lambda self, rows: read.extend(rows) or keep(self, rows))
    resumed = trainer_of(tmp_path / "out", own, **options)
    seen = noted(resumed)
    resumed.train(str(tmp_path / "out" / f"checkpoint-{step}"))
    assert seen == every[batch:]
    assert torch.equal(weights(resumed), weights(whole))
    if not workers and not own:  # else others read
        assert read == sum(seen, [])


def test_the_seed_of_the_run_gives_the_order_and_sequential_that_of_the_rows(tmp_path):
    def order(**options):
        trainer = trainer_for(tmp_path / "out", train=ImageDataset(rows(N)), **SETTINGS | options)
        seen = noted(trainer)
        trainer.train()
        return sum(seen[:7], [])

    assert order(train_sampling_strategy="sequential") == list(range(N))
    assert order() != order(seed=4) == order(seed=5, data_seed=4)


def test_a_checkpoint_of_the_order_before_is_not_continued(tmp_path):
    trainer_of(tmp_path / "out").train()
    file = tmp_path / "out" / "plan.json"
    plan = json.loads(file.read_text())
    file.write_text(json.dumps(plan | {"schema_version": SCHEMA_VERSION - 1}))
    with pytest.raises(ValueError, match="schema version 1, this hf_kd reads 2"):
        trainer_of(tmp_path / "out").train(str(tmp_path / "out" / "checkpoint-3"))


@pytest.mark.parametrize("option", ["dispatch_batches", "split_batches"])
def test_batches_that_one_process_shares_out_are_refused(tmp_path, option):
    with pytest.raises(ValueError, match=f"{option} is not supported"):
        trainer_for(tmp_path / "out", accelerator_config={option: True})


# ---- two processes; run by torchrun too: `test_order.py FOLDER` ----

CASES = {"plain": (False, 1), "accumulated": (False, 2), "own": (True, 1)}


def train(folder, case):
    own, accumulation = CASES[case.removesuffix("-resumed")]
    world = int(os.environ.get("WORLD_SIZE", 1))
    trainer = trainer_of(
        folder / f"{case.removesuffix('-resumed')}-{world}",
        own,
        loss="nkd",
        per_device_train_batch_size=16 // accumulation // world,
        gradient_accumulation_steps=accumulation,
    )
    seen, counted, keep = noted(trainer), [], trainer.prediction_step
    trainer.train(str(Path(trainer.args.output_dir, "checkpoint-6")) if case.endswith("-resumed") else None)

    def counting(model, inputs, *args, **options):
        counted.extend(trainer.gather_function(inputs["index"]).tolist())
        return keep(model, inputs, *args, **options)

    trainer.prediction_step = counting
    metrics = {} if own else trainer.evaluate(rows(21, seed=5))
    name = f"{case}-{world}-{trainer.args.process_index}"
    (folder / f"{name}.json").write_text(json.dumps({"seen": seen, "counted": counted, "metrics": metrics}))
    torch.save(weights(trainer), folder / f"{name}.pt")
    trainer.accelerator.wait_for_everyone()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The results of every case, in one process and in two; in two also resumed."""
    folder = tmp_path_factory.mktemp("order")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for case in CASES:
        train(folder, case)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one_for_a_number_that_does_not_divide(folder, case):
    one, *two = (json.loads((folder / f"{case}-{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    shared = [a + b for a, b in zip(*(result["seen"] for result in two), strict=True)]
    assert shared == one["seen"] and sorted(sum(shared[: len(shared) // 2], [])) == list(range(N))
    expected = torch.load(folder / f"{case}-1-0.pt")
    torch.testing.assert_close(torch.load(folder / f"{case}-2-0.pt"), expected, rtol=1e-4, atol=1e-5)
    if case != "own":
        assert sorted(two[0]["counted"]) == sorted(one["counted"]) == list(range(21))
        for name in ("loss", "kl"):
            assert two[0]["metrics"][f"eval_{name}"] == pytest.approx(one["metrics"][f"eval_{name}"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_go_on_in_the_middle_of_an_epoch(folder, case):
    for rank in (0, 1):
        whole, resumed = (json.loads((folder / f"{c}-2-{rank}.json").read_text()) for c in (case, f"{case}-resumed"))
        assert resumed["seen"] == whole["seen"][-len(resumed["seen"]) :] and resumed["seen"]
    assert torch.equal(torch.load(folder / f"{case}-resumed-2-0.pt"), torch.load(folder / f"{case}-2-0.pt"))


if __name__ == "__main__":
    for case in CASES:
        train(Path(sys.argv[1]), case)
        train(Path(sys.argv[1]), f"{case}-resumed")
    torch.distributed.destroy_process_group()
