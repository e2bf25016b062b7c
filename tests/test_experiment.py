"""The plan of an experiment: what it holds, what a continuation may change, and who trains a run."""

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import types

import pytest
from cli_helpers import REPOSITORY, distill
from tiny import tiny

from hf_kd import DistillationConfig
from hf_kd.cli import main
from hf_kd.cli.arguments import command_to_record, parse
from hf_kd.experiment.folder import check_disk
from hf_kd.experiment.lock import RunLock
from hf_kd.experiment.plan import plan
from hf_kd.launcher import check_processes, launch_command
from hf_kd.spec import DataSource, Experiment, check_same, differences, read_plan, run_spec

pytestmark = pytest.mark.usefixtures("undrawn_figures")


def config(folder="out", **values):
    values = {"loss": "ce", "use_cpu": True, "report_to": "none", "lr_scheduler_type": "constant"} | values
    return DistillationConfig(str(folder), **values)


def experiment(**values):
    spec = run_spec(config(**values))
    return Experiment.from_dict(Experiment(output_dir="out", runs=(spec,)).to_dict())


def run_json(folder):
    return json.loads((folder / "run.json").read_text())


# ---- the specification ----


def test_a_plan_survives_its_file():
    plan_ = experiment(loss="nkd", loss_kwargs={"gamma": 0.5}, lr_step_epochs=[1.0], optim_args="momentum=0.9")
    assert Experiment.from_dict(json.loads(json.dumps(plan_.to_dict()))) == plan_
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan_.runs[0].seed = 1
    with pytest.raises(ValueError, match="schema version 0"):
        Experiment.from_dict(plan_.to_dict() | {"schema_version": 0})


def test_another_number_of_processes_goes_on_with_the_same_steps_where_the_engine_allows():
    def launched(processes, batch, engine="ddp", streaming=False):
        (run,) = experiment(per_device_train_batch_size=batch).runs
        run = dataclasses.replace(run, processes=processes, engine=engine)
        return dataclasses.replace(experiment(), runs=(run,), data=DataSource(streaming=streaming))

    for engine in ("ddp", "fsdp"):
        assert differences(launched(2, 8, engine), launched(1, 16, engine)) == []
    (found,) = differences(launched(2, 8), launched(1, 8))
    assert found.startswith("processes (2 there, 1 here): checkpoints of DeepSpeed are for as many processes")
    assert len(differences(launched(2, 8, "zero2"), launched(1, 16, "zero2"))) == 2
    assert len(differences(launched(2, 8, streaming=True), launched(1, 16, streaming=True))) == 2
    assert differences(launched(2, 8, "zero2"), launched(2, 8, "zero3")) == ["engine (zero2 there, zero3 here)"]


def test_a_run_is_trained_with_what_its_spec_says():
    asked = config(
        loss="uskd", loss_kwargs={"beta": 0.3}, warmup_steps=0.1, label_smoothing_factor=0.1, seed=7, eval_steps=5,
        eval_strategy="steps", bf16=True, mixup_alpha=0.2, hub_token="hf_" + "x" * 34,
    )  # fmt: skip
    spec = run_spec(asked)
    again = DistillationConfig(**spec.arguments()).to_dict()
    before = asked.to_dict() | {"loss_kwargs": again["loss_kwargs"]}
    assert {k: v for k, v in again.items() if "token" not in k} == {
        k: v for k, v in before.items() if "token" not in k
    }
    assert spec.loss.hyperparameters["beta"] == 0.3 and "x" * 34 not in str(spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 1.0}, "learning_rate (5e-05 there, 1.0 here)"),
        ({"loss": "nkd"}, "loss.name (ce there, nkd here)"),
        ({"loss_kwargs": {"weight": 2.0}}, "loss.hyperparameters.weight (1.0 there, 2.0 here)"),
        ({"per_device_train_batch_size": 3}, "per_device_train_batch_size (8 there, 3 here)"),
        ({"augment": "flip"}, "augment (resized_crop there, flip here)"),
        ({"seed": 1}, "seed (42 there, 1 here)"),
    ],
)
def test_a_continuation_that_would_train_otherwise_is_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_same(experiment(), experiment(**change), "out")


@pytest.mark.parametrize(
    "change", [{"logging_steps": 7}, {"save_total_limit": 3}, {"dataloader_num_workers": 2}, {"num_train_epochs": 9}]
)
def test_what_does_not_change_the_past_is_free(change):
    assert differences(experiment(), experiment(**change)) == []


@pytest.mark.parametrize(
    ("schedule", "free"),
    [
        ({"lr_scheduler_type": "cosine"}, False),
        ({"lr_scheduler_type": "linear"}, False),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.1}, False),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10}, True),
        ({"lr_scheduler_type": "cosine", "lr_step_epochs": [1.0]}, True),
    ],
)
def test_more_epochs_only_where_the_past_does_not_depend_on_them(schedule, free):
    found = differences(experiment(**schedule), experiment(**schedule, num_train_epochs=9))
    assert (found == []) == free
    assert free or "depends on the length of training" in found[0]


# ---- planning ----


def test_a_dry_run_prints_the_plan_and_writes_nothing(things, tmp_path, capsys):
    out = tmp_path / "out"
    more = ["--compare", "ce,nkd", "--teacher", things / "teacher", "--seeds", "1", "2", "--output_dir", out]
    assert distill(things, *more, "--dry_run") == 0
    printed = capsys.readouterr().out
    for text in (
        "48 images to train on",
        "24 to evaluate on",
        "6 classes",
        "6 steps a run of 16 images",
        "32 px",
        "GB",
    ):
        assert text in printed, text
    assert [name in printed for name in ("ce, seed 1", "nkd, seed 2")] == [True, True]
    (yours,) = [line for line in printed.splitlines() if line.startswith("set by you")]
    assert "learning_rate 0.001" in yours and "weight_decay" not in yours
    assert not out.exists()


def test_the_plan_holds_what_the_run_depends_on(things, tmp_path):
    model, processor = tiny("vit", size=48, names=[f"class {i}" for i in range(6)])
    model.save_pretrained(tmp_path / "large"), processor.save_pretrained(tmp_path / "large")
    argv = ["--config", str(things / "config.yaml"), "--loss", "nkd", "--teacher", str(tmp_path / "large")]
    plan_ = plan(*parse([*argv, "--output_dir", str(tmp_path / "out")]), "hf-kd distill")
    assert plan_.train_image_size == 48 and plan_.runs[0].settings["train_image_size"] == 48
    assert (plan_.data.train_size, plan_.data.eval_size, len(plan_.data.classes)) == (48, 24, 6)
    assert plan_.data.fingerprint and plan_.teacher.id == str(tmp_path / "large")
    assert plan_.requirements["steps"] == 6 and plan_.requirements["disk_bytes"] > 4 * plan_.requirements["parameters"]
    argv += ["--per_device_train_batch_size", "20", "--dataloader_drop_last", "true"]
    assert plan(*parse([*argv, "--output_dir", str(tmp_path / "out")])).requirements["steps"] == 2 * 2
    assert not (tmp_path / "out").exists()


def test_too_little_disk_is_an_error_before_the_start(things, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=1000))
    assert distill(things, "--output_dir", tmp_path / "out") == 1
    assert "GB are free: choose another --output_dir" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    check_disk(Experiment(output_dir=str(tmp_path)), 1)  # a plan that knows no size asks for none


def test_no_token_is_recorded():
    token = "hf_" + "x" * 34
    argv = ["--student", "a/b", "--hub_token", token, f"--hub_token={token}", "--push_to_hub", "--loss", "ce"]
    assert command_to_record(argv) == ["--student", "a/b", "--loss", "ce"]


# ---- resuming ----


def test_an_unfinished_run_is_continued_as_what_it_was(things, tmp_path, capsys):
    """Cut off, then asked to go on as something else; then from its plan alone, without a further argument."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert distill(things, "--output_dir", out, "--loss", "uskd") == 0
    before = run_json(out)
    (out / "run.json").unlink()
    for folder in out.glob("checkpoint-*"):
        if folder.name != "checkpoint-3":
            folder.rename(tmp_path / folder.name)
    more = ["--output_dir", out, "--resume_from_checkpoint", "last", "--loss", "ce", "--learning_rate", "0.1"]
    capsys.readouterr()
    assert distill(things, *more, "--seed", "3") == 1
    error = capsys.readouterr().err
    for text in (
        "loss.name (uskd there, ce here)",
        "learning_rate (0.001 there, 0.1 here)",
        "seed (42 there, 3 here)",
    ):
        assert text in error
    hint = re.search("`(hf-kd resume [^`]+)`", error)[1]
    assert main(shlex.split(hint)[1:]) == 0
    assert run_json(out)["metrics"] == before["metrics"]
    assert distill(things, "--output_dir", whole, "--resume_from_checkpoint", "last") == 1
    assert "nothing to resume" in capsys.readouterr().err
    assert main(["resume", str(tmp_path / "nowhere")]) == 1
    assert "there is no plan.json" in capsys.readouterr().err


def test_a_refused_continuation_leaves_the_folder_as_it_was(things, tmp_path, capsys):
    out, other = tmp_path / "out", tmp_path / "other"
    more = ["--lr_scheduler_type", "constant", "--num_train_epochs"]
    assert distill(things, *more, 2, "--output_dir", out) == 0
    before = (out / "plan.json").read_text()
    assert distill(things, *more, 1, "--output_dir", out, "--resume_from_checkpoint", "last") == 1
    assert "beyond num_train_epochs=1" in capsys.readouterr().err
    assert (out / "plan.json").read_text() == before and main(["resume", str(out)]) == 0
    checkpoint = ["--resume_from_checkpoint", out / "checkpoint-3"]
    assert distill(things, *more, 2, "--output_dir", other, "--learning_rate", "1", *checkpoint) == 1
    assert "learning_rate (0.001 there, 1.0 here)" in capsys.readouterr().err
    assert not other.exists()


def test_the_record_has_the_plan_without_paths(things, tmp_path):
    out = tmp_path / "out"
    assert distill(things, "--output_dir", out) == 0
    record, plan_ = run_json(out), read_plan(out)
    assert record["plan"]["data"]["fingerprint"] == plan_.data.fingerprint
    assert plan_.student.id == str(things / "student") and record["plan"]["student"]["id"] == "student"


def test_a_plan_with_relative_paths_is_resumed_from_any_folder(things, tmp_path, monkeypatch):
    monkeypatch.chdir(things)
    more = ["--student", "student", "--teacher", "./teacher", "--dataset", "data", "--loss", "nkd"]
    assert distill(things, *more, "--output_dir", tmp_path / "out", "--num_train_epochs", "1") == 0
    plan_, before = read_plan(tmp_path / "out"), run_json(tmp_path / "out")
    ids = [plan_.student.id, plan_.teacher.id, plan_.data.id]
    assert ids == [str(things / name) for name in ("student", "teacher", "data")]
    assert (before["settings"]["student"], before["plan"]["data"]["id"]) == ("student", "data")
    (tmp_path / "out" / "run.json").unlink()
    monkeypatch.chdir(tmp_path)
    assert main(["resume", "out"]) == 0
    assert run_json(tmp_path / "out")["metrics"] == before["metrics"]
    assert str(things) not in (tmp_path / "out" / "run.json").read_text()


def test_runs_are_not_added_to_the_folder_of_a_single_run(things, tmp_path, capsys):
    out, more = tmp_path / "out", ["--num_train_epochs", "1", "--output_dir", tmp_path / "out"]
    assert distill(things, *more) == 0
    before = run_json(out)
    assert distill(things, *more, "--seeds", "1", "2", "--resume_from_checkpoint", "last") == 1
    assert "is the folder of one run" in capsys.readouterr().err
    assert run_json(out) == before and len(read_plan(out).runs) == 1


def test_hints_name_the_launcher_that_was_used(monkeypatch):
    plans = [dataclasses.replace(experiment(seed=seed), data=DataSource("data")) for seed in (0, 1)]
    with pytest.raises(ValueError, match="`hf-kd resume 'my out'`"):
        check_same(*plans, "my out")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    command = "accelerate launch --multi_gpu --num_processes 2 -m hf_kd resume out"
    with pytest.raises(ValueError, match=f"`{command}`"):
        check_same(*plans, "out")
    with pytest.raises(ValueError, match=f": {command}$"):  # and not `distill`
        check_processes(types.SimpleNamespace(world_size=1), "out")


def test_another_engine_is_refused_on_resume(things, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    values = plan(*parse(["--config", str(things / "config.yaml"), "--output_dir", str(out)])).to_dict()
    values["runs"][0]["engine"] = "zero2"
    (out / "plan.json").write_text(json.dumps(values))
    assert main(["resume", str(out)]) == 1
    assert "was trained by zero2 and is resumed with ddp" in capsys.readouterr().err


def test_the_options_of_accelerate_are_in_the_command(monkeypatch):
    words = ["python", "/bin/accelerate", "launch", "--config_file", "my zero3.yaml", "run.py", "--loss", "ce"]
    launcher = types.SimpleNamespace(cmdline=lambda: words)
    monkeypatch.setattr("psutil.Process", lambda: types.SimpleNamespace(parent=lambda: launcher))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(sys, "argv", words[5:])
    assert launch_command(["resume", "out"], module=True) == [
        "accelerate",
        *words[2:5],
        "-m",
        "hf_kd",
        "resume",
        "out",
    ]


def test_one_who_comes_later_takes_the_runs_that_nobody_has_started(things, tmp_path, capsys):
    out = tmp_path / "out"
    more = ["--compare", '{"a": {"loss": "ce"}, "b": {"loss": "ce"}}', "--output_dir", out]
    argv = ["--config", str(things / "config.yaml"), *map(str, more)]
    out.mkdir()
    (out / "plan.json").write_text(json.dumps(plan(*parse(argv)).to_dict()))
    (out / "a").mkdir()
    holder = hold(out / "a")  # another process trains it
    try:
        assert distill(things, *more, "--learning_rate", "7") == 1
        assert "learning_rate (0.001 there, 7.0 here)" in capsys.readouterr().err
        assert distill(things, *more) == 0
        assert "1 of 2 runs are not finished: a, seed 42" in capsys.readouterr().out
        assert (out / "b" / "run.json").is_file() and not (out / "a" / "run.json").exists()
        assert distill(things, *more) == 1
        error = capsys.readouterr().err
        assert "all of its 2 runs have been started" in error
        assert main(["resume", str(out)]) == 0  # not while it is being trained
        assert not (out / "a" / "run.json").exists()
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    hint = re.search("`(hf-kd resume [^`]+)`", error)[1]
    assert main(shlex.split(hint)[1:]) == 0
    runs = run_json(out)["runs"]
    assert [run["name"] for run in runs] == ["a", "b"] and runs[0]["metrics"] == runs[1]["metrics"]
    capsys.readouterr()
    assert main(["push", str(out)]) == 1  # and no checkpoint is named as a student
    assert f"such as {out / 'a'}, {out / 'b'}." in capsys.readouterr().err


def test_only_trains_one_run_and_resume_makes_the_table(things, tmp_path, capsys):
    """Two processes at the same time, as of a job array."""
    out, spec = tmp_path / "out", '{"a": {"loss": "ce"}, "b": {"loss": "ce"}}'
    more = ["--compare", spec, "--seeds", "1", "2", "--num_train_epochs", "1", "--output_dir", str(out)]
    command = [sys.executable, "-m", "hf_kd", "distill", "--config", str(things / "config.yaml"), *more, "--only"]
    tasks = [subprocess.Popen([*command, run], stderr=subprocess.PIPE, text=True) for run in ("a:2", "b:2")]
    for task in tasks:
        said = task.communicate(timeout=120)[1]
        assert task.returncode == 0, said[-2000:]
    assert {file.parent.relative_to(out).as_posix() for file in out.rglob("run.json")} == {"a/seed-2", "b/seed-2"}
    assert len(read_plan(out).runs) == 4
    assert "--only" not in read_plan(out).command
    assert distill(things, *more, "--only", "a:2") == 0  # is finished
    assert f"The table follows when all runs are finished, with: hf-kd resume {out}" in capsys.readouterr().out
    (out / "b" / "seed-1").mkdir()
    RunLock(out / "b" / "seed-1").file.touch()  # was begun
    assert distill(things, *more, "--only", "b:1") == 1
    hint = re.search("Continue it with: (hf-kd .*)", capsys.readouterr().err)[1]
    assert main([*shlex.split(hint)[1:-1], "b:3"]) == 1
    assert "--only b:3 is no run of this experiment; there are: a:1, b:1, a:2, b:2." in capsys.readouterr().err
    assert main(shlex.split(hint)[1:]) == 0
    assert (out / "b" / "seed-1" / "run.json").is_file()
    assert distill(things, *more, "--only", "a:1") == 0 and not (out / "report.md").exists()
    assert main(["resume", str(out)]) == 0
    assert len(run_json(out)["runs"]) == 4 and (out / "report.md").is_file()


def hold(folder):
    """A process that holds the lock of a run, and a child of it, as a loader's worker, that outlives it."""
    code = f"""
import os, sys
from hf_kd.experiment.lock import RunLock
assert RunLock({str(folder)!r}).acquire(new=True)
read, write = os.pipe()
if os.fork() == 0:
    os.close(1), os.close(2)
    sys.stdin.read()
    os._exit(0)
print("held", flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_ends_with_its_process_though_its_workers_live(tmp_path):
    holder = hold(tmp_path)
    lock = RunLock(tmp_path)
    assert lock.started and not lock.acquire(new=False) and not lock.acquire(new=True)
    assert f"process {holder.pid} on " in lock.holder()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert lock.acquire(new=False)
    lock.release()
    assert not RunLock(tmp_path).acquire(new=True)  # somebody started it once


def test_without_locks_of_the_file_system_the_process_id_tells(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_kd.experiment.lock.fcntl", None)
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    assert first.acquire(new=True) and not second.acquire(new=False)
    text = json.loads(second.file.read_text())
    second.file.write_text(json.dumps(text | {"pid": 2**22 + 1}))  # beyond what Linux gives out
    assert second.acquire(new=False)
    second.file.write_text(json.dumps(text | {"host": "elsewhere"}))
    assert not RunLock(tmp_path).acquire(new=False)


# ---- the launcher ----


def test_another_number_of_processes_than_asked_for_is_refused(monkeypatch):
    check_processes(config())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match=r"2 processes were asked for, and this runs one.*--multi_gpu --num_processes 2"
    ):
        check_processes(types.SimpleNamespace(world_size=1))


def test_the_command_of_a_module_names_its_subcommand(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/anywhere/hf_kd/__main__.py"])
    assert launch_command(["distill", "--loss", "ce"]) == ["hf-kd", "distill", "--loss", "ce"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch_command(["distill", "--loss", "ce"])[-5:] == ["-m", "hf_kd", "distill", "--loss", "ce"]
    with pytest.raises(ValueError, match="--num_processes 2 -m hf_kd distill"):
        check_processes(types.SimpleNamespace(world_size=1))
    monkeypatch.setattr(sys, "argv", ["examples/run_distill.py"])
    assert launch_command(["distill", "--loss", "ce"])[-3:] == ["examples/run_distill.py", "--loss", "ce"]


def test_accelerate_launch_that_starts_one_process_of_two_is_refused(things, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    command += [
        "examples/run_distill.py",
        "--config",
        str(things / "config.yaml"),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=os.environ)
    assert done.returncode != 0
    assert "error: 2 processes were asked for, and this runs one." in done.stderr
    assert "--multi_gpu --num_processes 2 examples/run_distill.py" in done.stderr
    assert not (tmp_path / "out").exists()


# ---- the same images for every run ----


def test_kd_of_weight_0_is_cross_entropy_with_a_larger_teacher(things, tmp_path):
    model, processor = tiny("resnet", size=48, names=[f"class {i}" for i in range(6)])
    model.save_pretrained(tmp_path / "large"), processor.save_pretrained(tmp_path / "large")
    spec = '{"ce": {}, "kd": {"weight": 0.0}}'
    more = ["--compare", spec, "--teacher", tmp_path / "large", "--augment", "resized_crop", "--mixup_alpha", "0.2"]
    assert distill(things, *more, "--output_dir", tmp_path / "out", "--num_train_epochs", "1") == 0
    ce, kd = run_json(tmp_path / "out")["runs"]
    assert ce["metrics"] == kd["metrics"]
    weights = [(tmp_path / "out" / name / "model.safetensors").read_bytes() for name in ("ce", "kd")]
    assert weights[0] == weights[1]
