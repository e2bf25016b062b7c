"""DDP, ZeRO and FSDP2 with two processes (gloo, CPU): the weights of one process, checkpoints, exports, refusals.

DeepSpeed is in the test environment with the newest versions. FSDP2 needs a GPU: here accelerate is told that there
are some, see `benchmarks/parity.py`, whose cells these are.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from cli_helpers import REPOSITORY
from safetensors.torch import load_file
from tiny import tiny, tiny_config
from torch import nn
from trainer_helpers import NAMES, config, noted, rows
from transformers import TrainerCallback

from hf_kd import engines, load_student
from hf_kd.checkpointing import HEAD_FILE
from hf_kd.cli import main
from hf_kd.data import order
from hf_kd.data.streaming import StreamedRows

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import parity  # noqa: E402

pytestmark = pytest.mark.slow
ENGINES = ["ddp", *(pytest.param(f"zero{i}", marks=pytest.mark.deepspeed) for i in (1, 2, 3)), "fsdp2"]
# All losses, all students, fixed and live statistics of batches; the others are in the benchmark.
CELLS = ["uskd/vit", "nkd/resnet", "kd/timm_resnet", parity.LIVE]
SAVED = ("model.safetensors", HEAD_FILE)
# With momentum: torch does not load the state of an optimizer that has none under FSDP2.
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "optim_args": "momentum=0.9"}


class At(TrainerCallback):
    """Calls a function with the control at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action(control)


def stop(control):
    control.should_training_stop = True


def trainer_of(engine, folder, cell="uskd/vit", at=None, **settings):
    trainer = parity.cell_trainer(engine, cell, folder, **settings)
    parity.check_engine(trainer, engine)
    if at is not None:
        trainer.add_callback(At(*at))
    return trainer


# ---- in both processes of an engine ----


def exports(engine, folder):
    """Without learning, what is saved is what every engine was given."""
    for cell in ("uskd/vit", "uskd/timm_resnet"):
        trainer = trainer_of(engine, folder / cell, cell, learning_rate=0.0, max_steps=1)
        trainer.train()
        trainer.save_model()


def resumes(engine, folder):
    trainer_of(engine, folder / "whole", **SAVING).train()
    trainer_of(engine, folder / "cut", at=(3, stop), **SAVING).train()
    trainer_of(engine, folder / "cut", **SAVING).train(resume_from_checkpoint=True)


def takes_the_best(engine, folder):
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = trainer_of(engine, folder, **SAVING | best)
    accuracy, evaluate = iter([0.9, 0.4]), trainer.evaluate
    trainer.evaluate = lambda *args, **kwargs: evaluate(*args, **kwargs) | {"eval_top1": next(accuracy)}
    trainer.train()
    trainer.save_model()


def finds_nan(engine, folder):
    """In the second process's part of the weights, both processes see it."""

    def spoil(control):
        weight = trainer.accelerator.unwrap_model(trainer.model).get_parameter("classifier.weight")
        if trainer.args.process_index == 1:
            with torch.no_grad():
                engines._local_part(weight).view(-1)[-1:] = torch.nan

    trainer = trainer_of(engine, folder, at=(2, spoil), **SAVING)
    try:
        trainer.train()
    except FloatingPointError as error:
        (folder / f"error-{trainer.args.process_index}").write_text(str(error))


def describes(engine, folder):
    """Without learning, the record is that of one process; called by the first process alone once it is evaluated."""
    from hf_kd.reporting.collect import make_record

    trainer = trainer_of(engine, folder, learning_rate=0.0, max_steps=1)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        student = make_record(trainer, metrics)["student"]
        (folder / "student.json").write_text(json.dumps(student, default=str))
    trainer.accelerator.wait_for_everyone()


def goes_on_from_one(engine, folder):
    """From the checkpoint of one process, or says why not."""
    trainer = trainer_of(engine, folder, **SAVING)
    if trainer.is_world_process_zero():
        shutil.copytree(folder.parents[1] / "one" / "resumes" / "whole", folder, dirs_exist_ok=True)
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    except ValueError as error:
        (folder / "error").write_text(str(error))


class Plain(nn.Module):
    """A student that is no model of transformers, with a weight that gets no gradient if it is `idle`."""

    def __init__(self, idle=False):
        super().__init__()
        self.config = tiny_config("resnet", names=NAMES)
        self.body, self.fc = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 6)
        if idle:
            self.idle = nn.Parameter(torch.zeros(3))

    def forward(self, pixel_values):
        return self.fc(self.body(pixel_values).mean((2, 3)))


def trains_plain_modules(engine, folder):
    settings = {"feature_module": "body", "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(engine, folder, student=Plain(), **settings)
    trainer.train()
    trainer.save_model()


def has_a_weight_without_gradient(engine, folder):
    settings = {"feature_module": "body", "max_steps": 2}
    try:
        trainer_of(engine, folder, student=Plain(idle=True), **settings).train()
    except ValueError as error:
        (folder / f"error-{os.environ.get('RANK')}").write_text(str(error))
    trainer_of(engine, folder, student=Plain(idle=True), ddp_find_unused_parameters=True, **settings).train()


def freezes(engine, folder):
    trainer = trainer_of(engine, folder, "uskd/resnet", freeze_backbone=True, **SAVING)
    trainer.train()
    trainer.save_model()


class OfTwo(order.EpochSampler):
    """In one process, the batches of two processes for the same step."""

    def __init__(self, dataset, batch_size, readers, *args):
        super().__init__(dataset, batch_size // 2, (2, 0, readers[2]), *args)

    def __iter__(self):
        every = self._batches()
        return (np.concatenate(every[i : i + 2]).tolist() for i in range(0, len(every), 2))


@mock.patch.object(order, "BLOCK_ROWS", 8)
def streams(engine, folder):
    """Three passes of two steps each; resumed in the second one."""
    rank = os.environ.get("RANK", "0")
    (folder / rank).mkdir(parents=True)
    data = []
    for split, table in (("train", rows(parity.IMAGES)), ("test", rows(parity.EVAL_IMAGES, seed=5))):
        file = str(folder / rank / f"{split}.parquet")
        table.to_parquet(file, batch_size=4)  # rows of a row group
        data.append(StreamedRows([file], table.features))
    settings = SAVING | {"data": data, "save_steps": 3, "max_steps": 6}
    sampler = OfTwo if engine == "one" else order.EpochSampler
    with mock.patch.object(order, "EpochSampler", sampler):
        whole = trainer_of(engine, folder / "whole", **settings)
        seen = noted(whole)
        whole.train()
        metrics = whole.evaluate()
        trainer_of(engine, folder / "cut", at=(5, stop), **settings).train()
        cut = trainer_of(engine, folder / "cut", **settings)
        resumed = noted(cut)
        cut.train(resume_from_checkpoint=True)
    numbers = {key: metrics[key] for key in ("eval_loss", "eval_top1", "eval_samples")}
    (folder / f"found-{rank}.json").write_text(json.dumps({"seen": seen, "resumed": resumed, "metrics": numbers}))
    whole.accelerator.wait_for_everyone()


ALL = (exports, resumes, takes_the_best, finds_nan, describes, goes_on_from_one, trains_plain_modules)
ALL += (has_a_weight_without_gradient, freezes, streams)
JOBS = {job.__name__: job for job in ALL}


# ---- what they have left ----


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module", params=ENGINES)
def engine(request, folder):
    """An engine that has run, in one launch, as one process has before."""
    for name in ("one", request.param):
        if not (folder / f"{name}.log").exists():
            error = parity.launch(name, folder, [__file__, str(folder), name])
            assert not error, f"{error}\n{(folder / f'{name}.log').read_text()[-3000:]}"
    return request.param


@pytest.mark.parametrize("cell", CELLS)
def test_two_processes_equal_one(engine, cell, folder):
    differences = parity.compare(engine, cell, folder)
    assert parity.is_equal(differences), differences


@pytest.mark.parametrize("cell", ["uskd/vit", "uskd/timm_resnet"])
def test_what_is_saved_is_the_plain_student_byte_by_byte(engine, cell, folder):
    saved, plain = (folder / name / "exports" / cell for name in (engine, "one"))
    for name in ("model.safetensors", "config.json"):
        assert (saved / name).read_bytes() == (plain / name).read_bytes(), name


def test_resuming_gives_the_weights_of_a_run_without_interruption(engine, folder):
    whole, cut = (folder / engine / "resumes" / name / "checkpoint-4" for name in ("whole", "cut"))
    for name in SAVED:
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    head, earlier = (load_file(path / HEAD_FILE) for path in (whole, whole.with_name("checkpoint-2")))
    assert head["weight"].shape == (6, 32) and not torch.equal(head["weight"], earlier["weight"])


def test_the_best_checkpoint_is_what_is_saved(engine, folder):
    folder = folder / engine / "takes_the_best"
    saved = (folder / "model.safetensors").read_bytes()
    assert saved == (folder / "checkpoint-2" / "model.safetensors").read_bytes()
    assert saved != (folder / "checkpoint-4" / "model.safetensors").read_bytes()


def test_a_weight_that_is_not_finite_is_found_by_every_process(engine, folder):
    folder = folder / engine / "finds_nan"
    for rank in (0, 1):
        assert "1 weights are not finite at step 2: ['classifier.weight']" in (folder / f"error-{rank}").read_text()
    assert not (folder / "checkpoint-2").exists()


def test_a_plain_module_is_saved_without_the_head_that_its_checkpoint_has(engine, folder):
    folder = folder / engine / "trains_plain_modules"
    keys = {"body.weight", "body.bias", "fc.weight", "fc.bias"}
    for path in (folder, folder / "checkpoint-2"):
        assert load_file(path / "model.safetensors").keys() == keys
    assert load_file(folder / "checkpoint-2" / HEAD_FILE)["weight"].shape == (6, 8)


def test_ddp_names_the_option_for_weights_without_gradient(engine, folder):
    """The others need none."""
    files = sorted((folder / engine / "has_a_weight_without_gradient").glob("error-*"))
    assert len(files) == (2 if engine == "ddp" else 0)
    assert all("--ddp_find_unused_parameters True" in file.read_text() for file in files)


def test_a_frozen_backbone_stays_and_the_heads_are_those_of_one_process(engine, folder):
    saved, plain = (folder / name / "freezes" for name in (engine, "one"))
    assert same_weights(saved, plain)
    initial, found = tiny("resnet", names=NAMES)[0].state_dict(), load_file(saved / "model.safetensors")
    changed = {name for name, value in found.items() if not torch.equal(value, initial[name])}
    assert changed == {"classifier.1.weight", "classifier.1.bias"}


def test_an_evaluation_is_of_the_running_statistics_that_are_saved(engine, folder, tmp_path):
    found = torch.load(folder / engine / parity.LIVE / "found.pt")
    student, _ = load_student(folder / engine / parity.LIVE)
    metrics = trainer_of("one", tmp_path, parity.LIVE, student=student).evaluate()
    assert metrics["eval_loss"] == pytest.approx(found["metrics"]["eval_loss"], abs=1e-6)


def test_the_record_measures_the_student_as_it_is_saved(engine, folder):
    ours, plain = (json.loads((folder / name / "describes" / "student.json").read_text()) for name in (engine, "one"))
    assert 0 < ours.pop("latency_ms") < 5 * plain.pop("latency_ms")
    assert ours == plain


def same_weights(folder, other, step=4):
    pairs = [[load_file(path / f"checkpoint-{step}" / name) for path in (folder, other)] for name in SAVED]
    return all(parity.largest_difference(*pair) <= parity.TOLERANCE for pair in pairs)


def test_a_stream_has_the_images_and_weights_of_one_process_and_resumes(engine, folder):
    folder, plain = (folder / name / "streams" for name in (engine, "one"))
    ours = [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]
    one = json.loads((plain / "found-0.json").read_text())
    for key, first in (("seen", 0), ("resumed", 6)):  # of 12 micro-batches, two to a step and four to a pass
        shared = [sorted(a + b) for a, b in zip(*(found[key] for found in ours), strict=True)]
        assert shared == [sorted(batch) for batch in one[key]] == [sorted(batch) for batch in one["seen"][first:]]
    for start in (0, 4, 8):
        assert sorted(sum(one["seen"][start : start + 4], [])) == list(range(parity.IMAGES))
    assert ours[0]["metrics"] == ours[1]["metrics"] == pytest.approx(one["metrics"], abs=1e-6)
    assert same_weights(folder / "whole", plain / "whole", step=6)
    for name in SAVED:
        cut, whole = ((folder / run / "checkpoint-6" / name).read_bytes() for run in ("cut", "whole"))
        assert cut == whole, name


def test_one_process_goes_on_from_two_and_two_from_one_under_ddp_only(engine, folder, tmp_path):
    """The others' checkpoints are of their own."""
    whole, two = folder / "one" / "resumes" / "whole", folder / engine / "goes_on_from_one"
    shutil.copytree(folder / engine / "resumes" / "whole", tmp_path, dirs_exist_ok=True)
    one = trainer_of("one", tmp_path, **SAVING)
    if engine == "ddp":
        one.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert same_weights(tmp_path, whole) and same_weights(two, whole)
        return
    kind = "fsdp" if engine == "fsdp2" else engine
    with pytest.raises(ValueError, match=rf"engine \({kind} there, ddp here\)"):
        one.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert f"engine (ddp there, {kind} here)" in (two / "error").read_text()


# ---- the command line ----

CONFIGURATIONS = {
    "ddp": ["--loss", "uskd"],
    "cpu_ddp": ["--loss", "uskd"],
    "deepspeed_zero2": ["--loss", "uskd"],
    "cpu_deepspeed_zero2": ["--loss", "uskd"],
    "deepspeed_zero3": ["--compare", "ce,uskd"],
    "cpu_deepspeed_zero3": ["--loss", "uskd"],
    "fsdp2": ["--loss", "uskd"],
}
COMMON = ["--optim", "sgd", "--learning_rate", "0.01", "--save_strategy", "no"]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.deepspeed if "deepspeed" in name else ()) for name in CONFIGURATIONS],
)
def test_the_command_line_with_a_configuration_of_the_examples(name, things, tmp_path):
    """The models, metrics and terms are those of one process."""
    file = REPOSITORY / "examples" / "accelerate_configs" / f"{name}.yaml"
    script = __file__ if name == "fsdp2" else str(REPOSITORY / "examples" / "run_distill.py")
    arguments = ["--config", str(things / "config.yaml"), *CONFIGURATIONS[name], *COMMON]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(file), script]
    two = [*arguments, "--output_dir", str(tmp_path / "2"), "--per_device_train_batch_size", "8"]
    done = subprocess.run(command + two, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert main(["distill", *arguments, "--output_dir", str(tmp_path / "1")]) == 0
    files = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("model.safetensors"))
    assert len(files) == (2 if "--compare" in arguments else 1)
    for path in files:
        ours, plain = (tmp_path / number / path for number in "21")
        assert parity.largest_difference(load_file(ours), load_file(plain)) <= parity.TOLERANCE
        record, expected = (json.loads((folder.parent / "run.json").read_text()) for folder in (ours, plain))
        assert record["metrics"] == pytest.approx(expected["metrics"], abs=1e-5)
        assert record["terms"] == pytest.approx(expected["terms"], abs=1e-5)
        assert record["student"]["parameters"] == expected["student"]["parameters"]
        assert record["plan"]["runs"][0]["engine"] == ENGINE_OF[name.removeprefix("cpu_")]
        assert f"--config_file examples/accelerate_configs/{name}.yaml" in record["command"]


# ---- refusals ----

ENGINE_OF = {"ddp": "ddp", "deepspeed_zero2": "zero2", "deepspeed_zero3": "zero3", "fsdp2": "fsdp"}
ZERO3 = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"}


@pytest.mark.deepspeed
def test_zero3_that_would_save_nothing_is_refused(tmp_path):
    from transformers.integrations import deepspeed

    with contextlib.ExitStack() as stack:
        stack.callback(deepspeed.unset_hf_deepspeed_config)
        with pytest.raises(ValueError, match='"stage3_gather_16bit_weights_on_model_save": true'):
            config(tmp_path, deepspeed=ZERO3)


if __name__ == "__main__":  # in a process of an engine: FOLDER ENGINE, or the arguments of run_distill.py
    status = 0
    if sys.argv[1].startswith("--"):
        with parity.pretend_gpus():
            status = main(["distill", *sys.argv[1:]])
    else:
        parity.work(sys.argv[2], Path(sys.argv[1]), parity.cells_of(CELLS) | JOBS)
    sys.exit(status)
