"""What pyproject.toml promises of the packages that hf_kd needs."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_minimum_versions_are_those_that_are_tested():
    """Every lower bound has two numbers (or as many as it needs), no upper one, and its pin in constraints-min.txt."""
    bounds = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pins = dict(re.findall(r"^(\w+)==([\d.]+)$", (ROOT / "constraints-min.txt").read_text(), flags=re.MULTILINE))
    lowest = dict(re.fullmatch(r"(\w+)>=(\d+(?:\.\d+)+)", bound).groups() for bound in bounds)
    assert lowest.keys() == pins.keys()
    for package, bound in lowest.items():
        padded = bound if bound.count(".") == 2 else f"{bound}.0"
        assert pins[package] in (bound, padded), package
