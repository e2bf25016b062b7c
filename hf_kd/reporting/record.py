"""The record of a run: the names of its files, what is left out of it, and how it is written.

A *run* is a plain dict, one student trained with one loss: name, loss, student, teacher (or None; of several their
sums, and "teachers" with the weight of each), data, seed, command, versions, settings, metrics, teacher_metrics (or
None; of several those of their mean), terms, history, timings, device, created, preset (name, source, what the user
changed, and the deviations from the paper, or None), latency (how it was measured), repo_id (or None), verdict (None,
or what `significance.verdicts` says of its loss, with the metrics of all `runs`), loss_description (of a loss that is
not hf_kd's), evaluation_sets (of several, size and metrics by name; `metrics` are those of the first), control (None,
or of what the run is a control, see `hf_kd.reporting.controls`), license (of the model, as the Hub writes it, if it is
known; of pretrained weights it is a key of student), class_changes (of a comparison: see `classes.class_changes`), and
diverged (None, or why this is no result: it has no metrics then, only a history). `make_record` gives it class_counts,
too, which are written to classes.csv.
"""

import json
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

RUN_FILE, CURVES_FILE, CARD_FILE, CLASSES_FILE = "run.json", "curves.png", "README.md", "classes.csv"
REPORT_FILE, RESULTS_FILE, CLASSES_FIGURE = "report.md", "results.csv", "classes.png"
METRICS = ("loss", "top1", "macro_top1", "top5", "ece")  # and with a teacher
TEACHER_METRICS = ("agreement", "kl", "teacher_top1", "teacher_errors_repeated")
PACKAGES = ("hf_kd", "torch", "torchvision", "transformers", "datasets", "accelerate", "timm", "huggingface_hub")
_SECRET_KEY = re.compile(r"token|secret|password|api_?key", re.IGNORECASE)
# A Hub token wherever it stands, and whatever follows an option such as --hub_token on a command line.
TOKEN = r"\bhf_[A-Za-z0-9]{30,}"
_SECRET_TEXT = re.compile(TOKEN + r"|(--?[\w-]*token[ =]+)(?!-)\S+")
# An absolute path describes the machine; a reader needs only its last part.
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/~)\]}-])~?/(?:[^\s/'\"]+/)*([^\s/'\"]+)/?")


def collect_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages a result depends on, from their metadata; None: not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def redact(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON-serialisable copy without secrets, of settings or of a whole run.

    Drops every key that contains "token", "secret", "password" or "api_key" (but not numbers named ``*_tokens``).
    Inside strings, Hub tokens and the value of an option that ends in "token" become ``<redacted>``, and of an
    absolute path only the last part is kept.
    """
    return plain(settings, redacted=True)


def loss_description(run: Mapping[str, Any]) -> dict[str, Any]:
    """`DistillationLoss.describe` of a run's loss, by the class or (not to import it) by the record; {} if unknown."""
    from ..losses import LOSSES  # torch, slow to import

    loss = run.get("loss") or {}
    own = LOSSES.get(loss.get("name", ""))
    return own.describe(loss) if own else run.get("loss_description") or {}


def eval_key(run: Mapping[str, Any], metric: str) -> str:
    """The key of a metric in the history: of several evaluation sets, that of the first, whose metrics the run has."""
    sets = list(run.get("evaluation_sets") or ())
    return f"eval_{sets[0]}_{metric}" if sets else f"eval_{metric}"


def divergence(loss: float | None, classes: int) -> str | None:
    """Why a student's cross entropy in an evaluation shows that its training diverged; None if it does not.

    It is not finite, or above 100 · ln C, of which guessing among the C classes gives ln C. None is unknown.
    """
    most = 100 * math.log(classes)
    if loss is None or loss <= most:
        return None
    return f"the evaluation loss is {loss:.3g}; guessing among {classes} classes gives {most / 100:.2f}"


def results(runs: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The runs that count: all but those that diverged."""
    return [run for run in runs if not run.get("diverged")]


def by_name(runs: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The variants of a comparison: the runs of each name, which differ in their seed."""
    variants: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        variants.setdefault(str(run.get("name") or ""), []).append(run)
    return variants


def read_record(folder: str | os.PathLike) -> dict[str, Any]:
    """The run.json in a folder; {} if there is none."""
    file = Path(folder) / RUN_FILE
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Writes `plain(obj)` as strict JSON (indent 2), whole or not at all; makes missing folders."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a rename is only atomic within a file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # An undecodable byte of a file name is a lone surrogate, and Python's escape of it is also JSON's.
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
            json.dump(plain(obj), file, indent=2, ensure_ascii=False, allow_nan=False)
            file.write("\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def plain(obj: Any, redacted: bool = False) -> Any:
    """A copy of only dict, list, str, int, bool and finite floats (others: None); `redacted` as in `redact`."""
    if isinstance(obj, Enum):
        return plain(obj.value, redacted)
    if hasattr(obj, "tolist"):  # numpy and torch, scalars too: a numpy float64 is also a Python float
        return plain(obj.tolist(), redacted)
    if obj is None or isinstance(obj, int):
        return obj
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, Mapping):
        kept = {str(key): value for key, value in obj.items() if not (redacted and _is_secret(str(key), value))}
        return {key: plain(value, redacted) for key, value in kept.items()}
    if isinstance(obj, set | frozenset):
        obj = sorted(obj, key=str)
    if isinstance(obj, list | tuple):
        return [plain(item, redacted) for item in obj]
    if not redacted:
        return str(obj)
    text = _ABSOLUTE_PATH.sub(r"\1", str(obj).replace(f"{Path.cwd()}{os.sep}", ""))
    return _SECRET_TEXT.sub(r"\1<redacted>", text)


def _is_secret(key: str, value: Any) -> bool:
    return bool(_SECRET_KEY.search(key)) and not (key.endswith("_tokens") and isinstance(value, int | float))
