"""The table that compares runs, and its error bars."""

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from .record import by_name, results
from .significance import BASELINE, compare, describe

MISSING = "–"
RATES = {"top1": "top-1 %", "top5": "top-5 %", "agreement": "agreement %", "ece": "ECE %"}
HEADER = ["student trained with", *RATES.values(), "seconds", "MB", "difference to CE"]


def teacher_row_of(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The teacher's row for `comparison_table`: its metrics, id and size; None if none was measured."""
    if not run.get("teacher_metrics"):
        return None
    return {**(run.get("teacher") or {}), **run["teacher_metrics"]}


def comparison_table(
    runs: Sequence[Mapping[str, Any]], teacher_row: Mapping[str, Any] | None = None, markdown: bool = False
) -> str:
    """The runs side by side, as text for a terminal or as a GitHub table, and below it the errors of its figures.

    Runs of one name are one row: the mean over the seeds, with the standard deviation of top-1; those that diverged
    count in no figure. Rates are percentages, "seconds" are those of training without evaluations, "MB" is the saved
    model. The last column is in top-1 points against the run named "ce" of the same seed, with the half-width of the
    paired 95 % interval. What is missing or not finite shows as "–". The sampling error is the half-width of the 95 %
    interval of one top-1 (Wilson 1927).

    Args:
        runs: records (see `record`) that share student, data and settings; only "name" is required.
        teacher_row: what `teacher_row_of` gives, as first row.
        markdown: a GitHub table instead of aligned text.
    """
    variants = by_name(runs)
    rows = [HEADER]
    if teacher_row is not None:
        label = f"teacher {teacher_row.get('id') or ''}".strip()
        rows.append(_row(label, [{"metrics": teacher_row, "student": teacher_row}], MISSING))
    for name, seeds in variants.items():
        test, kept = compare(runs, name, BASELINE), results(seeds)
        label = name if len(kept) == len(seeds) else f"{name} ({len(seeds) - len(kept)} of {len(seeds)} diverged)"
        rows.append(_row(label, kept or seeds, describe(test) if test else MISSING))
    return f"{layout(rows, markdown)}\n\n{_caveat(runs, max(map(len, variants.values()), default=0))}"


def _row(label: str, seeds: Sequence[Mapping[str, Any]], difference: str) -> list[str]:
    rates = [rate([_number(run, "metrics", key) for run in seeds], spread=key == "top1") for key in RATES]
    seconds = [value for run in seeds if (value := _training_seconds(run)) is not None]
    values = [statistics.fmean(seconds) if seconds else None, _number(seeds[0], "student", "size_mb")]
    return [label, *rates, *(MISSING if value is None else f"{value:.1f}" for value in values), difference]


def rate(values: Sequence[float | None], spread: bool = True) -> str:
    """`33.34 ± 1.01`: the mean of rates in [0, 1] in percent and, if `spread`, their standard deviation (n − 1).

    "–" if one of them is missing.
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return MISSING
    several = f" ± {100 * statistics.stdev(known):.2f}" if spread and len(known) > 1 else ""
    return f"{100 * statistics.fmean(known):.2f}{several}"


def _training_seconds(run: Mapping[str, Any]) -> float | None:
    """Without the evaluations in between, in which every student pays for the teacher's agreement."""
    seconds = _number(run, "timings", "train_seconds")
    if seconds is None:
        return None
    training = takewhile(lambda entry: "train_runtime" not in entry, run.get("history") or [])
    return seconds - sum(entry.get("eval_runtime", 0) for entry in training)


def _caveat(runs: Sequence[Mapping[str, Any]], most_seeds: int) -> str:
    seeds = sorted({str(run["seed"]) for run in runs if run.get("seed") is not None})
    named = f" ({'seed' if len(seeds) == 1 else 'seeds'} {', '.join(seeds)})" if seeds else ""
    text = f"Each row is one training run{named}, so a difference between rows has no error bar."
    if most_seeds > 1:
        text = (
            f"Each row is the mean of {most_seeds} training runs{named}; ± is their standard deviation, in the last "
            "column the half-width of the paired 95 % interval over the seeds."
        )
    pairs = [(_number(run, "metrics", "top1"), _number(run, "data", "eval_size")) for run in runs]
    measured = [(top1, int(size)) for top1, size in pairs if top1 is not None and size]
    if measured:
        width, images = max(_half_width(*pair) for pair in measured), min(size for _, size in measured)
        text += f" Sampling error of one top-1 from {images} images: ±{width:.2f} points (95 %)."
    return text


def _half_width(rate: float, n: int, z: float = 1.96) -> float:
    """Half-width in points of Wilson's score interval of a rate measured on n images."""
    return 100 * z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + (z / (2 * n)) ** 2)


def layout(rows: Sequence[Sequence[str]], markdown: bool) -> str:
    """The rows below the first, the header; all columns but the first are right-aligned."""
    if markdown:
        rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * width for width in widths]
    if markdown:
        rule[1:] = [dashes[:-1] + ":" for dashes in rule[1:]]
    lines = []
    for first, *others in [rows[0], rule, *rows[1:]]:
        padded = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append([first.ljust(widths[0]), *padded])
    if markdown:
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in lines)


def _number(run: Mapping[str, Any], section: str, key: str) -> float | None:
    """The finite number of that name, else None."""
    value = (run.get(section) or {}).get(key)
    return float(value) if value is not None and math.isfinite(value) else None
