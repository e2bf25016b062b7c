"""What the tool says of differences: against formulas written out here, and against what must not count as help."""

import math
import random
import statistics

import pytest

from hf_kd.reporting import comparison_table
from hf_kd.reporting.controls import CONTROLS
from hf_kd.reporting.significance import (
    baseline_tests,
    compare,
    paired_test,
    pairwise,
    seeds_needed,
    shared_errors,
    verdicts,
)
from hf_kd.reporting.tables import pairwise_table


def runs(**top1):
    """Records of runs with a top-1 in percent for each of the seeds 0, 1, …; `uskd` and `x2ce` name their loss."""
    losses = {"ce": "ce", "x2ce": "ce"}
    return [
        {
            "name": name.replace("x2ce", "2xce"),
            "seed": seed,
            "loss": {"name": losses.get(name, name)},
            "metrics": {"top1": value / 100},
        }
        for name, values in top1.items()
        for seed, value in enumerate(values)
    ]


def test_the_paired_test_is_students():
    differences = [0.9, 0.2, 0.7, 0.4]
    test = paired_test(differences)
    error = statistics.stdev(differences) / math.sqrt(4)
    assert test["mean"] == pytest.approx(0.55) and test["differences"] == differences
    assert test["half_width"] == pytest.approx(3.182446305 * error)  # 97.5 % quantile of t with 3 degrees of freedom
    # Two-sided p of t with 3 degrees of freedom, in closed form.
    t = 0.55 / error
    angle = math.atan(t / math.sqrt(3))
    assert test["p"] == pytest.approx(1 - 2 / math.pi * (angle + math.sin(angle) * math.cos(angle)))


@pytest.mark.parametrize("differences", [[1.0], [0.5, 0.5, 0.5]])
def test_where_nothing_can_be_tested_nothing_is_claimed(differences):
    test = paired_test(differences)
    assert test["p"] is None and test["half_width"] is None and test["mean"] == pytest.approx(differences[0])
    found = verdicts(runs(ce=[50, 50, 50], nkd=[51, 51, 51]))
    assert found[0]["helped"] is False and "the seeds do not differ" in found[0]["sentence"]
    assert verdicts(runs(ce=[50], nkd=[60])) == []


def test_help_is_a_paired_difference_and_not_a_bare_maximum():
    # The spread between seeds is large; the paired differences hardly differ.
    (found,) = verdicts(runs(ce=[40, 50, 60], nkd=[41.0, 51.1, 60.9]))
    assert found["helped"] and found["sentence"].startswith(
        "nkd helped by 1.00 ± 0.25 points of top-1 over ce (3 seeds"
    )
    # The best and the mean of the second are higher, but one pair says the opposite.
    (found,) = verdicts(runs(ce=[40, 50, 60], nkd=[44, 49, 64]))
    assert not found["helped"] and found["sentence"].startswith(
        "nkd did not help, as far as 3 seeds can tell: +2.33 ± "
    )
    (found,) = verdicts(runs(ce=[40, 50, 60], nkd=[39, 48.9, 59.1]))
    assert not found["helped"] and "did not help: -1.00 ± 0.25" in found["sentence"]


def test_uskd_must_also_beat_twice_the_cross_entropy():
    (found,) = verdicts(runs(ce=[40, 50, 60], x2ce=[41, 50.9, 61], uskd=[41.0, 51.1, 60.9]))
    assert not found["helped"] and "did not help beyond its control: +1.00 ± 0.25" in found["sentence"]
    assert [test["against"] for test in found["tests"]] == ["ce", "2xce"]
    (found,) = verdicts(runs(ce=[40, 50, 60], x2ce=[40, 50.1, 60], uskd=[41.0, 51.1, 60.9]))
    assert found["helped"] and "against its control 2xce" in found["sentence"]


def test_a_loss_that_is_not_ours_must_beat_the_controls_that_its_record_names():
    given = runs(ce=[40, 50, 60], x2ce=[41, 50.9, 61], mine=[41.0, 51.1, 60.9])
    assert verdicts(given)[0]["helped"]
    for run in given:
        if run["name"] == "mine":
            run["loss_description"] = {"controls": {"2xce": {}, "not run": {}}}
    (found,) = verdicts(given)
    assert not found["helped"] and [test["against"] for test in found["tests"]] == ["ce", "2xce"]


def test_pairs_are_of_one_seed_and_only_those_that_both_have():
    given = runs(ce=[40, 50, 60], nkd=[45, 41])
    given[-1]["seed"] = 7
    assert compare(given, "nkd", "ce")["differences"] == pytest.approx([5.0])
    given[0]["metrics"]["top1"] = math.nan
    assert compare(given, "nkd", "ce") is None
    assert verdicts(given) == []


def holm(ps):
    """The smallest level at which Holm's step-down procedure rejects each hypothesis, by trying all that matter."""

    def rejected(level):
        names = sorted(ps, key=ps.get)
        for i, name in enumerate(names):
            if ps[name] > level / (len(names) - i):
                return set(names[:i])
        return set(names)

    levels = sorted({min(1, k * p) for p in ps.values() for k in range(1, len(ps) + 1)} | {1.0})
    return {name: next((at for at in levels if name in rejected(at * (1 + 1e-12))), 1.0) for name in ps}


def many(seed, variants=4, seeds=5, effect=0.0):
    """Runs of a baseline and of variants whose differences to it are drawn from a normal distribution."""
    generator = random.Random(seed)
    top1 = {name: [generator.gauss(50, 1) for _ in range(seeds)] for name in ["ce", *"abcdefgh"[:variants]]}
    for name in top1.keys() - {"ce"}:
        top1[name] = [value + effect for value in top1[name]]
    return runs(**top1)


@pytest.mark.parametrize("variants", [1, 2, 5])
def test_the_correction_is_holms(variants):
    for seed in range(20):
        given = many(seed, variants, effect=1.0)
        tests = baseline_tests(given)
        expected = holm({name: test["p"] for name, test in tests.items()})
        assert {name: test["p_holm"] for name, test in tests.items()} == pytest.approx(expected)
        assert {test["family"] for test in tests.values()} == {variants}


def test_of_several_variants_without_an_effect_one_seems_to_help_in_at_most_one_comparison_of_twenty():
    comparisons = 1000
    wrong = alone = differs = 0
    for seed in range(comparisons):
        found = verdicts(many(seed))
        tests = [verdict["tests"][0] for verdict in found]
        wrong += any(verdict["helped"] for verdict in found)
        alone += any(test["p"] <= 0.05 and test["mean"] > 0 for test in tests)
        differs += any(test["p_holm"] <= 0.05 for test in tests)
    limit = comparisons * 0.05 + 2 * math.sqrt(comparisons * 0.05 * 0.95)
    assert wrong <= comparisons * 0.05 and differs <= limit
    assert alone > 1.3 * comparisons * 0.05, "the simulation shows what is corrected"


def test_the_correction_counts_neither_controls_nor_the_cross_entropy():
    given = runs(ce=[40, 50, 60], x2ce=[40, 50.1, 60], uskd=[41.0, 51.1, 60.9], nkd=[42, 52.2, 61.9])
    uskd, nkd = verdicts(given)
    assert [test.get("family") for test in uskd["tests"]] == [2, None]
    assert "p_holm" not in uskd["tests"][1] and uskd["tests"][1]["p"] < 0.05
    assert nkd["tests"][0]["p_holm"] == pytest.approx(max(2 * nkd["tests"][0]["p"], uskd["tests"][0]["p"]))
    assert "after Holm's correction for 2 variants), +0.97 ± " in uskd["sentence"]
    assert uskd["sentence"].count("Holm") == 1
    # By itself it would have helped.
    (alone,) = verdicts(runs(ce=[40, 50, 60], nkd=[43, 53, 65]))
    together = verdicts(runs(ce=[40, 50, 60], nkd=[43, 53, 65], kd=[41, 49, 60]))
    assert alone["helped"] and not together[0]["helped"]
    assert together[0]["sentence"].startswith("nkd did not help, as far as 3 seeds can tell: +3.67 ± 2.87")


def test_a_run_that_diverged_counts_nowhere_and_is_named():
    given = runs(ce=[40, 50, 60], nkd=[41.0, 51.1, 60.9])
    given[-1] |= {"metrics": {}, "diverged": "the loss is NaN"}
    (found,) = verdicts(given)
    assert found["seeds"] == [0, 1] and found["tests"][0]["family"] == 1
    assert found["sentence"].endswith(" Not counted, because it diverged: nkd of seed 2.")
    table = comparison_table(given).splitlines()
    assert table[3].startswith("nkd (1 of 3 diverged)") and "46.05 ± 7.14" in table[3]


def test_any_variant_can_be_the_baseline():
    given = runs(ce=[30, 31, 32], kd=[40, 50, 60], nkd=[41.0, 51.1, 60.9], uskd=[35, 41, 39])
    tests = baseline_tests(given, "kd")
    assert list(tests) == ["nkd", "uskd"] and {test["family"] for test in tests.values()} == {2}
    assert tests["nkd"]["differences"] == pytest.approx([1.0, 1.1, 0.9])
    nkd, uskd = verdicts(given, "kd")
    assert (
        nkd["helped"] and "over kd (3 seeds" in nkd["sentence"] and "after Holm's correction for 2" in nkd["sentence"]
    )
    assert not uskd["helped"] and nkd["tests"][0]["against"] == "kd"
    table = comparison_table(given, against="kd")
    assert "difference to kd" in table and "+1.00 ± 0.25" in table


def test_pairs_are_described_each_by_itself():
    given = runs(ce=[30, 31, 32], kd=[40, 50, 60], nkd=[41.0, 51.1, 60.9])
    assert set(pairwise(given)) == {(a, b) for a in ("ce", "kd", "nkd") for b in ("ce", "kd", "nkd") if a != b}
    lines = pairwise_table(given).splitlines()
    assert lines[0].split() == ["row", "−", "column", "ce", "kd", "nkd"]
    assert lines[4].split()[-3:] == ["+1.00", "±", "0.25"] and lines[3].split()[-3:] == ["-1.00", "±", "0.25"]
    assert pairwise_table(runs(ce=[30, 31], kd=[40, 50])) == "" and pairwise_table(runs(ce=[3], kd=[4], nkd=[5])) == ""


def test_how_many_seeds_a_difference_needs_has_the_power_that_is_claimed():
    differences = [1.0, -0.4, 1.6, 0.1]
    needed = seeds_needed(paired_test(differences))
    mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
    generator, shares = random.Random(0), {}
    for n in (needed - 1, needed):
        found = [paired_test([generator.gauss(mean, deviation) for _ in range(n)]) for _ in range(2000)]
        shares[n] = sum(test["p"] <= 0.05 and test["mean"] > 0 for test in found) / len(found)
    assert shares[needed] > 0.8 - 0.03 > 0 and shares[needed - 1] < 0.8 + 0.03
    assert seeds_needed(paired_test([1.0])) is None and seeds_needed(paired_test([-0.5, 0.5])) is None
    assert seeds_needed(paired_test([0.001, 1.0, -1.0])) is None  # more than 1,000
    (open_,) = verdicts(runs(ce=[40, 50, 60], nkd=[44, 49, 64]))
    assert open_["sentence"].endswith(" seeds to show (power 80 %).")
    (clear,) = verdicts(runs(ce=[40, 50, 60], nkd=[41.0, 51.1, 60.9]))
    assert "would need" not in clear["sentence"]


def test_the_teachers_errors_are_compared_with_what_plain_training_repeats():
    given = runs(ce=[40, 50, 60], kd=[41, 51, 61], nkd=[41.0, 51.1, 60.9])
    assert shared_errors(given) == {} and "shared_errors" not in verdicts(given)[0], "records without the figure"
    for run in given:
        shares = {"ce": (0.30, 0.32, 0.31), "kd": (0.40, 0.41, 0.45), "nkd": (0.30, 0.42, None)}[run["name"]]
        run["metrics"] |= {"teacher_errors_repeated": shares[run["seed"]], "teacher_top1": 0.9265}
    for against in ("ce", "kd"):  # it is the baseline without a teacher that tells what is repeated anyway
        kd = shared_errors(given, against)["kd"]
        assert kd["against"] == "ce" and kd["differences"] == pytest.approx([10, 9, 14])
        assert kd["half_width"] == pytest.approx(4.302652730 * statistics.stdev([10, 9, 14]) / math.sqrt(3))
    assert kd["sentence"] == (
        "Of the images that the teacher gets wrong (7.35 % of all), kd gives the same wrong class to 42.00 % and "
        "ce to 31.00 %: a difference of +11.00 ± 6.57 points (3 seeds)."
    )
    nkd = shared_errors(given)["nkd"]
    assert nkd["seeds"] == [0, 1] and "to 36.00 % and ce to 31.00 %" in nkd["sentence"]
    assert [verdict["shared_errors"] for verdict in verdicts(given)] == list(shared_errors(given).values())
    without = [run for run in given if run["name"] != "ce"]
    assert shared_errors(without, "kd")["nkd"]["against"] == "kd"
    assert shared_errors(given[::3])["kd"]["sentence"].endswith("a difference of +10.00 points (1 seed).")


def test_a_variant_without_a_p_is_neither_corrected_nor_counted():
    given = runs(ce=[50, 50, 50], nkd=[51, 51, 51], kd=[51, 52, 54], uskd=[49, 52, 54])
    nkd, kd, _ = (verdict["sentence"] for verdict in verdicts(given))
    assert "(3 seeds, no test: the seeds do not differ)" in nkd and "after Holm's correction for 2 variants" in kd
    assert "for the 2 variants that distil and have a p (of 3)." in comparison_table(given)


# ---- controls ----


def with_controls(**top1):
    """Runs of nkd and of controls, whose names say their kind."""
    found = runs(**{name.replace("x2ce", "2xce"): values for name, values in top1.items()})
    for run in found:
        kind = run["name"].removeprefix("nkd-")
        if kind in CONTROLS:
            of = "nkd" if kind != run["name"] else None
            run["control"] = {"kind": kind, "of": of} | ({"ratio": 1.25} if kind == "ce_same_time" else {})
            run["loss"] = {"name": "nkd" if of else "ce"}
    return found


def test_a_variant_must_beat_its_controls_which_are_not_counted():
    plain, nkd = [40, 50, 60], [44.0, 54.1, 63.9]
    given = with_controls(ce=plain, nkd=nkd, **{"nkd-random_teacher": [41, 51.2, 60.9], "2xce": [40, 50.1, 60]})
    (found,) = verdicts(given)
    assert found["helped"] and [test["against"] for test in found["tests"]] == ["ce", "nkd-random_teacher", "2xce"]
    assert found["tests"][0]["family"] == 1
    assert "against its control nkd-random_teacher" in found["sentence"]
    remains = "Of +4.00 ± 0.25 points over ce, +1.03 ± 0.38 remain with random weights in place of the teacher's: "
    assert f" {remains}regularisation, not knowledge." in found["sentence"]

    given = with_controls(ce=plain, nkd=nkd, **{"nkd-permuted_teacher": [44, 54, 64], "ce_same_time": [41, 51, 61.1]})
    (found,) = verdicts(given)
    assert not found["helped"] and found["sentence"].startswith("nkd did not help beyond its control: +4.00")
    assert "remain with the teacher's outputs exchanged within each label: regularisation, not" in found["sentence"]
    table = comparison_table(given)
    assert "nkd-permuted_teacher (control)" in table and "ce_same_time (control)" in table
    assert "(1.25 times the steps)" in table and "variants that distil" not in table

    # Those of a variant are no controls of another; those of all are.
    given += with_controls(kd=[43, 53.2, 63])
    by_name = {verdict["loss"]: [test["against"] for test in verdict["tests"]] for verdict in verdicts(given)}
    assert by_name == {"nkd": ["ce", "nkd-permuted_teacher", "ce_same_time"], "kd": ["ce", "ce_same_time"]}
    # Where nothing was gained, nothing remains.
    (found,) = verdicts(with_controls(ce=nkd, nkd=plain, **{"nkd-random_teacher": plain}))
    assert "remain" not in found["sentence"]
    # A control below the baseline has none of the gain, which is then not regularisation.
    (found,) = verdicts(with_controls(ce=plain, nkd=nkd, **{"nkd-random_teacher": [30, 41, 50]}))
    none = "Of +4.00 ± 0.25 points over ce, none remain (-9.67 ± 1.43) with random weights in place of the teacher's."
    assert none in found["sentence"] and "regularisation" not in found["sentence"]


def test_a_control_of_an_unknown_kind_is_marked_all_the_same():
    given = with_controls(ce=[40], nkd=[41]) + [{"name": "x", "seed": 0, "control": {"kind": "other", "of": None}}]
    assert "x (control)" in comparison_table(given)
