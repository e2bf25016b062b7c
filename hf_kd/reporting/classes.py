"""Top-1 by class: the file of a run, and which classes gain and lose most against a baseline, over seeds.

`counts` are those of one evaluation: name, images and hits of the classes, three lists in their order.
"""

import csv
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .metadata import one_line
from .record import CLASSES_FILE
from .significance import LEVEL, baseline_tests, describe
from .tables import layout

MOST = 10  # classes that are listed on either side
COLUMNS = ("name", "images", "hits")
_TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}


def write_counts(counts: Mapping[str, Sequence], folder: str | os.PathLike) -> None:
    """Writes classes.csv: a line for each class, in their order, with its name, images and top-1 hits."""
    with open(Path(folder, CLASSES_FILE), "w", **_TEXT) as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(zip(*(counts[key] for key in COLUMNS), strict=True))


def read_counts(folder: str | os.PathLike) -> dict[str, list] | None:
    """The counts that are in a run's folder; None if there are none."""
    path = Path(folder, CLASSES_FILE)
    if not path.is_file():
        return None
    with open(path, **_TEXT) as file:
        rows = list(csv.DictReader(file))
    names, *numbers = ([row[key] for row in rows] for key in COLUMNS)
    return dict(zip(COLUMNS, (names, *([int(value) for value in values] for values in numbers)), strict=True))


def class_changes(
    runs: Sequence[Mapping[str, Any]], counts: Sequence[Mapping[str, Sequence] | None], against: str
) -> dict[str, dict[str, Any]]:
    """The classes whose top-1 differs most from that of the variant `against`, of each other variant that distils.

    Args:
        runs: records; those that diverged count nowhere.
        counts: of each of the runs; None where there are none.

    Returns:
        By the variant's name: against, seeds, classes (how many have images), apart (of how many the 95 % interval
        leaves out 0; None with one seed), gains and losses: up to ten each, the largest first, with the class's name
        and images, own and baseline (top-1 in percent, means over the seeds), mean (of the paired differences, points)
        and half_width (of its 95 % interval by itself; None if there is none). Variants that share no seed with
        counts of the same images are left out.
    """
    by_name: dict[str, dict[Any, Mapping]] = {}  # and seed
    for run, part in zip(runs, counts, strict=True):
        if part and not run.get("diverged"):
            by_name.setdefault(run["name"], {})[run.get("seed")] = part
    found, base = {}, by_name.get(against, {})
    for name in baseline_tests(runs, against):
        own = by_name.get(name, {})
        pairs = {seed: (own[seed], base[seed]) for seed in own if seed in base}
        parts = [part for pair in pairs.values() for part in pair]
        if parts and all(part[key] == parts[0][key] for part in parts for key in ("name", "images")):
            found[name] = {"against": against, "seeds": list(pairs), **_changes(list(pairs.values()))}
    return found


def _changes(pairs: Sequence[tuple[Mapping, Mapping]]) -> dict[str, Any]:
    names, images = pairs[0][0]["name"], np.array(pairs[0][0]["images"])
    there = np.flatnonzero(images)
    own, base = (100 * np.array([pair[i]["hits"] for pair in pairs])[:, there] / images[there] for i in (0, 1))
    means, widths = (own - base).mean(0), np.full(len(there), math.nan)
    if len(pairs) > 1:
        from scipy.stats import t  # slow to import

        spread = (own - base).std(0, ddof=1)
        widths = t.isf(LEVEL / 2, len(pairs) - 1) * spread / math.sqrt(len(pairs))
        widths[spread < 1e-9] = math.nan  # all seeds alike: no interval, as in `paired_test`
    rows = [
        {
            "class": names[c],
            "images": int(images[c]),
            "own": float(own[:, i].mean()),
            "baseline": float(base[:, i].mean()),
            "mean": float(means[i]),
            "half_width": None if math.isnan(widths[i]) else float(widths[i]),
        }
        for i, c in enumerate(there)
    ]
    return {
        "classes": len(rows),
        "apart": int((np.abs(means) > widths).sum()) if len(pairs) > 1 else None,
        "gains": sorted((row for row in rows if row["mean"] > 0), key=lambda row: -row["mean"])[:MOST],
        "losses": sorted((row for row in rows if row["mean"] < 0), key=lambda row: row["mean"])[:MOST],
    }


def chance(changes: Mapping[str, Any]) -> str:
    """How far the listed differences can be due to chance, in words."""
    classes, seeds = changes["classes"], len(changes["seeds"])
    text = (
        f"These are the largest differences of {classes:,} classes: the largest of many are large by chance, too, and "
        "on other seeds or images they would be smaller on average."
    )
    if changes["apart"] is None:
        return f"{text} From one seed there is no interval."
    return (
        f"{text} ± is the half-width of the paired 95 % interval over {seeds} seeds, of each class by itself. It "
        f"leaves out 0 for {changes['apart']:,} of the {classes:,} classes; without any difference it would for about "
        f"5 % of them, {LEVEL * classes:,.1f}."
    )


def changes_section(changes: Mapping[str, Mapping[str, Any]], figure: str) -> str:
    """The part of a report: for each variant a table of its gains and losses, and what to make of them."""
    parts = []
    for name, found in changes.items():
        against = found["against"]
        rows = [["class", "images", f"{against} %", f"{name} %", "difference"]]
        for row in [*found["gains"], *reversed(found["losses"])]:
            rates = [f"{row[key]:.2f}" for key in ("baseline", "own")]
            rows.append([one_line(row["class"]), f"{row['images']:,}", *rates, describe(row)])
        parts += [f"### {name} against {against}", layout(rows, markdown=True), chance(found)]
    if not parts:
        return ""
    end = f"All classes are in {CLASSES_FILE} in the folder of each run."
    return "\n\n".join(["## Top-1 by class: the largest gains and losses", *parts, end, f"![by class]({figure})"])


def changes_sentence(found: Mapping[str, Any], code: Callable[[Any], str]) -> str:
    """The three largest gains and losses of one variant, for its card; "" if there are none. `code` quotes names."""
    sides = {side: found.get(side, ())[:3] for side in ("gains", "losses")}
    listed = [
        f"the largest {side} are " + ", ".join(f"{code(row['class'])} {describe(row)}" for row in rows)
        for side, rows in sides.items()
        if rows
    ]
    start = f"Top-1 by class, in points against {code(found.get('against'))}: {'; '.join(listed)}."
    return f"{start} {chance(found)}" if listed else ""


def plot_changes(changes: Mapping[str, Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Writes a PNG with a panel for each variant: the differences of its listed classes, with their intervals."""
    from matplotlib.figure import Figure  # slow to import

    columns = min(len(changes), 3)
    rows = math.ceil(len(changes) / columns)
    most = max(len(found["gains"]) + len(found["losses"]) for found in changes.values())
    figure = Figure(figsize=(max(3.6 * columns, 6), rows * (0.2 * most + 1.2)), layout="constrained")
    for i, (name, found) in enumerate(changes.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        listed = [*found["gains"], *reversed(found["losses"])]
        axes.axvline(0, color="black", linewidth=1)
        for y, row in enumerate(listed):
            colour = "#3f90da" if row["mean"] > 0 else "#bd1f01"
            axes.errorbar(row["mean"], y, xerr=row["half_width"], fmt="D", color=colour, markersize=4, capsize=3)
        labels = [one_line(row["class"]) for row in listed]
        labels = [label if len(label) <= 24 else f"{label[:23]}…" for label in labels]
        axes.set_yticks(range(len(listed)), labels, fontsize=8, parse_math=False)
        axes.set_ylim(len(listed) - 0.4, -0.6)
        count = len(found["seeds"])
        seeds, interval = (f"{count} seeds", "95 % interval") if count > 1 else ("one seed", "no interval")
        axes.set_title(f"{name} against {found['against']}, {seeds}", fontsize=10, parse_math=False)
        axes.set_xlabel(f"points ({interval})", fontsize=8)
        low, high = axes.get_xlim()
        axes.set_xlim(max(low, -105), min(high, 105))  # no difference is larger than 100 points
        axes.tick_params(axis="x", labelsize=8)
        axes.tick_params(left=False)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, format="png", dpi=150)
