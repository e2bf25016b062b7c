"""Records of runs, and readers of the cards that are made of them."""

import functools
import json
import re
from pathlib import Path

import jinja2
import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
STUDENT_COMMIT, TEACHER_COMMIT, DATA_COMMIT = "3a5e" * 10, "b07c" * 10, "9d18" * 10
SEEDS = [0, 1, 2]
# Numbers of the template, which no run has to give.
STATIC = (
    "[Tt]op-1|[Tt]op-5|top_5_accuracy|top 5 accuracy|arXiv:[0-9.]+[0-9]|arxiv.org/abs/[0-9.]+[0-9]|\\(1 − weight\\)"
)


compiled = functools.cache(jinja2.Template)


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    """The template of hundreds of cards is compiled once, which takes longer than filling it in."""
    monkeypatch.setattr(jinja2, "Template", compiled)


def metrics(name, seed):
    base = {"ce": 0.7013, "2xce": 0.7041, "uskd": 0.7132, "nkd": 0.7377}[name] + 0.0017 * seed - 0.0011 * seed**2
    rates = {"top5": base + 0.2114 + 0.0023 * seed, "agreement": base + 0.0541 - 0.0071 * seed**2}
    return {"loss": 1.1, "top1": base, **rates, "ece": 0.0432 - base / 97 + 0.0031 * seed}


def verdict_of(loss, against):
    """What `hf_kd.reporting.significance` writes, with means and intervals that are plain numbers here."""
    tests = []
    for i, other in enumerate(against):
        differences = [100 * (metrics(loss, s)["top1"] - metrics(other, s)["top1"]) + 0.13 * s for s in SEEDS]
        test = {"name": loss, "against": other, "seeds": list(SEEDS), "differences": differences, "mean": 1.32 - i}
        test |= {"half_width": 0.3171, "p": 0.00213, "test": "paired t-test over seeds, two-sided, 95 %"}
        tests.append(test | ({} if i else {"p_holm": 0.00639, "family": 3}))
    runs = [
        {"name": name, "seed": seed, "loss": {"name": name.removeprefix("2x")}, "metrics": metrics(name, seed)}
        for seed in SEEDS
        for name in (*against, loss)
    ]
    sentence = f"{loss} helped by 1.32 ± 0.32 points of top-1 over ce (3 seeds, p = 0.0021)."
    return {"loss": loss, "seeds": list(SEEDS), "helped": True, "sentence": sentence, "tests": tests, "runs": runs}


def record(loss="uskd", seed=1, **more):
    """A record as --verdict leaves it: a fine-tuned Hub student, a teacher that measures or teaches."""
    numbers = {"uskd": {"alpha": 1.25, "beta": 0.15, "mu": 0.006}, "nkd": {"temperature": 1.75, "gamma": 1.45}}[loss]
    names = {"uskd": ["ce", "2xce"], "nkd": ["ce"]}[loss]
    run = {
        "name": loss,
        "loss": {"name": loss, **numbers, "label_smoothing": 0.11},
        "student": {
            "id": "facebook/deit-tiny-patch16-224",
            "revision": STUDENT_COMMIT,
            "library": "transformers",
            "kind": "vit",
            "from_scratch": False,
            "architecture": "ViTForImageClassification",
            "parameters": 5543716,
            "size_mb": 22.1931,
            "image_size": [224, 208],
            "latency_ms": 13.5718,
        },
        "teacher": {
            "id": "timm/resnet50.a1_in1k",
            "revision": TEACHER_COMMIT,
            "library": "timm",
            "architecture": "resnet50",
            "parameters": 23712932,
            "size_mb": 95.0643,
            "image_size": [288, 256],
            "latency_ms": 61.2094,
        },
        "data": {
            "id": "uoft-cs/cifar100",
            "revision": DATA_COMMIT,
            "train_split": "train",
            "eval_split": "test",
            "train_size": 49871,
            "eval_size": 9973,
            "classes": 99,
            "skipped": {"count": 129, "examples": [], "eval_count": 27, "eval_examples": []},
        },
        "preset": {"name": "vit_finetune", "source": "as arXiv 2303.13005 does", "changed": ["learning_rate"]},
        "latency": {"how": "median of 30 forwards of one image, 1 thread, Some CPU 7742"},
        "repo_id": "anna/deit-tiny-cifar100",
        "seed": seed,
        "command": "accelerate launch examples/run_distill.py --student facebook/deit-tiny-patch16-224 --loss uskd",
        "versions": {"python": "3.11.9", "torch": "2.14.1", "hf_kd": None},
        "settings": {
            "num_train_epochs": 31,
            "max_steps": -1,
            "per_device_train_batch_size": 96,
            "learning_rate": 0.000123,
            "optim": "adamw_torch",
            "dataset_config": None,
            "load_best_model_at_end": False,
        },
        "metrics": metrics(loss, seed),
        "teacher_metrics": {"loss": 0.9, "top1": 0.8119, "top5": 0.9533, "ece": 0.0277, "n": 9973.0},
        "terms": {"loss": 1.5},
        "history": [{"loss": 1.5, "step": 77, "epoch": 0.5}],
        "timings": {"train_seconds": 5123.44, "eval_seconds": 61.37},
        "device": "cuda:0, 8 threads, 1 processes",
        "created": "2026-11-23T11:20:02+00:00",
        "verdict": verdict_of(loss, names),
    }
    return {**run, **more}


def timm_student():
    student = {"id": "timm/resnet18.a1_in1k", "library": "timm", "from_scratch": True, "architecture": "resnet18"}
    return {**record()["student"], **student}


def old_records():
    """The runs of a comparison, without the latency that records did not have at first."""
    for run in json.loads((ROOT / "benchmarks/results/quickstart/run.json").read_text())["runs"]:
        models = {key: {**run[key], "latency_ms": None} for key in ("student", "teacher")}
        yield {**run, **models, "latency": None}


NEW = [record(), record("nkd", seed=2), record("nkd", student=timm_student()), record(verdict=None, repo_id=None)]
RECORDS = [*NEW, *old_records()]


def body_of(card):
    return card.split("\n---\n", 1)[1]


def table_of(card):
    """Label: cells of the first table, as a Markdown parser reads them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(body_of(card))
    tokens = tokens[: [token.type for token in tokens].index("table_close")]
    rows, cells = [], []
    for i, token in enumerate(tokens):
        if token.type in ("th_open", "td_open"):
            cells.append("".join(child.content for child in tokens[i + 1].children))
        elif token.type == "tr_close":
            rows, cells = [*rows, cells], []
    return {row[0]: row[1:] for row in rows}


def tokens_of(text):
    return [token.rstrip(".,") for token in re.findall(r"\d[\d,.]*(?:e[-+]?\d+)?", text)]


def metadata_of(card):
    return yaml.safe_load(card.split("---\n")[1])


def check_metadata(card):
    """The rules that the Hub documents for a model card, and the round trip through huggingface_hub's classes."""
    found = metadata_of(card)
    known = {
        "license",
        "license_name",
        "license_link",
        "library_name",
        "pipeline_tag",
        "tags",
        "base_model",
        "base_model_relation",
        "datasets",
        "metrics",
    }
    assert set(found) <= known | {"model-index"}
    assert found["library_name"] in ("transformers", "timm")
    assert found["pipeline_tag"] == "image-classification"
    assert all(isinstance(tag, str) and 0 < len(tag) < 256 and "\n" not in tag for tag in found["tags"])
    for name in [*found.get("datasets", []), *([found["base_model"]] if "base_model" in found else [])]:
        validate_repo_id(name)
    assert ("base_model" in found) == ("base_model_relation" in found)
    assert found.get("base_model_relation", "finetune") in ("adapter", "merge", "quantized", "finetune")
    parsed = ModelCard(card)
    assert str(parsed) == card
    if "model-index" in found:
        [model] = found["model-index"]
        assert isinstance(model["name"], str) and model["name"]
        for result in model["results"]:
            assert result["task"] == {"type": "image-classification"}
            assert set(result["dataset"]) <= {"name", "type", "config", "split", "revision"}
            assert all(isinstance(text, str) and text for text in result["dataset"].values())
            for metric in result["metrics"]:
                assert set(metric) == {"type", "name", "value"} and type(metric["value"]) is float
        name, results = model_index_to_eval_results(found["model-index"])
        assert parsed.data.model_name == name and parsed.data.eval_results == results
    return found
