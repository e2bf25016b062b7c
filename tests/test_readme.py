"""What the pages and the committed records say of results is what follows from the records' figures."""

import importlib.util
from pathlib import Path

import pytest

from hf_kd.reporting.card import model_card

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("regenerate", ROOT / "benchmarks" / "regenerate.py")
regenerate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(regenerate)


@pytest.mark.parametrize(("path", "blocks"), zip(regenerate.PAGES, (3, 1), strict=True), ids=("README", "seeds"))
def test_tables_and_verdicts_are_those_of_the_records(path, blocks):
    text = path.read_text("utf-8")
    assert len(regenerate.BLOCK.findall(text)) == blocks
    assert regenerate.page(text) == text


def rounded(value):
    """Without the last digits of numbers, which depend on scipy's version."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return f"{value:.6g}" if isinstance(value, float) else value


@pytest.mark.parametrize("path", regenerate.RECORDS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_verdicts_and_cards_are_those_of_the_records(path):
    record = regenerate.read(path)
    assert rounded(regenerate.with_verdicts(record)) == rounded(record)
    if path.parent.parent.name == "model_cards":
        assert path.with_name("README.md").read_text("utf-8") == model_card(record)
