"""What a comparison prints on the way, and the files that it leaves."""

import csv
import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
from cli_helpers import distill
from trainer_helpers import config, rows, trainer_for

from hf_kd.cli import main
from hf_kd.experiment import progress as module
from hf_kd.experiment.progress import ComparisonProgress, duration
from hf_kd.reporting import comparison_table, teacher_row_of
from hf_kd.reporting.classes import changes_section, read_counts
from hf_kd.spec import Experiment, run_spec

pytestmark = pytest.mark.usefixtures("undrawn_figures")


def test_a_comparison_says_where_it_is_and_leaves_a_report(things, tmp_path, capsys):
    out = tmp_path / "out"
    more = ["--compare", "ce,nkd", "--seeds", "3", "4", "--teacher", things / "teacher", "--output_dir", out]
    assert distill(things, *more, "--disable_tqdm", "false", "--num_train_epochs", "1") == 0
    printed, bars = capsys.readouterr()
    lines = printed.splitlines()
    assert "4 runs of 3 steps: ce, nkd; seeds 3, 4" in lines
    keys = ["ce, seed 3", "nkd, seed 3", "ce, seed 4", "nkd, seed 4"]
    starts = [line for line in lines if re.match(r"\[\d/4\] .*Loss\(", line)]
    assert [line.split(": ")[0] for line in starts] == [f"[{i}/4] {key}" for i, key in enumerate(keys, 1)]
    records = [json.loads((out / key.replace(", ", "/").replace(" ", "-") / "run.json").read_text()) for key in keys]
    for i, (key, record) in enumerate(zip(keys, records, strict=True), 1):
        result = rf"\[{i}/4\] {key}: top-1 {100 * record['metrics']['top1']:.2f} % after .+?"
        left = f"; {4 - i} left, about .+" if i < 4 else ""
        assert [line for line in lines if re.fullmatch(result + left, line)], (key, printed)
    assert any(line.startswith("[1/4] ce, seed 3: step 3 of 3, top-1 ") for line in lines)
    assert "it/s]" not in bars and "{'loss'" not in printed, "no bars where there is no terminal"

    comparison = json.loads((out / "run.json").read_text())
    report = (out / "report.md").read_text()
    table = comparison_table(comparison["runs"], teacher_row_of(comparison["runs"][0]), markdown=True)
    assert table in report and f"- {comparison['verdicts'][0]['sentence']}" in report and "(curves.png)" in report
    shared = comparison["verdicts"][0]["shared_errors"]["sentence"]
    assert f"- {shared}" in report and shared in printed
    rates = [record["metrics"]["teacher_errors_repeated"] for record in records]
    assert f"nkd gives the same wrong class to {50 * (rates[1] + rates[3]):.2f} %" in shared
    changes = comparison["class_changes"]["nkd"]
    assert changes["classes"] == 6 and changes_section({"nkd": changes}, "classes.png") in report
    for key, record in zip(keys, records, strict=True):
        counts = read_counts(out / key.replace(", ", "/").replace(" ", "-"))
        assert sum(counts["hits"]) / sum(counts["images"]) == record["metrics"]["top1"] and len(counts["name"]) == 6
        assert record.get("class_changes") == (changes if record["name"] == "nkd" else None)
        assert "class_counts" not in record
    assert (out / "classes.png").is_file()
    assert comparison["verdicts"][0]["sentence"] in printed and str(tmp_path) not in report
    found = list(csv.DictReader(open(out / "results.csv")))
    assert [(row["name"], int(row["seed"])) for row in found] == [("ce", 3), ("nkd", 3), ("ce", 4), ("nkd", 4)]
    for row, record in zip(found, records, strict=True):
        for metric in ("loss", "top1", "macro_top1", "top5", "ece", "agreement", "kl"):
            assert float(row[metric]) == record["metrics"][metric]
        assert float(row["train_seconds"]) == record["timings"]["train_seconds"]
    assert (out / "curves.png").is_file() and "report.md, results.csv, run.json and curves.png are in" in lines[-1]

    (out / "nkd" / "seed-4" / "run.json").unlink()
    assert main(["resume", str(out)]) == 0
    assert "[4/4] nkd, seed 4: top-1" in capsys.readouterr().out


def test_a_single_run_has_no_number_and_no_report(things, tmp_path, capsys):
    out = tmp_path / "out"
    assert distill(things, "--output_dir", out, "--num_train_epochs", "1") == 0
    printed = capsys.readouterr().out
    assert re.search(r"^ce, seed 42: top-1 \d+\.\d\d % after \d+ s$", printed, re.M) and "[1/" not in printed
    assert not (out / "report.md").exists() and not (out / "results.csv").exists()


def plan_of(names, seeds):
    run = run_spec(config("nowhere"))
    runs = [
        dataclasses.replace(run, name=name, seed=seed, folder=f"{name}-{seed}") for seed in seeds for name in names
    ]
    return Experiment("nowhere", runs=tuple(runs))


def test_the_estimate_counts_what_is_left_by_variant(monkeypatch):
    now = SimpleNamespace(value=0.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now.value)
    plan = plan_of(["ce", "nkd"], [0, 1, 2])
    progress, trainer = (
        ComparisonProgress(plan),
        SimpleNamespace(add_callback=lambda _: None, remove_callback=lambda _: None),
    )
    record, texts = {"metrics": {"top1": 0.5}}, []
    for spec, seconds in zip(plan.runs, (10, 70, 14, 80, 12, 60), strict=True):
        progress.start(spec, trainer)
        now.value += seconds
        texts.append(progress.finish(record).split(": ")[1])
    assert texts[0] == "top-1 50.00 % after 10 s; 5 left, about 50 s"
    assert texts[1] == "top-1 50.00 % after 1 min 10 s; 4 left, about 2 min 40 s"
    assert texts[2] == "top-1 50.00 % after 14 s; 3 left, about 2 min 32 s"  # 70 + 12 + 70
    assert texts[-1] == "top-1 50.00 % after 1 min 0 s"
    progress.start(plan.runs[4], trainer)
    now.value += 1
    resumed = ComparisonProgress(plan)  # knows only the last session of the first run, whose record has all its time
    resumed.start(plan.runs[0], trainer)
    now.value += 2
    text = resumed.finish(record | {"timings": {"train_seconds": 20}})
    assert text.endswith("after 2 s; 5 left, about 1 min 40 s")
    assert progress.finish({"diverged": "yes"}).split(": ")[1].startswith("diverged after")


def test_the_time_is_estimated_after_the_first_steps_only(tmp_path, monkeypatch, capsys):
    now = SimpleNamespace(value=0.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now.value)
    progress, trainer = (
        ComparisonProgress(plan_of(["ce", "nkd"], [0])),
        trainer_for(tmp_path, train=rows(8), max_steps=30),
    )
    progress.start(progress.experiment.runs[0], trainer)
    step = trainer.training_step

    def timed(*args, **kwargs):
        now.value += 60 if trainer.state.global_step == 0 else 2  # the first sets things up
        return step(*args, **kwargs)

    monkeypatch.setattr(trainer, "training_step", timed)
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if "about" in line]
    assert lines == ["about 2 min 0 s for 2 runs, evaluations not counted"]
    progress.start(progress.experiment.runs[0], SimpleNamespace(add_callback=print, remove_callback=print))
    for trainer.state.global_step in range(16, 27):  # resumed after step 15
        progress.on_step_end(trainer.args, trainer.state, trainer.control)
        now.value += 2
    assert "about 1 min 30 s for 2 runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (3629, "1 h 0 min"), (9e4, "25 h 0 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
