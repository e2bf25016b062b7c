"""Markdown and metadata of a card hold, whatever is missing and whatever the names are."""

import json
import re
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.utils import get_session
from local_hub import LocalHub
from markdown_it import MarkdownIt
from model_card_helpers import (  # noqa: F401  # compiled_once is a fixture
    DATA_COMMIT,
    RECORDS,
    ROOT,
    STATIC,
    body_of,
    check_metadata,
    compiled_once,
    metrics,
    record,
    table_of,
    tokens_of,
)

from hf_kd.losses import NKDLoss
from hf_kd.reporting.card import PROJECT, TEMPLATE, model_card, write_card


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
        "tags": ["hf_kd", "generated_from_trainer"],
    }
    empty = body_of(model_card({}))
    assert "## Loss" not in empty and "## Limits" in empty
    assert not tokens_of(re.sub(STATIC, "", empty.split("## Citation")[0]))


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
        "tags": ["hf_kd", "generated_from_trainer", "knowledge-distillation", "nkd"],
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
    assert found["tags"] == [tag for tag in ("hf_kd", "generated_from_trainer", kind, run["loss"]["name"]) if tag]


def test_the_license_is_that_of_pretrained_weights_or_what_the_record_says():
    assert "license" not in check_metadata(model_card(record()))
    student = record()["student"]
    base = {**student, "license": "other", "license_name": "research", "license_link": "https://example.org/license"}
    found = check_metadata(model_card(record(student=base)))
    assert [found[key] for key in ("license", "license_name", "license_link")] == [*base.values()][-3:]
    scratch = record(student=base | {"from_scratch": True})
    assert "license" not in check_metadata(model_card(scratch)), "of other weights"
    assert check_metadata(model_card({**scratch, "license": "mit"}))["license"] == "mit"


def test_links_and_citation_are_the_projects():
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    assert PROJECT in urls.values()
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    bibtex = " ".join(NKDLoss.CITATION.split())
    assert cited["title"] in bibtex and str(cited["year"]) in bibtex and cited["collection-title"] in bibtex
    assert " and ".join(f"{a['family-names']}, {a['given-names']}" for a in cited["authors"]) in bibtex
    for run in (record(), {**record(), "loss": {"name": "own"}, "loss_description": {"citation": "@x{y}"}}):
        card = model_card(run)
        assert card.count(NKDLoss.CITATION) == 1 and f"by [hf_kd]({PROJECT})." in card
    assert "```bibtex\n@x{y}\n```\n\nhf_kd implements this paper" in card


def test_the_hubs_validation_takes_the_card(tmp_path, monkeypatch):
    post = get_session().post
    with LocalHub(tmp_path / "hub") as hub:
        # The address is fixed in huggingface_hub before 2.
        monkeypatch.setattr(get_session(), "post", lambda url, **k: post(hub.endpoint + urlsplit(url).path, **k))
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
    for each in run["verdict"]["runs"]:
        each["name"] = {"nkd": evil}.get(each["name"], each["name"])
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
    assert links == [PROJECT, "run.json", "https://arxiv.org/abs/2303.13005"]
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
    token, home = "hf_" + "aB3" * 12, Path("/", "home", "anna")
    run = record(command=f"python {home / 'work' / 'run.py'} --hub_token {token}", device=f"cpu of {token}")
    run["student"] |= {"id": f"{home}/models/tiny", "revision": None}
    run["teacher"] |= {"id": "~/models/big", "revision": None}
    card = model_card(run)
    assert token not in card and "anna/work" not in card and "/models" not in card and "/home" not in card
    assert "`tiny`" in card and "teacher `big`" in card and "python run.py" in card


def test_what_diverged_has_no_card():
    with pytest.raises(ValueError, match="diverged and is no result.*the loss is NaN"):
        model_card(record(diverged="the loss is NaN"))


def test_a_comparison_is_no_model(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"command": "x", "runs": [record()], "verdicts": []}))
    with pytest.raises(ValueError, match="compares several runs"):
        write_card(tmp_path)
    with pytest.raises(FileNotFoundError):
        write_card(tmp_path / "nothing")


def test_a_wheel_has_the_template():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["hf_kd"]
    assert any(TEMPLATE.match(pattern) for pattern in data)
