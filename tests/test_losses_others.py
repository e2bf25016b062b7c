"""DKD, DIST, WTTM, hard labels, Tf-KD and logit standardization: oracles in float64, one image after the other."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from losses_helpers import CLASSES, B, C, grad, label_case, leaf, logits, same

from hf_kd.losses import (
    LOSSES,
    Progress,
    dist_loss,
    dkd_loss,
    get_loss,
    hard_loss,
    kd_loss,
    standardize_logits,
    tf_kd_loss,
    wttm_loss,
)
from hf_kd.losses.overview import overview

KINDS = ["int", "one_hot", "mixed", "smooth", "smooth_mixed"]


def softmax(row, temperature=1.0):
    e = [math.exp((x - max(row)) / temperature) for x in row]
    return [x / math.fsum(e) for x in e]


def kl(p, q):
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


def differences(function, s):
    """The gradient of a function of nested lists by central differences."""
    rows, gradient = s.tolist(), torch.zeros_like(s)
    for b in range(s.shape[0]):
        for i in range(s.shape[1]):
            values = []
            for step in (1e-5, -1e-5):
                moved = [list(row) for row in rows]
                moved[b][i] += step
                values.append(function(moved))
            gradient[b, i] = (values[0] - values[1]) / 2e-5
    return gradient


def check(oracle, function, dtype, *others):
    """Values and gradients of each term of `function(student, ...)` against `oracle(lists, ...)`."""
    s = leaf(logits(0, dtype))
    terms, lists = function(s, *others), [x.double().tolist() for x in others]
    for name, term in terms.items():
        same(term, oracle(s.tolist(), *lists)[name])
        expected = differences(lambda rows, name=name: oracle(rows, *lists)[name], s.detach().double())
        same(grad(term, s), expected, atol=1e-7)
    return terms


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("temperature", "alpha", "beta"), [(1.0, 1.0, 0.5), (4.0, 0.7, 8.0)])
def test_dkd_equals_its_definition(kind, temperature, alpha, beta, dtype):
    labels, meaning = label_case(kind)

    def oracle(s, t):
        target = non_target = 0.0
        for b in range(B):
            p, q = softmax(t[b], temperature), softmax(s[b], temperature)
            targets = [k for k, _ in meaning[b]]
            rest = [i for i in range(C) if i not in targets]
            binary = [[x[k] for k in targets] + [math.fsum(x[i] for i in rest)] for x in (p, q)]
            others = [[x[i] / math.fsum(x[j] for j in rest) for i in rest] for x in (p, q)]
            target += alpha * temperature**2 * kl(*binary) / B
            non_target += beta * temperature**2 * kl(*others) / B
        return {"target": target, "non_target": non_target}

    labels = labels if kind == "int" else labels.to(dtype)
    function = partial(dkd_loss, labels=labels, temperature=temperature, alpha=alpha, beta=beta)
    assert [*check(oracle, function, dtype, logits(1, dtype))] == ["target", "non_target"]


@pytest.mark.parametrize("kind", ["int", "mixed"])
def test_dkd_is_kd_where_beta_is_the_probability_of_the_others(kind):
    labels, meaning = label_case(kind)
    for b in range(B):
        s, t = logits(0, torch.float64)[b : b + 1], logits(1, torch.float64)[b : b + 1]
        rest = 1 - sum(torch.softmax(t / 3, 1)[0, k].item() for k, _ in meaning[b])
        terms = dkd_loss(s, t, labels[b : b + 1], 3.0, 1.0, rest)
        same(sum(terms.values()), kd_loss(s, t, 3.0)["kd"])


@pytest.mark.parametrize(("epoch", "factor"), [(0.0, 0.25), (0.9, 0.25), (1.0, 0.5), (3.5, 1.0), (9.0, 1.0)])
def test_dkd_warms_up_by_whole_epochs(epoch, factor):
    labels = torch.tensor(CLASSES)
    loss = get_loss("dkd", warmup_epochs=4)
    loss.progress = Progress(epoch=epoch)
    terms, full = loss(logits(0), labels, teacher_logits=logits(1)), dkd_loss(logits(0), logits(1), labels)
    for name, term in full.items():
        same(terms[name], factor * term)
    same(terms["ce"], F.cross_entropy(logits(0), labels))


def correlation(x, y):
    a, b = ([v - math.fsum(row) / len(row) for v in row] for row in (x, y))
    norms = math.sqrt(math.fsum(v * v for v in a)) * math.sqrt(math.fsum(v * v for v in b))
    return math.fsum(v * w for v, w in zip(a, b, strict=True)) / (norms + 1e-8)


@DTYPES
@pytest.mark.parametrize(("temperature", "beta", "gamma"), [(1.0, 2.0, 2.0), (4.0, 0.5, 3.0)])
def test_dist_equals_its_definition(temperature, beta, gamma, dtype):
    def oracle(s, t):
        s, t = ([softmax(row, temperature) for row in x] for x in (s, t))
        inter = math.fsum(correlation(x, y) for x, y in zip(s, t, strict=True)) / B
        columns = zip(zip(*s, strict=True), zip(*t, strict=True), strict=True)
        intra = math.fsum(correlation(x, y) for x, y in columns) / C
        scale = temperature**2
        return {"inter": beta * scale * (1 - inter), "intra": gamma * scale * (1 - intra)}

    function = partial(dist_loss, temperature=temperature, beta=beta, gamma=gamma)
    assert [*check(oracle, function, dtype, logits(1, dtype))] == ["inter", "intra"]


def test_dist_of_one_image_has_a_constant_second_term():
    s = leaf(logits(0)[:1])
    terms = dist_loss(s, logits(1)[:1], gamma=3.0)
    assert terms["intra"].item() == 3.0
    assert (grad(terms["intra"], s) == 0).all() and grad(terms["inter"], s).abs().sum() > 0


def test_dist_of_equal_logits_is_finite():
    s = leaf(torch.zeros(B, C))
    terms = dist_loss(s, logits(1))
    for term in terms.values():
        assert term.isfinite() and grad(term, s).isfinite().all()


@DTYPES
@pytest.mark.parametrize(("exponent", "weight"), [(0.8, 1.6), (0.25, 1.0), (1.0, 2.0)])
def test_wttm_equals_its_definition(exponent, weight, dtype):
    def oracle(s, t):
        total = 0.0
        for b in range(B):
            powers = [p**exponent for p in softmax(t[b])]
            q = [p / math.fsum(powers) for p in powers]
            total += weight * math.fsum(powers) * kl(q, softmax(s[b])) / B
        return {"wttm": total}

    check(oracle, partial(wttm_loss, exponent=exponent, weight=weight), dtype, logits(1, dtype))


def test_wttm_with_exponent_1_is_kd_at_temperature_1():
    same(wttm_loss(logits(0), logits(1), 1.0, 0.5)["wttm"], kd_loss(logits(0), logits(1), 1.0, 0.5)["kd"])


@DTYPES
def test_hard_equals_its_definition(dtype):
    def oracle(s, t):
        best = [row.index(max(row)) for row in t]
        return {"hard": -0.3 * math.fsum(math.log(softmax(s[b])[best[b]]) for b in range(B)) / B}

    check(oracle, partial(hard_loss, weight=0.3), dtype, logits(1, dtype))
    loss, labels = get_loss("hard", weight=0.3, label_smoothing=0.1), torch.tensor(CLASSES)
    same(
        loss(logits(0), labels, teacher_logits=logits(1))["ce"],
        0.7 * F.cross_entropy(logits(0), labels, label_smoothing=0.1),
    )


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("temperature", "alpha", "multiplier"), [(20.0, 0.1, 100.0), (0.5, 0.95, 1.0)])
def test_tf_kd_equals_its_definition(kind, temperature, alpha, multiplier, dtype):
    labels, _ = label_case(kind)
    rows = F.one_hot(labels, C).double() if kind == "int" else labels
    a, b = 0.99, 0.01 / (C - 1)
    high = math.exp(a / temperature) / (math.exp(a / temperature) + (C - 1) * math.exp(b / temperature))
    low = (1 - high) / (C - 1)

    def oracle(s, rows):
        total = 0.0
        for row, values in zip(s, rows, strict=True):
            q = [high * v + low * (1 - v) for v in values]
            total += alpha * multiplier * kl(q, softmax(row)) / (B * C)
        return {"tf_kd": total}

    labels = labels if kind == "int" else labels.to(dtype)
    settings = {"temperature": temperature, "alpha": alpha, "multiplier": multiplier}
    check(oracle, lambda s, _: tf_kd_loss(s, labels, **settings), dtype, rows)
    loss = get_loss("tf_kd", **settings)
    same(loss(logits(0), torch.tensor(CLASSES))["ce"], (1 - alpha) * F.cross_entropy(logits(0), torch.tensor(CLASSES)))


def test_tf_kd_has_the_numbers_of_its_page():
    """At C = 100 and t = 20 the designed teacher has .010502 at the label and .009995 elsewhere."""
    s = leaf(torch.zeros(1, 100, dtype=torch.float64))
    got = 0.01 - grad(tf_kd_loss(s, torch.tensor([3]), multiplier=1000.0)["tf_kd"], s)  # softmax(s) - q
    assert round(got[0, 3].item(), 6) == 0.010502 and round(got[0, 4].item(), 6) == 0.009995


def test_logits_are_standardized_with_the_gradient_through_mean_and_deviation():
    x = leaf(logits(0, torch.float64))
    got = standardize_logits(x)
    for row, values in zip(got, x.tolist(), strict=True):
        mean = math.fsum(values) / C
        std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (C - 1))
        same(row, [(v - mean) / (std + 1e-7) for v in values])
    assert torch.autograd.gradcheck(standardize_logits, x)
    assert standardize_logits(logits(0, torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("name", ["kd", "dkd"])
def test_logit_standardization_changes_the_teachers_terms_only(name):
    labels, s, t = torch.tensor(CLASSES), logits(0), logits(1)
    plain, modified = get_loss(name), get_loss(name, logit_standardization=True)
    expected = plain(standardize_logits(s), labels, teacher_logits=standardize_logits(t))
    got = modified(s, labels, teacher_logits=t)
    same(got["ce"], plain(s, labels, teacher_logits=t)["ce"])
    for key in got.keys() - {"ce"}:
        same(got[key], expected[key])
    for key, value in modified(5 * s + 3, labels, teacher_logits=t).items():  # neither scale nor shift counts
        assert torch.allclose(value, got[key], rtol=1e-4) == (key != "ce")
    assert "standardized" in modified.describe(modified.hyperparameters())["formula"]


@pytest.mark.parametrize("name", ["kd", "dkd"])
def test_a_head_that_starts_at_zero_has_gradients_of_usual_size(name):
    s = leaf(torch.zeros(B, C))
    terms = get_loss(name, logit_standardization=True)(s, torch.tensor(CLASSES), teacher_logits=logits(1))
    gradient = grad(sum(terms.values()), s)
    assert gradient.isfinite().all() and gradient.abs().max() < 10


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"kd", "dkd"}))
def test_logit_standardization_is_refused_elsewhere(name):
    with pytest.raises(ValueError, match=f"{name} takes no argument logit_standardization"):
        get_loss(name, logit_standardization=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["int", "smooth_mixed"])
@pytest.mark.parametrize("classes", [2, 3, C])
@pytest.mark.parametrize("scale", [0.0, 1e3])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.filterwarnings("ignore:with [23] classes")
def test_finite_at_any_logits(name, scale, classes, kind, dtype):
    signs = torch.tensor([[(-1.0) ** (b // (i % 3 + 1) + i) for i in range(classes)] for b in range(B)])
    s, w = leaf((scale * signs).to(dtype)), leaf((scale * signs.flip(0)).to(dtype))
    t = (scale * signs.roll(1, 1)).to(dtype)
    labels = torch.tensor(CLASSES) % classes
    if kind != "int":
        soft = F.one_hot(labels, classes) * 0.6 + F.one_hot((labels + 1) % classes, classes) * 0.3 + 0.1 / classes
        labels = soft.to(dtype)
    settings = [{}, {"logit_standardization": True}] if name in ("kd", "dkd") else [{}]
    for kwargs in settings:
        for term in get_loss(name, **kwargs)(s, labels, teacher_logits=t, aux_logits=w).values():
            assert term.dtype == torch.float32 and term.isfinite()
            assert grad(term, s).isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_many_classes(name):
    s = leaf(torch.randn(2, 21841, generator=torch.Generator().manual_seed(0)))
    others = leaf(torch.randn(2, 21841, generator=torch.Generator().manual_seed(1)))
    exact = leaf(s.detach().double())
    labels = torch.tensor([0, 21840])
    terms = get_loss(name)(s, labels, teacher_logits=others, aux_logits=others)
    expected = get_loss(name)(exact, labels, teacher_logits=others.double(), aux_logits=others.double())
    for key, term in terms.items():
        same(term, expected[key], rtol=1e-4, atol=1e-6)
        assert grad(term, s).isfinite().all()


def test_kl_only_is_kd_without_cross_entropy_and_other_names_stand_for_their_settings():
    s, t, labels = logits(0), logits(1), torch.tensor(CLASSES)
    terms = get_loss("kl_only", temperature=2.0)(s, labels, teacher_logits=t)
    assert terms["ce"].item() == 0
    same(terms["kd"], kd_loss(s, t, 2.0)["kd"])
    same(get_loss("label_smoothing")(s, labels)["ce"], F.cross_entropy(s, labels, label_smoothing=0.1))
    same(get_loss("2xce")(s, labels)["ce"], 2 * F.cross_entropy(s, labels))
    with pytest.raises(ValueError, match="kl_only takes no argument gamma"):
        get_loss("kl_only", gamma=1.0)


def test_the_overview_names_every_loss_with_its_place():
    page = overview()
    assert page == (Path(__file__).parents[1] / "docs" / "losses.md").read_text("utf-8")  # benchmarks/regenerate.py
    assert all(f"## {name}" in page and cls.title in page and cls.formula in page for name, cls in LOSSES.items())
    for name in LOSSES.keys() - {"ce"}:
        first = page.split(f"## {name}: ")[1].split("\n")[2]
        added = name in ("nkd", "uskd", "dkd", "dist", "wttm")
        assert first.startswith("Added to the cross entropy." if added else "Instead of the cross entropy")
        assert ("Needs a teacher" in first) == ("teacher_logits" in LOSSES[name].requires)
