"""Writes everything that shows results again from the records: python benchmarks/regenerate.py

Cards and curves in model_cards/, curves in benchmarks/results/, and the tables and verdicts between
`<!-- results NAME -->` and `<!-- end -->` in README.md come from the run.json beside them and from nothing else.
"""

import json
import re
from pathlib import Path

from hf_kd.reporting import comparison_table, plot_curves, teacher_row_of, verdicts, write_card

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- results ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def records(name: str) -> list[dict]:
    return json.loads((RESULTS / name / "run.json").read_text("utf-8"))["runs"]


def table_and_verdicts(name: str) -> str:
    """The table of a comparison and a line for each verdict, as Markdown."""
    runs = records(name)
    sentences = "\n".join(f"- {verdict['sentence']}" for verdict in verdicts(runs))
    return f"{comparison_table(runs, teacher_row_of(runs[0]), markdown=True)}\n\n{sentences}"


def readme(text: str) -> str:
    """README.md with its blocks of results made anew."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{table_and_verdicts(found[2])}\n\n{found[3]}", text)


def main() -> None:
    for card in sorted(ROOT.glob("model_cards/*/run.json")):
        write_card(card.parent)
        plot_curves([json.loads(card.read_text("utf-8"))], card.with_name("curves.png"))
    for comparison in sorted(RESULTS.glob("*/run.json")):
        plot_curves(records(comparison.parent.name), comparison.with_name("curves.png"))
    (ROOT / "README.md").write_text(readme((ROOT / "README.md").read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
