"""Losses against float64 oracles written as plain loops, closed-form gradients and finite differences."""

import copy
import math
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from hf_kd.losses import LOSSES, CELoss, KDLoss, NKDLoss, USKDLoss, _common, ce_loss, get_loss, kd_loss
from hf_kd.losses import nkd_loss as nkd
from hf_kd.losses import uskd_loss as uskd

B, C = 6, 7
CLASSES = [3, 0, 6, 2, 3, 5]
SECOND = [1, 5, None, 4, 6, None]  # the second image of a mixed pair; None: the row was not mixed


def logits(seed, dtype=torch.float32, classes=C, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(B, classes, generator=generator, dtype=torch.float64)).to(dtype)


def leaf(tensor):
    return tensor.clone().requires_grad_()


def label_case(kind):
    """Labels as the code gets them, and by hand what they mean: (class, label value) of each row's targets."""
    if kind == "int":
        return torch.tensor(CLASSES), [[(c, 1.0)] for c in CLASSES]
    mixed = "mixed" in kind
    smooth = 0.1 if "smooth" in kind else 0.0
    labels, meaning = torch.full((B, C), smooth / C, dtype=torch.float64), []
    for row, (first, second) in enumerate(zip(CLASSES, SECOND, strict=True)):
        shares = [(first, 0.7), (second, 0.3)] if mixed and second is not None else [(first, 1.0)]
        meaning.append([(c, share * (1 - smooth) + smooth / C) for c, share in shares])
        for c, value in meaning[-1]:
            labels[row, c] = value
    return labels, meaning


KINDS = ["int", "one_hot", "mixed", "smooth", "smooth_mixed"]


# ---- oracles: one image after the other, Python floats, straight from the paper ----


def softmax(row, drop=()):
    """Probabilities over the classes that are not dropped; the dropped ones have 0."""
    top = max(x for i, x in enumerate(row) if i not in drop)
    e = [0.0 if i in drop else math.exp(x - top) for i, x in enumerate(row)]
    return [x / math.fsum(e) for x in e]


def oracle_nkd(s, t, meaning, temperature, gamma):
    target, non_target = 0.0, 0.0
    grad_target, grad_non_target = torch.zeros(B, C).double(), torch.zeros(B, C).double()
    for b in range(B):
        drop = [c for c, _ in meaning[b]]
        big_s, big_t = softmax(s[b]), softmax(t[b])
        n_s = softmax([x / temperature for x in s[b]], drop)
        n_t = softmax([x / temperature for x in t[b]], drop)
        for k, v in meaning[b]:
            target -= v * big_t[k] * math.log(big_s[k]) / B
            for i in range(C):
                grad_target[b, i] -= v * big_t[k] * ((i == k) - big_s[i]) / B
        for i in range(C):
            if i not in drop:
                non_target -= gamma * temperature**2 * n_t[i] * math.log(n_s[i]) / B
                grad_non_target[b, i] = gamma * temperature * (n_s[i] - n_t[i]) / B
    return {"target": target, "non_target": non_target}, {"target": grad_target, "non_target": grad_non_target}


def oracle_zipf(s, w, drop, target_in_rank):
    """N(Z) of one image, by counting for each class how many are ahead of it."""
    rest_s, rest_w = 1 - sum(softmax(s)[k] for k in drop), 1 - sum(softmax(w)[k] for k in drop)
    r = [a / rest_s + b / rest_w for a, b in zip(softmax(s), softmax(w), strict=True)]
    ranked = [i for i in range(len(r)) if target_in_rank or i not in drop]
    z = [0.0 if i in drop else 1 / (1 + sum(r[j] > r[i] for j in ranked)) for i in range(len(r))]
    return [x / math.fsum(z) for x in z]


def oracle_uskd(s, w, meaning, alpha, beta, mu, target_in_rank):
    terms = dict.fromkeys(["target", "non_target", "weak"], 0.0)
    grads = {key: torch.zeros(B, C).double() for key in terms}
    mean = []
    for column in range(2):
        squares = [softmax(s[b])[meaning[b][column][0]] ** 2 for b in range(B) if len(meaning[b]) > column]
        mean.append(sum(squares) / max(len(squares), 1))
    for b in range(B):
        drop = [c for c, _ in meaning[b]]
        big_s, big_w, n_s = softmax(s[b]), softmax(w[b]), softmax(s[b], drop)
        zipf = oracle_zipf(s[b], w[b], drop, target_in_rank)
        for column, (k, v) in enumerate(meaning[b]):
            p = v + big_s[k] ** 2 - mean[column]
            terms["target"] -= alpha * p * math.log(big_s[k]) / B
            for i in range(C):
                grads["target"][b, i] -= alpha * p * ((i == k) - big_s[i]) / B
        background = (1 - sum(v for _, v in meaning[b])) / (C - len(drop))
        for i in range(C):
            if i not in drop:
                terms["non_target"] -= beta * zipf[i] * math.log(n_s[i]) / B
                grads["non_target"][b, i] = beta * (n_s[i] - zipf[i]) / B
            weak_label = 0.9 * dict(meaning[b]).get(i, background) + 0.1 / C
            terms["weak"] -= mu * weak_label * math.log(big_w[i]) / B
            grads["weak"][b, i] = mu * (big_w[i] - weak_label) / B
    return terms, grads


def same(actual, expected, rtol=1e-5, atol=0.0):
    """Equal to 1e-5; entries that cancel to near 0 to 1e-6 of the largest."""
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    atol = max(atol, 1e-6 * expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def grad(term, x):
    (result,) = torch.autograd.grad(term, x, retain_graph=True, allow_unused=True)
    return torch.zeros_like(x) if result is None else result


# ---- values and gradients ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("temperature", "gamma"), [(1.0, 1.5), (3.0, 3.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nkd_equals_oracle(kind, temperature, gamma, dtype):
    labels, meaning = label_case(kind)
    labels = labels if kind == "int" else labels.to(dtype)
    s, t = leaf(logits(0, dtype)), logits(1, dtype)
    terms = nkd(s, t, labels, temperature, gamma)
    values, grads = oracle_nkd(s.tolist(), t.tolist(), meaning, temperature, gamma)
    assert list(terms) == ["target", "non_target"]
    for key in terms:
        same(terms[key], values[key])
        same(grad(terms[key], s), grads[key])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target_in_rank", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uskd_equals_oracle(kind, target_in_rank, dtype):
    labels, meaning = label_case(kind)
    labels = labels if kind == "int" else labels.to(dtype)
    s, w = leaf(logits(2, dtype)), leaf(logits(3, dtype))
    terms = uskd(s, w, labels, 0.8, 0.3, 0.05, target_in_rank)
    values, grads = oracle_uskd(s.tolist(), w.tolist(), meaning, 0.8, 0.3, 0.05, target_in_rank)
    assert list(terms) == ["target", "non_target", "weak"]
    for key in terms:
        same(terms[key], values[key])
        same(grad(terms[key], w if key == "weak" else s), grads[key])
        same(grad(terms[key], s if key == "weak" else w), torch.zeros(B, C))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_equals_oracle_and_torch(temperature):
    s, t = leaf(logits(4)), logits(5)
    (kd,) = kd_loss(s, t, temperature, weight=0.9).values()
    value, expected = 0.0, torch.zeros(B, C).double()
    for b in range(B):
        p = softmax([x / temperature for x in t[b].tolist()])
        q = softmax([x / temperature for x in s[b].tolist()])
        for i in range(C):
            value += 0.9 * temperature**2 * p[i] * math.log(p[i] / q[i]) / B
            expected[b, i] = 0.9 * temperature * (q[i] - p[i]) / B
    same(kd, value)
    same(grad(kd, s), expected)
    log_q = (s / temperature).log_softmax(1)
    same(kd, 0.9 * temperature**2 * F.kl_div(log_q, (t / temperature).softmax(1), reduction="batchmean"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ce_equals_oracle(kind, smoothing):
    labels, _ = label_case(kind)
    s = leaf(logits(6))
    (ce,) = ce_loss(s, labels, weight=0.5, label_smoothing=smoothing).values()
    rows = F.one_hot(labels, C).tolist() if kind == "int" else labels.tolist()
    value, expected = 0.0, torch.zeros(B, C).double()
    for b in range(B):
        q = softmax(s[b].tolist())
        for i in range(C):
            v = (1 - smoothing) * rows[b][i] + smoothing / C
            value -= 0.5 * v * math.log(q[i]) / B
            expected[b, i] = 0.5 * (q[i] - v) / B
    same(ce, value)
    same(grad(ce, s), expected)


@pytest.mark.parametrize("kind", ["int", "smooth_mixed"])
def test_finite_differences(kind):
    labels, meaning = label_case(kind)
    s, t, w = leaf(logits(7, torch.float64)), logits(8, torch.float64), leaf(logits(9, torch.float64))
    check = partial(torch.autograd.gradcheck, eps=1e-6, atol=1e-7, rtol=1e-5)
    assert check(lambda x: tuple(nkd(x, t, labels, 2.0, 1.5).values()), s)
    assert check(lambda x: tuple(kd_loss(x, t).values()), s)
    assert check(lambda x: tuple(ce_loss(x, labels, label_smoothing=0.1).values()), s)
    # P is a constant to autograd, so the target term is differenced with P held at its value.
    assert check(lambda x: uskd(x, w.detach(), labels, beta=1.0)["non_target"], s)
    assert check(lambda x: uskd(s.detach(), x, labels, mu=1.0)["weak"], w)
    p = [[v + softmax(s[b].tolist())[k] ** 2 for k, v in meaning[b]] for b in range(B)]
    for column in range(2):
        rows = [b for b in range(B) if len(meaning[b]) > column]
        mean = sum(softmax(s[b].tolist())[meaning[b][column][0]] ** 2 for b in rows) / max(len(rows), 1)
        for b in rows:
            p[b][column] -= mean
    actual = grad(uskd(s, w, labels)["target"], s)
    for b, i in [(0, 3), (0, 1), (2, 6), (3, 0)]:
        values = []
        for step in (1e-6, -1e-6):
            row = s[b].tolist()
            row[i] += step
            pairs = zip(p[b], meaning[b], strict=True)
            values.append(-sum(x * math.log(softmax(row)[k]) for x, (k, _) in pairs) / B)
        same(actual[b, i], (values[0] - values[1]) / 2e-6, rtol=1e-5, atol=1e-8)


def test_teacher_gets_no_gradient():
    s, t = leaf(logits(0)), leaf(logits(1))
    labels, _ = label_case("mixed")
    sum({**nkd(s, t, labels), **kd_loss(s, t)}.values()).backward()
    assert t.grad is None and s.grad is not None


def test_nkd_argmax_reading_is_the_integer_loss():
    s, t = logits(0), logits(1)
    for kind in ("mixed", "smooth", "smooth_mixed"):
        labels, _ = label_case(kind)
        expected = nkd(s, t, torch.tensor(CLASSES))
        for key, value in nkd(s, t, labels, soft_labels="argmax").items():
            same(value, expected[key])


def test_which_values_of_a_soft_label_are_targets():
    rows = torch.tensor(
        [
            [0.5, 0.5, 0.0, 0.0],  # equal halves: both
            [0.4, 0.3, 0.3, 0.0],  # no single second: one target
            [0.1, 0.2, 0.0, 0.7],  # second is class 1
            [0.925, 0.025, 0.025, 0.025],  # smoothing: one target
        ]
    )
    targets = _common.find_targets(rows, torch.float32)
    assert [set(row) for row in targets.index.tolist()] == [{0, 1}, {0}, {3, 1}, {0}]
    assert targets.active.tolist() == [[True, True], [True, False], [True, True], [True, False]]
    same(targets.value, [[0.5, 0.5], [0.4, 0.0], [0.7, 0.2], [0.925, 0.0]])
    two = _common.find_targets(torch.tensor([[1.0, 0.0], [0.9, 0.1]]), torch.float32)
    assert two.active.tolist() == [[True, False], [True, True]]


# ---- the traps of the official code's history ----


def test_trap_1_non_target_term_leaves_the_target_out():
    s, t = leaf(logits(0)), logits(1)
    labels = torch.tensor(CLASSES)
    got = grad(nkd(s, t, labels)["non_target"], s)
    assert (got[range(B), CLASSES] == 0).all()
    _, grads = oracle_nkd(s.tolist(), t.tolist(), label_case("int")[1], 1.0, 1.5)
    plain_kd = grad(kd_loss(s, t, temperature=1.0)["kd"], s)
    assert F.cosine_similarity(got.double().flatten(), grads["non_target"].flatten(), dim=0) > 0.99999
    assert F.cosine_similarity(got.flatten(), plain_kd.flatten(), dim=0) < 0.95
    # moving the target's logits alone must not move the term
    moved = s.detach().clone()
    moved[range(B), CLASSES] += 3
    same(nkd(moved, t, labels)["non_target"], nkd(s, t, labels)["non_target"])


def test_trap_2_ranks_sums_of_probabilities():
    # By probabilities the classes 1..4 rank 2, 1, 3, 4; by sums of log-probabilities 3, 1, 2, 4; the student alone
    # says 1, 2, 3, 4.
    probabilities = torch.tensor([[0.0, 0.50, 0.30, 0.18, 0.02], [0.0, 0.015, 0.735, 0.10, 0.15]]).double()
    s, w = leaf(probabilities[:1].clamp_min(1e-9).log()), probabilities[1:].clamp_min(1e-9).log()
    got = grad(uskd(s, w, torch.tensor([0]), beta=1.0, target_in_rank=False)["non_target"], s)
    n_z = probabilities[0] - got[0]
    assert n_z[1:].argsort(descending=True).tolist() == [1, 0, 2, 3]
    same(n_z[1:], torch.tensor([1 / 2, 1, 1 / 3, 1 / 4]) / (1 + 1 / 2 + 1 / 3 + 1 / 4), atol=1e-6)
    # and the weak logits do something
    other = grad(uskd(s, 0 * w, torch.tensor([0]), beta=1.0, target_in_rank=False)["non_target"], s)
    assert not torch.allclose(got, other)


def test_target_in_rank():
    s = leaf(torch.tensor([[9.0, 3.0, 2.0, 1.0], [-9.0, 3.0, 2.0, 1.0]]).double())
    labels = torch.tensor([0, 0])
    for inside, first in ((True, [2, 3, 4]), (False, [1, 2, 3])):
        n_s = s.detach()[:, 1:].softmax(1)
        got = grad(uskd(s, s.detach(), labels, beta=1.0, target_in_rank=inside)["non_target"], s)[:, 1:]
        for row, positions in ((0, first), (1, [1, 2, 3])):  # in row 1 the target is last and takes nobody's place
            z = torch.tensor([1 / position for position in positions]).double()
            same(n_s[row] - 2 * got[row], z / z.sum(), atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["int", "smooth_mixed"])
@pytest.mark.parametrize("classes", [3, C])
@pytest.mark.filterwarnings("ignore:with 3 classes")
def test_trap_4_finite_at_logits_of_1000(dtype, kind, classes):
    signs = torch.tensor([[(-1.0) ** (b // (i % 3 + 1) + i) for i in range(classes)] for b in range(B)])
    s, w = leaf((1e3 * signs).to(dtype)), leaf((1e3 * signs.flip(0)).to(dtype))
    t = (1e3 * signs.roll(1, 1)).to(dtype)
    with torch.no_grad():
        s[0], w[0], t[0] = 0.0, 0.0, 0.0
        s[0, 0], w[0, 0], t[0, 0] = 1e3, 1e3, 1e3  # all on one class, right or wrong
    labels = torch.tensor(CLASSES) % classes
    if kind != "int":
        soft = F.one_hot(labels, classes) * 0.6 + F.one_hot((labels + 1) % classes, classes) * 0.3 + 0.1 / classes
        labels = soft.to(dtype)
    for terms in (ce_loss(s, labels), kd_loss(s, t), nkd(s, t, labels, 3.0), uskd(s, w, labels)):
        for term in terms.values():
            assert term.dtype == torch.float32 and term.isfinite()
            assert grad(term, s).isfinite().all() and grad(term, w).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    s, t, w = logits(0, dtype), logits(1, dtype), logits(2, dtype)
    labels, _ = label_case("mixed")
    for half, full in (
        (nkd(s, t, labels), nkd(s.float(), t.float(), labels)),
        (uskd(s, w, labels), uskd(s.float(), w.float(), labels)),
        (kd_loss(s, t), kd_loss(s.float(), t.float())),
        (ce_loss(s, labels), ce_loss(s.float(), labels)),
    ):
        for key in full:
            same(half[key], full[key], rtol=1e-6)


def test_autocast_changes_nothing():
    s, t, w = logits(0), logits(1), logits(2)
    labels, _ = label_case("mixed")
    for function in (partial(nkd, s, t), partial(uskd, s, w), partial(ce_loss, s)):
        expected = function(labels=labels)
        with torch.autocast("cpu", torch.bfloat16):
            for key, value in function(labels=labels).items():
                assert value.dtype == torch.float32
                same(value, expected[key], rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_trap_5_one_hot_labels_equal_integers(name):
    loss = get_loss(name)
    labels = torch.tensor(CLASSES)
    results = []
    for given in (labels, F.one_hot(labels, C).float()):
        s, w = leaf(logits(0)), leaf(logits(2))
        terms = loss(s, given, teacher_logits=logits(1), weak_logits=w)
        results.append((terms, [grad(term, x) for term in terms.values() for x in (s, w)]))
    for key in results[0][0]:
        same(results[0][0][key], results[1][0][key], rtol=1e-6)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        same(one, other, rtol=1e-6)


@pytest.mark.parametrize("kind", ["int", "soft"])
@pytest.mark.parametrize("classes", [2, 3])
def test_trap_6_few_classes(kind, classes, monkeypatch):
    monkeypatch.setattr(_common, "_warned_no_non_target", False)
    labels = torch.tensor(CLASSES) % classes
    if kind == "soft":
        labels = 0.6 * F.one_hot(labels, classes) + 0.4 * F.one_hot((labels + 1) % classes, classes)
    no_non_target = classes == 2 or kind == "soft"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            s, w = leaf(logits(0, classes=classes)), leaf(logits(2, classes=classes))
            both = nkd(s, logits(1, classes=classes), labels, 3.0), uskd(s, w, labels)
            for terms in both:
                assert (terms["non_target"].item() == 0) == no_non_target
                assert (grad(terms["non_target"], s) == 0).all() == no_non_target
                assert grad(terms["target"], s).abs().sum() > 0
    assert len(caught) == no_non_target
    if caught:
        assert "non-target" in str(caught[0].message) and caught[0].filename == __file__


def test_trap_7_soft_target_has_batch_mean_1():
    s, w = leaf(logits(0)), logits(1)
    labels = torch.tensor(CLASSES)
    at_target = grad(uskd(s, w, labels)["target"], s)[range(B), CLASSES]
    p = -B * at_target / (1 - s.detach().softmax(1)[range(B), CLASSES])
    same(p.mean(), 1.0)
    assert p.std() > 0.01  # P is not constant


def test_reduce_mean_over_two_ranks_equals_one_batch():
    s, w = logits(0), logits(1)
    labels, _ = label_case("mixed")  # rows 0, 1 | 3, 4 are mixed: make the halves uneven
    labels[4] = F.one_hot(torch.tensor(3), C)
    halves, means = (slice(0, 3), slice(3, 6)), []
    for part in halves:
        uskd(s[part], w[part], labels[part], reduce_mean=lambda m: (means.append(m), m)[1])
    everywhere = torch.stack(means).mean(0)
    parts = [uskd(s[part], w[part], labels[part], reduce_mean=lambda m: everywhere) for part in halves]
    whole = uskd(s, w, labels)
    for key in whole:
        same((parts[0][key] + parts[1][key]) / 2, whole[key])
    assert not torch.isclose(uskd(s[:3], w[:3], labels[:3])["target"], parts[0]["target"])


# ---- modules ----


def test_modules_give_ce_then_their_terms():
    s, t, w = logits(0), logits(1), logits(2)
    labels, _ = label_case("mixed")
    expected = {
        CELoss(0.5, 0.1): ce_loss(s, labels, 0.5, 0.1),
        KDLoss(2.0, 0.7, 0.1): ce_loss(s, labels, 0.3, 0.1) | kd_loss(s, t, 2.0, 0.7),
        NKDLoss(2.0, 0.5, "argmax", 0.1): ce_loss(s, labels, 1, 0.1) | nkd(s, t, labels, 2.0, 0.5, "argmax"),
        USKDLoss(0.5, 0.2, 0.3, False, None, 0.1): ce_loss(s, labels, 1, 0.1)
        | uskd(s, w, labels, 0.5, 0.2, 0.3, False),
    }
    for loss, terms in expected.items():
        got = copy.deepcopy(loss)(s, labels, teacher_logits=t, weak_logits=w)
        assert list(got) == list(terms) and next(iter(got)) == "ce"
        for key in terms:
            same(got[key], terms[key])
        assert not list(loss.parameters()) and not loss.state_dict()


def test_modules_describe_themselves():
    assert repr(get_loss("nkd", gamma=2.0)) == (
        "NKDLoss(temperature=1.0, gamma=2.0, soft_labels='two_hot', label_smoothing=0.0)"
    )
    for name, cls in LOSSES.items():
        assert cls.name == name and cls.CITATION.startswith("@") and {"imagenet", "cifar100"} <= cls.PRESETS.keys()
        for numbers in cls.PRESETS.values():
            assert isinstance(get_loss(name, **numbers), cls)
    needs = {name: (cls.needs_teacher, cls.needs_feature) for name, cls in LOSSES.items()}
    assert needs == {"ce": (False, False), "kd": (True, False), "nkd": (True, False), "uskd": (False, True)}


@pytest.mark.parametrize("kind", ["int", "mixed"])
@pytest.mark.parametrize("name", LOSSES)
def test_compiles_to_one_graph(name, kind):
    labels, _ = label_case(kind)
    module = get_loss(name)
    s, t, w = leaf(logits(0)), logits(1), leaf(logits(2))
    functions = {
        "ce": lambda: ce_loss(s, labels),
        "kd": lambda: kd_loss(s, t),
        "nkd": lambda: nkd(s, t, labels, 3.0),
        "uskd": lambda: uskd(s, w, labels, reduce_mean=lambda m: 0.5 * m),
    }
    for run in (functions[name], lambda: module(s, labels, teacher_logits=t, weak_logits=w)):
        torch.compiler.reset()
        expected, got = run(), torch.compile(run, fullgraph=True, backend="aot_eager")()
        assert list(expected) == list(got)
        for key in got:
            same(got[key], expected[key])
            same(grad(got[key], s), grad(expected[key], s))


# ---- errors ----

INTEGERS, SOFT = torch.tensor(CLASSES), F.one_hot(torch.tensor(CLASSES), C).float()


def changed(tensor, value, at=(2, 1)):
    tensor = tensor.clone()
    tensor[at] = value
    return tensor


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"student_logits": torch.zeros(B, C, 1)}, r"student_logits.*\(B, C\).*\(6, 7, 1\)"),
        ({"student_logits": torch.zeros(B, 1)}, r"student_logits.*C >= 2.*\(6, 1\)"),
        ({"student_logits": torch.zeros(0, C)}, r"student_logits.*B >= 1.*\(0, 7\)"),
        ({"student_logits": torch.zeros(B, C).long()}, "student_logits.*floating point.*int64"),
        ({"other": torch.zeros(B, 9)}, "has 9 classes, student_logits has 7"),
        ({"other": torch.zeros(B + 1, C)}, r"_logits must be.*\(6, 7\).*\(7, 7\)"),
        ({"other": torch.zeros(C)}, r"_logits must be.*\(6, 7\).*\(7,\)"),
        ({"labels": INTEGERS[:3]}, r"labels must be.*\(6,\).*\(3,\)"),
        ({"labels": INTEGERS.int()}, r"labels must be int64.*int32.*\.long\(\)"),
        ({"labels": INTEGERS.float()}, r"labels must be.*float32 of shape \(6,\)"),
        ({"labels": SOFT.long()}, r"labels must be.*int64 of shape \(6, 7\).*\.float\(\)"),
        ({"labels": SOFT[:, :5]}, r"labels must be.*\(6, 7\).*\(6, 5\)"),
        ({"labels": changed(INTEGERS, -100, (slice(1, 3),))}, r"2 value\(s\) outside \[0, 7\).*-100.*ignore index"),
        ({"labels": changed(INTEGERS, 7, (0,))}, r"1 value\(s\) outside \[0, 7\), the first is 7"),
        ({"labels": changed(SOFT, -0.25)}, r"1 negative value\(s\).*-0.25"),
        ({"labels": changed(SOFT, torch.nan)}, r"labels holds 1 NaN or infinite value\(s\) of 42.*row 2"),
        ({"student_logits": changed(logits(0), torch.nan)}, "student_logits holds 1 NaN .*row 2"),
        ({"student_logits": changed(logits(0), -torch.inf)}, "student_logits holds 1 NaN .*row 2"),
        ({"other": changed(logits(0), torch.inf)}, "(teacher|weak)_logits holds 1 NaN .*row 2"),
    ],
)
@pytest.mark.parametrize("name", ["ce", "kd", "nkd", "uskd"])
def test_wrong_tensors(name, arguments, message):
    given = {"student_logits": logits(0), "other": logits(1), "labels": INTEGERS} | arguments
    s, other, labels = given.values()
    functions = {
        "ce": lambda: ce_loss(s, labels),
        "kd": lambda: kd_loss(s, other),
        "nkd": lambda: nkd(s, other, labels),
        "uskd": lambda: uskd(s, other, labels),
    }
    if not (name == "ce" and "other" in arguments):
        with pytest.raises(ValueError, match=message):
            get_loss(name)(s, labels, teacher_logits=other, weak_logits=other)
        if not (name == "kd" and "labels" in arguments):
            with pytest.raises(ValueError, match=message):
                functions[name]()


def test_large_finite_logits_are_no_error():
    assert ce_loss(torch.full((B, C), 3e38), INTEGERS)["ce"].isfinite()  # their sum overflows, they do not


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("nkdd", {}, "unknown loss 'nkdd': did you mean nkd.*pass one of ce, kd, nkd, uskd"),
        ("zzz", {}, "unknown loss 'zzz': pass one of ce, kd, nkd, uskd"),
        ("nkd", {"gama": 2}, "nkd takes no argument gama=2: it accepts temperature, gamma"),
        ("kd", {"temperature": 0}, "temperature=0 is not accepted.*> 0"),
        ("kd", {"weight": 1.5}, "weight=1.5 is not accepted.*>= 0 and <= 1"),
        ("nkd", {"temperature": -1.0}, "temperature=-1.0"),
        ("nkd", {"gamma": -0.1}, "gamma=-0.1 .*>= 0"),
        ("nkd", {"gamma": math.nan}, "gamma=nan"),
        ("nkd", {"gamma": "1e-3"}, "gamma='1e-3'"),
        ("nkd", {"soft_labels": "both"}, "soft_labels='both'.*two_hot, argmax"),
        ("uskd", {"alpha": -1}, "alpha=-1"),
        ("uskd", {"beta": math.inf}, "beta=inf"),
        ("uskd", {"mu": True}, "mu=True"),
        ("ce", {"weight": -1}, "weight=-1"),
        ("ce", {"label_smoothing": 1.1}, "label_smoothing=1.1 .*>= 0 and <= 1"),
    ],
)
def test_wrong_names_and_numbers(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        get_loss(name, **arguments)


def test_wrong_numbers_to_functions():
    s, t = logits(0), logits(1)
    for call in (
        lambda: ce_loss(s, INTEGERS, weight=-1),
        lambda: kd_loss(s, t, temperature=0),
        lambda: nkd(s, t, INTEGERS, gamma=-1),
        lambda: nkd(s, t, INTEGERS, soft_labels="both"),
        lambda: uskd(s, t, INTEGERS, mu=-1),
    ):
        with pytest.raises(ValueError, match="is not accepted"):
            call()


def test_missing_inputs():
    for name in ("kd", "nkd"):
        with pytest.raises(ValueError, match=r"teacher_logits=None.*\(B, C\)"):
            get_loss(name)(logits(0), INTEGERS)
    with pytest.raises(ValueError, match="weak_logits=None.*linear head"):
        USKDLoss()(logits(0), INTEGERS)


def test_off_cpu_values_are_read_in_a_modules_first_call_only():
    # Reading a value of a meta tensor raises, as reading one on an accelerator would wait for it.
    s, labels = torch.zeros(B, C, device="meta"), torch.zeros(B, dtype=torch.int64, device="meta")
    for given in (labels, torch.zeros(B, C, device="meta")):
        assert len({**ce_loss(s, given), **kd_loss(s, s), **nkd(s, s, given), **uskd(s, s, given)}) == 5
    for name in LOSSES:
        loss = get_loss(name)
        with pytest.raises((RuntimeError, NotImplementedError)):
            loss(s, labels, s, s)
        loss(logits(0), INTEGERS, logits(1), logits(2))
        assert loss(s, labels, s, s)["ce"].device.type == "meta"
