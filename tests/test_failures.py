"""What goes wrong is said in one message, with the right exit status: wrong arguments, and runs that diverge."""

import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import datasets
import pytest
import yaml
from cli_helpers import REPOSITORY, distill, images
from trainer_helpers import rows, trainer_for
from transformers import TrainerCallback

from hf_kd import DistillationConfig, config, push
from hf_kd.cli import main
from hf_kd.cli.arguments import ScriptArguments, _read_config, make_parser
from hf_kd.reporting import comparison_table, plot_curves, verdicts
from hf_kd.reporting.card import model_card
from hf_kd.reporting.record import divergence

pytestmark = pytest.mark.usefixtures("undrawn_figures")

NAN = ["--learning_rate", "1e5"]  # the logits become NaN
HUGE = ["--learning_rate", "1e2", "--num_train_epochs", "1"]  # the loss stays finite


def run_json(folder):
    return json.loads((Path(folder) / "run.json").read_text())


# ---- wrong arguments: exit status 2, before anything is loaded ----


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--loss", "nkd"], "loss='nkd' learns from a teacher and none is given"),
        (["--loss", "uskd", "--teacher", "x"], "uses no teacher"),
        (["--loss", "nkdd"], "did you mean nkd or kd?"),
        (["--compare", "ce,nkdd"], "did you mean nkd or kd?"),
        (["--compare", ","], "--compare has no loss in it"),
        (["--compare", "ce,ce"], "names a loss twice"),
        (["--compare", '{"../x": {"loss": "ce"}}'], "can't be the name of a folder"),
        (["--compare", "ce", "--loss_kwargs", '{"weight": 3}'], "loss_kwargs belongs to a single run"),
        (["--loss_kwargs", '{"weight": 1'], "loss_kwargs is not valid JSON"),
        (["--loss_kwargs", "gamma=1.5"], "write '{\"gamma\": 1.5}'"),
        (["--loss_kwargs", "{gamma: 1.5, temperature: 2}"], 'write \'{"gamma": 1.5, "temperature": 2}\''),
        (["--loss_kwargs", "1.5"], "loss_kwargs must be a JSON object"),
        (["--loss_kwargs", '{"weight": NaN}'], "weight=nan is not accepted"),
        (["--gamma", "2"], "a hyperparameter of nkd, dist. Write --loss_kwargs '{\"gamma\": 2}'"),
        (["--gamma"], "--loss_kwargs '{\"gamma\": 1.5}'"),
        (["--temperature=4"], "of kd, nkd, dkd, dist, tf_kd. Write --loss_kwargs '{\"temperature\": 4}'"),
        (["--target-in-rank", "false"], "Write --loss_kwargs '{\"target_in_rank\": false}'"),
        (["--lerning_rate", "3"], "Nearest: --learning_rate"),
        (["ce"], "there is no argument ce"),
        (["--learning_rate", "fast"], "--learning_rate: invalid float value: 'fast'"),
        (["--learning_rate", ""], "--learning_rate is empty"),
        (["--teacher="], "--teacher is empty"),
        (["--seed"], "--seed: expected one argument"),
        (["--lr_scheduler_type", "cosin"], "--lr_scheduler_type: invalid choice: 'cosin'"),
        (["--lr_scheduler_kwargs", "[1]"], "lr_scheduler_kwargs must be a JSON object"),
        (["--lr_scheduler_kwargs", '{"foo": 1}'], "do not fit linear"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "min_lr"),
        (["--optim", "sgd", "--optim_args", "momentum"], "optim_args='momentum' (name=value,...)"),
        (["--optim", "sgd", "--optim_args", "momentum=high"], "could not convert string to float: 'high'"),
        (["--optim", "adamw_bnb_8bit"], "optim='adamw_bnb_8bit'"),
        (["--num_train_epochs", "-1"], "num_train_epochs=-1"),
        (["--num_train_epochs", "0"], "num_train_epochs=0"),
        (["--max_steps", "0"], "max_steps=0 trains nothing"),
        (["--image_size", "0"], "image_size=0"),
        (["--image_mean", "123.675", "116.28", "103.53"], "it would be: --image_mean 0.485 0.456 0.406"),
        (["--image_mean", "0.5", "0.5"], "one for each of the 3 channels"),
        (["--image_std", "0"], "image_std=0"),
        (["--eval_fraction", "1"], "eval_fraction=1 leaves no images"),
        (["--max_train_samples", "0"], "max_train_samples=0"),
        (["--lr_step_epochs", "3", "1"], "lr_step_epochs=[3.0, 1.0] must be in rising order"),
        (["--augment", "crop"], "augment='crop' is unknown"),
        (["--teacher_dtype", "fp8"], "teacher_dtype='fp8' is unknown"),
        (["--report_to", "wandb"], "report_to='wandb' needs its package"),
        (["--report_to", "tensorbord"], "report_to='tensorbord'"),
        (["--resume_from_checkpoint", "/missing/checkpoint-3"], "/missing/checkpoint-3 is no checkpoint"),
        (
            ["--metric_for_best_model", "top-1", "--load_best_model_at_end"],
            "loss, top1, macro_top1, top5, ece",
        ),
        (["--load_best_model_at_end", "true", "--eval_strategy", "no", "--save_strategy", "no"], "set eval_strategy"),
        (["--accelerator_config", '{"foo": 1}'], "unexpected keyword argument 'foo'"),
        (["--class_map", "{a: b}"], "class_map is not valid JSON"),
        (["--config", "missing.yaml"], "--config missing.yaml can't be read"),
        (["--preset", "vit"], "--preset vit is unknown; there are: auto, none, cifar_crd, cnn_finetune"),
        (["--hub_strategy", "every_save"], "is not supported: the student is pushed at the end"),
        (["--verdict"], "ce is cross entropy, what it is measured against"),
        (["--loss", "label_smoothing", "--verdict"], "label_smoothing is cross entropy, what it is measured against"),
        (["--loss", "kd", "--verdict", "--against", "kd"], "--against kd is the loss itself"),
        (["--compare", "ce,kd", "--against", "nkd"], "choose one of ce, kd"),
        (["--loss", "uskd", "--verdict", "--seeds", "1"], "at least two seeds"),
        (["--loss", "uskd", "--verdict", "--compare", "ce"], "drop it, or --compare"),
        (["--seeds", "1", "1"], "names a seed twice"),
        (
            ["--compare", "ce,uskd", "--only", "ce:1"],
            "--only ce:1 is no run of this experiment; there are: ce:42, uskd",
        ),
        (["--max_hours", "0"], "max_hours=0"),
        (["--seeds", "0", "-1"], "seeds=-1"),
        (["--seeds", "1", "2", "--push_to_hub"], "hf-kd push FOLDER"),
    ],
)
def test_wrong_usage_is_one_clear_error(more, message, things, tmp_path, capsys):
    assert distill(things, "--output_dir", tmp_path / "out", *more) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()[1:]
    assert line.startswith("error: ") and message in line and not said.out
    assert not (tmp_path / "out").exists()


def test_every_number_must_be_finite_and_in_its_range():
    taken = {}
    for name in config._NUMBERS:
        for value in (math.nan, math.inf, -math.inf, -2):
            with pytest.raises(ValueError, match=name) as caught:
                DistillationConfig("out", use_cpu=True, **{name: [value] if name == "lr_step_epochs" else value})
            taken[name, value] = str(caught.value)
    assert len(config._NUMBERS) >= 35 and all("finite number" in text for text in taken.values())
    DistillationConfig("out", use_cpu=True, learning_rate=0.0, num_train_epochs=0.5, max_steps=-1, warmup_steps=0.1)


def test_every_option_of_a_file_has_its_type(tmp_path):
    parser, file = make_parser(), tmp_path / "config.yaml"
    numbers = {action.dest for action in parser._actions if action.type in (int, float)}
    objects = "fsdp_config accelerator_config deepspeed liger_kernel_config".split()
    for name in [f.name for cls in (ScriptArguments, DistillationConfig) for f in fields(cls)]:
        wrong = ["", [[1]], *["many"] * (name in numbers)]
        wrong += [{"a": 1}] * (name not in objects and not name.endswith("kwargs"))
        for value in wrong if name not in ("compare", "class_map") else [""]:  # whose content is checked later
            file.write_text(yaml.safe_dump({name: value}))
            with pytest.raises(ValueError, match=rf"config\.yaml: (--)?{name}\b"):
                _read_config(str(file), parser)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loss: {}", "loss can't be {}"),
        ("student: []", "student can't be []"),
        ("student:", "--student must be given"),
        ("num_train_epochs:", "num_train_epochs can't be None"),
        ("seed: 1.5", "invalid int value: '1.5'"),
        ("gamma: 2", 'a hyperparameter of nkd, dist. Write loss_kwargs: {"gamma": 2}'),
        ("learning_rat: 1", "Nearest: learning_rate"),
        ("seeds: []", "--seeds: expected at least one argument"),
        ("report_to: [wandb]", "report_to='wandb' needs its package"),
        ("- a", "must hold `name: value` lines, it holds a list"),
        ("a: b: c", "can't be read"),
        ("\0", "can't be read"),
    ],
)
def test_a_wrong_file_is_one_clear_error(text, message, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(f"{text}\n")
    assert main(["distill", "--config", str(tmp_path / "config.yaml"), "--use_cpu"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"not weights" * 9, None])
def test_weights_that_are_corrupt_are_named(content, things, tmp_path, capsys):
    shutil.copytree(things / "teacher", tmp_path / "teacher")
    file = tmp_path / "teacher" / "model.safetensors"
    file.write_bytes(content or file.read_bytes()[:-100])
    more = ["--loss", "nkd", "--teacher", tmp_path / "teacher", "--output_dir", tmp_path / "out"]
    assert distill(things, *more) == 1
    said = capsys.readouterr().err
    assert f"the weights of teacher {tmp_path / 'teacher'} cannot be read" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        (datasets.Value("float64"), "column 'label' is Value('float64'): no labels, which are integers, texts or"),
        (datasets.ClassLabel(names=["only"]), "only the class ['only']"),
    ],
)
def test_labels_that_are_no_classes_are_named(feature, message, things, tmp_path, capsys):
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        data = datasets.Dataset.from_dict({**images(8, 1), "label": [0] * 8}, features=features)
        data.to_parquet(tmp_path / "data" / f"{split}.parquet")
    assert distill(things, "--dataset", tmp_path / "data", "--output_dir", tmp_path / "out") == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("program", [["-m", "hf_kd", "distill"], ["examples/run_distill.py"]])
def test_the_exit_status_of_a_process(program):
    """2 for wrong usage, as `hf-kd` and as a script; the others are those of `main`."""
    done = subprocess.run(
        [sys.executable, *program, "--student", "x", "--learning_rate", "-1", "--use_cpu"],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "error: learning_rate=-1" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("steps", "at step 5: 1 step\\(s\\) since OUT/checkpoint-4 are lost"),
        ("no", "at step 5: 5 step\\(s\\) \\(there is no checkpoint\\) are lost"),
    ],
)
def test_ctrl_c_twice_says_what_is_lost(strategy, message, tmp_path):
    class PressTwice(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            for _ in range(2 * (state.global_step == 5)):
                signal.raise_signal(signal.SIGINT)

    trainer = trainer_for(tmp_path, max_steps=6, save_strategy=strategy, save_steps=2)
    trainer.add_callback(PressTwice())
    with pytest.raises(KeyboardInterrupt, match=message.replace("OUT", str(tmp_path))):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_while_the_command_is_imported_ends_it_silently(monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_kd.cli.commands.run_command", stop)
    assert main(["distill", "--student", "x"]) == 130
    assert capsys.readouterr().err == "\nstopped\n"


# ---- divergence ----


@pytest.mark.parametrize(
    ("loss", "diverged"),
    [(None, False), (4.6, False), (460, False), (461, True), (1e21, True), (float("inf"), True), (float("nan"), True)],
)
def test_what_counts_as_divergence(loss, diverged):
    assert bool(divergence(loss, 100)) == diverged


@pytest.mark.parametrize(("settings", "reason"), [(NAN, "student_logits holds "), (HUGE, "the evaluation loss is ")])
def test_a_run_that_diverged_is_an_error_and_keeps_its_record(settings, reason, things, tmp_path, capsys):
    out, settings = tmp_path / "hot", [*settings, "--save_strategy", "no"]
    assert distill(things, "--output_dir", out, *settings) == 1
    said = capsys.readouterr().err
    assert f"ce, seed 42: {reason}" in said.splitlines()[-1] and "Traceback" not in said
    run = run_json(out)
    assert run["diverged"].startswith(reason) and run["metrics"] == {} and run["history"]
    assert (out / "model.safetensors").is_file()
    assert not (out / "README.md").exists() and not (out / "curves.png").exists()
    with pytest.raises(ValueError, match="diverged"):
        model_card(run)
    # Neither a resumption nor a repetition trains it again or makes a result of it.
    before = (out / "run.json").read_text()
    assert main(["resume", str(out)]) == 1
    assert f"ce, seed 42: {reason}" in capsys.readouterr().err.splitlines()[-1]
    assert distill(things, "--output_dir", out, *settings) == 1
    assert "all of its 1 runs have been started" in capsys.readouterr().err
    assert (out / "run.json").read_text() == before
    assert main(["push", str(out), "anna/hot"]) == 1


def test_a_loss_that_is_not_finite_ends_its_run_alone(things, tmp_path, capsys):
    """In a comparison the other runs go on, tables, curves and verdicts leave it out, and the last line names it."""
    out = tmp_path / "out"
    spec = '{"ce": {}, "hot": {"loss": "ce", "weight": 1e38}, "twin": {"loss": "ce"}}'
    more = ["--compare", spec, "--seeds", "1", "2", "--optim", "sgd", "--max_grad_norm", "0", "--output_dir", out]
    assert distill(things, *more) == 1
    said = capsys.readouterr()
    last = said.err.splitlines()[-1]
    assert "2 of 6 runs diverged" in last and "hot, seed 1: student_logits holds" in last and "; hot, seed 2: " in last
    assert "hot (2 of 2 diverged)" in said.out
    runs = run_json(out)["runs"]
    assert [bool(run["diverged"]) for run in runs] == [False, True, False] * 2
    assert all((out / run["name"] / f"seed-{run['seed']}" / "model.safetensors").is_file() for run in runs)
    assert all((out / "twin" / f"seed-{seed}" / "README.md").is_file() for seed in (1, 2))
    assert not list((out / "hot").rglob("README.md"))


def record(name, seed, top1, diverged=None):
    history = [{"step": 1, "loss": 1.0, "loss_ce": 1.0, "eval_top1": top1}]
    metrics = {} if diverged else {"top1": top1}
    return {"name": name, "loss": {"name": name}, "seed": seed, "metrics": metrics, "history": history} | {
        "diverged": diverged
    }


def test_a_seed_that_diverged_counts_nowhere(tmp_path, monkeypatch):
    runs = [record("ce", seed, 0.5 + seed / 100) for seed in (1, 2, 3)]
    runs += [record("nkd", 1, 0.6), record("nkd", 2, 0.62), record("nkd", 3, 0.01, "the loss is NaN at step 3")]
    (row,) = [line for line in comparison_table(runs).splitlines() if line.startswith("nkd")]
    assert row.startswith("nkd (1 of 3 diverged)") and "61.00 ± 1.41" in row
    (verdict,) = verdicts(runs)
    assert verdict["seeds"] == [1, 2] and verdict["sentence"].endswith("because it diverged: nkd of seed 3.")
    drawn = []
    monkeypatch.setattr("hf_kd.reporting.curves._plot_top1", lambda axes, name, seeds, style: drawn.extend(seeds))
    plot_curves(runs, tmp_path / "curves.png")
    assert [(run["name"], run["seed"]) for run in drawn] == [("ce", 1), ("ce", 2), ("ce", 3), ("nkd", 1), ("nkd", 2)]


def test_a_trainer_built_in_python_does_not_publish_what_diverged(tmp_path):
    trainer = trainer_for(tmp_path / "out", evaluation=rows(), learning_rate=1e8, logging_strategy="no")
    with pytest.raises(FloatingPointError, match="student_logits holds 48 NaN"):
        trainer.train()
    push.add_missing_record(trainer)
    with pytest.raises(ValueError, match="out holds a run that diverged, .* the evaluation loss is nan"):
        push.publish(tmp_path / "out", "anna/hot")
    assert run_json(tmp_path / "out")["diverged"] and not (tmp_path / "out" / "README.md").exists()
