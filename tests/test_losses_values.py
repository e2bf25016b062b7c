"""Losses against float64 oracles, closed-form gradients and finite differences, and the official code's old traps."""

import math
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from losses_helpers import CLASSES, B, C, grad, label_case, leaf, logits, same

from hf_kd.losses import LOSSES, ce_loss, functional, get_loss, kd_loss
from hf_kd.losses import nkd_loss as nkd
from hf_kd.losses import uskd_loss as uskd
from hf_kd.losses.uskd import zipf_weights

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


@pytest.mark.filterwarnings("ignore:labels have rows with more than two classes")
def test_which_values_of_a_soft_label_are_targets():
    rows = torch.tensor(
        [
            [0.5, 0.5, 0.0, 0.0],  # equal halves: both
            [0.4, 0.3, 0.3, 0.0],  # no single second: one target
            [0.1, 0.2, 0.0, 0.7],  # second is class 1
            [0.925, 0.025, 0.025, 0.025],  # smoothing: one target
        ]
    )
    targets = functional.top_targets(rows, torch.float32)
    assert [set(row) for row in targets.index.tolist()] == [{0, 1}, {0}, {3, 1}, {0}]
    assert targets.active.tolist() == [[True, True], [True, False], [True, True], [True, False]]
    same(targets.value, [[0.5, 0.5], [0.4, 0.0], [0.7, 0.2], [0.925, 0.0]])
    two = functional.top_targets(torch.tensor([[1.0, 0.0], [0.9, 0.1]]), torch.float32)
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


@pytest.mark.parametrize("inside", [True, False])
def test_equal_classes_rank_by_their_index_compiled_or_not(inside):
    generator = torch.Generator().manual_seed(0)
    s, w = (torch.randint(3, (64, 40), generator=generator).double() for _ in range(2))
    s[:8], w[:8] = 0, 0
    labels = torch.randint(40, (64,), generator=generator)
    expected = torch.zeros(64, 40).double()
    for row, target in enumerate(labels.tolist()):
        rest = [c for c in range(40) if c != target]
        over = [x[row].exp() / x[row, rest].exp().sum() for x in (s, w)]  # N, and at the target S / (1 - S)
        key = [(-round((over[0] + over[1])[c].item(), 9), c) for c in range(40)]
        ranked = sorted(range(40) if inside else rest, key=key.__getitem__)
        expected[row, ranked] = 1 / torch.arange(1, len(ranked) + 1).double()
        expected[row, target] = 0
    zipf = partial(zipf_weights, target_in_rank=inside)
    for function in (zipf, torch.compile(zipf, backend="eager", fullgraph=True)):
        same(function(s, w, labels[:, None]), expected)


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
        terms = loss(s, given, teacher_logits=logits(1), aux_logits=w)
        results.append((terms, [grad(term, x) for term in terms.values() for x in (s, w)]))
    for key in results[0][0]:
        same(results[0][0][key], results[1][0][key], rtol=1e-6)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        same(one, other, rtol=1e-6)


@pytest.mark.parametrize("kind", ["int", "soft"])
@pytest.mark.parametrize("classes", [2, 3])
def test_trap_6_few_classes(kind, classes, monkeypatch):
    functional._warn_no_non_target.cache_clear()
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


@pytest.mark.filterwarnings("error")
def test_rows_with_more_than_two_classes_are_warned_of_once(monkeypatch):
    monkeypatch.setattr(functional, "_looked_at", set())
    student, teacher = logits(0), logits(1)
    for kind in ("int", "smooth", "mixed", "smooth_mixed"):
        nkd(student, teacher, label_case(kind)[0])  # silent
    dense = torch.softmax(logits(2), 1)
    with pytest.warns(UserWarning, match="take the two with the largest values as targets"):
        nkd(student, teacher, dense)
    uskd(student, teacher, dense)
