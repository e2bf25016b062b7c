"""The model card of a student, written from its run.json alone: every number on it is there, or follows from it."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .record import CARD_FILE, RUN_FILE, loss_description, redact
from .significance import BASELINE, points
from .tables import MISSING, layout, rate

HUB, FOLDER = "https://huggingface.co", "path/to/this/folder"
# A line stands if its fields, {name} and {?name}, are neither empty nor false; the second kind shows nothing.
TEMPLATE = Path(__file__).with_suffix(".md")
RATES = {"top1": "top-1 %", "top5": "top-5 %", "agreement": "agreement %", "ece": "ECE %"}
SIZES = {"parameters": ("parameters", ","), "size_mb": ("size MB", ",.1f"), "latency_ms": ("CPU latency ms", ",.2f")}
TIMES = {"train_seconds": "training", "eval_seconds": "last evaluation"}
METRICS = {"top1": "accuracy", "top5": "top_5_accuracy", "ece": "expected_calibration_error"}
SETTINGS = (
    "num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps learning_rate optim "
    "optim_args weight_decay lr_scheduler_type warmup_steps max_grad_norm augment mixup_alpha cutmix_alpha "
    "label_smoothing_factor max_train_samples max_eval_samples"
).split()


def write_card(folder: str | os.PathLike) -> Path:
    """Writes README.md from the run.json beside it, and returns its path.

    Raises:
        OSError: there is no run.json in `folder`, or README.md cannot be written.
        ValueError: run.json is no record of one run.
    """
    path = Path(folder) / CARD_FILE
    card = model_card(json.loads((Path(folder) / RUN_FILE).read_text("utf-8")))
    path.write_bytes(card.encode("utf-8", errors="replace"))  # of file names, run.json keeps bytes that are no UTF-8
    return path


def model_card(run: Mapping[str, Any]) -> str:
    """Markdown with YAML metadata, from a run record (see `hf_kd.reporting.tables`) alone.

    What the record lacks shows as "–" or not at all. Rates are in percent, differences in points; a row of several
    seeds has the mean ± standard deviation (n − 1).

    Raises:
        ValueError: the record is a comparison's, which is no model.
    """
    if "runs" in run:
        raise ValueError("this run.json compares several runs: take the one in the folder of one of them")
    run = redact(run)  # records are written redacted, but this one may have another origin
    fields, lines = _fields(run), []
    for line in TEMPLATE.read_text("utf-8").splitlines():
        if all(fields[name] for name in re.findall(r"{\??(\w+)}", line)):
            lines.append(re.sub(r"{\?\w+}", "", line).format_map(fields))
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    text = re.sub(r"^## .*\s+(?=## |\Z)", "", f"{text}\n", flags=re.MULTILINE)  # headings with nothing below
    return f"---\n{metadata(run).to_yaml()}\n---\n\n{text.strip()}\n"


def metadata(run: Mapping[str, Any]) -> ModelCardData:
    """What the Hub's filters and widgets read. No license: it is not in a record."""
    student, data, metrics = (_dict(run, key) for key in ("student", "data", "metrics"))
    name, loss = _line(data.get("id")), _line(_dict(run, "loss").get("name"))
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=name if _on_hub(data) else "imagefolder",  # else the Hub would link to a namesake
            dataset_name=name,
            dataset_config=_line(_dict(run, "settings").get("dataset_config")) or None,
            dataset_split=_line(data.get("eval_split")) or None,
            dataset_revision=_line(data["revision"]) if _on_hub(data) else None,
            metric_type=metric,
            metric_name=metric.replace("_", " "),
            metric_value=metrics[key],
        )
        for key, metric in METRICS.items()
        if name and metrics.get(key) is not None
    ]
    # Only what the weights started from: the Hub takes a second base model, the teacher, for a merge of the two.
    finetuned = _on_hub(student) and student.get("from_scratch") is False
    return ModelCardData(
        library_name="timm" if student.get("library") == "timm" else "transformers",
        pipeline_tag="image-classification",
        tags=[tag for tag in ("hf_kd", *loss_description(run).get("tags", ()), loss) if tag],
        base_model=student["id"] if finetuned else None,
        base_model_relation="finetune" if finetuned else None,
        datasets=[data["id"]] if _on_hub(data) else None,
        metrics=["accuracy"] if results else None,
        model_name=title(run) if results else None,
        eval_results=results or None,
    )


def _fields(run: Mapping[str, Any]) -> dict[str, Any]:
    student, teacher, data, loss = (_dict(run, key) for key in ("student", "teacher", "data", "loss"))
    verdict, settings, preset, timings = (_dict(run, key) for key in ("verdict", "settings", "preset", "timings"))
    repo, skipped, description = _line(run.get("repo_id")), _dict(data, "skipped"), loss_description(run)
    hyperparameters = {key: value for key, value in loss.items() if key != "name"}
    best, sentence = settings.get("load_best_model_at_end"), _escape(verdict.get("sentence"))
    # A positive max_steps overrides the number of epochs.
    unused = ("num_train_epochs",) if (settings.get("max_steps") or -1) > 0 else ("max_steps",)
    start: dict[Any, str] = {True: "architecture only, randomly initialized", False: "with its weights"}
    taught = "taught the student" if _teaches(run) else "measured only; the student did not learn from it"
    return {
        "title": _escape(title(run)),
        "what": _what(student, data),
        "method": _method(run),
        "verdict": sentence,
        "tests": "\n".join([">", *(_test(test) for test in verdict["tests"])])
        if sentence and verdict.get("tests")
        else "",
        "alone": not sentence,
        "untested": not sentence and loss.get("name") != BASELINE,
        "run_seed": _show(run.get("seed")),
        "table": _table(run),
        "measured": data and _split(data, "eval"),
        "other_runs": verdict.get("runs"),
        "latency": _escape(_dict(run, "latency").get("how")),
        "loss": loss and _join([_code(loss.get("name")), *_pairs(hyperparameters)]),
        "formula": _join([_line(description.get("formula")), _source(description.get("paper"))], " "),
        "student": student and _model(student, start.get(student.get("from_scratch"))),
        "teacher": teacher and _model(teacher, taught),
        "data": data and _data(data),
        "history": run.get("history"),
        "place": json.dumps(repo or FOLDER),
        "timm": student.get("library") == "timm" and json.dumps(f"hf-hub:{repo}" if repo else f"local-dir:{FOLDER}"),
        "command": _line(run.get("command")),
        "seed": "" if run.get("seed") is None else _show(run["seed"]),
        "preset": preset and _join([_code(preset.get("name")), _escape(preset.get("source"))]),
        "changed": _join(_code(key) for key in preset.get("changed") or []),
        "settings": _join(_pairs({key: settings.get(key) for key in SETTINGS if key not in unused})),
        "versions": _join(_pairs(_dict(run, "versions"))),
        "device": _escape(run.get("device")),
        "times": _join(f"{TIMES[k]} {_show(timings[k], ',.1f')} s" for k in TIMES if timings.get(k) is not None),
        "created": _escape(run.get("created")),
        "best": best,
        "last": best is False,
        "skipped": (skipped.get("count") or skipped.get("eval_count"))
        and f"{_show(skipped.get('count'))} in training, {_show(skipped.get('eval_count'))} in evaluation",
        "citation": (description.get("citation") or "").replace("```", ""),
    }


def _what(student: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    text = _code(student["architecture"]) if student.get("architecture") else "An image classifier"
    text += f" of {_show(student['parameters'], ',')} parameters" if student.get("parameters") is not None else ""
    return f"{text}, trained on {_link(data, 'datasets/')}"


def _method(run: Mapping[str, Any]) -> str:
    description = loss_description(run)
    text = _escape(description.get("title")) or _code(_dict(run, "loss").get("name"))
    if _teaches(run):
        return f"{text} from {_link(_dict(run, 'teacher'))}"
    return f"{text}, without a teacher" if "self-distillation" in description.get("tags", ()) else text


def _source(paper: Any) -> str:
    """The link to a paper, from its arXiv id or URL."""
    paper = _line(paper)
    if re.fullmatch(r"[\w.-]+(/\d+)?", paper):
        return f"From [arXiv:{paper}](https://arxiv.org/abs/{paper})."
    return f"From <{paper}>." if re.fullmatch(r"https?://[^\s<>]+", paper) else _escape(paper)


def _test(test: Mapping[str, Any]) -> str:
    """One comparison of the verdict, with the difference of every seed."""
    text = f"> - against {_code(test.get('against'))}: {_join(map(_points, test.get('differences') or []))} points of "
    text += (
        f"top-1 (seeds {_join(map(_show, test.get('seeds') or [])) or MISSING}), mean {_points(test.get('mean'))} ± "
    )
    text += f"{_show(test.get('half_width'), '.2f')}, p = {_show(test.get('p'), '.2g')}"
    return f"{text}; {_escape(test.get('test') or MISSING)}"


def _table(run: Mapping[str, Any]) -> str:
    student, teacher = _dict(run, "student"), _dict(run, "teacher")
    variants: dict[str, list] = {}
    controls = {*loss_description(run).get("controls", ())}
    for other in _dict(run, "verdict").get("runs") or []:
        variants.setdefault(_line(other.get("name")), []).append(_dict(other, "metrics"))
        controls.update(loss_description(other).get("controls", ()))
    own = _code(run.get("name") or _dict(run, "loss").get("name"))
    rows = [_row(f"**this model** ({own}, seed {_show(run.get('seed'))})", [_dict(run, "metrics")], student)]
    if teacher or run.get("teacher_metrics"):
        rows.append(_row(f"teacher {_code(teacher.get('id'))}", [_dict(run, "teacher_metrics")], teacher))
    for name, metrics in variants.items():
        role = "no-KD baseline " if name == BASELINE else "control " if name in controls else ""
        several = f", mean ± standard deviation of {len(metrics)} seeds" if len(metrics) > 1 else ""
        rows.append(_row(f"{role}{_code(name)}{several}", metrics, student))
    labels = ["", *RATES.values(), *(label for label, _ in SIZES.values())]
    return layout([labels, *rows], markdown=True)


def _row(label: str, metrics: Sequence[Mapping[str, Any]], model: Mapping[str, Any]) -> list[str]:
    rates = [rate([each.get(key) for each in metrics]) for key in RATES]
    return [label, *rates] + [_show(model.get(key), form) for key, (_, form) in SIZES.items()]


def _model(model: Mapping[str, Any], use: str | None) -> str:
    size = " × ".join(_show(side) for side in model.get("image_size") or [])
    facts = [model.get("architecture") and _code(model["architecture"]), model.get("library"), size and f"{size} px"]
    return _join([_link(model), _commit(model), use, *facts])


def _data(data: Mapping[str, Any]) -> str:
    facts = [f"{_split(data, 'train')} for training", f"{_split(data, 'eval')} for evaluation"]
    return _join([_link(data, "datasets/"), _commit(data), *facts, f"{_show(data.get('classes'), ',')} classes"])


def _split(data: Mapping[str, Any], part: str) -> str:
    name = f" (split {_code(data[f'{part}_split'])})" if data.get(f"{part}_split") else ""
    return f"{_show(data.get(f'{part}_size'), ',')} images{name}"


def title(run: Mapping[str, Any]) -> str:
    """The repository's name, or one made of student, loss and data."""
    ids = [_dict(run, "student").get("id"), _dict(run, "loss").get("name"), _dict(run, "data").get("id")]
    ids = [run["repo_id"]] if run.get("repo_id") else ids
    return "-".join(_line(each).rstrip("/").split("/")[-1] for each in ids if each) or "image-classifier"


def _teaches(run: Mapping[str, Any]) -> bool:
    return "teacher_logits" in loss_description(run).get("requires", ())


def _on_hub(entry: Mapping[str, Any]) -> bool:
    """Only what came from the Hub has a revision."""
    try:
        validate_repo_id(entry.get("id"))
    except HFValidationError:
        return False
    return bool(entry.get("id") and entry.get("revision"))


def _link(entry: Mapping[str, Any], kind: str = "") -> str:
    name = _code(entry.get("id"))
    return f"[{name}]({HUB}/{kind}{entry['id']})" if _on_hub(entry) else name


def _commit(entry: Mapping[str, Any]) -> str:
    return f"at {_code(entry['revision'])}" if _on_hub(entry) else "not pinned to a revision"


def _dict(mapping: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    return mapping.get(key) or {}


def _pairs(values: Mapping[str, Any]) -> list[str]:
    return [_code(f"{key} {value}") for key, value in values.items() if value is not None]


def _join(parts: Iterable[str | None], separator: str = ", ") -> str:
    return separator.join(part for part in parts if part)


def _show(value: Any, form: str = "") -> str:
    return MISSING if value is None else f"{value:{form}}"


def _points(value: float | None) -> str:
    return MISSING if value is None else points(value)


def _line(value: Any) -> str:
    return "" if value is None else " ".join(str(value).split())


def _escape(value: Any) -> str:
    """Text without the meaning that Markdown and HTML give to some characters."""
    return re.sub(r"([\\`*_{}\[\]<>|~$#])", r"\\\1", _line(value))


def _code(value: Any) -> str:
    """Inline code; no backtick or line break in the value can end it."""
    text = _line(value)
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{ticks}{pad}{text}{pad}{ticks}" if text else MISSING
