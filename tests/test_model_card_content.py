"""A card says what its run.json says and nothing else."""

import ast
import copy
import re
import statistics
from dataclasses import fields

import pytest
from model_card_helpers import (  # noqa: F401  # compiled_once is a fixture
    DATA_COMMIT,
    RECORDS,
    SEEDS,
    STATIC,
    STUDENT_COMMIT,
    TEACHER_COMMIT,
    body_of,
    check_metadata,
    compiled_once,
    metadata_of,
    metrics,
    old_records,
    record,
    table_of,
    timm_student,
    tokens_of,
)
from trainer_helpers import config

from hf_kd import DistillationConfig
from hf_kd.losses import LOSSES
from hf_kd.reporting.card import SETTINGS, model_card
from hf_kd.spec import DATA_OPTIONS, EXECUTION, STUDENT_OPTIONS


def section(card, heading):
    return re.search(rf"^## {heading}\n\n(.*?)(?=\n\n## |\Z)", body_of(card).strip(), re.S | re.M)[1]


def leaves(value, path=()):
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))
    else:
        yield path, value


def allowed_numbers(run):
    """What a card may show of a record, by the conversions that it states."""
    forms = {key: lambda v: [f"{100 * v:.2f}", repr(v)] for key in ("top1", "top5", "ece", "agreement")}
    forms |= {key: lambda v: [f"{abs(v):.2f}"] for key in ("mean", "half_width", "differences", "latency_ms")}
    forms |= {key: lambda v: [f"{v:,.1f}"] for key in ("size_mb", "train_seconds", "eval_seconds")}
    forms |= {key: lambda v: [f"{v:,}"] for key in ("parameters", "train_size", "eval_size", "classes")}
    forms |= {key: lambda v: [f"{v:.2g}"] for key in ("p", "p_holm")}
    forms |= {key: lambda v: [f"{v:.4g}"] for key in ("epoch", "loss", "eval_loss")}
    forms |= {"eval_top1": lambda v: [f"{100 * v:.2f}"]}
    found = set()
    for path, value in leaves(run):
        key = next(part for part in reversed(path) if isinstance(part, str))
        if isinstance(value, int | float) and not isinstance(value, bool):
            found.update(forms.get(key, lambda v: [str(v)])(value))
        else:
            found.update(tokens_of(str(value)))
    runs = (run.get("verdict") or {}).get("runs") or []
    for name in {each["name"] for each in runs}:
        own = [each["metrics"] for each in runs if each["name"] == name]
        found.add(str(len(own)))
        for key in own[0]:
            values = [each[key] for each in own]
            found |= {f"{100 * statistics.mean(values):.2f}", f"{100 * statistics.stdev(values):.2f}"}
    return found


@pytest.mark.parametrize("run", RECORDS, ids=lambda run: f"{run['data']['id']}-{run['name']}")
def test_every_number_is_in_the_record(run):
    run = {**run, "settings": {k: v for k, v in run["settings"].items() if k != "compare"}}
    card = model_card(run)
    assert LOSSES[run["loss"]["name"]].CITATION in card
    text = re.sub(STATIC, "", card.split("## Citation")[0])
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

    def several(name):
        cells = []
        for key in ("top1", "top5", "agreement", "ece"):
            values = [100 * metrics(name, seed)[key] for seed in SEEDS]
            cells.append(f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}")
        return [*cells, *sizes]

    own = metrics("uskd", 1)
    assert table == {
        "": ["top-1 %", "top-5 %", "agreement %", "ECE %", "parameters", "size MB", "CPU latency ms"],
        "this model (uskd, seed 1)": [f"{100 * own[k]:.2f}" for k in ("top1", "top5", "agreement", "ece")] + sizes,
        "teacher timm/resnet50.a1_in1k": ["81.19", "95.33", "–", "2.77", "23,712,932", "95.1", "61.21"],
        "baseline without distillation ce, mean ± standard deviation of 3 seeds": several("ce"),
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
        "mean +1.32 ± 0.32, p = 0.0021, 0.0064 after Holm's correction for 3 variants; "
        "paired t-test over seeds, two-sided, 95 %"
    ) in top
    assert "against `2xce`: +0.00, +0.00, -0.50 points of top-1 (seeds 0, 1, 2), mean +0.32 ± –, p = –;" in top


def test_one_run_says_that_it_is_one():
    card = model_card(record(verdict=None))
    assert "One training run (seed 1): its figures have no error bar." in card
    assert "cannot be told" in card and "Did distillation help" not in card and "±" not in card
    ce = model_card({**record(verdict=None), "loss": {"name": "ce", "weight": 1.0}})
    assert "One training run" in ce and "cannot be told" not in ce
    assert metadata_of(ce)["tags"] == ["hf_kd", "generated_from_trainer", "ce"]


@pytest.mark.parametrize("run", old_records(), ids=lambda run: f"{run['data']['id']}-{run['name']}")
def test_older_records_have_a_card(run):
    card = model_card(run)
    assert f"One training run (seed {run['seed']})" in card and "![" in card
    rows = table_of(card)
    assert [row[-1] for row in rows.values()] == ["CPU latency ms", "–", "–"]
    assert rows[f"this model ({run['name']}, seed {run['seed']})"][0] == f"{100 * run['metrics']['top1']:.2f}"
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
    assert "49,871 images (split `train`) for training, 9,973 images (split `test`) for evaluation, 99" in data
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


def test_every_setting_that_is_not_the_default_is_listed():
    never = set("seed loss loss_kwargs from_scratch eval_fraction use_cpu local_rank label_names".split())
    never |= set("class_names do_train do_eval do_predict num_train_epochs lr_scheduler_type".split())
    names = {f.name for f in fields(DistillationConfig)} | {*STUDENT_OPTIONS, *DATA_OPTIONS, "class_map"}
    names -= never | {*EXECUTION} | {name for name in names if "token" in name}
    values = {name: f"value-of-{name}" for name in names} | {"max_steps": 7, "lr_step_epochs": [31, 61]}
    listed = section(model_card(record(settings=values)), "Reproduce it")
    assert [name for name in sorted(names) if f"\n  - `{name} {values[name]}`" not in listed] == []
    assert {"lr_step_factor", "adam_beta1", "max_image_pixels", "image_mean", "max_train_samples"} <= names


def test_settings_that_are_the_default_or_do_not_apply_are_not_listed(tmp_path):
    def settings(**more):
        listed = section(model_card(record(settings=config(tmp_path, **more).to_dict())), "Reproduce it")
        return set(re.findall(r"^  - `(\S+) ", listed, re.M))

    plain = settings()
    assert {"max_steps", "optim", "lr_scheduler_type", "augment"} <= plain <= set(SETTINGS)
    stepped = settings(max_steps=-1, num_train_epochs=2, lr_step_epochs=[1.0])
    assert stepped - plain == {"lr_step_epochs", "lr_step_factor", "num_train_epochs"}
    assert plain - stepped == {"max_steps", "lr_scheduler_type"}
    other = settings(data_seed=4, accelerator_config={"even_batches": False}, adam_beta1=0.8)
    assert other - plain == {"data_seed", "accelerator_config", "adam_beta1"}


def test_several_evaluation_sets():
    sets = {"clean": {"size": 9973, "metrics": metrics("nkd", 1)}, "foggy": {"size": 1234, "metrics": {"top1": 0.251}}}
    history = [{"eval_clean_loss": 1.25, "eval_clean_top1": 0.75, "eval_foggy_top1": 0.25, "epoch": 1.0, "step": 9}]
    card = model_card(record(evaluation_sets=sets, history=history))
    assert "the first of these evaluation sets:\n\n| evaluation set |" in card
    assert re.search(r"\| `foggy` +\| +1,234 \| +25\.10 \| +– \|", card)
    assert "| 1     |    9 |             – |            1.25 |   75.00 |" in card


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


def test_an_average_and_a_frozen_backbone_are_said_in_words():
    def card(**settings):
        return model_card(record(settings={**record()["settings"], **settings}))

    assert "moving average" not in card() and "only its classification head" not in card(ema_decay=None)
    averaged = card(ema_decay=0.9995, ema_warmup=True, freeze_backbone=True)
    end = "the end of training: the evaluation set chose no checkpoint"
    assert f"- The weights are that average at {end}" in card(ema_decay=0.9, load_best_model_at_end=False)
    assert f"- The weights are those of {end}" in card(ema_decay=None, load_best_model_at_end=False)
    assert "an exponential moving average over the steps of training, of decay 0.9995 (with a warm-up)." in averaged
    assert "; only its classification head was trained\n" in averaged
    assert "`freeze_backbone True`" in averaged and "(with a warm-up)" not in card(ema_decay=0.9)
