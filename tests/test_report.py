"""run.json is strict and holds no secret, the table says what it knows, the image is an image."""

import json
import math
import sys
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_kd.reporting.curves import plot_curves
from hf_kd.reporting.record import collect_versions, redact, write_json
from hf_kd.reporting.tables import comparison_table, teacher_row_of

HUB_TOKEN = "hf_" + "aB3" * 12


def make_run(name, top1, terms=("ce",), teacher=False, **more):
    history = []
    for step in range(1, 7):
        values = {f"loss_{term}": 2.0 / step / (i + 1) for i, term in enumerate(terms)}
        history.append({"loss": sum(values.values()), **values, "learning_rate": 0.1, "epoch": step / 2, "step": step})
        if step % 2 == 0:
            history.append({"eval_top1": top1 * step / 6, "eval_loss": 1.0, "epoch": step / 2, "step": step})
    history.append({"train_loss": 1.0, "train_runtime": 3.0, "epoch": 3.0, "step": 6})
    metrics = {"loss": 1.0, "top1": top1, "top5": 0.9, "ece": 0.05}
    return {
        "name": name,
        "student": {"id": "student/tiny", "size_mb": 22.93},
        "teacher": {"id": "teacher/big", "size_mb": 102.2} if teacher else None,
        "data": {"id": "some/data", "eval_size": 10000},
        "seed": 3,
        "metrics": {**metrics, "agreement": 0.81, "kl": 0.2, "teacher_top1": 0.8} if teacher else metrics,
        "teacher_metrics": {"top1": 0.8, "top5": 0.95, "ece": 0.02} if teacher else None,
        "history": history,
        "timings": {"train_seconds": 61.25, "eval_seconds": 1.0, "total_seconds": 70.0},
        **more,
    }


def test_versions_are_those_of_what_is_installed():
    versions = collect_versions()
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert versions["python"].split(".")[:2] == [str(part) for part in sys.version_info[:2]]


def test_json_is_strict_and_plain(tmp_path):
    class Colour(Enum):
        RED = "red"

    path = tmp_path / "new" / "run.json"
    write_json(
        path,
        {
            "nan": math.nan,
            "inf": [math.inf, -math.inf, np.float32("nan"), torch.tensor(math.nan)],
            "numpy": {"f": np.float64(0.5), "i": np.int64(3), "b": np.bool_(True), "a": np.array([1.0, math.nan])},
            "tensor": torch.tensor([1, 2]),
            "path": Path("a") / "b",
            "set": {"b", "a"},
            "enum": Colour.RED,
            1: (None, True, 2, 0.25, "é"),
            "undecodable": "\udc80.jpg",
        },
    )

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse) == {
        "nan": None,
        "inf": [None, None, None, None],
        "numpy": {"f": 0.5, "i": 3, "b": True, "a": [1.0, None]},
        "tensor": [1, 2],
        "path": str(Path("a") / "b"),
        "set": ["a", "b"],
        "enum": "red",
        "1": [None, True, 2, 0.25, "é"],
        "undecodable": "\udc80.jpg",
    }
    assert path.read_text(encoding="utf-8").startswith('{\n  "nan": null')


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    class Broken:
        def __str__(self):
            raise RuntimeError("no text")

    path = tmp_path / "run.json"
    write_json(path, {"kept": 1})
    with pytest.raises(RuntimeError, match="no text"):
        write_json(path, {"a": 1, "b": Broken()})
    with monkeypatch.context() as patch, pytest.raises(OSError, match="stopped here"):
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("stopped here")))
        write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"kept": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_redact_drops_secrets_and_keeps_counts():
    settings = {
        "hub_token": HUB_TOKEN,
        "push_to_hub_token": None,
        "HF_TOKEN": "x",
        "api_key": "x",
        "hub_tokens": [HUB_TOKEN],
        "include_tokens": "x",
        "num_input_tokens": 17,
        "learning_rate": 0.1,
        "dtype": torch.float32,
        "nested": [{"token": "x", "kept": Path("out")}],
        "note": f"logged in as {HUB_TOKEN}.",
    }
    clean = redact(settings)
    assert clean == {
        "num_input_tokens": 17,
        "learning_rate": 0.1,
        "dtype": "torch.float32",
        "nested": [{"kept": "out"}],
        "note": "logged in as <redacted>.",
    }
    json.dumps(clean, allow_nan=False)
    assert settings["hub_token"] == HUB_TOKEN, "the caller's own settings stay as they are"


@pytest.mark.parametrize("option", ["--hub_token secret", "--hub-token=secret", f"x {HUB_TOKEN}"])
def test_redact_cleans_a_command(option):
    command = redact({"command": f"hf-kd distill {option} --seed 3"})["command"]
    assert "secret" not in command and HUB_TOKEN not in command
    assert command.startswith("hf-kd distill ") and command.endswith("<redacted> --seed 3")


def test_redact_keeps_ordinary_text():
    text = "the distillation token is averaged; hf_kd distill --hub_token --seed 3"
    assert redact({"text": text})["text"] == text


def test_table_for_a_terminal():
    nkd = make_run("nkd", 0.7125, teacher=True)
    runs = [make_run("ce", 0.7), nkd, make_run("kd", 0.69996)]
    lines = comparison_table(runs, teacher_row_of(nkd)).splitlines()
    assert lines[0].split("  ")[0] == "student trained with"
    assert lines[2].split() == ["teacher", "teacher/big", "80.00", "95.00", "–", "2.00", "–", "102.2", "–"]
    assert lines[3].split() == ["ce", "70.00", "90.00", "–", "5.00", "61.2", "22.9", "+0.00"]
    assert lines[4].split() == ["nkd", "71.25", "90.00", "81.00", "5.00", "61.2", "22.9", "+1.25"]
    assert lines[5].split()[-1] == "+0.00", "not -0.00"
    assert len({len(line) for line in lines[:6]}) == 1, "the columns line up"
    # Half of scipy 1.17's binomtest(7000, 10000).proportion_ci(method="wilson"), the widest of the three rows.
    assert lines[6] == "" and lines[7] == (
        "Each row is one training run (seed 3), so a difference between rows has no error bar. "
        "Sampling error of one top-1 from 10000 images: ±0.90 points (95 %)."
    )
    assert len(lines) == 8


def test_table_in_markdown():
    lines = comparison_table([make_run("ce", 0.7), make_run("a|b", 0.65)], markdown=True).splitlines()
    cells = [[cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")] for line in lines[:4]]
    assert [len(row) for row in cells] == [8] * 4
    assert cells[0][0] == "student trained with" and cells[0][-1] == "difference to CE"
    assert set("".join(cells[1])) == {"-", ":"} and not cells[1][0].endswith(":") and cells[1][1].endswith("-:")
    assert cells[3][0] == "a/b" and cells[3][-1] == "-5.00"


def test_table_says_nothing_it_does_not_know():
    runs = [{"name": "nkd"}, make_run("uskd", math.nan), make_run("dist", 0.5, seed=4, timings={})]
    lines = comparison_table(runs).splitlines()
    assert lines[2].split() == ["nkd"] + ["–"] * 7
    assert lines[3].split() == ["uskd", "–", "90.00", "–", "5.00", "61.2", "22.9", "–"]
    assert lines[4].split() == ["dist", "50.00", "90.00", "–", "5.00", "–", "22.9", "–"]
    assert "(seeds 3, 4)" in lines[-1] and "±0.98 points" in lines[-1]
    assert comparison_table([{"name": "ce"}]).splitlines()[-1] == (
        "Each row is one training run, so a difference between rows has no error bar."
    )
    assert teacher_row_of(runs[1]) is None


@pytest.mark.parametrize(("right", "n", "expected"), [(10, 10, "13.88"), (0, 10, "13.88"), (3, 4, "32.69")])
def test_sampling_error_of_few_images(right, n, expected):
    # Half the length of scipy 1.17's Wilson interval; the textbook interval would be ±0 where all are right.
    line = comparison_table([make_run("ce", right / n, data={"eval_size": n})]).splitlines()[-1]
    assert f"from {n} images: ±{expected} points" in line


def read_image(path):
    with Image.open(path) as image:
        image.load()
        return image.format, image.convert("RGB")


@pytest.mark.parametrize("count", [1, 3])
def test_curves_are_an_image(tmp_path, count):
    runs = [
        make_run("nkd", 0.71, ("ce", "target", "non_target"), teacher=True),
        make_run("ce", 0.7),
        make_run("", 0.5),
    ]
    path = tmp_path / "new" / "curves.png"
    pyplot_before = "matplotlib.pyplot" in sys.modules  # another test's library may have imported it
    plot_curves(runs[:count], path)
    kind, image = read_image(path)
    assert kind == "PNG"
    assert 800 <= image.width <= 2400 and 500 <= image.height <= 2400
    assert len(image.getcolors(maxcolors=2**24)) > 100, "more than an empty frame"
    assert ("matplotlib.pyplot" in sys.modules) == pyplot_before, "no global state"


def test_curves_without_history_or_values(tmp_path):
    broken = {"loss": math.nan, "loss_ce": None, "loss_target": 1.0, "step": 1}
    runs = [{"name": "a", "history": []}, {"name": "b"}, {"name": "c", "history": [broken, {"step": 2}]}]
    plot_curves(runs, tmp_path / "curves.png")
    assert read_image(tmp_path / "curves.png")[0] == "PNG"
    with pytest.raises(ValueError, match="no runs"):
        plot_curves([], tmp_path / "none.png")


@pytest.fixture
def figures(monkeypatch):
    """The matplotlib figures that were saved."""
    from matplotlib.figure import Figure

    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k)))
    return saved


def test_a_diverged_run_does_not_look_finite(tmp_path, figures):
    history = [{"loss": 3.0, "loss_ce": 1.0, "loss_target": 2.0, "step": 1}]
    history += [{"loss": math.nan, "loss_ce": None, "loss_target": math.inf, "step": 2}]
    plot_curves([{"name": "nkd", "history": history}], tmp_path / "curves.png")
    texts = [text.get_text() for text in figures[0].axes[0].texts]
    assert texts == ["at the end: total nan, ce nan, target inf"]


def names_of(axes):
    return [line.get_label() for line in axes.lines]


def test_no_panel_cuts_its_curves(tmp_path, figures):
    small, large = make_run("ce", 0.7, ("ce",)), make_run("nkd", 0.71, ("ce", "target", "non_target"), teacher=True)
    plot_curves([small, large], tmp_path / "curves.png")
    first, second, below, _ = figures[0].axes
    assert names_of(second) == ["total", "ce", "target", "non-target"]
    assert list(second.lines[0].get_ydata()) == pytest.approx([e["loss"] for e in large["history"] if "loss" in e])
    for axes in (first, second):
        low, high = axes.get_ylim()
        values = [y for line in axes.lines for y in line.get_ydata()]
        assert axes.get_yscale() == "log" and 0 < low <= min(values) and max(values) <= high
    assert list(below.lines[0].get_ydata()) == pytest.approx([70 / 3, 140 / 3, 70])
    assert below.lines[2].get_linestyle() == "--" and list(below.lines[2].get_ydata()) == [80, 80]
    assert not any(axes.get_legend() for axes in figures[0].axes), "legends are outside of the axes"


def test_a_term_has_one_colour_in_all_figures(tmp_path, figures):
    terms = ("ce", "kd", "target", "non_target", "weak")
    orders = (terms, terms[::-1], terms[2:], ("own", "ce", "weak"))
    for order in orders:
        plot_curves([make_run("x", 0.7, order)], tmp_path / "curves.png")
    colours = [{line.get_label(): line.get_color() for line in figure.axes[0].lines} for figure in figures]
    for found in colours:
        assert found.items() >= {name: colours[0][name] for name in found if name in colours[0]}.items()
        assert len(set(found.values())) == len(found)
    assert len(colours[3]) == 4 and "own" in colours[3]


def test_what_is_no_part_of_the_loss_is_dashed_and_named(tmp_path, figures):
    run = make_run("nkd", 0.7, ("ce", "target", "non_target"))
    for entry in run["history"]:
        if "loss" in entry:
            entry["diagnostic_non_target_kl"] = entry["loss_non_target"] / 10
    plot_curves([run], tmp_path / "curves.png")
    lines = {line.get_label(): line for line in figures[0].axes[0].lines}
    assert list(lines) == ["total", "ce", "target", "non-target", "non-target, KL"]
    assert [line.get_linestyle() for line in lines.values()] == ["-"] * 4 + ["--"]
    legend = [text.get_text() for text in figures[0].subfigs[0].legends[0].get_texts()]
    assert legend == list(lines)


def test_the_title_names_no_folders_and_no_owner(tmp_path, figures):
    run = {"name": "ce", "student": {"id": "/some/machine/net/"}, "data": {"id": "own/flowers"}}
    plot_curves([run], tmp_path / "curves.png")
    assert figures[0].get_suptitle() == "net on flowers"


def test_seeds_of_a_loss_share_a_colour_and_a_mean(tmp_path, figures):
    tops = {"ce": (0.6, 0.63, 0.69), "nkd": (0.7, 0.71, 0.75)}
    runs = [
        make_run(name, top, ("ce", "kd"), seed=seed) for name, all_ in tops.items() for seed, top in enumerate(all_)
    ]
    runs[4]["history"] = runs[4]["history"][:-4]  # stopped after two of three evaluations
    plot_curves(runs, tmp_path / "curves.png")
    *panels, below, differences = figures[0].axes
    assert [axes.get_title() for axes in panels] == ["ce, seed 0", "nkd, seed 0"]
    for axes, run in zip(panels, (runs[0], runs[3]), strict=True):
        assert list(axes.lines[0].get_ydata()) == [e["loss"] for e in run["history"] if "loss" in e]
    colours = [line.get_color() for line in below.lines]
    assert len(set(colours[:4])) == len(set(colours[4:])) == 1 and colours[0] != colours[4]
    ce, nkd = below.lines[3], below.lines[7]
    widths = [line.get_linewidth() for line in below.lines]
    assert max(widths[:3]) < ce.get_linewidth() and max(widths[4:7]) < nkd.get_linewidth()
    assert list(ce.get_ydata()) == pytest.approx([64 / 3, 128 / 3, 64])
    assert list(nkd.get_ydata()) == pytest.approx([24, 48]), "a mean of two seeds is not that of three"
    # The root of ((4² + 1² + 5²) / 2), and of the same of 2/3 · (2, 1, 3): n − 1, as numpy's ddof=1.
    assert [line.get_label() for line in (ce, nkd)] == ["ce 64.00 ± 4.58 %", "nkd 48.00 ± 1.76 %"]
    legend = figures[0].subfigs[1].legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [ce.get_label(), nkd.get_label()]
    assert "standard deviation over seeds" in legend.get_title().get_text()
    # The differences are those of the final metrics: 10, 8 and 6 points; 4.303 is the quantile of t.
    dots = differences.lines[1]
    assert list(dots.get_xdata()) == pytest.approx([10, 8, 6]) and dots.get_color() == nkd.get_color()
    (interval,) = [line.get_segments()[0] for line in differences.collections]
    assert interval[:, 0] == pytest.approx([8 - 4.303 * 2 / 3**0.5, 8 + 4.303 * 2 / 3**0.5], abs=1e-3)
    assert [tick.get_text() for tick in differences.get_yticklabels()] == ["nkd\n+8.00 ± 4.97"]


def test_a_seed_without_a_value_is_no_mean_and_one_that_diverged_is_left_out(tmp_path, figures):
    runs = [make_run("nkd", top, seed=seed) for seed, top in enumerate((0.6, math.nan))]
    plot_curves(runs, tmp_path / "curves.png")
    assert figures[0].axes[-1].lines[-1].get_label() == "nkd nan ± nan %"
    plot_curves([runs[0], runs[1] | {"diverged": "the loss is NaN"}], tmp_path / "curves.png")
    assert figures[1].axes[-1].lines[-1].get_label() == "nkd 60.00 %"


def test_the_macro_average_is_shown_where_it_is_another():
    balanced, other = make_run("ce", 0.7), make_run("ce", 0.7)
    balanced["metrics"]["macro_top1"] = 0.7 + 1e-12
    other["metrics"]["macro_top1"] = 0.6
    assert "macro" not in comparison_table([balanced])
    lines = comparison_table([other, make_run("nkd", 0.5)], {"top1": 0.8}).splitlines()
    assert "top-1 %  macro top-1 %  top-5 %" in lines[0]
    assert [line.split()[1:3] for line in lines[2:5]] == [["80.00", "–"], ["70.00", "60.00"], ["50.00", "–"]]
