"""What the head of a model card says to the Hub, from a run record."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .record import loss_description

LICENSE = ("license", "license_name", "license_link")
HUB_NAMES = {"top1": "accuracy", "top5": "top_5_accuracy", "ece": "expected_calibration_error"}


def title(run: Mapping[str, Any]) -> str:
    """The repository's name, or one made of student, loss and data."""
    student, loss, data = ((run.get(key) or {}) for key in ("student", "loss", "data"))
    ids = [student.get("id"), run.get("name") if run.get("control") else loss.get("name"), data.get("id")]
    ids = [run["repo_id"]] if run.get("repo_id") else ids
    return "-".join(one_line(text).rstrip("/").split("/")[-1] for text in ids if text) or "image-classifier"


def metadata(run: Mapping[str, Any]) -> ModelCardData:
    """What the Hub's filters and widgets read. The license is the record's own, or that of the pretrained weights."""
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
        for key, metric in HUB_NAMES.items()
        if name and run["metrics"].get(key) is not None
    ]
    # Only what the weights started from: the Hub takes a second base model, the teacher, for a merge of the two.
    finetuned = on_hub(student) and student.get("from_scratch") is False
    licensed = run if run.get("license") else student if student.get("from_scratch") is False else {}
    license: Any = {key: licensed[key] for key in LICENSE if licensed.get("license") and licensed.get(key)}
    return ModelCardData(
        **license,
        library_name="timm" if student.get("library") == "timm" else "transformers",
        pipeline_tag="image-classification",
        tags=[tag for tag in ("hf_kd", "generated_from_trainer", *loss_description(run).get("tags", ()), loss) if tag],
        base_model=student["id"] if finetuned else None,
        base_model_relation="finetune" if finetuned else None,
        datasets=[data["id"]] if on_hub(data) else None,
        metrics=["accuracy"] if results else None,
        model_name=title(run) if results else None,
        eval_results=results or None,
    )


def on_hub(entry: Mapping[str, Any]) -> bool:
    """Only what came from the Hub has a revision."""
    try:
        validate_repo_id(entry.get("id"))
    except HFValidationError:
        return False
    return bool(entry.get("id") and entry.get("revision"))


def one_line(value: Any) -> str:
    return "" if value is None else " ".join(str(value).split())
