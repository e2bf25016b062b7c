"""The model card of a student, written from its run.json alone: every number on it is there, or follows from it."""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..losses import LOSSES
from ..spec import DATA_OPTIONS, EXECUTION, STUDENT_OPTIONS
from .classes import changes_sentence
from .controls import control_names, describe_control
from .metadata import metadata, on_hub, one_line, title
from .record import CARD_FILE, RUN_FILE, by_name, loss_description, redact
from .significance import BASELINE
from .tables import MISSING, layout, log_table, rate, rates_of

PROJECT = "https://arxiv.org/abs/2303.13005"  # of pyproject.toml's URLs
TEMPLATE = Path(__file__).with_suffix(".md")
SIZES = {"parameters": ("parameters", ","), "size_mb": ("size MB", ",.1f"), "latency_ms": ("CPU latency ms", ",.2f")}
SECTIONS = "student teacher data loss metrics teacher_metrics settings preset versions latency timings verdict".split()
GLOSSARY = {
    "top1": "Top-1: share of the images whose most probable class is the right one.",
    "macro_top1": "Macro top-1: top-1 of each class, averaged over the classes (they have unequal numbers of images).",
    "top5": "Top-5: share of the images whose class is among the five most probable.",
    "agreement": "Agreement: share of the images that student and teacher give the same class.",
    "ece": "ECE, expected calibration error: how far confidence and accuracy are apart, on average.",
}
# Shown whether or not they have their default. Of the others, those that are elsewhere on the card are never listed.
SETTINGS = (
    "num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps learning_rate optim "
    "optim_args weight_decay lr_scheduler_type lr_step_epochs lr_step_factor warmup_steps max_grad_norm augment "
    "mixup_alpha cutmix_alpha label_smoothing_factor"
).split()
ELSEWHERE = (
    "seed loss loss_kwargs from_scratch eval_fraction class_names use_cpu local_rank label_names do_train "
    "do_eval do_predict"
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
    description, rates = loss_description(run), rates_of([run, *(run["verdict"].get("runs") or ())])
    helpers: list[Any] = [code, escape, link, number, numbers, on_hub, one_line, pairs, paper_link, teacher_links]
    card = ModelCard.from_template(
        metadata(run),
        template_path=str(TEMPLATE),
        run=run,
        loss=description,
        title=title(run),
        table=_table(run, rates),
        evaluation_sets=_evaluation_sets(run),
        glossary=[text for key, text in GLOSSARY.items() if key in rates],
        errors=_errors(run),
        variants=_variants(run),
        control=describe_control(run.get("control") or {}),
        teaches="teacher_logits" in description.get("requires", ()),
        log=log_table(run),
        settings=_settings(run["settings"]),
        baseline=_baseline(run),
        project=PROJECT,
        # CITATION.cff asks to cite the paper that hf_kd implements.
        citations=[text for text in dict.fromkeys((description.get("citation"), LOSSES["nkd"].CITATION)) if text],
        **{helper.__name__: helper for helper in helpers},
    )
    return f"{card}\n"


def _settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The main settings, and all that differ from their default and say what is learned, or from what."""
    from transformers.trainer_pt_utils import AcceleratorConfig  # slow to import, as the next

    from ..config import DistillationConfig

    values = dict(settings)
    # What does not apply: a positive max_steps overrides the number of epochs, lr_step_epochs the scheduler.
    values.pop("num_train_epochs" if (values.get("max_steps") or -1) > 0 else "max_steps", None)
    for key in ["lr_scheduler_type"] if values.get("lr_step_epochs") else ["lr_step_epochs", "lr_step_factor"]:
        values.pop(key, None)
    if values.get("data_seed") == values.get("seed"):
        values.pop("data_seed", None)
    defaults: dict[str, Any] = dict.fromkeys((*STUDENT_OPTIONS, *DATA_OPTIONS, "dataset_config", "class_map"))
    for f in dataclasses.fields(DistillationConfig):
        defaults[f.name] = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    defaults["accelerator_config"] = AcceleratorConfig().to_dict()
    differ = {}
    for key, default in defaults.items():
        value = values.get(key, default)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            value, default = {part: item for part, item in value.items() if item != default.get(part)}, {}
        if value != default and (value or default) and key not in (*ELSEWHERE, *EXECUTION):
            differ[key] = value
    return {key: values[key] for key in SETTINGS if key in values} | differ


def _variants(run: Mapping[str, Any]) -> list[str]:
    """What the names in the table of a comparison mean: the title and the hyperparameters of each loss."""
    lines = []
    for name, seeds in by_name(run["verdict"].get("runs") or ()).items():
        loss = dict(seeds[0].get("loss") or {})
        what = [escape(loss_description(seeds[0]).get("title")) or code(loss.get("name"))]
        numbers = [code(f"{key} {value}") for key, value in loss.items() if key != "name" and value is not None]
        control = seeds[0].get("control")
        note = f" (a control: {escape(describe_control(control))})" if control else ""
        lines.append(f"{code(name)}: {', '.join(what + numbers)}{note}")
    return lines


def _errors(run: Mapping[str, Any]) -> list[str]:
    """Of the teacher's errors those that the student repeats, and the classes that differ most from the baseline's."""
    lines, share = [], run["metrics"].get("teacher_errors_repeated")
    if share is not None:
        text = f"Of the images that the teacher gets wrong, this model gives {100 * share:.2f} % the same wrong class."
        shared = run["verdict"].get("shared_errors")
        lines.append(f"{text} Over the seeds: {escape(shared['sentence'])}" if shared else text)
    if text := changes_sentence(run.get("class_changes") or {}, code):
        lines.append(text)
    return lines


def _evaluation_sets(run: Mapping[str, Any]) -> str:
    """A table of the metrics on each of several evaluation sets; "" where there is one."""
    sets = run.get("evaluation_sets") or {}
    if len(sets) < 2:
        return ""
    rates = rates_of(sets.values())
    rows = [["evaluation set", "images", *rates.values()]]
    for name, part in sets.items():
        values = [rate([(part.get("metrics") or {}).get(key)]) for key in rates]
        rows.append([code(name), number(part.get("size"), ","), *values])
    return layout(rows, markdown=True)


def _table(run: Mapping[str, Any], rates: Mapping[str, str]) -> str:
    student, teacher, others = run["student"], run["teacher"], run["verdict"].get("runs") or []
    own = code(run.get("name") or run["loss"].get("name"))
    rows = [_row(f"**this model** ({own}, seed {number(run.get('seed'))})", [run], student, rates)]
    if teacher or run["teacher_metrics"]:
        rows.append(_row(f"teacher {code(teacher.get('id'))}", [{"metrics": run["teacher_metrics"]}], teacher, rates))
    controls = control_names([run, *others])
    for name, seeds in by_name(others).items():
        kind = "baseline without distillation " if name == BASELINE else "baseline "
        role = kind if name in (BASELINE, _baseline(run)) else "control " if name in controls else ""
        several = f", mean ± standard deviation of {len(seeds)} seeds" if len(seeds) > 1 else ""
        rows.append(_row(f"{role}{code(name)}{several}", seeds, student, rates))
    header = ["", *rates.values(), *(label for label, _ in SIZES.values())]
    return layout([header, *rows], markdown=True)


def _baseline(run: Mapping[str, Any]) -> str:
    """The name of what the run's loss is measured against."""
    return (run["verdict"].get("tests") or [{}])[0].get("against", BASELINE)


def _row(label: str, runs: Sequence[Mapping[str, Any]], model: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    rates = [rate([(run.get("metrics") or {}).get(key) for run in runs]) for key in keys]
    return [label, *rates, *(number(model.get(key), form) for key, (_, form) in SIZES.items())]


# What the template calls. A value may be None, or jinja2's Undefined, whose text is empty.


def link(entry: Mapping[str, Any], kind: str = "") -> str:
    name = code(entry.get("id"))
    return f"[{name}](https://huggingface.co/{kind}{entry['id']})" if on_hub(entry) else name


def teacher_links(teacher: Mapping[str, Any]) -> str:
    """A link to the teacher; of several to each, with its weight."""
    several = [f"{link(each)} (weight {number(each.get('weight'), '.4g')})" for each in teacher.get("teachers") or ()]
    return f"the mean of {' and '.join(several)}" if several else link(teacher)


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


def escape(value: Any) -> str:
    """Text without the meaning that Markdown and HTML give to some characters."""
    return re.sub(r"([\\`*_{}\[\]<>|~$#])", r"\\\1", one_line(value))


def code(value: Any) -> str:
    """Inline code; no backtick or line break in the value can end it."""
    text = one_line(value)
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{ticks}{pad}{text}{pad}{ticks}" if text else MISSING
