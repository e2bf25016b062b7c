"""A stream that two processes share: as in one process, resumed, and stopped where one of them has no data.

Also run by torchrun: `test_streaming_processes.py FOLDER`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import alone as alone
from data_helpers import pytestmark as pytestmark
from test_streaming import FEATURES, SETTINGS, SHARDS, write
from trainer_helpers import noted, trainer_for, weights

from hf_kd.data.order import EpochSampler, batch_sizes
from hf_kd.data.streaming import StreamedRows


def train_two_passes(folder):
    """Two passes of 53 images, of which the last step has 5; in one process with the batches of two. The file `resume`
    holds the step to go on from, `fail` the process that fails after the step."""
    rows = StreamedRows(sorted(map(str, (folder / "d").glob("train*"))), FEATURES)
    test = StreamedRows(sorted(map(str, (folder / "d").glob("test*"))), FEATURES)
    world = int(os.environ.get("WORLD_SIZE", 1))
    options = {"per_device_train_batch_size": 16 // world, "save_strategy": "steps", "save_steps": 3, "loss": "nkd"}
    trainer = trainer_for(folder / f"out-{world}", train=rows, evaluation=test, **SETTINGS | options)
    seen = noted(trainer)
    if (folder / "resume").exists():
        trainer.train(str(folder / f"out-{world}" / f"checkpoint-{(folder / 'resume').read_text()}"))
    elif (folder / "fail").exists():
        fail_in(trainer, *map(int, (folder / "fail").read_text().split()))
        trainer.train()
    else:
        trainer.train()
    counted, predict = [], trainer.prediction_step

    def counting(model, inputs, *args, **options):
        counted.extend(trainer.gather_function(inputs["index"]).tolist())
        return predict(model, inputs, *args, **options)

    trainer.prediction_step = counting
    metrics = trainer.evaluate() | {"ids": sorted(counted)}
    rank = trainer.args.process_index
    (folder / f"seen-{world}-{rank}.json").write_text(json.dumps(seen))
    if trainer.is_world_process_zero():
        torch.save(weights(trainer), folder / f"weights-{world}.pt")
        (folder / f"metrics-{world}.json").write_text(json.dumps(metrics))
    trainer.accelerator.wait_for_everyone()


def fail_in(trainer, rank, step):
    get = StreamedRows.__getitems__

    def fail(self, *args):
        if trainer.args.process_index == rank and trainer.state.global_step == step:
            raise PermissionError("access was withdrawn")
        return get(self, *args)

    StreamedRows.__getitems__ = fail


@pytest.mark.slow
def test_two_processes_equal_one_and_resume_in_the_middle_of_a_pass(tmp_path, monkeypatch):
    write(tmp_path / "d", SHARDS[4])
    write(tmp_path / "d", [9, 4], "test", 1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]

    def launch(expected=0):
        done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
        assert done.returncode == expected, done.stderr[-3000:]
        if expected:
            return done.stderr
        seen = [json.loads((tmp_path / f"seen-2-{rank}.json").read_text()) for rank in (0, 1)]
        return [
            list(map(sorted, (a + b for a, b in zip(*seen, strict=True))))[: 2 * 4],
            torch.load(tmp_path / "weights-2.pt"),
        ]

    seen, two = launch()
    assert [sum(map(len, seen[i : i + 4])) for i in (0, 4)] == [53, 53]
    assert sorted(row for batch in seen[:4] for row in batch) == list(range(53)) and len(seen[3]) == 5
    keep = EpochSampler._batches

    def merged(self):
        self.sizes, self.processes = batch_sizes(53, 8, 2), 2
        parts = keep(self)
        self.processes = 1
        return [np.concatenate(parts[i : i + 2]) for i in range(0, len(parts), 2)]

    monkeypatch.setattr(EpochSampler, "_batches", merged)
    monkeypatch.setattr(EpochSampler, "__len__", lambda self: 4)
    train_two_passes(tmp_path)
    torch.testing.assert_close(two, torch.load(tmp_path / "weights-1.pt"), rtol=1e-4, atol=1e-5)
    first, second = (json.loads((tmp_path / f"metrics-{n}.json").read_text()) for n in (1, 2))
    assert first["ids"] == second["ids"] == list(range(13))
    for name in ("loss", "kl"):
        assert first[f"eval_{name}"] == pytest.approx(second[f"eval_{name}"], rel=1e-4)
    (tmp_path / "resume").write_text("6")
    resumed, again = launch()
    assert resumed[:2] == seen[6:8] and torch.equal(two, again)
    # A process without data: both save the step before, also where it is not the first process.
    (tmp_path / "resume").unlink()
    (tmp_path / "fail").write_text("1 5")
    told = launch(expected=1)
    assert "access was withdrawn" in told and "The state of step 5 is saved in" in told
    assert sorted(path.name for path in (tmp_path / "out-2").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-5"]
    (tmp_path / "resume").write_text("5")
    resumed, again = launch()
    assert resumed[:3] == seen[5:8] and torch.equal(two, again)


if __name__ == "__main__":
    train_two_passes(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
