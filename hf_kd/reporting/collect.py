"""The record of one run, as run.json keeps it: everything the card and the tables say comes from here."""

import copy
import datetime
import math
import os
import platform
import statistics
import timeit
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import torch

from ..data import ImageData
from ..data.collators import kinds_of
from ..data.order import groups_of
from ..engines import whole_student
from ..losses import LOSSES, loss_source
from ..models.ensemble import TeacherEnsemble, members, name_of_mean
from ..models.features import HEAD
from ..models.loading import commit_of, model_family
from ..models.teacher import Teacher
from ..ranks import check_same_plan
from ..spec import PLAN_FILE, DataSource, EnsembleSource, Experiment, ModelSource, continue_plan, run_spec
from . import record as records
from .card import write_card
from .classes import write_counts
from .curves import plot_curves
from .origin import dataset_origin, weights_license

FORWARDS = 30


def describe_model(model: torch.nn.Module, name: str | None, size: tuple[int, int]) -> dict:
    """What a record says of a classifier, on any device: where it is from, what it is, its size and latency.

    `name` is its Hub id or folder, `size` the height and width of its input in pixels.
    """
    own = [p for n, p in model.named_parameters() if not n.startswith(f"{HEAD}.")]
    config = getattr(model, "config", None)
    return {
        "id": name,
        "revision": commit_of(model),
        "library": "timm" if getattr(config, "model_type", "") == "timm_wrapper" else "transformers",
        "kind": model_family(config),
        "architecture": getattr(config, "architecture", None) or type(model).__name__,
        "parameters": sum(p.numel() for p in own),
        "size_mb": sum(v.numel() * v.element_size() for v in [*own, *model.buffers()]) / 1e6,
        "image_size": list(size),
        "latency_ms": latency_ms(model, size),
    }


@torch.no_grad()
def latency_ms(model: torch.nn.Module, size: tuple[int, int]) -> float:
    """Median time in ms of a forward of one image, on the CPU with one thread, as the saved model would run."""
    if any(p.device.type != "cpu" for p in model.parameters()):
        model = copy.deepcopy(model).cpu()
    pixels = torch.zeros(1, 3, *size, dtype=next(model.parameters()).dtype)
    training, threads = model.training, torch.get_num_threads()
    torch.set_num_threads(1)
    model.eval()
    try:
        seconds = timeit.repeat(lambda: model(pixels), number=1, repeat=3 + FORWARDS)
    finally:
        model.train(training)
        torch.set_num_threads(threads)
    return 1000 * statistics.median(seconds[3:])


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe_teacher(teacher: Teacher, sources: Sequence[ModelSource] = ()) -> dict:
    """What a record says of a teacher, by the plan's `sources` if there are any.

    Of several, the sums of their sizes and latencies, and "teachers": what it says of each, and its "weight".
    """
    entries = []
    for each, source in zip_longest(members(teacher), sources):
        entry = describe_model(each.model, source.id if source else each.name, each.preprocessing.size)
        if each.mapping.kind != "identity":
            entry["class_mapping"] = each.mapping.describe()
        if source:
            seen = source.seen_evaluation_images
            entry["seen_evaluation_images"] = "not checked" if seen is None else seen
        entries.append(entry)
    if not isinstance(teacher, TeacherEnsemble):
        return entries[0]
    sums = {key: sum(entry[key] for entry in entries) for key in ("parameters", "size_mb", "latency_ms")}
    weighted = [{"weight": weight, **entry} for weight, entry in zip(teacher.weights, entries, strict=True)]
    name = name_of_mean(teacher.weights, [entry["id"] for entry in entries])
    return {"id": name, "image_size": list(teacher.preprocessing.size), **sums, "teachers": weighted}


def known_plan(trainer) -> Experiment:
    """The plan of a `DistillationTrainer` as far as it knows it: of models made in Python, and data without a name."""
    model, teacher = trainer.model, trainer.eval_teacher
    config = getattr(model, "config", None)
    name = getattr(model, "name_or_path", None) or type(model).__name__
    streaming = groups_of(trainer.train_dataset) is not None
    plan = Experiment(
        output_dir=trainer.args.output_dir,
        student=ModelSource(name, commit=commit_of(model)),
        teacher=teacher and _teacher_source(teacher),
        data=DataSource(
            train_size=_size(trainer.train_dataset),
            eval_size=_size(trainer.eval_dataset),
            streaming=streaming,
            stream_workers=trainer.args.dataloader_num_workers if streaming else None,
            classes=config and [config.id2label[i] for i in sorted(config.id2label)],
        ),
        train_image_size=trainer.train_image_size,
        runs=(run_spec(trainer.args, loss_source=loss_source(type(trainer.train_loss))),),
        versions=records.collect_versions(),
    )
    return Experiment.from_dict(plan.to_dict())


def _teacher_source(teacher: Teacher) -> ModelSource | EnsembleSource:
    sources = tuple(ModelSource(each.name, commit=commit_of(each.model)) for each in members(teacher))
    return EnsembleSource(sources, teacher.weights) if isinstance(teacher, TeacherEnsemble) else sources[0]


def _size(dataset) -> int | None:
    """The number of images; of several evaluation sets that of the first, as `measure_teacher` takes it."""
    dataset = next(iter(dataset.values()), None) if isinstance(dataset, dict) else dataset
    return len(dataset) if hasattr(dataset, "__len__") else None


def _metrics(measured: dict[str, float], prefix: str) -> dict[str, float]:
    names = (*records.METRICS, *records.TEACHER_METRICS)
    named = {key: measured.get(f"{prefix}_{key}", measured.get(key)) for key in names}
    return {key: value for key, value in named.items() if value is not None}


def _class_counts(trainer, prefix: str, measured: dict[str, float]) -> dict[str, list] | None:
    """Images and hits by class of the evaluation that gave these metrics; None if another one came after it."""
    counts, labels = trainer.class_counts.get(prefix), trainer.accelerator.unwrap_model(trainer.model).config.id2label
    if not counts or not math.isclose(sum(counts["hits"]) / max(1, sum(counts["images"])), measured.get("top1", -1)):
        return None
    return {"name": [labels[i] for i in range(len(counts["images"]))], **counts}


def _data_entry(trainer, data: ImageData | None, eval_size: float | None) -> dict:
    """What is known of the data: by what `load_data` gave, else by what the datasets say of themselves."""
    sizes = {"train_size": _size(trainer.train_dataset), "eval_size": eval_size or _size(trainer.eval_dataset)}
    if data is not None:
        entry = data.describe()
    else:
        entry = dataset_origin(trainer.train_dataset)
        entry["train_split"], evaluated = entry.pop("split"), trainer.eval_dataset
        several = isinstance(evaluated, dict)
        entry["eval_split"] = next(iter(evaluated), None) if several else dataset_origin(evaluated)["split"]
    return {"id": entry.pop("name"), **entry, **sizes}


def write_plan(trainer, checkpoint: str | None) -> None:
    """Writes the trainer's plan.json before the first step; training from a checkpoint must be of the same plan."""
    trainer.plan = trainer.plan or known_plan(trainer)
    check_same_plan(trainer.plan)
    if checkpoint:
        continue_plan(trainer.plan, checkpoint)
    if trainer.is_world_process_zero():
        records.write_json(Path(trainer.args.output_dir) / PLAN_FILE, trainer.plan.to_dict())


def make_record(
    trainer,
    metrics: dict | None = None,
    data: ImageData | None = None,
    student: dict | None = None,
    skipped: tuple[dict, dict] | None = None,
    **known,
) -> dict:
    """The record of a trained student; see `hf_kd.reporting.record` for its keys.

    Args:
        trainer: the `DistillationTrainer`, after training.
        metrics: what `trainer.evaluate()` gave; default: a new evaluation, unless `diverged` is known.
        data: what the datasets were loaded with; without it they may tell their name and split themselves.
        student: further keys of the student's entry, or other values, such as id and from_scratch.
        skipped: images that could not be decoded in training and in evaluation, and why; default: those of this
            process.
        **known: further keys of the record, or other values: name, teacher, command, settings, preset, license,
            diverged, ….
    """
    args, loss, history, teacher = trainer.args, trainer.train_loss, trainer.state.log_history, trainer.eval_teacher
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not known.get("diverged"):
        metrics = metrics or trainer.evaluate()
    metrics = metrics or {}
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {}
    prefix = f"eval_{next(iter(sets))}" if sets else "eval"
    measured = _metrics(metrics, prefix)
    known["diverged"] = known.get("diverged") or records.divergence(measured.get("loss"), model.config.num_labels)
    if sets and not known["diverged"]:
        known["evaluation_sets"] = {
            name: {
                "size": metrics.get(f"eval_{name}_samples", _size(part)),
                "metrics": _metrics(metrics, f"eval_{name}"),
            }
            for name, part in sets.items()
        }
    skipped = skipped or (trainer.skipped, trainer.eval_skipped)
    whole = whole_student(trainer)
    student_entry = describe_model(whole, getattr(model, "name_or_path", None) or None, trainer.preprocessing.size)
    if saved := [file.stat().st_size for file in Path(args.output_dir).glob("model*.safetensors")]:
        student_entry["size_mb"] = sum(saved) / 1e6
    if student and student.get("from_scratch") is False:
        student_entry |= weights_license(model, student.get("id") or student_entry["id"])
    if "teacher" not in known:
        known["teacher"] = teacher and describe_teacher(teacher)
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device
    head, alpha = trainer.auxiliary_head, loss.distillation_alpha
    loss_entry = {"name": loss.name, **loss.hyperparameters()}
    if alpha is not None:
        loss_entry["distillation_alpha"] = alpha
    if loss.name not in LOSSES:
        known.setdefault("loss_description", loss.describe(loss_entry))
    record = {
        "name": loss.name,
        "loss": loss_entry,
        "student": {**student_entry, **({"feature_layer": vars(head.layer)} if head else {}), **(student or {})},
        "data": {
            **_data_entry(trainer, data, metrics.get(f"{prefix}_samples")),
            "classes": model.config.num_labels,
            "augmentation": trainer.augmentation_applied,
            "skipped": {
                "count": len(skipped[0]),
                "kinds": kinds_of(skipped[0]),
                "examples": list(skipped[0])[:100],
                "eval_count": len(skipped[1]),
                "eval_kinds": kinds_of(skipped[1]),
                "eval_examples": list(skipped[1])[:100],
            },
        },
        "seed": args.seed,
        "versions": records.collect_versions(),
        "settings": args.to_dict(),
        "metrics": {} if known["diverged"] else measured,
        "class_counts": None if known["diverged"] else _class_counts(trainer, prefix, measured),
        "teacher_metrics": trainer.teacher_metrics,
        "terms": {k: v for k, v in last_with("loss", history).items() if k.startswith("loss")},
        "history": history,
        "timings": {
            "train_seconds": last_with("seconds", history).get("seconds"),
            "eval_seconds": sum(v for k, v in metrics.items() if k.endswith("_runtime")) or None,
        },
        "latency": {"how": f"median of {FORWARDS} forwards of one image, 1 thread, {cpu_name()}"},
        "device": f"{device}, {torch.get_num_threads()} threads, {args.world_size} processes",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **dict.fromkeys(("preset", "repo_id", "verdict")),
        "plan": trainer.plan and trainer.plan.to_dict(),
    }
    return records.redact(record | known)


def last_with(key: str, history: list[dict]) -> dict:
    """The last entry of a log that has a key; {} if there is none."""
    return next((entry for entry in reversed(history) if key in entry), {})


def write_record(record: dict, folder: str | os.PathLike) -> None:
    """Writes a run's run.json, classes.csv, curves.png and card (README.md) into its folder; of one that diverged
    run.json only."""
    kept = {key: value for key, value in record.items() if key != "class_counts"}  # with many classes too long for it
    records.write_json(Path(folder, records.RUN_FILE), kept)
    for name in (records.CLASSES_FILE, records.CURVES_FILE, records.CARD_FILE):  # of an earlier training
        Path(folder, name).unlink(missing_ok=True)
    if record.get("diverged"):
        return
    if counts := record.get("class_counts"):
        write_counts(counts, folder)
    plot_curves([record], Path(folder, records.CURVES_FILE))
    write_card(folder)
