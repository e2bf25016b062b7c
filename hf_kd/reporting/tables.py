"""The table that compares runs, and its error bars."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from .controls import control_names, describe_control
from .record import by_name, eval_key, results
from .significance import BASELINE, baseline_tests, compare, describe, p_value, pairwise

MISSING = "–"
RATES = {
    "top1": "top-1 %", "macro_top1": "macro top-1 %", "top5": "top-5 %", "agreement": "agreement %", "ece": "ECE %"
}  # fmt: skip


def teacher_row_of(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The teacher's row for `comparison_table`: its metrics, id and size; None if none was measured."""
    if not run.get("teacher_metrics"):
        return None
    return {**(run.get("teacher") or {}), **run["teacher_metrics"]}


def comparison_table(
    runs: Sequence[Mapping[str, Any]],
    teacher_row: Mapping[str, Any] | None = None,
    markdown: bool = False,
    against: str = BASELINE,
) -> str:
    """The runs side by side, as text for a terminal or as a GitHub table, and below it the errors of its figures.

    Runs of one name are one row: the mean over the seeds, with the standard deviation of top-1; those that diverged
    count in no figure. Rates are percentages (for the macro average see `rates_of`), "seconds" are those of training
    without evaluations, "MB" is the saved model. The difference is in top-1 points to the baseline's run of the
    same seed, with the half-width of the paired 95 % interval. Of several seeds, "p" is that of the paired t-test,
    corrected for the number of variants that distil (see `baseline_tests`). What is missing or not finite shows as
    "–". Controls are marked, and described below. The sampling error is the half-width of the 95 % interval of one
    top-1 (Wilson 1927).

    Args:
        runs: records (see `record`) that share student, data and settings; only "name" is required.
        teacher_row: what `teacher_row_of` gives, as first row.
        markdown: a GitHub table instead of aligned text.
        against: the name of the baseline's runs.
    """
    variants, tests, controls = by_name(runs), baseline_tests(runs, against), control_names(runs)
    tested = any(p_value(test) is not None for test in tests.values())
    rates = rates_of(runs)
    difference = f"difference to {'CE' if against == BASELINE else against}"
    header = ["student trained with", *rates.values(), "seconds", "MB", difference]
    rows = [[*header, "p"] if tested else header]
    if teacher_row is not None:
        label = f"teacher {teacher_row.get('id') or ''}".strip()
        rows.append(_row(label, [{"metrics": teacher_row, "student": teacher_row}], rates))
    for name, seeds in variants.items():
        test, kept = tests.get(name) or compare(runs, name, against), results(seeds)
        label = f"{name} (control)" if name in controls - {against} else name
        label += "" if len(kept) == len(seeds) else f" ({len(seeds) - len(kept)} of {len(seeds)} diverged)"
        p = p_value(tests[name]) if name in tests else None
        cells = [describe(test) if test else MISSING, MISSING if p is None else f"{p:.2g}"]
        rows.append(_row(label, kept or seeds, rates) + cells)
    rows = [(row + [MISSING] * 2)[: len(rows[0])] for row in rows]
    caveat = _caveat(runs, max(map(len, variants.values()), default=0))
    if tested:
        family = max(test["family"] for test in tests.values())
        without = f" and have a p (of {len(tests)})" if family < len(tests) else ""
        corrected = (
            f", corrected by Holm's method for the {family} variants that distil{without}" if family > 1 else ""
        )
        caveat += f" p: of the paired t-test of the difference, two-sided{corrected}."
    if described := {str(run["name"]): describe_control(run["control"]) for run in runs if run.get("control")}:
        caveat += f" Controls: {'; '.join(f'{name}: {text}' for name, text in described.items())}."
    return f"{layout(rows, markdown)}\n\n{caveat}"


def pairwise_table(runs: Sequence[Mapping[str, Any]], markdown: bool = False) -> str:
    """The mean paired difference, row minus column, of each two variants in points of top-1, with the half-width of
    its own 95 % interval; "" for fewer than three variants, or a single seed."""
    tests = pairwise(results(runs))
    names = list(dict.fromkeys(name for name, _ in tests))
    if len(names) < 3 or all(test["half_width"] is None for test in tests.values()):
        return ""
    cells = [[describe(tests[row, column]) if row != column else "" for column in names] for row in names]
    rows = [["row − column", *names], *([name, *line] for name, line in zip(names, cells, strict=True))]
    return f"{layout(rows, markdown)}\n\nEach interval is by itself: of many pairs, some differ by chance."


def _row(label: str, seeds: Sequence[Mapping[str, Any]], keys: Iterable[str]) -> list[str]:
    rates = [rate([_number(run, "metrics", key) for run in seeds], spread=key == "top1") for key in keys]
    seconds = [value for run in seeds if (value := _training_seconds(run)) is not None]
    values = [statistics.fmean(seconds) if seconds else None, _number(seeds[0], "student", "size_mb")]
    return [label, *rates, *(MISSING if value is None else f"{value:.1f}" for value in values)]


def rates_of(runs: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The rates that a table of these runs shows: key in `metrics`, and header.

    The macro average over the classes is among them where it is not top-1, as the classes differ in their numbers of
    images.
    """
    pairs = [(_number(run, "metrics", "top1"), _number(run, "metrics", "macro_top1")) for run in runs]
    differs = any(top1 is not None and macro is not None and abs(top1 - macro) > 1e-9 for top1, macro in pairs)
    return {key: header for key, header in RATES.items() if differs or key != "macro_top1"}


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
            f"Each row is the mean of {most_seeds} training runs{named}; ± is their standard deviation, of a "
            "difference the half-width of its own paired 95 % interval over the seeds."
        )
    pairs = [(_number(run, "metrics", "top1"), _number(run, "data", "eval_size")) for run in runs]
    measured = [(top1, int(size)) for top1, size in pairs if top1 is not None and size]
    if measured:
        width, images = max(_half_width(*pair) for pair in measured), min(size for _, size in measured)
        text += f" Sampling error of one top-1 from {images} images: ±{width:.2f} points (95 %)."
    return text


def log_table(run: Mapping[str, Any], most: int = 20) -> str:
    """The training log as a Markdown table: a row for each step with an evaluation, or without any with a loss.

    "" if there is none. Of more than `most` rows some are shown, evenly spaced, with the first and the last.
    """
    history, top1, loss = run.get("history") or [], eval_key(run, "top1"), eval_key(run, "loss")
    evaluated = any(top1 in entry for entry in history)
    found, training = {}, None
    for entry in history:
        training = entry.get("loss", training)
        if (top1 if evaluated else "loss") in entry:
            cells = [(entry.get("epoch"), ".4g"), (entry.get("step"), ""), (training, ".4g"), (entry.get(loss), ".4g")]
            texts = [f"{value:{form}}" if isinstance(value, int | float) else MISSING for value, form in cells]
            found[entry.get("step")] = [*texts, rate([entry.get(top1)])]
    if not found:
        return ""
    rows = list(found.values())
    if len(rows) > most:
        rows = [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]
    header = ["epoch", "step", "training loss", "evaluation loss", "top-1 %"]
    columns = len(header) if evaluated else 3
    return layout([row[:columns] for row in [header, *rows]], markdown=True)


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
