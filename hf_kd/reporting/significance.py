"""Did distillation help? Paired tests over seeds, in points of top-1, from run records alone.

A seed fixes the initial weights and the order and augmentation of the data, so two losses trained from one seed are a
pair. Their differences measure the training's randomness on this evaluation set, not that of drawing other images.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .record import loss_description

BASELINE = "ce"
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


def compare(runs: Iterable[Mapping[str, Any]], name: str, against: str) -> dict[str, Any] | None:
    """The paired test of variants `name` and `against`, over the seeds that both have; None if there are none."""
    top1: dict[str, dict[int | None, float]] = {name: {}, against: {}}
    for run in runs:
        value = run.get("metrics", {}).get("top1")
        if run["name"] in top1 and value is not None and math.isfinite(value):
            top1[run["name"]][run.get("seed")] = 100 * value
    seeds = [seed for seed in top1[name] if seed in top1[against]]
    if not seeds:
        return None
    test = paired_test([top1[name][seed] - top1[against][seed] for seed in seeds])
    return {"name": name, "against": against, "seeds": seeds, **test}


def verdicts(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One verdict for each variant that distils, in the order of the runs; none without "ce" runs or several seeds.

    A variant *helped* if the 95 % interval of its difference to "ce" is above 0, and also that of its
    difference to each of its loss's `controls` among the runs: a gain that a control shows too is not due to the loss.

    Returns:
        Dicts of loss (the variant's name), seeds, helped, sentence, and tests: for each variant that it is compared
        with differences, mean, half_width of the 95 % interval, and p of a paired t-test (the last two may be None).
    """
    variants = {run["name"]: run for run in runs}
    found = []
    for name, run in variants.items():
        if BASELINE in (name, (run.get("loss") or {}).get("name")):
            continue
        others = [BASELINE, *(control for control in loss_description(run).get("controls", ()) if control in variants)]
        tests = [test for other in others if (test := compare(runs, name, other))]
        if tests and tests[0]["against"] == BASELINE and len(tests[0]["seeds"]) > 1:
            verdict = {"loss": name, "seeds": tests[0]["seeds"]}
            verdict["helped"] = len(tests) == len(others) and all(_above(test) for test in tests)
            sentence = _sentence(name, tests, verdict["helped"]) + _not_counted(runs, [name, *others])
            found.append(verdict | {"sentence": sentence, "tests": tests})
    return found


def describe(test: Mapping[str, Any], sign: str = "+") -> str:
    """`+0.52 ± 0.31`: the mean and, where there is one, the half-width of its 95 % interval, in points."""
    mean = f"{test['mean']:{sign}z.2f}"  # z: never −0.00
    return mean if test["half_width"] is None else f"{mean} ± {test['half_width']:.2f}"


def _above(test: Mapping[str, Any]) -> bool:
    return test["half_width"] is not None and test["mean"] > test["half_width"]


def _not_counted(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    diverged = [f"{run['name']} of seed {run.get('seed')}" for run in runs if run.get("diverged")]
    diverged = [text for text in diverged if text.split(" of seed ")[0] in names]
    return f" Not counted, because it diverged: {', '.join(diverged)}." if diverged else ""


def _sentence(name: str, tests: Sequence[Mapping[str, Any]], helped: bool) -> str:
    def proof(test: Mapping[str, Any]) -> str:
        p = "no test: the seeds do not differ" if test["p"] is None else f"p = {test['p']:.2g}"
        return f"({len(test['seeds'])} seeds, {p})"

    first, *controls = tests
    if helped:
        text = f"{name} helped by {describe(first, sign='')} points of top-1 over {first['against']}"
    elif _above(first):
        text = f"{name} did not help beyond its control: {describe(first)} points of top-1 over {first['against']}"
    else:
        harmed = first["half_width"] is not None and first["mean"] < -first["half_width"]
        doubt = "" if harmed else f", as far as {len(first['seeds'])} seeds can tell"
        text = f"{name} did not help{doubt}: {describe(first)} points of top-1 against {first['against']}"
    text += f" {proof(first)}"
    for test in controls:
        text += f", {describe(test)} against its control {test['against']} {proof(test)}"
    return f"{text}."
