"""Two processes (gloo, CPU) against one: same losses, same weights, same metrics."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback


class StopRankOne(TrainerCallback):
    """Ctrl-C that reaches one process of the two."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGINT)


# Also run by itself, by torchrun: `test_distributed.py FOLDER LOSS`.
def worker(folder: str, loss: str) -> None:
    from test_trainer import freeze_batch_norm, rows, trainer_for

    world = int(os.environ.get("WORLD_SIZE", 1))
    broken, stop = None, loss == "stop"
    if stop:
        loss = "ce"
    if loss == "skip":
        loss, broken = "ce", 5
    data = rows(48)
    if broken is not None:
        import datasets

        data = data.cast_column("image", datasets.Image(decode=False))
        data = data.map(
            lambda row, i: {"image": {"bytes": b"", "path": None}} if i == broken else row, with_indices=True
        )
        data = data.cast_column("image", datasets.Image())
    trainer = trainer_for(
        folder, "vit", loss, train=data, evaluation=rows(21, seed=5), per_device_train_batch_size=16 // world,
        gradient_accumulation_steps=1 if loss == "uskd" else 2, max_steps=-1, augment="pad_crop",
        num_train_epochs=20 if stop else 1,
        max_skipped_fraction=0.5, eval_strategy="no",
    )  # fmt: skip
    freeze_batch_norm(trainer.model)
    if stop:
        trainer.add_callback(StopRankOne())
    assert trainer.args.world_size == world
    try:
        trainer.train()
    except KeyboardInterrupt as stopped:
        Path(folder, f"stopped-{trainer.args.process_index}").write_text(str(stopped))
    metrics = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        torch.save(trainer.model.state_dict(), Path(folder) / "final.pt")
        history = [e for e in trainer.state.log_history if "loss" in e]
        Path(folder, "result.json").write_text(json.dumps({"metrics": metrics, "history": history}))
    trainer.accelerator.wait_for_everyone()  # a rank that leaves early takes the others' connections with it
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def launch(folder: Path, loss: str, processes: int) -> dict:
    folder.mkdir()
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*start, str(Path(__file__)), str(folder), loss]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("loss", ["nkd", "uskd"])
@pytest.mark.slow
def test_two_processes_equal_one(loss, tmp_path):
    """48 images: the last optimizer step has half as many, and the evaluation set (21) is odd."""
    one, two = (launch(tmp_path / str(n), loss, n) for n in (1, 2))
    assert len(one["history"]) == len(two["history"])
    for a, b in zip(one["history"], two["history"], strict=True):
        for name in (k for k in a if k.startswith("loss")):
            assert b[name] == pytest.approx(a[name], rel=1e-4), name
    # A batch of another size may decide one of the 21 images otherwise; means of all images show one counted twice.
    for name in ("loss", *(["kl"] if loss == "nkd" else [])):
        assert two["metrics"][f"eval_{name}"] == pytest.approx(one["metrics"][f"eval_{name}"], rel=1e-4), name
    for name in ("top1", "top5", "ece", *(["agreement", "teacher_top1"] if loss == "nkd" else [])):
        assert two["metrics"][f"eval_{name}"] == pytest.approx(one["metrics"][f"eval_{name}"], abs=1.01 / 21), name
    a, b = (torch.load(tmp_path / n / "final.pt") for n in "12")
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5, msg=name)
    assert not (tmp_path / "2" / "aux_head.safetensors").exists()


@pytest.mark.slow
def test_an_image_skipped_on_one_rank_keeps_the_mean_exact(tmp_path):
    one, two = (launch(tmp_path / str(n), "skip", n) for n in (1, 2))
    for a, b in zip(one["history"], two["history"], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)


@pytest.mark.slow
def test_ctrl_c_in_one_process_stops_both_with_a_checkpoint(tmp_path):
    launch(tmp_path / "2", "stop", 2)
    assert [(tmp_path / "2" / f"stopped-{rank}").read_text().split(";")[0] for rank in (0, 1)] == [
        "stopped at step 10"
    ] * 2
    saved = {path.name for path in (tmp_path / "2" / "checkpoint-10").iterdir()}
    assert saved >= {"trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"}  # moved when both were written
    assert not (tmp_path / "2" / ".incomplete").exists()


if __name__ == "__main__":
    worker(*sys.argv[1:])
