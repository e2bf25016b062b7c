"""Two processes of the command (gloo, CPU): one fails or is asked to stop, and both end, saying which and why."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import REPOSITORY, images
from transformers import TrainerCallback

from hf_kd import checkpointing, ranks
from hf_kd.checkpointing import last_checkpoint

pytestmark = pytest.mark.slow


class At(TrainerCallback):
    """Does something in one rank at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def fail(*_, **__):
    raise OSError("the disk is gone")


def nan_logits(trainer):
    """The logits of step 8 are NaN."""

    def hook(module, inputs, output):
        if module.training and trainer.state.global_step == 7:
            output.logits = output.logits * float("nan")
        return output

    trainer.model.register_forward_hook(hook)


def break_something(case: str) -> None:
    """Makes this rank do what the case is called."""
    from hf_kd.data import ImageDataset
    from hf_kd.trainer import DistillationTrainer

    rank, actions = int(os.environ["RANK"]), {
        "raises": lambda: 1 / 0,
        "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "stopped": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    }  # fmt: skip
    if rank == 1 and case in actions:
        step = At(8, actions[case])
        init = DistillationTrainer.__init__
        DistillationTrainer.__init__ = lambda self, *a, **k: init(self, *a, callbacks=[step], **k)
    if rank == 1 and case == "reads":
        first = iter([ImageDataset.__getitems__] * 12)  # batches
        ImageDataset.__getitems__ = lambda self, indices: next(first, fail)(self, indices)
    if rank == 0 and case == "saves":
        first = iter([checkpointing.weights_to_save])
        checkpointing.weights_to_save = lambda *a: next(first, fail)(*a)
    if rank == 0 and case == "records":
        import hf_kd.experiment.run

        hf_kd.experiment.run.write_record = fail
    if rank == 1 and case == "nan":
        train = DistillationTrainer.train
        DistillationTrainer.train = lambda self, *a, **k: (nan_logits(self), train(self, *a, **k))[1]


def worker(case: str, statuses: str, argv: list[str]) -> int:
    from hf_kd.cli import main

    break_something(case)
    status, rank = 1, int(os.environ["RANK"])
    if case == "data" and rank == 1:
        argv = [text.replace("/data", "/rank-1-data") for text in argv]
    try:
        status = main(argv)
    finally:
        Path(statuses, f"{case}-{rank}").write_text(str(status))
    return status


ACCELERATE = ["accelerate.commands.launch", "--quiet", "--config_file", "examples/accelerate_configs/cpu_ddp.yaml"]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def launch(case, folder, argv, launcher=TORCHRUN, expected=1):
    """Messages and the exit status of each rank (None: it was killed). The launcher must end within two minutes."""
    command = [sys.executable, "-m", *launcher, __file__, case, str(folder), *map(str, argv)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == expected, done.stderr[-4000:]
    files = [folder / f"{case}-{rank}" for rank in (0, 1)]
    return done.stderr, [int(file.read_text()) if file.exists() else None for file in files]


@pytest.fixture
def arguments(things, tmp_path):
    """12 steps, 6 an epoch, with a checkpoint after each."""
    return [
        "distill", "--config", things / "config.yaml", "--per_device_train_batch_size", 4, "--logging_steps", 100,
        "--optim", "sgd", "--output_dir", tmp_path / "out",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "failed", "message", "launcher"),
    [
        ("raises", 1, "rank 1 has failed: division by zero", ACCELERATE),
        ("killed", 1, "rank 1 ended without a message: killed", TORCHRUN),
        ("reads", 1, "rank 1 has failed: the disk is gone", TORCHRUN),
        ("saves", 0, "rank 0 has failed: the disk is gone", TORCHRUN),
        ("records", 0, "rank 0 has failed: the disk is gone", TORCHRUN),
    ],
)
def test_the_other_rank_says_which_failed_and_why(case, failed, message, launcher, arguments, tmp_path):
    said, statuses = launch(case, tmp_path, arguments, launcher)
    assert f"error: rank {1 - failed}: {message}" in said, said[-4000:]
    # The launcher ends the other one when the first has ended, which may be before that has written its status.
    assert statuses[1 - failed] in (1, None) and statuses[failed] == (None if case == "killed" else 1)
    if failed == 0:
        assert "error: rank 0: the disk is gone" in said
    assert Path(last_checkpoint(tmp_path / "out")).name == f"checkpoint-{12 if case == 'records' else 6}"


def test_ranks_with_other_data_are_refused_by_both(arguments, things, tmp_path):
    import datasets

    (things / "rank-1-data").mkdir()
    for split, n in (("train", 48), ("test", 24)):
        features = datasets.Dataset.from_parquet(str(things / "data" / f"{split}.parquet")).features
        datasets.Dataset.from_dict(images(n, 5), features=features).to_parquet(
            things / "rank-1-data" / f"{split}.parquet"
        )
    try:
        said, statuses = launch("data", tmp_path, [*arguments, "--dataset", things / "data"])
    finally:
        shutil.rmtree(things / "rank-1-data")
    assert statuses == [1, 1]
    for rank in (0, 1):
        assert f"error: rank {rank}: rank 1 would train something else than rank 0" in said, said[-4000:]
    assert "data.fingerprint (" in said and not (tmp_path / "out" / "plan.json").exists()


def test_logits_that_one_rank_finds_nan_end_the_run_of_both_as_diverged(arguments, tmp_path):
    said, statuses = launch("nan", tmp_path, arguments)
    assert statuses == [1, 1] and "1 of 1 runs diverged" in said, said[-4000:]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["diverged"].startswith("rank 1: student_logits holds 24 NaN")
    assert last_checkpoint(tmp_path / "out").endswith("checkpoint-6")


def test_a_signal_to_one_rank_stops_both_and_resume_continues(arguments, tmp_path):
    said, statuses = launch("stopped", tmp_path, arguments)
    assert statuses == [75, 75], said[-4000:]
    assert f"Resume with: torchrun --nproc_per_node 2 -m hf_kd resume {tmp_path / 'out'}" in said
    assert said.count("exitcode  : 75") == 2
    assert said.count("SIGUSR1: stopped at step 9; the state is saved in") == 2
    said, statuses = launch("resumed", tmp_path, ["resume", tmp_path / "out"], expected=0)
    assert statuses == [0, 0], said[-4000:]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["history"][-1]["step"] == 12


def test_one_process_has_no_ranks_to_name():
    with pytest.raises(OSError, match="the disk is gone"), ranks.failures_named():
        fail()
    assert ranks.prefix() == ""


if __name__ == "__main__":
    sys.exit(worker(sys.argv[1], sys.argv[2], sys.argv[3:]))
