"""What goes wrong is said in one message, with the right exit status: wrong arguments, and runs that diverge."""

import json
from pathlib import Path

import pytest
from cli_helpers import distill
from trainer_helpers import rows, trainer_for

from hf_kd import push
from hf_kd.cli import main
from hf_kd.reporting import comparison_table, plot_curves, verdicts
from hf_kd.reporting.card import model_card
from hf_kd.reporting.record import divergence

pytestmark = pytest.mark.usefixtures("undrawn_figures")

NAN = ["--learning_rate", "1e5"]  # the logits become NaN
HUGE = ["--learning_rate", "1e2", "--num_train_epochs", "1"]  # the loss stays finite


def run_json(folder):
    return json.loads((Path(folder) / "run.json").read_text())


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
