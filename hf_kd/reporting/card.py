"""The model card of a student, written from its run.json alone: every number on it is there, or follows from it."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .record import CARD_FILE, RUN_FILE, by_name, loss_description, redact
from .significance import BASELINE
from .tables import MISSING, RATES, layout, rate

TEMPLATE = Path(__file__).with_suffix(".md")
SIZES = {"parameters": ("parameters", ","), "size_mb": ("size MB", ",.1f"), "latency_ms": ("CPU latency ms", ",.2f")}
METRICS = {"top1": "accuracy", "top5": "top_5_accuracy", "ece": "expected_calibration_error"}
SECTIONS = "student teacher data loss metrics teacher_metrics settings preset versions latency timings verdict".split()
SETTINGS = (
    "num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps learning_rate optim "
    "optim_args weight_decay lr_scheduler_type warmup_steps max_grad_norm augment mixup_alpha cutmix_alpha "
    "label_smoothing_factor max_train_samples max_eval_samples"
).split()


def write_card(folder: str | os.PathLike) -> Path:
    """Writes README.md from the run.json beside it, and returns its path. Errors as of `model_card`, and OSError."""
    card = model_card(json.loads((Path(folder) / RUN_FILE).read_text("utf-8")))
    path = Path(folder) / CARD_FILE
    path.write_bytes(card.encode("utf-8", errors="replace"))  # of file names, run.json keeps bytes that are no UTF-8
    return path


def model_card(run: Mapping[str, Any]) -> str:
    """Markdown with YAML metadata, from a run record (see `hf_kd.reporting.record`) alone.

    What the record lacks shows as "–" or not at all. Rates are in percent, differences in points; a row of several
    seeds has the mean ± standard deviation (n − 1). ValueError for the record of a comparison.
    """
    if "runs" in run:
        raise ValueError("this run.json compares several runs: take the one in the folder of one of them")
    if run.get("diverged"):
        raise ValueError(f"this run diverged and is no result, so that there is nothing for a card: {run['diverged']}")
    run = redact(run)  # records are written redacted, but this one may have another origin
    run |= {section: run.get(section) or {} for section in SECTIONS}
    settings = {key: run["settings"].get(key) for key in SETTINGS}
    # A positive max_steps overrides the number of epochs.
    del settings["num_train_epochs" if (settings["max_steps"] or -1) > 0 else "max_steps"]
    helpers: list[Any] = [code, escape, link, number, numbers, on_hub, one_line, pairs, paper_link]
    card = ModelCard.from_template(
        _metadata(run),
        template_path=str(TEMPLATE),
        run=run,
        loss=loss_description(run),
        title=title(run),
        table=_table(run),
        settings=settings,
        baseline=BASELINE,
        **{helper.__name__: helper for helper in helpers},
    )
    return f"{card}\n"


def title(run: Mapping[str, Any]) -> str:
    """The repository's name, or one made of student, loss and data."""
    ids = [(run.get(key) or {}).get("name" if key == "loss" else "id") for key in ("student", "loss", "data")]
    ids = [run["repo_id"]] if run.get("repo_id") else ids
    return "-".join(one_line(each).rstrip("/").split("/")[-1] for each in ids if each) or "image-classifier"


def _metadata(run: Mapping[str, Any]) -> ModelCardData:
    """What the Hub's filters and widgets read. No license: it is not in a record."""
    student, data = run["student"], run["data"]
    name, loss = one_line(data.get("id")), one_line(run["loss"].get("name"))
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=name if on_hub(data) else "imagefolder",  # else the Hub would link to a namesake
            dataset_name=name,
            dataset_config=one_line(run["settings"].get("dataset_config")) or None,
            dataset_split=one_line(data.get("eval_split")) or None,
            dataset_revision=one_line(data["revision"]) if on_hub(data) else None,
            metric_type=metric,
            metric_name=metric.replace("_", " "),
            metric_value=run["metrics"][key],
        )
        for key, metric in METRICS.items()
        if name and run["metrics"].get(key) is not None
    ]
    # Only what the weights started from: the Hub takes a second base model, the teacher, for a merge of the two.
    finetuned = on_hub(student) and student.get("from_scratch") is False
    return ModelCardData(
        library_name="timm" if student.get("library") == "timm" else "transformers",
        pipeline_tag="image-classification",
        tags=[tag for tag in ("hf_kd", *loss_description(run).get("tags", ()), loss) if tag],
        base_model=student["id"] if finetuned else None,
        base_model_relation="finetune" if finetuned else None,
        datasets=[data["id"]] if on_hub(data) else None,
        metrics=["accuracy"] if results else None,
        model_name=title(run) if results else None,
        eval_results=results or None,
    )


def _table(run: Mapping[str, Any]) -> str:
    student, teacher, others = run["student"], run["teacher"], run["verdict"].get("runs") or []
    own = code(run.get("name") or run["loss"].get("name"))
    rows = [_row(f"**this model** ({own}, seed {number(run.get('seed'))})", [run], student)]
    if teacher or run["teacher_metrics"]:
        rows.append(_row(f"teacher {code(teacher.get('id'))}", [{"metrics": run["teacher_metrics"]}], teacher))
    controls = {name for each in (run, *others) for name in loss_description(each).get("controls", ())}
    for name, seeds in by_name(others).items():
        role = "no-KD baseline " if name == BASELINE else "control " if name in controls else ""
        several = f", mean ± standard deviation of {len(seeds)} seeds" if len(seeds) > 1 else ""
        rows.append(_row(f"{role}{code(name)}{several}", seeds, student))
    header = ["", *RATES.values(), *(label for label, _ in SIZES.values())]
    return layout([header, *rows], markdown=True)


def _row(label: str, runs: Sequence[Mapping[str, Any]], model: Mapping[str, Any]) -> list[str]:
    rates = [rate([(run.get("metrics") or {}).get(key) for run in runs]) for key in RATES]
    return [label, *rates, *(number(model.get(key), form) for key, (_, form) in SIZES.items())]


# What the template calls. A value may be None, or jinja2's Undefined, whose text is empty.


def on_hub(entry: Mapping[str, Any]) -> bool:
    """Only what came from the Hub has a revision."""
    try:
        validate_repo_id(entry.get("id"))
    except HFValidationError:
        return False
    return bool(entry.get("id") and entry.get("revision"))


def link(entry: Mapping[str, Any], kind: str = "") -> str:
    name = code(entry.get("id"))
    return f"[{name}](https://huggingface.co/{kind}{entry['id']})" if on_hub(entry) else name


def paper_link(paper: Any) -> str:
    paper = one_line(paper)
    if re.fullmatch(r"[\w.-]+(/\d+)?", paper):
        return f"From [arXiv:{paper}](https://arxiv.org/abs/{paper})."
    return f"From <{paper}>." if re.fullmatch(r"https?://[^\s<>]+", paper) else escape(paper)


def number(value: Any, form: str = "") -> str:
    return f"{value:{form}}" if isinstance(value, int | float) else MISSING


def numbers(values: Any, form: str = "") -> str:
    return ", ".join(number(value, form) for value in values or ()) or MISSING


def pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(code(f"{key} {value}") for key, value in values.items() if value is not None) or MISSING


def one_line(value: Any) -> str:
    return "" if value is None else " ".join(str(value).split())


def escape(value: Any) -> str:
    """Text without the meaning that Markdown and HTML give to some characters."""
    return re.sub(r"([\\`*_{}\[\]<>|~$#])", r"\\\1", one_line(value))


def code(value: Any) -> str:
    """Inline code; no backtick or line break in the value can end it."""
    text = one_line(value)
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{ticks}{pad}{text}{pad}{ticks}" if text else MISSING
