"""A figure of one or more runs: every loss term in training, and top-1 in evaluation."""

import math
import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .record import by_name, results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOTAL_COLOUR = "#555555"
PANELS_PER_ROW = 3


def plot_curves(runs: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Writes a PNG: above, one panel per variant with its training loss terms; below, every run's evaluated top-1.

    A variant is all runs of one name, which differ in their seed; its panel, with a logarithmic scale of its own,
    shows the first of them. Of several seeds every one is a thin line and their mean a thick one. A legend shows each
    last value, of several seeds the mean ± standard deviation (n − 1). A dashed line is the teacher's top-1.

    Args:
        runs: records (see `record`), at least one that did not diverge; only name is required.
        path: the file; missing folders are made.
    """
    runs = results(runs)
    if not runs:
        raise ValueError("no runs to plot that did not diverge; pass at least one")
    # Slow to import, and training does not need it. Figure without pyplot leaves no global state behind.
    from matplotlib import color_sequences
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    class PlainFormatter(LogFormatter):
        """0.6 and not 6e−01, at the ticks that LogFormatter labels."""

        def __call__(self, x, pos=None):
            return f"{x:g}" if super().__call__(x, pos) else ""

    variants = by_name(runs)
    columns = min(len(variants), PANELS_PER_ROW)
    rows = math.ceil(len(variants) / columns)
    figure = Figure(figsize=(max(8.0, 4.4 * columns), 3.2 * rows + 3.8), layout="constrained")
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[3.2] * rows + [3.6])

    terms = dict.fromkeys(key for run in runs for entry in _history(run) for key in entry if key.startswith("loss_"))
    term_colours = dict(zip(terms, cycle(color_sequences["petroff10"]), strict=False))
    colours = dict(zip(variants, cycle(color_sequences["Dark2"]), strict=False))
    first = None
    for i, (name, seeds) in enumerate(variants.items()):
        axes = figure.add_subplot(grid[i // columns, i % columns], sharex=first)
        first = first or axes
        _plot_terms(axes, seeds[0], term_colours)
        which = f", seed {seeds[0]['seed']}" if len(seeds) > 1 and seeds[0].get("seed") is not None else ""
        axes.set_title(f"trained with {name}{which}", fontsize=11, color=colours[name])
        axes.set_ylabel("training loss" if i % columns == 0 else "")
        axes.set_yscale("log")  # the terms of one loss differ by orders of magnitude
        axes.yaxis.set_major_formatter(PlainFormatter())
        axes.yaxis.set_minor_formatter(PlainFormatter(minor_thresholds=(1.5, 0.5)))
    below = figure.add_subplot(grid[rows, :])
    for i, (name, seeds) in enumerate(variants.items()):
        _plot_top1(below, name, seeds, {"color": colours[name], "marker": "osD^v"[i % 5], "markersize": 4})
    _finish(below, runs[0], "no evaluation logged")
    _plot_teachers(below, runs)
    below.set_title("top-1 on the evaluation set", fontsize=11)
    below.set_ylabel("top-1 %")
    handles, labels = below.get_legend_handles_labels()
    if handles:
        # Below the panel: curves and the teacher's line leave no corner that is always free.
        figure.legend(
            handles,
            labels,
            title="last top-1" + (", mean ± standard deviation over seeds" if len(variants) < len(runs) else ""),
            fontsize=9,
            title_fontsize=9,
            ncols=min(len(handles), columns + 1),
            loc="outside lower center",
        )
    figure.suptitle(_subject(runs), fontsize=12)

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)


def _plot_terms(axes: "Axes", run: Mapping[str, Any], colours: Mapping[str, Any]) -> None:
    terms = [term for term in colours if any(term in entry for entry in _history(run))]
    # With one term the total is that term.
    for key in terms if len(terms) == 1 else ["loss", *terms]:
        x, y = _series(run, key)
        if y:
            label = f"{'total' if key == 'loss' else key.removeprefix('loss_')} {y[-1]:.3g}"
            style = {"color": TOTAL_COLOUR, "linewidth": 2.2} if key == "loss" else {"color": colours[key]}
            axes.plot(x, y, label=label, marker="o" if len(y) < 3 else None, **style)
    _finish(axes, run, "no training loss logged")
    if axes.lines:
        axes.legend(title="last value", fontsize=8, title_fontsize=8, loc="best", framealpha=0.85)


def _plot_top1(axes: "Axes", name: str, seeds: Sequence[Mapping[str, Any]], style: dict[str, Any]) -> None:
    curves = [dict(zip(*_series(run, "eval_top1"), strict=True)) for run in seeds]
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
    top1 = [((run.get("teacher") or {}).get("id"), (run.get("teacher_metrics") or {}).get("top1")) for run in runs]
    for name, value in dict.fromkeys(top1):
        if value is not None and math.isfinite(value):
            label = f"teacher {100 * value:.2f} %" + (f" ({name})" if name else "")
            axes.axhline(100 * value, color="black", linestyle="--", linewidth=1.2, label=label)


def _finish(axes: "Axes", run: Mapping[str, Any], nothing: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(_clock(run))
    if axes.lines:
        axes.grid(alpha=0.3)
    else:
        # Not set_ticks([]), which would also empty the panels that share this axis.
        axes.tick_params(bottom=False, left=False, labelbottom=False, labelleft=False)
        axes.text(0.5, 0.5, nothing, ha="center", va="center", color="grey", transform=axes.transAxes)


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
    """Student and data, each named once."""
    names = [sorted({str((run.get(key) or {}).get("id") or "") for run in runs} - {""}) for key in ("student", "data")]
    return " on ".join(", ".join(ids) for ids in names if ids)
