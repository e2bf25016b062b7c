"""Two processes (gloo, CPU) against one: same losses, same weights, same metrics."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback


class StopRankOne(TrainerCallback):
    """Ctrl-C that reaches one process of the two."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGINT)


class CountCollectives(TrainerCallback):
    """Counts those of the third step, from the end of the second; the first differ, since DDP builds its buckets."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]).__enter__()
        elif state.global_step == 3:
            self.profiler.__exit__(None, None, None)
            self.calls = Counter(event.name for event in self.profiler.events() if event.name.startswith("c10d::"))


# One launch for all cases: importing takes longer than training.
pytestmark = pytest.mark.slow


# Also run by torchrun: `test_distributed.py FOLDER CASE ...`.
def worker(folder: str, loss: str) -> None:
    from trainer_helpers import NAMES, freeze_batch_norm, make_teacher, rows, trainer_for

    from hf_kd.data import ImageDataset

    if loss == "collectives":
        return collectives(folder)
    if loss == "evaluation fault":
        return evaluation_faults(folder)
    world = int(os.environ.get("WORLD_SIZE", 1))
    more = {"ema": {"ema_decay": 0.7, "eval_strategy": "epoch"}, "frozen": {"freeze_backbone": True}}.get(loss, {})
    kind, loss = ("resnet" if more else "vit"), {"ema": "ce", "frozen": "uskd"}.get(loss, loss)
    broken, stop, teacher = None, loss == "stop", None
    if loss == "two teachers":
        loss, teacher = "kd", [make_teacher(), make_teacher("vit", size=32, names=NAMES[::-1])]
    if stop:
        loss = "ce"
    permuted = loss == "permuted"
    if permuted:
        loss = "nkd"
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
    if loss == "token":
        loss, kind = "hard", "distilled timm_deit"
    if permuted:
        data = ImageDataset(data, seed=3).with_partners(3)
    trainer = trainer_for(
        folder, kind, loss, teacher, train=data, evaluation=rows(21, seed=5), per_device_train_batch_size=16 // world,
        gradient_accumulation_steps=1 if loss in ("uskd", "dist") else 2, max_steps=-1, augment="pad_crop",
        num_train_epochs=20 if stop else 1,
        learning_rate=1e-4 if loss == "dist" else 0.05,  # whose gradient is large at the start
        **{"max_skipped_fraction": 0.5, "eval_strategy": "no", **more},
    )  # fmt: skip
    if not trainer.args.freeze_backbone:  # which holds all of them, and shall do so by itself
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
        head = trainer.auxiliary_head
        weights = trainer.model.state_dict() | ({} if head is None else head.state_dict())
        torch.save(weights, Path(folder) / "final.pt")
        history = [e for e in trainer.state.log_history if "loss" in e]
        result = {"metrics": metrics, "history": history, "classes": trainer.class_counts["eval"]}
        Path(folder, "result.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()  # a rank that leaves early takes the others' connections with it


def collectives(folder: str) -> None:
    """How many a step of each loss has, and one of plain DDP."""
    from tiny import tiny
    from trainer_helpers import NAMES, rows, trainer_for

    counts, state = {}, SimpleNamespace(global_step=0)
    for loss in ("ce", "nkd", "uskd"):
        counter = CountCollectives()
        trainer = trainer_for(folder, "resnet", loss, train=rows(96), max_steps=4, logging_strategy="no")
        trainer.add_callback(counter)
        trainer.train()
        counts[loss] = counter.calls
    counter = CountCollectives()
    plain = torch.nn.parallel.DistributedDataParallel(tiny("resnet", names=NAMES)[0].train())
    for state.global_step in (1, 2, 3):
        plain(torch.rand(4, 3, 32, 32)).logits.sum().backward()
        counter.on_step_end(None, state, None)
    counts["plain"] = counter.calls
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, f"counts-{trainer.args.process_index}.json").write_text(json.dumps(counts))


def evaluation_faults(folder: str) -> None:
    """The second process cannot read, from the first batch of an evaluation on or later; both skip too many images."""
    from data_helpers import with_broken
    from trainer_helpers import rows, trainer_for, weights

    from hf_kd.data.collators import EvaluationCollator

    collate, found = EvaluationCollator.__call__, {}

    def training(name, evaluation, fails_at=None, resume=None, **more):
        calls = []

        def reading(self, items):
            calls.append(items)
            if fails_at is not None and trainer.args.process_index == 1 and len(calls) > fails_at:
                raise PermissionError("access was withdrawn")
            return collate(self, items)

        settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "ema_decay": 0.7} | more
        trainer = trainer_for(Path(folder, name), evaluation=evaluation, **settings)
        EvaluationCollator.__call__ = reading
        try:
            trainer.train(resume)
        except (OSError, ValueError) as error:
            return [str(error), *error.__notes__]
        finally:
            EvaluationCollator.__call__ = collate
        return weights(trainer)

    data = rows(40, seed=5)  # 3 batches for each
    whole = training("whole", data)
    for name, fails_at in (("first", 0), ("later", 2)):
        found[name] = training(name, data, fails_at)
        found[f"{name} resumed"] = torch.equal(training(name, data, resume=True), whole)
    found["broken"] = training("broken", with_broken(data, 9, 10, 17, 18), max_skipped_fraction=0.05)  # 2 each
    rank = os.environ["RANK"]
    Path(folder, f"found-{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder `2` with the results of every case by name, and `1` with those that one process can have."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    cases = ["nkd", "permuted", "uskd", "dist", "token", "two teachers", "ema", "frozen", "skip"]
    command += [str(Path(__file__)), str(folder / "2"), *cases, "stop", "evaluation fault", "collectives"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    for case in cases:
        worker(str(folder / "1" / case), case)
    return folder


def results(folder, case):
    return [json.loads((folder / n / case / "result.json").read_text()) for n in "12"]


@pytest.mark.parametrize("loss", ["nkd", "permuted", "uskd", "dist", "token", "two teachers", "ema", "frozen"])
def test_two_processes_equal_one(loss, folder):
    """48 images: the last optimizer step has half as many, and the evaluation set (21) is odd."""
    one, two = results(folder, loss)
    teaches = loss in ("nkd", "dist")
    assert len(one["history"]) == len(two["history"])
    for a, b in zip(one["history"], two["history"], strict=True):
        for name in (k for k in a if k.startswith("loss")):
            assert b[name] == pytest.approx(a[name], rel=1e-4), name
    # A batch of another size may decide one of the 21 images otherwise; means of all images show one counted twice.
    for name in ("loss", *(["kl"] if teaches else [])):
        assert two["metrics"][f"eval_{name}"] == pytest.approx(one["metrics"][f"eval_{name}"], rel=1e-4), name
    for name in ("top1", "top5", "ece", *(["agreement", "teacher_top1"] if teaches else [])):
        assert two["metrics"][f"eval_{name}"] == pytest.approx(one["metrics"][f"eval_{name}"], abs=1.01 / 21), name
    assert two["metrics"]["eval_macro_top1"] == pytest.approx(one["metrics"]["eval_macro_top1"], abs=1.01 / 18)
    errors = 21 * (1 - one["metrics"].get("eval_teacher_top1", 0))
    repeated = [result["metrics"].get("eval_teacher_errors_repeated", 0) * errors for result in (one, two)]
    assert repeated[1] == pytest.approx(repeated[0], abs=1.01) and (repeated[0] > 0 or not teaches)
    assert one["classes"]["images"] == two["classes"]["images"] == [4, 4, 4, 3, 3, 3]
    assert sum(abs(x - y) for x, y in zip(one["classes"]["hits"], two["classes"]["hits"], strict=True)) <= 1
    a, b = (torch.load(folder / n / loss / "final.pt") for n in "12")
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5, msg=name)
    assert not (folder / "2" / loss / "aux_head.safetensors").exists()


def test_an_image_skipped_on_one_rank_keeps_the_mean_exact(folder):
    one, two = results(folder, "skip")
    for a, b in zip(one["history"], two["history"], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)


def test_ctrl_c_in_one_process_stops_both_with_a_checkpoint(folder):
    stopped = [(folder / "2" / "stop" / f"stopped-{rank}").read_text() for rank in (0, 1)]
    assert [text.split(";")[0] for text in stopped] == ["stopped at step 4"] * 2
    saved = {path.name for path in (folder / "2" / "stop" / "checkpoint-4").iterdir()}
    assert saved >= {"trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"}  # moved when both were written
    assert not (folder / "2" / "stop" / ".incomplete").exists()


def test_both_save_their_state_where_one_has_no_data_for_an_evaluation(folder):
    out, withdrawn = folder / "2" / "evaluation fault", "access was withdrawn"
    for rank in (0, 1):
        found = json.loads((out / f"found-{rank}.json").read_text())
        for name in ("first", "later"):
            text = withdrawn if rank else f"process 1 has no data: {withdrawn}"
            assert found[name] == [text, f"The state of step 2 is saved in {out / name / 'checkpoint-2'}."]
            assert found[f"{name} resumed"]
        text, note = found["broken"]
        assert text.startswith("4 of 40 images could not be decoded (4 empty)") and "step 2 is saved" in note


@pytest.mark.parametrize(("loss", "own"), [("ce", 1), ("nkd", 1), ("uskd", 2)])
def test_a_step_has_the_collectives_of_ddp_and_one_of_the_count_and_of_uskds_mean(loss, own, folder):
    for rank in (0, 1):
        counts = json.loads((folder / "2" / "collectives" / f"counts-{rank}.json").read_text())
        plain = counts["plain"]
        assert plain["c10d::allreduce_"] >= 1 and plain["c10d::broadcast_"] >= 1  # gradients; running statistics
        assert counts[loss] == plain | {"c10d::allreduce_": plain["c10d::allreduce_"] + own}


if __name__ == "__main__":
    for case in sys.argv[2:]:
        worker(f"{sys.argv[1]}/{case}", case)
    torch.distributed.destroy_process_group()
