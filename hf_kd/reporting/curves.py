"""A figure of one or more runs: every loss term in training, top-1 in evaluation, and the differences to plain CE."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..metrics.loss_terms import DIAGNOSTIC
from .metadata import one_line
from .record import by_name, eval_key, results
from .significance import BASELINE, compare, describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The same in every figure. What has no colour here takes one of the others, in order.
TERMS = {
    "loss": ("total", "#333333"),
    "loss_ce": ("ce", "#3f90da"),
    "loss_kd": ("kd", "#ffa90e"),
    "loss_target": ("target", "#bd1f01"),
    "loss_non_target": ("non-target", "#009e73"),
    f"{DIAGNOSTIC}non_target_kl": ("non-target, KL", "#009e73"),
    "loss_weak": ("weak", "#832db6"),
}
VARIANTS = {"ce": "#3f90da", "2xce": "#717581", "kd": "#ffa90e", "nkd": "#d6257d", "uskd": "#7a4a2b"}
OTHERS = ("#66a61e", "#b9ac70", "#17becf", "#e76300", "#94a4a2", "#5254a3")
PANELS_PER_ROW, WIDTH = 3, 9.0  # inches, shown at about 90 pixels an inch in a README


def plot_curves(runs: Sequence[Mapping[str, Any]], path: str | os.PathLike, against: str = BASELINE) -> None:
    """Writes a PNG: above, one panel per variant with its training loss terms; below (of one variant: beside it) every
    run's evaluated top-1, and the differences to the runs named `against`.

    A variant is all runs of one name, which differ in their seed; its panel, with a logarithmic scale of its own,
    shows the first of them. A dashed term is no part of the loss: of NKD, the non-target term without the teacher's
    entropy, which training cannot change. Of several seeds every top-1 is a thin line and the mean a thick one; the
    legend shows the last value, of several seeds the mean ± standard deviation (n − 1). A dashed line is the teacher's
    top-1. A difference is that of each seed, as in `significance.compare`, with the mean and its 95 % interval.

    Args:
        runs: records (see `record`), at least one that did not diverge; only name is required.
        path: the file; missing folders are made.
    """
    runs = results(runs)
    if not runs:
        raise ValueError("no runs to plot that did not diverge; pass at least one")
    # Slow to import, and training does not need it. Figure without pyplot leaves no global state behind.
    from matplotlib.figure import Figure

    variants = by_name(runs)
    differences = {name: test for name in variants if name != against and (test := compare(runs, name, against))}
    rows = math.ceil(len(variants) / PANELS_PER_ROW)
    heights = [2.1 * rows + 0.7, 3.4] if len(variants) > 1 else [3.4]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.3), layout="constrained")
    figure.suptitle(_subject(runs), fontsize=12)
    halves: Any = figure.subfigures(2, 1, height_ratios=heights) if len(variants) > 1 else figure.subfigures(1, 2)
    above, below = halves
    _plot_losses(above, variants, rows)
    colours = dict(zip(variants, _colours(variants, VARIANTS), strict=True))
    panels = below.subplots(1, 2, width_ratios=[1.3, 1]) if differences else [below.subplots()]
    for i, (name, seeds) in enumerate(variants.items()):
        _plot_top1(panels[0], name, seeds, {"color": colours[name], "marker": "osD^v"[i % 5], "markersize": 4})
    _finish(panels[0], runs[0], "no evaluation logged")
    _plot_teachers(panels[0], runs)
    panels[0].set_title("top-1 % on the evaluation set", fontsize=10)
    if differences:
        _plot_differences(panels[1], differences, colours, against)
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        title = "last top-1" + (", mean ± standard deviation over seeds" if len(variants) < len(runs) else "")
        _legend(below, handles, labels, PANELS_PER_ROW if len(variants) > 1 else 2, title)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150)


def _plot_losses(figure, variants: Mapping[str, Sequence[Mapping[str, Any]]], rows: int) -> None:
    from matplotlib.ticker import LogFormatter

    class PlainFormatter(LogFormatter):
        """0.6 and not 6e−01, at the ticks that LogFormatter labels."""

        def __call__(self, x, pos=None):
            return f"{x:g}" if super().__call__(x, pos) else ""

    logged = {key for seeds in variants.values() for run in seeds for entry in _history(run) for key in entry}
    own = sorted(key for key in logged if key.startswith(("loss_", DIAGNOSTIC)))
    terms = [*(key for key in TERMS if key in logged), *(key for key in own if key not in TERMS)]
    colours = dict(zip(terms, _colours(terms, {key: colour for key, (_, colour) in TERMS.items()}), strict=True))
    columns = min(len(variants), PANELS_PER_ROW)
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
    for i, axes in enumerate(grid.flat):
        if i >= len(variants):
            axes.set_axis_off()
            continue
        name, seeds = list(variants.items())[i]
        _plot_terms(axes, seeds[0], colours)
        which = f", seed {seeds[0]['seed']}" if len(seeds) > 1 and seeds[0].get("seed") is not None else ""
        axes.set_title(f"{name}{which}", fontsize=10)
        axes.set_ylabel("training loss" if i % columns == 0 else "", fontsize=9)
        if i + columns < len(variants):
            axes.set_xlabel("")
        axes.tick_params(labelbottom=True)
        axes.set_yscale("log")  # the terms of one loss differ by orders of magnitude
        axes.yaxis.set_major_formatter(PlainFormatter())
        axes.yaxis.set_minor_formatter(PlainFormatter(minor_thresholds=(1.5, 0.5)))
        axes.tick_params(which="both", labelsize=8)
    lines = {line.get_label(): line for axes in grid.flat for line in axes.lines}
    if lines:
        order = [_term(key) for key in terms if _term(key) in lines]
        _legend(figure, [lines[name] for name in order], order, 7 if len(variants) > 1 else 4)


def _plot_terms(axes: "Axes", run: Mapping[str, Any], colours: Mapping[str, Any]) -> None:
    shown = [key for key in colours if any(key in entry for entry in _history(run))]
    parts, lost = [key for key in shown if key.startswith("loss_")], []
    for key in shown:
        x, y = _series(run, key)
        if y and (key != "loss" or len(parts) != 1):  # with one term the total is that term
            (line,) = axes.plot(x, y, label=_term(key), color=colours[key], marker="o" if len(y) < 3 else None)
            line.set_linewidth(2.4 if key == "loss" else 1.5)
            line.set_linestyle("-" if key == "loss" or key in parts else "--")
            lost += [] if math.isfinite(y[-1]) else [f"{_term(key)} {y[-1]}"]
    if lost:
        text = f"at the end: {', '.join(lost)}"
        axes.text(0.5, 0.95, text, ha="center", va="top", fontsize=9, color="red", transform=axes.transAxes)
    _finish(axes, run, "no training loss logged")


def _plot_top1(axes: "Axes", name: str, seeds: Sequence[Mapping[str, Any]], style: dict[str, Any]) -> None:
    curves = [dict(zip(*_series(run, eval_key(run, "top1")), strict=True)) for run in seeds]
    curves = [curve for curve in curves if curve]
    if len(curves) > 1:
        for curve in curves:
            x, y = list(curve), 100 * np.array([*curve.values()])
            axes.plot(x, y, color=style["color"], linewidth=0.7, alpha=0.6, label="_")
        style |= {"linewidth": 2.0}
    common = [at for at in curves[0] if all(at in curve for curve in curves)] if curves else []
    if common:
        values = 100 * np.array([[curve[at] for at in common] for curve in curves])
        mean = values.mean(0)
        spread = f" ± {values[:, -1].std(ddof=1):.2f}" if len(curves) > 1 else ""
        axes.plot(common, mean, label=f"{name} {mean[-1]:.2f}{spread} %", **style)


def _plot_teachers(axes: "Axes", runs: Sequence[Mapping[str, Any]]) -> None:
    for value in dict.fromkeys((run.get("teacher_metrics") or {}).get("top1") for run in runs):
        if value is not None and math.isfinite(value):
            label = f"teacher {100 * value:.2f} %"
            axes.axhline(100 * value, color="black", linestyle="--", linewidth=1.2, label=label)


def _plot_differences(
    axes: "Axes", tests: Mapping[str, Mapping[str, Any]], colours: Mapping[str, Any], against: str
) -> None:
    axes.axvline(0, color="black", linewidth=1)
    for row, (name, test) in enumerate(tests.items()):
        values = test["differences"]
        axes.plot(values, [row + 0.18] * len(values), "o", color=colours[name], markersize=4, alpha=0.6)
        axes.errorbar(test["mean"], row, xerr=test["half_width"], fmt="D", color=colours[name], capsize=5, linewidth=2)
    axes.set_yticks(range(len(tests)), [f"{name}\n{describe(test)}" for name, test in tests.items()], fontsize=9)
    axes.set_ylim(len(tests) - 0.5, -0.5)
    axes.set_title(f"difference to {against}, points of top-1", fontsize=10)
    tested = any(test["half_width"] is not None for test in tests.values())
    axes.set_xlabel("seeds (dots), mean and its 95 % interval" if tested else "one seed, no interval", fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.3)


def _legend(figure, handles: Sequence[Any], labels: Sequence[str], columns: int, title: str = "") -> None:
    columns = min(len(handles), columns)
    options = {"title": title or None, "fontsize": 9, "title_fontsize": 9, "ncols": columns, "frameon": False}
    figure.legend(handles, labels, loc="outside lower center", **options)


def _finish(axes: "Axes", run: Mapping[str, Any], nothing: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(_clock(run), fontsize=9)
    axes.tick_params(labelsize=8)
    if axes.lines:
        axes.grid(alpha=0.3)
    else:
        # Not set_ticks([]), which would also empty the panels that share this axis.
        axes.tick_params(bottom=False, left=False, labelbottom=False, labelleft=False)
        axes.text(0.5, 0.5, nothing, ha="center", va="center", color="grey", transform=axes.transAxes)


def _colours(names: Iterable[str], fixed: Mapping[str, str]) -> list[str]:
    others = [name for name in names if name not in fixed]
    return [fixed.get(name) or OTHERS[others.index(name) % len(OTHERS)] for name in names]


def _term(key: str) -> str:
    return TERMS[key][0] if key in TERMS else key.removeprefix("loss_").removeprefix(DIAGNOSTIC)


def _history(run: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return run.get("history") or []


def _clock(run: Mapping[str, Any]) -> str:
    return "epoch" if all("epoch" in entry for entry in _history(run)) else "step"


def _series(run: Mapping[str, Any], key: str) -> tuple[list[float], list[float]]:
    """Where and what was logged under a key; NaN, or the null that run.json makes of it, stays a gap in the line."""
    clock = _clock(run)
    entries = [entry for entry in _history(run) if clock in entry and key in entry]
    values = [math.nan if entry[key] is None else float(entry[key]) for entry in entries]
    return [float(entry[clock]) for entry in entries], values


def _subject(runs: Sequence[Mapping[str, Any]]) -> str:
    """Student and data, each named once and without its folders or owner."""
    names = [
        sorted({one_line((run.get(key) or {}).get("id")).rstrip("/").split("/")[-1] for run in runs} - {""})
        for key in ("student", "data")
    ]
    return " on ".join(", ".join(ids) for ids in names if ids)
