"""The command line as a user meets it: what it makes, what it says, what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cli_helpers import NAMES, REPOSITORY, distill, images
from PIL import Image
from tiny import tiny
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from hf_kd.cli import main
from hf_kd.cli.arguments import make_parser, parse
from hf_kd.experiment.variants import run_configs

pytestmark = pytest.mark.usefixtures("undrawn_figures")


def test_a_run_leaves_a_model_that_anyone_can_open(things, tmp_path, capsys):
    out = tmp_path / "out"
    assert distill(things, "--loss", "uskd", "--output_dir", out) == 0
    model = AutoModelForImageClassification.from_pretrained(out)
    assert [model.config.id2label[i] for i in range(6)] == NAMES
    assert AutoImageProcessor.from_pretrained(out).size["height"] == 32
    answers = pipeline("image-classification", model=str(out))(images(1, 3)["image"][0])
    assert answers[0]["label"] in NAMES

    run = json.loads((out / "run.json").read_text())
    assert run["loss"]["name"] == "uskd" and run["loss"]["alpha"] == 1.0
    assert run["settings"]["learning_rate"] == 1e-3 and run["seed"] == 42
    assert {"top1", "top5", "ece", "loss"} <= run["metrics"].keys()
    assert {"loss", "loss_ce", "loss_target", "loss_non_target", "loss_weak"} <= run["terms"].keys()
    assert run["terms"]["loss"] == pytest.approx(sum(v for k, v in run["terms"].items() if k != "loss"), rel=1e-5)
    assert run["student"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert run["versions"]["torch"] and run["timings"]["train_seconds"] > 0
    assert run["data"] | {"skipped": 0} == run["data"] | {
        "skipped": 0,
        "train_size": 48,
        "eval_size": 24,
        "classes": 6,
    }
    assert Image.open(out / "curves.png").format == "PNG"
    assert "top-1 %" in capsys.readouterr().out


def test_compare_trains_every_loss_from_the_same_start(things, tmp_path, capsys):
    out = tmp_path / "out"
    spec = '{"ce": {}, "nkd": {"gamma": 0.5}, "zero": {"loss": "nkd", "gamma": 0.5}}'
    status = distill(things, "--compare", spec, "--teacher", things / "teacher", "--output_dir", out)
    printed = capsys.readouterr().out
    assert status == 0
    runs = json.loads((out / "run.json").read_text())["runs"]
    assert [run["name"] for run in runs] == ["ce", "nkd", "zero"]
    first = [[e for e in run["history"] if "loss" in e][0]["loss_ce"] for run in runs]
    assert first[0] == pytest.approx(first[1], rel=1e-5)  # the same first weights and the same first batch
    assert runs[1]["metrics"] == runs[2]["metrics"]  # the same run twice
    assert all("agreement" in run["metrics"] and run["teacher_metrics"]["top1"] is not None for run in runs)
    assert "difference to CE" in printed and "teacher" in printed
    assert (out / "curves.png").is_file() and (out / "nkd" / "model.safetensors").is_file()
    assert not list(out.rglob("*aux_head*"))


def test_verdict_trains_the_controls_over_seeds_and_tests_pairs(things, tmp_path, capsys):
    out = tmp_path / "out"
    more = ["--loss", "uskd", "--verdict", "--seeds", "5", "6", "--output_dir", out, "--augment", "pad_crop"]
    assert distill(things, *more) == 0
    printed = capsys.readouterr().out
    comparison = json.loads((out / "run.json").read_text())
    runs = {(run["name"], run["seed"]): run for run in comparison["runs"]}
    assert list(runs) == [(name, seed) for seed in (5, 6) for name in ("ce", "2xce", "uskd")]
    # Pairs: the same first weights and the same first augmented batch, which another seed does not have.
    first = {key: [e for e in run["history"] if "loss" in e][0]["loss_ce"] for key, run in runs.items()}
    for seed in (5, 6):
        assert first["uskd", seed] == pytest.approx(first["ce", seed], rel=1e-5)
        assert first["2xce", seed] == pytest.approx(2 * first["ce", seed], rel=1e-5)
    assert first["ce", 5] != pytest.approx(first["ce", 6], rel=1e-3)

    assert printed.count("auxiliary head on vit.layers.1 (17 × 32, its class token)") == 2
    layer = runs["uskd", 5]["student"]["feature_layer"]
    assert (layer["name"], layer["shape"], layer["pooling"]) == ("vit.layers.1", [17, 32], "class_token")
    assert "feature_layer" not in runs["ce", 5]["student"]
    (verdict,) = comparison["verdicts"]
    assert verdict["sentence"] in printed
    ce, uskd = ([100 * runs[name, seed]["metrics"]["top1"] for seed in (5, 6)] for name in ("ce", "uskd"))
    assert verdict["tests"][0]["differences"] == pytest.approx([b - a for a, b in zip(ce, uskd, strict=True)])
    own = json.loads((out / "uskd" / "seed-5" / "run.json").read_text())["verdict"]
    assert {k: v for k, v in own.items() if k != "runs"} == verdict and len(own["runs"]) == 6
    assert json.loads((out / "ce" / "seed-5" / "run.json").read_text())["verdict"] is None
    assert verdict["sentence"] in (out / "uskd" / "seed-6" / "README.md").read_text()

    # Cut off in its last run: what is finished is kept, the same comes out, and seeds can be added.
    file = out / "uskd" / "seed-6" / "run.json"
    before, kept = json.loads(file.read_text()), out / "2xce" / "seed-6" / "run.json"
    file.unlink()
    stamp = kept.stat().st_mtime_ns
    assert distill(things, *more, "--resume_from_checkpoint", "last") == 0
    assert json.loads(file.read_text())["metrics"] == before["metrics"] and kept.stat().st_mtime_ns == stamp
    more[more.index("6")] = "7"
    assert distill(things, *more, "--resume_from_checkpoint", "last") == 0
    assert [run["seed"] for run in json.loads((out / "run.json").read_text())["runs"]] == [5] * 3 + [7] * 3


def test_seeds_of_one_loss(things, tmp_path, capsys):
    assert distill(things, "--seeds", "1", "2", "--output_dir", tmp_path / "out") == 0
    assert {path.parent.name for path in (tmp_path / "out").glob("ce/*/model.safetensors")} == {"seed-1", "seed-2"}
    assert "mean of 2 training runs (seeds 1, 2)" in capsys.readouterr().out


@pytest.mark.parametrize(("strategy", "evaluations"), [("epoch", 2), ("no", 1)])
def test_the_last_evaluation_is_not_made_twice(strategy, evaluations, things, tmp_path):
    out = tmp_path / "out"
    assert distill(things, "--output_dir", out, "--eval_strategy", strategy) == 0
    run = json.loads((out / "run.json").read_text())
    found = [entry for entry in run["history"] if "eval_top1" in entry]
    assert len(found) == evaluations and found[-1]["step"] == 6
    assert run["metrics"]["top1"] == found[-1]["eval_top1"] and run["timings"]["eval_seconds"] > 0
    again = tmp_path / "again"  # the same weights, evaluated anew
    assert distill(things, "--output_dir", again, "--eval_strategy", "no") == 0
    assert json.loads((again / "run.json").read_text())["metrics"] == run["metrics"]


def test_runs_draw_the_same_random_numbers(things, tmp_path):
    """A student with dropout, and a teacher that is measured before the first run only."""
    from transformers import AutoConfig

    AutoConfig.from_pretrained(things / "student", hidden_dropout_prob=0.3).save_pretrained(things / "dropout")
    AutoImageProcessor.from_pretrained(things / "student").save_pretrained(things / "dropout")
    spec = '{"a": {"loss": "ce"}, "b": {"loss": "ce"}, "c": {"loss": "nkd"}}'
    out = tmp_path / "out"
    more = ["--student", things / "dropout", "--compare", spec, "--teacher", things / "teacher", "--output_dir", out]
    assert distill(things, *more) == 0
    a, b, c = (json.loads((out / name / "run.json").read_text()) for name in "abc")
    assert a["metrics"] == b["metrics"] != c["metrics"]

    # Of a comparison that was cut off, what is finished is kept and what is not is trained.
    (out / "b" / "run.json").unlink()
    before = (out / "a" / "run.json").stat().st_mtime_ns
    assert distill(things, *more, "--resume_from_checkpoint", "last") == 0
    assert (out / "a" / "run.json").stat().st_mtime_ns == before
    assert json.loads((out / "b" / "run.json").read_text())["metrics"] == b["metrics"]


def test_resume_of_a_finished_run_does_what_is_asked(things, tmp_path, capsys):
    out = tmp_path / "out"
    constant = ["--output_dir", out, "--lr_scheduler_type", "constant"]
    assert distill(things, *constant) == 0
    assert distill(things, *constant, "--resume_from_checkpoint", "last", "--num_train_epochs", "3") == 0
    run = json.loads((out / "run.json").read_text())
    assert run["history"][-1]["epoch"] == 3
    seconds = [entry["seconds"] for entry in run["history"] if "seconds" in entry]
    assert seconds == sorted(seconds) and run["timings"]["train_seconds"] == seconds[-1]
    assert distill(things, *constant, "--seed", "1", "--resume_from_checkpoint", "last") == 1
    assert "seed (42 there, 1 here)" in capsys.readouterr().err
    assert distill(things, "--output_dir", out, "--loss", "uskd", "--resume_from_checkpoint", "last") == 1
    assert "choose another --output_dir" in capsys.readouterr().err
    assert (
        distill(things, "--output_dir", out, "--compare", "ce", "--resume_from_checkpoint", out / "checkpoint-3") == 2
    )
    assert "--resume_from_checkpoint last" in capsys.readouterr().err


def test_a_short_run_still_has_its_terms_and_no_path_of_the_machine(things, tmp_path):
    out = tmp_path / "out"
    assert distill(things, "--output_dir", out, "--loss", "uskd", "--logging_steps", "500") == 0
    text = (out / "run.json").read_text()
    assert len(json.loads(text)["terms"]) == 5
    assert str(tmp_path) not in text and str(things) not in text


def test_yaml_means_what_it_says(things, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        "student: x\nsave_strategy: no\neval_strategy: no\nlr_step_epochs: 1\nloss_kwargs: {weight: 2}\nloss: ce\n"
    )
    _, config = parse(["--config", str(file), "--use_cpu"])
    assert (config.save_strategy.value, config.eval_strategy.value) == ("no", "no")
    assert config.lr_step_epochs == [1] and config.loss_kwargs == {"weight": 2}


def test_the_command_line_wins_over_the_config_and_that_over_the_defaults(things):
    script, config = parse(["--config", str(things / "config.yaml"), "--num_train_epochs", "5"])
    assert (config.num_train_epochs, config.learning_rate, config.seed) == (5, 1e-3, 42)
    assert script.from_scratch is True


def test_every_shipped_config_can_be_read(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    files = sorted(Path("examples/configs").glob("*.yaml"))
    assert len(files) >= 6
    for file in files:
        given = yaml.safe_load(file.read_text())
        script, config = parse(["--config", str(file), "--use_cpu", "--student", "x", "--dataset", "y"])
        for name, value in given.items():
            if name not in ("student", "dataset"):
                got = getattr(script if hasattr(script, name) else config, name)
                same = (value, [value], float(value) if isinstance(value, int) else value)
                assert getattr(got, "value", got) in same, name
        assert run_configs(script, config, None)


def test_help_fits_a_person(capsys):
    text = make_parser().format_help()
    assert "--loss" in text and "--student" in text and "--learning_rate" in text
    assert "--hub_token" not in text and len(text.splitlines()) < 175
    assert "--hub_token" in make_parser(help_all=True).format_help()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dataset", "THINGS/nowhere"], "nowhere"),
        (["--student", "THINGS/nowhere"], "nowhere"),
        (["--label_column", "species"], "image"),
        (["--output_dir", "THINGS"], "in use"),
        (["--output_dir", "THINGS/config.yaml/out"], "can't be written to"),
        (["--output_dir", "/proc/out"], "can't be written to"),
        (["--loss", "nkd", "--teacher", "THINGS/other"], "6"),
        (["--resume_from_checkpoint", "last"], "nothing to resume"),
        (["--optim", "sgd", "--optim_args", "momentum=0,nestrov=true"], "optim_args='nestrov=true' has no effect"),
    ],
)
def test_bad_input_is_one_clear_error(more, message, things, tmp_path, capsys):
    if not (things / "other").exists():
        model, processor = tiny("resnet", num_labels=4)
        model.save_pretrained(things / "other"), processor.save_pretrained(things / "other")
    more = [text.replace("THINGS", str(things)) for text in more]
    where = [] if "--output_dir" in more else ["--output_dir", str(tmp_path / "out")]
    assert distill(things, *more, *where) == 1
    error = capsys.readouterr().err
    assert "error: " in error and message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_ctrl_c_saves_and_prints_the_command_that_goes_on(things, tmp_path):
    """In a subprocess, as a user; the signal is sent by the run itself at a known step."""
    out = tmp_path / "out"
    arguments = ["--config", str(things / "config.yaml"), "--output_dir", str(out), "--save_strategy", "no"]
    code = f"""
import os, signal, sys
from transformers import TrainerCallback
import hf_kd.trainer, hf_kd.cli
class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2: os.kill(os.getpid(), signal.SIGINT)
init = hf_kd.trainer.DistillationTrainer.__init__
hf_kd.trainer.DistillationTrainer.__init__ = lambda self, *a, **k: init(self, *a, callbacks=[Stop()], **k)
sys.argv = ["hf-kd", "distill"]
sys.exit(hf_kd.cli.main(["distill", *{arguments!r}]))
"""
    stopped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert stopped.returncode == 130, stopped.stderr[-2000:]
    assert (out / "checkpoint-2" / "trainer_state.json").is_file()
    assert f"Resume with: hf-kd resume {out}" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert main(["resume", str(out)]) == 0
    whole = tmp_path / "whole"
    assert distill(things, "--output_dir", whole) == 0
    a, b = (json.loads((folder / "run.json").read_text())["metrics"] for folder in (whole, out))
    assert a == b
