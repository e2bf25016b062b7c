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


def test_the_usage_starts_without_a_launcher_and_keeps_the_two_commands():
    text = (ROOT / "README.md").read_text("utf-8")
    usage = text.split("\n## Usage\n")[1]
    assert usage.index("\nhf-kd distill --student ") < usage.index("\naccelerate launch ")
    assert "accelerate launch --quiet --multi_gpu --num_processes 2 examples/run_distill.py" in usage
    commands = (
        "pip install -e . && accelerate launch examples/run_distill.py --config examples/configs/quickstart.yaml",
        "accelerate launch examples/run_distill.py --student facebook/deit-tiny-patch16-224 --loss uskd",
    )
    assert all(f"\n{command}\n" in text for command in commands)
