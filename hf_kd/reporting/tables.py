"""The table that compares runs, and its error bars."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .significance import BASELINE, compare, describe

MISSING = "–"
HEADER = (
    "student trained with",
    "top-1 %",
    "top-5 %",
    "agreement %",
    "ECE %",
    "seconds",
    "MB",
    "difference to CE",
)


def teacher_row_of(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The teacher's row for `comparison_table`: its metrics, id and size; None if the run has no teacher measured."""
    if not run.get("teacher_metrics"):
        return None
    return {**(run.get("teacher") or {}), **run["teacher_metrics"]}


def comparison_table(
    runs: Sequence[Mapping[str, Any]], teacher_row: Mapping[str, Any] | None = None, markdown: bool = False
) -> str:
    """The runs side by side, as text for a terminal or as a GitHub table, and below it the errors of its figures.

    The runs should share student, data and settings, and differ in their loss and seed. Runs of one name are one row:
    the mean over its seeds, with the standard deviation of top-1. Rates are percentages, "seconds" are those of
    training without evaluations, "MB" is the saved model, and the last column is in top-1 points against the run named
    "ce" of the same seed, with the half-width of the paired 95 % interval (`significance`). What is missing or not
    finite shows as "–". The sampling error is the half-width of the 95 % interval of a single top-1 (Wilson 1927),
    which, unlike the usual one, is not 0 if all images are right.

    Args:
        runs: see the module's text; only "name" is required.
        teacher_row: top1, top5, ece (in [0, 1]), size_mb and id of the teacher (see `teacher_row_of`), as first row.
        markdown: a GitHub table instead of aligned text.
    """
    variants: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        variants.setdefault(run["name"], []).append(run)
    rows = []
    if teacher_row is not None:
        label = f"teacher {teacher_row['id']}" if teacher_row.get("id") else "teacher"
        rates = [rate([_number(teacher_row, key)]) for key in ("top1", "top5")]
        size = _fixed(_number(teacher_row, "size_mb"))
        rows.append([label, *rates, MISSING, rate([_number(teacher_row, "ece")]), MISSING, size, MISSING])
    for name, seeds in variants.items():
        test = compare(runs, name, BASELINE)
        rates = [
            rate([_number(run, "metrics", key) for run in seeds], spread=key == "top1")
            for key in ("top1", "top5", "agreement", "ece")
        ]
        seconds = [value for run in seeds if (value := _training_seconds(run)) is not None]
        size = _fixed(_number(seeds[0], "student", "size_mb"))
        mean_seconds = _fixed(statistics.fmean(seconds) if seconds else None)
        rows.append([str(name), *rates, mean_seconds, size, describe(test) if test else MISSING])
    return f"{layout([list(HEADER), *rows], markdown)}\n\n{_caveat(runs, variants)}"


def rate(values: Sequence[float | None], spread: bool = True) -> str:
    """`33.34 ± 1.01`: the mean of rates in [0, 1] in percent and, of several, their standard deviation (n − 1).

    Without `spread` the mean alone; "–" if one of them is missing.
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return MISSING
    several = f" ± {100 * statistics.stdev(known):.2f}" if spread and len(known) > 1 else ""
    return f"{100 * statistics.fmean(known):.2f}{several}"


def _training_seconds(run: Mapping[str, Any]) -> float | None:
    """Without the evaluations in between, in which every student pays for the teacher's agreement."""
    seconds = _number(run, "timings", "train_seconds")
    history = run.get("history") or [{}]
    ended = next((i for i, entry in enumerate(history) if "train_runtime" in entry), len(history))
    return seconds and seconds - sum(entry.get("eval_runtime", 0) for entry in history[:ended])


def _caveat(runs: Sequence[Mapping[str, Any]], variants: Mapping[str, Sequence]) -> str:
    seeds = sorted({str(run["seed"]) for run in runs if run.get("seed") is not None})
    named = f" ({'seed' if len(seeds) == 1 else 'seeds'} {', '.join(seeds)})" if seeds else ""
    if any(len(seeds) > 1 for seeds in variants.values()):
        text = (
            f"Each row is the mean of {max(map(len, variants.values()))} training runs{named}; ± is their standard "
            "deviation, in the last column the half-width of the paired 95 % interval over the seeds."
        )
    else:
        text = f"Each row is one training run{named}, so a difference between rows has no error bar."
    pairs = [(_number(run, "metrics", "top1"), _number(run, "data", "eval_size")) for run in runs]
    known = [(top1, int(size)) for top1, size in pairs if top1 is not None and size]
    if not known:
        return text
    width = max(_half_width(top1, size) for top1, size in known)
    return (
        f"{text} Sampling error of one top-1 from {min(size for _, size in known)} images: ±{width:.2f} points (95 %)."
    )


def _half_width(rate: float, n: int, z: float = 1.96) -> float:
    """Half-width in points of Wilson's score interval of a rate measured on n images."""
    return 100 * z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + (z / (2 * n)) ** 2)


def layout(rows: list[list[str]], markdown: bool) -> str:
    if markdown:
        rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    padded = [
        [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
    if markdown:
        rule = ["-" * (width - 1) + ":" if i else "-" * width for i, width in enumerate(widths)]
        return "\n".join(f"| {' | '.join(row)} |" for row in [padded[0], rule, *padded[1:]])
    lines = ["  ".join(row).rstrip() for row in [padded[0], ["-" * width for width in widths], *padded[1:]]]
    return "\n".join(lines)


def _number(mapping: Mapping[str, Any], *keys: str) -> float | None:
    """The finite number at a path of keys, else None."""
    value: Any = mapping
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return float(value) if value is not None and math.isfinite(value) else None


def _fixed(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"
