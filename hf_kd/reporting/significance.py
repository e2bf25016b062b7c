"""Did distillation help? Paired tests over seeds, in points of top-1, from run records alone.

A seed fixes the initial weights and the order and augmentation of the data, so two losses trained from one seed are a
pair. Their differences measure the training's randomness on this evaluation set, not that of drawing other images.

The baseline is plain cross entropy, or any other variant that is asked for (`--against kd`). The p-values of several
variants against it are corrected by the method of Holm (1979): the probability that any of them is said to help or to
harm, though none makes a difference, is at most 5 %.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .controls import REMAINS, controls_of

BASELINE = "ce"
LEVEL = 0.05
TEST = "paired t-test over seeds, two-sided, 95 %"


def paired_test(differences: Sequence[float]) -> dict[str, Any]:
    """Student's t-test of one or more paired differences, in points, against 0.

    half_width of the 95 % interval and p (two-sided) are None with one seed, or if all differences are equal.
    """
    result = {"differences": list(differences), "mean": statistics.fmean(differences), "test": TEST}
    if len(differences) < 2 or math.isclose(min(differences), max(differences), abs_tol=1e-9):
        return {**result, "half_width": None, "p": None}
    from scipy.stats import ttest_1samp  # slow to import

    outcome = ttest_1samp(differences, 0.0)
    low, high = outcome.confidence_interval(0.95)
    return {**result, "half_width": float(high - low) / 2, "p": float(outcome.pvalue)}


def compare(runs: Iterable[Mapping[str, Any]], name: str, against: str, metric: str = "top1") -> dict[str, Any] | None:
    """The paired test of variants `name` and `against`, over the seeds that both have; None if there are none."""
    points = {variant: _points(runs, variant, metric) for variant in (name, against)}
    seeds = [seed for seed in points[name] if seed in points[against]]
    if not seeds:
        return None
    test = paired_test([points[name][seed] - points[against][seed] for seed in seeds])
    return {"name": name, "against": against, "seeds": seeds, **test}


def _points(runs: Iterable[Mapping[str, Any]], name: str, metric: str) -> dict[int | None, float]:
    """A rate in percent of the runs of a variant, by seed."""
    values = {run.get("seed"): (run.get("metrics") or {}).get(metric) for run in runs if run["name"] == name}
    return {seed: 100 * value for seed, value in values.items() if value is not None and math.isfinite(value)}


POWER, MOST_SEEDS = 0.8, 1000


def seeds_needed(test: Mapping[str, Any]) -> int | None:
    """How many seeds a paired t-test would need to show, with 80 % probability, a difference of the size and spread
    that a `paired_test` has seen; None if there is no spread, no difference, or more than 1,000 are needed."""
    if test["half_width"] is None or test["mean"] == 0:
        return None
    from scipy.stats import nct, t  # slow to import

    effect = abs(test["mean"]) / statistics.stdev(test["differences"])
    for n in range(2, MOST_SEEDS + 1):
        if nct.sf(t.isf(LEVEL / 2, n - 1), n - 1, effect * math.sqrt(n)) >= POWER:
            return n
    return None


def pairwise(runs: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """`compare` of each two variants, by their names. It describes: with so many pairs some differ by chance."""
    names = list(dict.fromkeys(run["name"] for run in runs))
    pairs = ((a, b) for a in names for b in names if a != b)
    return {pair: test for pair in pairs if (test := compare(runs, *pair))}


def baseline_tests(runs: Sequence[Mapping[str, Any]], against: str = BASELINE) -> dict[str, dict[str, Any]]:
    """The `compare` with the baseline of every other variant that distils, by name, with p corrected for their number.

    `p_holm` is None where p is; `family` is the number of p-values that are corrected together.
    """
    tests = {name: test for name in _distil(runs) if name != against and (test := compare(runs, name, against))}
    ordered = sorted((test for test in tests.values() if test["p"] is not None), key=lambda test: test["p"])
    smallest = 0.0
    for i, test in enumerate(ordered):
        smallest = max(smallest, min(1.0, (len(ordered) - i) * test["p"]))
        test["p_holm"] = smallest
    return {name: {"p_holm": None, **test, "family": len(ordered)} for name, test in tests.items()}


def _distil(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    variants = {run["name"]: run for run in runs}
    return [
        name
        for name, run in variants.items()
        if BASELINE not in (name, (run.get("loss") or {}).get("name")) and not run.get("control")
    ]


def shared_errors(runs: Sequence[Mapping[str, Any]], against: str = BASELINE) -> dict[str, dict[str, Any]]:
    """Of every variant that distils, by name, the `compare` of teacher_errors_repeated with plain cross entropy, where
    it is among the runs, or else with `against`; with a `sentence`. A student repeats some of the teacher's errors
    without having learned from it: hard images are hard for both."""
    base = BASELINE if any(run["name"] == BASELINE for run in runs) else against
    found, key = {}, "teacher_errors_repeated"
    for name in _distil(runs):
        if name == base or not (test := compare(runs, name, base, key)):
            continue
        own, other = (
            statistics.fmean(_points(runs, variant, key)[seed] for seed in test["seeds"]) for variant in (name, base)
        )
        seeds = f"{len(test['seeds'])} seed{'s' if len(test['seeds']) > 1 else ''}"
        right = [*_points(runs, name, "teacher_top1").values()]
        few = f" ({100 - statistics.fmean(right):.2f} % of all)" if right else ""
        sentence = (
            f"Of the images that the teacher gets wrong{few}, {name} gives the same wrong class to {own:.2f} % "
            f"and {base} to {other:.2f} %: a difference of {describe(test)} points ({seeds})."
        )
        found[name] = {**test, "sentence": sentence}
    return found


def verdicts(runs: Sequence[Mapping[str, Any]], against: str = BASELINE) -> list[dict[str, Any]]:
    """One verdict for each variant that distils, in the order of the runs, but for the baseline `against`; none
    without runs of the baseline or several seeds.

    A variant *helped* if its mean difference to the baseline is positive with a corrected p of at most 0.05, and if
    the 95 % interval of its difference to each of its controls (see `controls_of`) is above 0: a gain that a control
    shows too is not due to the loss. The controls are further conditions, not further chances, and are not
    counted.

    Returns:
        Dicts of loss (the variant's name), seeds, helped, sentence, and tests: for each variant that it is compared
        with differences, mean, half_width of the 95 % interval of this difference by itself, and p of a paired t-test
        (the last two may be None); for the baseline also p_holm and family, see `baseline_tests`. If the records have
        teacher_errors_repeated, also shared_errors, what the function of this name says of the variant.
    """
    variants, shared = {run["name"]: run for run in runs}, shared_errors(runs, against)
    found = []
    for name, first in baseline_tests(runs, against).items():
        if len(first["seeds"]) < 2:
            continue
        controls = controls_of(variants[name], variants.values())
        tests = [first, *(test for other in controls if other != against and (test := compare(runs, name, other)))]
        beats_all = len(tests) == len({against, *controls}) and all(_above(test) for test in tests)
        verdict = {"loss": name, "seeds": first["seeds"], "helped": beats_all}
        sentence = _sentence(name, tests, beats_all)
        for control in controls:
            what = REMAINS.get((variants[control].get("control") or {}).get("kind", ""))
            if what and first["mean"] > 0 and (rest := compare(runs, control, against)):
                left = f"{describe(rest)} remain {what}."
                if rest["mean"] <= 0:
                    left = f"none remain ({describe(rest)}) {what.split(':')[0]}."
                sentence += f" Of {describe(first)} points over {against}, {left}"
        sentence += _not_counted(runs, [name, against, *controls])
        own_errors = {"shared_errors": shared[name]} if name in shared else {}
        found.append(verdict | {"sentence": sentence, "tests": tests, **own_errors})
    return found


def describe(test: Mapping[str, Any], sign: str = "+") -> str:
    """`+0.52 ± 0.31`: the mean and, where there is one, the half-width of its 95 % interval, in points."""
    mean = f"{test['mean']:{sign}z.2f}"  # z: never −0.00
    return mean if test["half_width"] is None else f"{mean} ± {test['half_width']:.2f}"


def p_value(test: Mapping[str, Any]) -> float | None:
    """The p that decides: against the baseline the corrected one; of a control, at its own level, the plain one."""
    return test.get("p_holm", test["p"])


def _significant(test: Mapping[str, Any]) -> bool:
    p = p_value(test)
    return p is not None and p <= LEVEL


def _above(test: Mapping[str, Any]) -> bool:
    return _significant(test) and test["mean"] > 0


def _not_counted(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    lost = [run for run in runs if run.get("diverged") and run["name"] in names]
    diverged = [f"{run['name']} of seed {run.get('seed')}" for run in lost]
    return f" Not counted, because it diverged: {', '.join(diverged)}." if diverged else ""


def _sentence(name: str, tests: Sequence[Mapping[str, Any]], helped: bool) -> str:
    def proof(test: Mapping[str, Any]) -> str:
        p = "no test: the seeds do not differ" if p_value(test) is None else f"p = {p_value(test):.2g}"
        several = test.get("family", 1)
        is_corrected = several > 1 and p_value(test) is not None
        corrected = f" after Holm's correction for {several} variants" if is_corrected else ""
        return f"({len(test['seeds'])} seeds, {p}{corrected})"

    first, *controls = tests
    if helped:
        text = f"{name} helped by {describe(first, sign='')} points of top-1 over {first['against']}"
    elif _above(first):
        text = f"{name} did not help beyond its control: {describe(first)} points of top-1 over {first['against']}"
    else:
        doubt = "" if _significant(first) else f", as far as {len(first['seeds'])} seeds can tell"
        text = f"{name} did not help{doubt}: {describe(first)} points of top-1 against {first['against']}"
    text += f" {proof(first)}"
    for test in controls:
        text += f", {describe(test)} against its control {test['against']} {proof(test)}"
    holds_0 = first["half_width"] is not None and abs(first["mean"]) <= first["half_width"]
    if holds_0 and (needed := seeds_needed(first)):
        text += f". A difference of this size and spread would need about {needed} seeds to show (power 80 %)"
    return f"{text}."
