"""The files of a comparison, beside those of its runs: run.json, report.md, results.csv and curves.png."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .classes import changes_section, class_changes, plot_changes
from .curves import plot_curves
from .record import (
    CLASSES_FIGURE,
    CURVES_FILE,
    METRICS,
    REPORT_FILE,
    RESULTS_FILE,
    RUN_FILE,
    TEACHER_METRICS,
    redact,
    write_json,
)
from .significance import BASELINE, shared_errors, verdicts
from .tables import comparison_table, pairwise_table, teacher_row_of


def write_comparison(
    runs: Sequence[Mapping[str, Any]],
    folder: str | os.PathLike,
    command: str | None = None,
    against: str = BASELINE,
    class_counts: Sequence[Mapping[str, Sequence] | None] | None = None,
) -> dict[str, Any]:
    """Writes what several runs together say. Returns what run.json has: command, against (the baseline's name),
    runs, verdicts and class_changes. `class_counts` are those of each run, see `classes`; a figure, classes.png, shows
    the largest differences.

    results.csv has a line for each run: name, seed, loss, metrics as in run.json (rates in [0, 1]; empty: not known),
    the seconds of training, and why it is no result if it diverged.
    """
    changes = class_changes(runs, class_counts or [None] * len(runs), against)
    found = {"verdicts": verdicts(runs, against), "class_changes": changes}
    comparison = redact({"command": command, "against": against, "runs": runs, **found})
    folder, teacher = Path(folder), teacher_row_of(runs[0])
    write_json(folder / RUN_FILE, comparison)
    plot_curves(runs, folder / CURVES_FILE, against)
    if changes:
        plot_changes(changes, folder / CLASSES_FIGURE)
    parts = [
        f"# Comparison of {', '.join(dict.fromkeys(run['name'] for run in comparison['runs']))}",
        comparison_table(comparison["runs"], teacher and redact(teacher), markdown=True, against=against),
        "\n".join(f"- {verdict['sentence']}" for verdict in comparison["verdicts"]),
        pairwise_table(comparison["runs"], markdown=True),
        "\n".join(f"- {test['sentence']}" for test in shared_errors(comparison["runs"], against).values()),
        f"![training losses, top-1 and differences to {against}]({CURVES_FILE})",
        changes_section(changes, CLASSES_FIGURE),
        f"```bash\n{comparison['command']}\n```" if command else "",
        f"All figures are from [{RUN_FILE}]({RUN_FILE}); those of each run are in [{RESULTS_FILE}]({RESULTS_FILE}).",
    ]
    text = "\n\n".join(part for part in parts if part)
    (folder / REPORT_FILE).write_bytes(f"{text}\n".encode("utf-8", errors="replace"))
    columns = [*METRICS, *(key for key in TEACHER_METRICS if key != "teacher_top1")]
    with open(folder / RESULTS_FILE, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "seed", "loss_name", *columns, "train_seconds", "diverged"])
        for run in comparison["runs"]:
            metrics, loss, timings = (run.get(section) or {} for section in ("metrics", "loss", "timings"))
            first = [run["name"], run.get("seed"), loss.get("name")]
            last = [timings.get("train_seconds"), run.get("diverged")]
            writer.writerow([*first, *(metrics.get(key) for key in columns), *last])
    return comparison
