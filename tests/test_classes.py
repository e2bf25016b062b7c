"""Gains and losses by class, counted by hand."""

import math

import pytest
from model_card_helpers import record, verdict_of

from hf_kd.reporting.card import model_card
from hf_kd.reporting.classes import chance, changes_section, class_changes, plot_changes, read_counts, write_counts

NAMES = ["cat", 'a, "b" | c', "dog", "nothing", "$x_1$"]
IMAGES = [10, 20, 50, 0, 10]
HITS = {  # by variant, of the seeds 0 and 1
    "ce": ([5, 10, 25, 0, 3], [6, 12, 25, 0, 5]),
    "nkd": ([7, 8, 25, 0, 4], [9, 9, 26, 0, 6]),
}


def counts(hits, images=IMAGES):
    return {"name": NAMES, "images": images, "hits": hits}


def given(hits=HITS, seeds=2):
    runs = [{"name": n, "seed": s, "loss": {"name": n}, "metrics": {"top1": 0.5}} for n in hits for s in range(seeds)]
    return runs, [counts(hits[run["name"]][run["seed"]]) for run in runs]


def test_changes_by_hand():
    found = class_changes(*given(), "ce")["nkd"]
    assert found["against"] == "ce" and found["seeds"] == [0, 1] and found["classes"] == 4, "one class has no image"
    cat, x, dog = found["gains"]
    assert [cat["class"], x["class"], dog["class"]] == ["cat", "$x_1$", "dog"]
    assert (cat["images"], cat["baseline"], cat["own"], cat["mean"]) == pytest.approx((10, 55, 80, 25))
    # The differences are 20 and 30 points, and 12.706 is the 97.5 % quantile of t with 1 degree of freedom.
    assert cat["half_width"] == pytest.approx(12.70620474 * math.sqrt(50) / math.sqrt(2))
    assert x["mean"] == pytest.approx(10) and x["half_width"] is None, "10 points with either seed"
    assert dog["mean"] == pytest.approx(1)
    (loss,) = found["losses"]
    assert loss["class"] == NAMES[1] and (loss["baseline"], loss["own"]) == pytest.approx((55, 42.5))
    assert loss["mean"] == pytest.approx(-12.5) and found["apart"] == 0
    assert "over 2 seeds" in chance(found) and "for 0 of the 4 classes" in chance(found)
    section = changes_section({"nkd": found}, "x.png")
    lines = [[cell.strip() for cell in line.strip("|").split(" |")] for line in section.splitlines() if "|" in line]
    assert lines[0] == ["class", "images", "ce %", "nkd %", "difference"]
    assert lines[2] == ["cat", "10", "55.00", "80.00", "+25.00 ± 63.53"] and lines[5][-1] == "-12.50 ± 31.77"
    assert "\\|" in section and changes_section({}, "x.png") == ""


def test_intervals_that_leave_out_0_are_counted():
    hits = {"ce": ([5, 10, 25, 0, 5], [5, 10, 26, 0, 5]), "nkd": ([9, 10, 40, 0, 5], [8, 10, 40, 0, 5])}
    found = class_changes(*given(hits), "ce")["nkd"]
    # 40 and 30 points: 35 ± 63.5; 30 and 28: 29 ± 12.7; the others do not differ, and are no gain or loss.
    assert found["apart"] == 1 and [row["class"] for row in found["gains"]] == ["cat", "dog"] and not found["losses"]


def test_one_seed_has_no_interval():
    found = class_changes(*given(seeds=1), "ce")["nkd"]
    assert found["apart"] is None and {row["half_width"] for row in found["gains"]} == {None}
    assert chance(found).endswith("From one seed there is no interval.")


def test_at_most_ten_a_side_the_largest_first():
    runs, _ = given(seeds=1)
    both = [{"name": [f"{i}" for i in range(40)], "images": [100] * 40, "hits": hits}
            for hits in ([50] * 40, [30 + i for i in range(40)])]  # fmt: skip
    found = class_changes(runs, both, "ce")["nkd"]
    assert [row["class"] for row in found["gains"]] == [str(i) for i in range(39, 29, -1)]
    assert [row["class"] for row in found["losses"]] == [str(i) for i in range(10)]


def test_runs_without_counts_of_the_same_images_are_left_out():
    runs, parts = given()
    assert class_changes(runs, [None] * 4, "ce") == {} == class_changes(runs, parts, "kd")
    assert class_changes(runs, [None, *parts[1:]], "ce")["nkd"]["seeds"] == [1]
    runs[1]["diverged"] = "the loss is NaN"
    assert class_changes(runs, parts, "ce")["nkd"]["seeds"] == [0]
    parts[0] = counts(parts[0]["hits"], [10, 20, 50, 1, 10])
    assert class_changes(runs, parts, "ce") == {}


def test_the_file_keeps_any_name(tmp_path):
    part = {"name": [*NAMES[:4], "\udc80é\n"], "images": IMAGES, "hits": HITS["ce"][0]}
    assert read_counts(tmp_path) is None
    write_counts(part, tmp_path)
    assert read_counts(tmp_path) == part


def test_the_figure_shows_every_listed_class_with_its_interval(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k)))
    changes = class_changes(*given(), "ce")
    plot_changes(changes | {"kd": changes["nkd"]}, tmp_path / "classes.png")
    axes = saved[0].axes
    assert [a.get_title() for a in axes] == ["nkd against ce, 2 seeds", "kd against ce, 2 seeds"]
    assert [tick.get_text() for tick in axes[0].get_yticklabels()] == ["cat", "$x_1$", "dog", NAMES[1]]
    points = [line.get_xdata()[0] for line in axes[0].lines if line.get_marker() == "D"]
    assert points == pytest.approx([25, 10, 1, -12.5])
    intervals = [segment[:, 0] for part in axes[0].collections for segment in part.get_segments()]
    assert intervals[0] == pytest.approx([25 - 63.531, 25 + 63.531], abs=1e-3) and len(intervals) == 3
    assert (tmp_path / "classes.png").stat().st_size > 5000


def test_the_card_says_it():
    run = record("nkd", metrics={"top1": 0.7, "teacher_errors_repeated": 0.4567})
    before = model_card(run)
    assert "gives 45.67 % the same wrong class." in before and "by class" not in before
    run["verdict"] = {**verdict_of("nkd", ["ce"]), "shared_errors": {"sentence": "nkd 42.00 % and ce 31.00 %."}}
    run["class_changes"] = class_changes(*given(), "ce")["nkd"]
    card = model_card(run)
    assert "the same wrong class. Over the seeds: nkd 42.00 % and ce 31.00 %." in card
    assert "the largest gains are `cat` +25.00 ± 63.53, `$x_1$` +10.00" in card
    assert "large by chance, too" in card
