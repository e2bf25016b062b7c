"""What README.md shows of results is what the records hold."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_tables_are_those_of_the_records():
    spec = importlib.util.spec_from_file_location("regenerate", ROOT / "benchmarks" / "regenerate.py")
    regenerate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(regenerate)
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(regenerate.BLOCK.findall(text)) == 3
    assert regenerate.readme(text) == text
