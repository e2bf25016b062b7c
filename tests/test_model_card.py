"""A card says what its run.json says and nothing else, in Markdown and metadata that hold whatever the names are."""

import ast
import copy
import json
import re
import statistics
import tomllib
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id
from local_hub import LocalHub
from markdown_it import MarkdownIt

from hf_kd.losses import LOSSES
from hf_kd.model_card import TEMPLATE, model_card, write_card

ROOT = Path(__file__).parents[1]
STUDENT_COMMIT, TEACHER_COMMIT, DATA_COMMIT = "3a5e" * 10, "b07c" * 10, "9d18" * 10
SEEDS = [0, 1, 2]
# Numbers of the template, which no run has to give.
STATIC = "top-1|top-5|top_5_accuracy|top 5 accuracy|arXiv:[0-9.]+[0-9]|arxiv.org/abs/[0-9.]+[0-9]|\\(1 − weight\\)"


def metrics(arm, seed):
    base = {"ce": 0.7013, "2xce": 0.7041, "uskd": 0.7132, "nkd": 0.7377}[arm] + 0.0017 * seed - 0.0011 * seed**2
    rates = {"top5": base + 0.2114 + 0.0023 * seed, "agreement": base + 0.0541 - 0.0071 * seed**2}
    return {"loss": 1.1, "top1": base, **rates, "ece": 0.0432 - base / 97 + 0.0031 * seed}


def verdict_of(loss, against):
    """What `hf_kd.verdict` writes, with means and intervals that are plain numbers here."""
    tests = []
    for i, other in enumerate(against):
        differences = [100 * (metrics(loss, s)["top1"] - metrics(other, s)["top1"]) + 0.13 * s for s in SEEDS]
        test = {"name": loss, "against": other, "seeds": list(SEEDS), "differences": differences, "mean": 1.32 - i}
        test |= {"half_width": 0.3171, "p": 0.00213, "test": "paired t-test over seeds, two-sided, 95 %"}
        tests.append(test)
    runs = [
        {"name": arm, "seed": seed, "loss": {"name": arm.removeprefix("2x")}, "metrics": metrics(arm, seed)}
        for seed in SEEDS
        for arm in (*against, loss)
    ]
    sentence = f"{loss} helped by 1.32 ± 0.32 points of top-1 over ce (3 seeds, p = 0.0021)."
    return {"loss": loss, "seeds": list(SEEDS), "helped": True, "sentence": sentence, "tests": tests, "runs": runs}


def record(loss="uskd", seed=1, **more):
    """A record as --verdict leaves it: a fine-tuned Hub student, a teacher that measures or teaches."""
    numbers = {"uskd": {"alpha": 1.25, "beta": 0.15, "mu": 0.006}, "nkd": {"temperature": 1.75, "gamma": 1.45}}[loss]
    arms = {"uskd": ["ce", "2xce"], "nkd": ["ce"]}[loss]
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
        "latency": {"how": "median of 30 forwards of one picture, 1 thread, Some CPU 7742"},
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
        "verdict": verdict_of(loss, arms),
    }
    return {**run, **more}


def timm_student():
    student = {"id": "timm/resnet18.a1_in1k", "library": "timm", "from_scratch": True, "architecture": "resnet18"}
    return {**record()["student"], **student}


def old_records():
    for name in ("quickstart",):
        yield from json.loads((ROOT / "benchmarks" / "results" / name / "run.json").read_text())["runs"]


NEW = [record(), record("nkd", seed=2), record("nkd", student=timm_student()), record(verdict=None, repo_id=None)]
RECORDS = [*NEW, *old_records()]


def body_of(card):
    return card.split("\n---\n", 1)[1]


def section(card, heading):
    return re.search(rf"^## {heading}\n\n(.*?)(?=\n\n## |\Z)", body_of(card).strip(), re.S | re.M)[1]


def table_of(card):
    """Label: cells, as a Markdown parser reads them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(body_of(card))
    rows, cells = [], []
    for i, token in enumerate(tokens):
        if token.type in ("th_open", "td_open"):
            cells.append("".join(child.content for child in tokens[i + 1].children))
        elif token.type == "tr_close":
            rows, cells = [*rows, cells], []
    return {row[0]: row[1:] for row in rows}


def leaves(value, path=()):
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))
    else:
        yield path, value


def tokens_of(text):
    return [token.rstrip(".,") for token in re.findall(r"\d[\d,.]*(?:e[-+]?\d+)?", text)]


def allowed_numbers(run):
    """What a card may show of a record, by the conversions that it states."""
    forms = {key: lambda v: [f"{100 * v:.2f}", repr(v)] for key in ("top1", "top5", "ece", "agreement")}
    forms |= {key: lambda v: [f"{abs(v):.2f}"] for key in ("mean", "half_width", "differences", "latency_ms")}
    forms |= {key: lambda v: [f"{v:,.1f}"] for key in ("size_mb", "train_seconds", "eval_seconds")}
    forms |= {key: lambda v: [f"{v:,}"] for key in ("parameters", "train_size", "eval_size", "classes")}
    forms |= {"p": lambda v: [f"{v:.2g}"]}
    found = set()
    for path, value in leaves(run):
        key = next(part for part in reversed(path) if isinstance(part, str))
        if isinstance(value, int | float) and not isinstance(value, bool):
            found.update(forms.get(key, lambda v: [str(v)])(value))
        else:
            found.update(tokens_of(str(value)))
    arms = (run.get("verdict") or {}).get("runs") or []
    for arm in {each["name"] for each in arms}:
        own = [each["metrics"] for each in arms if each["name"] == arm]
        found.add(str(len(own)))
        for key in own[0]:
            values = [each[key] for each in own]
            found |= {f"{100 * statistics.mean(values):.2f}", f"{100 * statistics.stdev(values):.2f}"}
    return found


@pytest.mark.parametrize("run", RECORDS, ids=lambda run: f"{run['data']['id']}-{run['name']}")
def test_every_number_is_in_the_record(run):
    run = {**run, "history": [], "settings": {k: v for k, v in run["settings"].items() if k != "compare"}}
    card = model_card(run)
    citation = LOSSES[run["loss"]["name"]].CITATION
    assert citation in card
    text = re.sub(STATIC, "", card.replace(citation, ""))
    shown = tokens_of(text)
    assert len(shown) > 20
    assert set(shown) - allowed_numbers(run) == set()


def test_every_number_that_is_shown_follows_the_record():
    """Changes one number after the other; the card must change each time, except for what it does not show."""
    run = record(history=[{"step": 1}])
    card, silent = model_card(run), set()
    for path, value in leaves(run):
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        changed = copy.deepcopy(run)
        *parents, last = path
        target = changed
        for key in parents:
            target = target[key]
        target[last] = value + 1 if isinstance(value, int) else 1.371 * value
        if model_card(changed) == card:
            silent.add(".".join(str(key) for key in path if isinstance(key, str)))
    unseen = {
        "settings.max_steps",
        "metrics.loss",
        "teacher_metrics.loss",
        "teacher_metrics.n",
        "terms.loss",
        "history.step",
    }
    assert silent == unseen | {"verdict.runs.metrics.loss", "verdict.runs.seed", "verdict.seeds"}


def test_table_of_a_verdict():
    table = table_of(model_card(record()))
    sizes = ["5,543,716", "22.2", "13.57"]

    def several(arm):
        cells = []
        for key in ("top1", "top5", "agreement", "ece"):
            values = [100 * metrics(arm, seed)[key] for seed in SEEDS]
            cells.append(f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}")
        return [*cells, *sizes]

    own = metrics("uskd", 1)
    assert table == {
        "": ["top-1 %", "top-5 %", "agreement %", "ECE %", "parameters", "size MB", "CPU latency ms"],
        "this model (uskd, seed 1)": [f"{100 * own[k]:.2f}" for k in ("top1", "top5", "agreement", "ece")] + sizes,
        "teacher timm/resnet50.a1_in1k": ["81.19", "95.33", "–", "2.77", "23,712,932", "95.1", "61.21"],
        "no-KD baseline ce, mean ± standard deviation of 3 seeds": several("ce"),
        "control 2xce, mean ± standard deviation of 3 seeds": several("2xce"),
        "uskd, mean ± standard deviation of 3 seeds": several("uskd"),
    }


def test_verdict_is_near_the_top_with_its_evidence():
    run = record()
    run["verdict"]["tests"][1] |= {"half_width": None, "p": None, "differences": [0.001, -0.001, -0.5]}
    card = model_card(run)
    top = body_of(card).split("\n## ")[0]
    assert run["verdict"]["sentence"] in top and "One training run" not in card
    first, second = run["verdict"]["tests"]
    assert (
        f"against `ce`: {', '.join(f'{d:+.2f}' for d in first['differences'])} points of top-1 (seeds 0, 1, 2), "
        "mean +1.32 ± 0.32, p = 0.0021; paired t-test over seeds, two-sided, 95 %"
    ) in top
    assert "against `2xce`: +0.00, +0.00, -0.50 points of top-1 (seeds 0, 1, 2), mean +0.32 ± –, p = –;" in top


def test_one_run_says_that_it_is_one():
    card = model_card(record(verdict=None))
    assert "One training run (seed 1): its figures have no error bar." in card
    assert "cannot be told" in card and "Did distillation help" not in card and "±" not in card
    ce = model_card({**record(verdict=None), "loss": {"name": "ce", "weight": 1.0}})
    assert "One training run" in ce and "cannot be told" not in ce
    assert metadata_of(ce)["tags"] == ["hf_kd", "ce"]


@pytest.mark.parametrize("run", old_records(), ids=lambda run: f"{run['data']['id']}-{run['name']}")
def test_older_records_have_a_card(run):
    card = model_card(run)
    assert "One training run (seed 0)" in card and "![" in card
    rows = table_of(card)
    assert [row[-1] for row in rows.values()] == ["CPU latency ms", "–", "–"]
    assert rows[f"this model ({run['name']}, seed 0)"][0] == f"{100 * run['metrics']['top1']:.2f}"
    assert check_metadata(card).get("datasets") is None, "a local folder is no Hub id"


def test_origin_is_pinned_and_linked_only_on_the_hub():
    card = model_card(record("nkd"))
    student, teacher, data = section(card, "Where it comes from").splitlines()
    url = "https://huggingface.co"
    assert (
        f"[`facebook/deit-tiny-patch16-224`]({url}/facebook/deit-tiny-patch16-224), at `{STUDENT_COMMIT}`" in student
    )
    assert "with its weights" in student and "224 × 208 px" in student
    assert f"[`timm/resnet50.a1_in1k`]({url}/timm/resnet50.a1_in1k), at `{TEACHER_COMMIT}`, taught" in teacher
    assert f"[`uoft-cs/cifar100`]({url}/datasets/uoft-cs/cifar100), at `{DATA_COMMIT}`" in data
    assert "49,871 pictures (split `train`) for training, 9,973 pictures (split `test`) for evaluation, 99" in data
    run = record()
    for key in ("student", "teacher", "data"):
        run[key]["revision"] = None
    run["teacher"]["id"] = "outputs/teacher"
    local = section(model_card(run), "Where it comes from")
    assert url not in local and local.count("not pinned to a revision") == 3
    assert "measured only; the student did not learn from it" in local


def test_how_to_use_it():
    plain, timm = model_card(record()), model_card(record(student=timm_student()))
    unpushed = model_card(record(student=timm_student(), repo_id=None))
    blocks = {card: re.findall(r"```python\n(.*?)\n```", card, re.S) for card in (plain, timm, unpushed)}
    for block in sum(blocks.values(), []):
        ast.parse(block)
    assert len(blocks[plain]) == 1 and 'model="anna/deit-tiny-cifar100"' in blocks[plain][0]
    assert len(blocks[timm]) == 2 and 'create_model("hf-hub:anna/deit-tiny-cifar100", pretrained=True)' in timm
    assert 'model="path/to/this/folder"' in unpushed and 'create_model("local-dir:path/to/this/folder"' in unpushed
    assert metadata_of(plain)["library_name"] == "transformers" and metadata_of(timm)["library_name"] == "timm"


def test_recipe_and_limits():
    card = model_card(record())
    recipe, limits = section(card, "Reproduce it"), section(card, "Limits")
    assert record()["command"] in recipe
    assert "- Seed: 1\n- Preset: `vit_finetune`, as arXiv 2303.13005 does\n" in recipe
    assert "- Not from the preset: `learning_rate`\n" in recipe
    assert "`learning_rate 0.000123`" in recipe and "max_steps" not in recipe
    assert "`torch 2.14.1`" in recipe and "hf_kd" not in recipe
    assert "- Time: training 5,123.4 s, last evaluation 61.4 s" in recipe
    assert "left out: 129 in training, 27 in evaluation" in limits and "chose no checkpoint" in limits
    assert "median of 30 forwards" in section(card, "Results")
    best = {**record()["settings"], "load_best_model_at_end": True}
    clean = {**record()["data"], "skipped": {"count": 0, "eval_count": 0}}
    limits = section(model_card(record(settings=best, data=clean, verdict=None)), "Limits")
    assert "flatter" in limits and "chose no checkpoint" not in limits
    assert "decoded" not in limits and "interval" not in limits
    assert "chose" not in model_card(record(settings={}))


def smaller(value):
    """The value without each of its keys, and with null there, down to any depth."""
    if isinstance(value, dict):
        for key in value:
            rest = {other: item for other, item in value.items() if other != key}
            yield rest
            yield {**rest, key: None}
            yield from ({**rest, key: item} for item in smaller(value[key]))
    elif isinstance(value, list) and value:
        yield []
        yield from ([item, *value[1:]] for item in smaller(value[0]))


def test_whatever_is_missing_leaves_a_card():
    run, count = record("nkd"), 0
    for less in smaller(run):
        card = model_card(less)
        assert "None" not in card and "nan" not in card.split()
        check_metadata(card)
        count += 1
    assert count > 150
    assert check_metadata(model_card({})) == {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["hf_kd"],
    }
    empty = body_of(model_card({}))
    assert "## Loss" not in empty and "## Citation" not in empty and "## Limits" in empty
    assert not tokens_of(re.sub(STATIC, "", empty))


def metadata_of(card):
    return yaml.safe_load(card.split("---\n")[1])


def check_metadata(card):
    """The rules that the Hub documents for a model card, and the round trip through huggingface_hub's classes."""
    found = metadata_of(card)
    known = {"library_name", "pipeline_tag", "tags", "base_model", "base_model_relation", "datasets", "metrics"}
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


def test_metadata_of_a_finetuned_student(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(record("nkd", seed=2)))
    path = write_card(tmp_path)
    assert path == tmp_path / "README.md" and path.read_text("utf-8") == model_card(record("nkd", seed=2))
    own = metrics("nkd", 2)
    data = {"name": "uoft-cs/cifar100", "type": "uoft-cs/cifar100", "split": "test", "revision": DATA_COMMIT}
    shown = [
        {"type": "accuracy", "value": own["top1"], "name": "accuracy"},
        {"type": "top_5_accuracy", "value": own["top5"], "name": "top 5 accuracy"},
        {"type": "expected_calibration_error", "value": own["ece"], "name": "expected calibration error"},
    ]
    expected = {
        "base_model": "facebook/deit-tiny-patch16-224",
        "base_model_relation": "finetune",
        "datasets": ["uoft-cs/cifar100"],
        "library_name": "transformers",
        "metrics": ["accuracy"],
        "pipeline_tag": "image-classification",
        "tags": ["hf_kd", "knowledge-distillation", "nkd"],
        "model-index": [
            {
                "name": "deit-tiny-cifar100",
                "results": [{"task": {"type": "image-classification"}, "dataset": data, "metrics": shown}],
            }
        ],
    }
    assert metadata_load(path) == expected == check_metadata(path.read_text("utf-8"))
    assert ModelCard.load(path).data.eval_results[0].metric_value == own["top1"]


@pytest.mark.parametrize("run", RECORDS, ids=lambda run: f"{run['data']['id']}-{run['name']}")
def test_metadata_is_valid(run):
    found = check_metadata(model_card(run))
    based = run["student"]["revision"] is not None and not run["student"]["from_scratch"]
    assert found.get("base_model") == (run["student"]["id"] if based else None)
    kind = {"uskd": "self-distillation", "ce": None}.get(run["loss"]["name"], "knowledge-distillation")
    assert found["tags"] == [tag for tag in ("hf_kd", kind, run["loss"]["name"]) if tag]


def test_the_hubs_validation_takes_the_card(tmp_path, monkeypatch):
    with LocalHub(tmp_path / "hub") as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        ModelCard(model_card(record())).validate()
        assert hub.requests[-1] == ("POST", "/api/validate-yaml")


def test_names_cannot_break_the_card():
    evil = "a|b` ``c``\n---\n| x |\n# [z](y) <b> *k* _u_: {w} 'q' \"d\" \\"
    flat = " ".join(evil.split())
    run = record("nkd", repo_id=None, name=evil, device=evil, command=f"run '{evil}'")
    run["student"] |= {"id": evil, "architecture": evil}
    run["teacher"]["id"] = run["data"]["id"] = run["data"]["eval_split"] = evil
    run["preset"] = {"name": evil, "source": evil, "changed": [evil]}
    run["verdict"]["sentence"] = evil
    for arm in run["verdict"]["runs"]:
        arm["name"] = {"nkd": evil}.get(arm["name"], arm["name"])
    card = model_card(run)
    calm = MarkdownIt("commonmark").enable("table").parse(body_of(model_card(record("nkd"))))
    tokens = MarkdownIt("commonmark").enable("table").parse(body_of(card))
    headings = [
        [t.content for t, before in zip(ts[1:], ts, strict=False) if before.tag == "h2"] for ts in (tokens, calm)
    ]
    assert headings[0][::2] == headings[1][::2]
    kinds = [[t.type for t in ts if t.level == 0] for ts in (tokens, calm)]
    assert kinds[0] == kinds[1], "no block more or less than on a tame card"
    inline = [child for t in tokens if t.type == "inline" for child in t.children]
    assert not [
        t for t in inline if t.type == "html_inline" or t.type in ("em_open", "image") and "curves" not in str(t)
    ]
    links = [t.attrs["href"] for t in inline if t.type == "link_open"]
    assert links == ["run.json", "https://arxiv.org/abs/2303.13005"]
    codes = [t.content for t in inline if t.type == "code_inline"]
    assert codes.count(flat) >= 6
    texts = ["".join(child.content for child in t.children) for t in tokens if t.type == "inline"]
    assert any(flat in text and "Did distillation help" in text for text in texts)
    [command] = [t.content for t in tokens if t.type == "fence" and t.info == "bash"]
    assert command == f"run '{flat}'\n"
    assert {len(cells) for cells in table_of(card).values()} == {7}
    found = check_metadata(card)
    assert found["model-index"][0]["results"][0]["dataset"]["name"] == flat
    assert "base_model" not in found, "an id that the Hub cannot have is not claimed to be there"


def test_neither_token_nor_machine_path():
    token = "hf_" + "aB3" * 12
    run = record(command=f"python /home/anna/work/run.py --hub_token {token}", device=f"cpu of {token}")
    run["student"] |= {"id": "/home/anna/models/tiny", "revision": None}
    run["teacher"] |= {"id": "~/models/big", "revision": None}
    card = model_card(run)
    assert token not in card and "anna/work" not in card and "/models" not in card and "/home" not in card
    assert "`tiny`" in card and "teacher `big`" in card and "python run.py" in card


def test_a_comparison_is_no_model(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"command": "x", "runs": [record()], "verdicts": []}))
    with pytest.raises(ValueError, match="compares several runs"):
        write_card(tmp_path)
    with pytest.raises(FileNotFoundError):
        write_card(tmp_path / "nothing")


def test_a_wheel_has_the_template():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["hf_kd"]
    assert any(TEMPLATE.match(pattern) for pattern in data)
