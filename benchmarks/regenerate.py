"""Writes everything that shows results again from the records, and docs/losses.md: python benchmarks/regenerate.py

Cards and curves in model_cards/, curves in benchmarks/results/, and the tables and verdicts between
`<!-- results NAME -->` and `<!-- end -->` in README.md and in benchmarks/results/ come from the run.json (seeds.json,
losses.json) beside them and from nothing else. In these records only the verdicts are written anew, which follow from
the metrics.
"""

import json
import re
from pathlib import Path

from hf_kd.losses.overview import overview
from hf_kd.reporting import comparison_table, plot_curves, teacher_row_of, verdicts, write_card
from hf_kd.reporting.record import write_json
from hf_kd.reporting.significance import BASELINE

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RECORDS = sorted([*ROOT.glob("model_cards/*/run.json"), *RESULTS.glob("*/*.json")])
PAGES = [ROOT / "README.md", *(RESULTS / "quickstart" / name for name in ("seeds.md", "losses.md"))]
BLOCK = re.compile(r"(<!-- (results|verdicts) ([\w/-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


def with_verdicts(record: dict) -> dict:
    """The record of a comparison, or of a run with the comparison that it was part of, with its verdicts anew."""
    if "runs" in record:
        runs = [with_verdicts(run) for run in record["runs"]]
        return record | {"runs": runs, "verdicts": verdicts(runs, record.get("against", BASELINE))}
    if not record.get("verdict"):
        return record
    runs, against = record["verdict"]["runs"], record["verdict"]["tests"][0]["against"]
    (own,) = (verdict for verdict in verdicts(runs, against) if verdict["loss"] == record["name"])
    return record | {"verdict": own | {"runs": runs}}


def block(kind: str, name: str) -> str:
    """The table of a comparison (of "results") and a line for each verdict, as Markdown."""
    record = read(RESULTS / f"{name}.json")
    runs, against = record["runs"], record.get("against", BASELINE)
    sentences = "\n".join(f"- {verdict['sentence']}" for verdict in verdicts(runs, against))
    teacher = teacher_row_of(runs[0])
    table = comparison_table(runs, teacher, markdown=True, against=against) if kind == "results" else ""
    return f"{table}\n\n{sentences}".strip()


def page(text: str) -> str:
    """A page with its blocks made anew."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{block(found[2], found[3])}\n\n{found[4]}", text)


def main() -> None:
    for path in RECORDS:
        record = read(path)
        if (new := with_verdicts(record)) != record:
            write_json(path, new)
        if path.parent.parent.name == "model_cards":
            write_card(path.parent)
        if path.name == "run.json":
            plot_curves(new.get("runs", [new]), path.with_name("curves.png"))
    (ROOT / "docs" / "losses.md").write_text(overview(), "utf-8")
    for path in PAGES:
        path.write_text(page(path.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
