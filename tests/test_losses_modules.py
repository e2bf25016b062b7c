"""Losses as modules: their terms, descriptions, compilation and errors."""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from losses_helpers import CLASSES, B, C, grad, label_case, leaf, logits, same

from hf_kd.losses import (
    LOSSES,
    CELoss,
    KDLoss,
    NKDLoss,
    USKDLoss,
    ce_loss,
    dist_loss,
    dkd_loss,
    get_loss,
    hard_loss,
    kd_loss,
    tf_kd_loss,
    wttm_loss,
)
from hf_kd.losses import nkd_loss as nkd
from hf_kd.losses import uskd_loss as uskd

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
        got = copy.deepcopy(loss)(s, labels, teacher_logits=t, aux_logits=w)
        assert list(got) == list(terms) and next(iter(got)) == "ce"
        for key in terms:
            same(got[key], terms[key])
        assert not list(loss.parameters()) and not loss.state_dict()


def test_modules_describe_themselves():
    assert repr(get_loss("nkd", gamma=2.0)) == (
        "NKDLoss(temperature=1.0, gamma=2.0, soft_labels='two_hot', label_smoothing=0.0)"
    )
    for name, cls in LOSSES.items():
        assert cls.name == name and cls.CITATION.startswith("@") and cls.published.keys()
        for numbers in cls.published.values():
            assert isinstance(get_loss(name, **numbers), cls)
        gains = re.findall(r"([\d.]{5})→([\d.]{5})", ", ".join(cls.published_results.values()))
        assert all(50 < float(before) < float(after) < 90 for before, after in gains) and bool(gains) == (
            name not in ("ce", "hard", "tf_kd")
        )
        assert cls.title and cls.formula and (cls.paper or name == "ce")
    requires = {name: set(cls.requires) for name, cls in LOSSES.items()}
    others = {"ce": set(), "uskd": {"aux_logits"}, "tf_kd": set()}
    assert requires == dict.fromkeys(("kd", "nkd", "dkd", "dist", "wttm", "hard"), {"teacher_logits"}) | others


def test_kd_weighs_its_cross_entropy_as_old_records_say_or_freely():
    s, t, labels = logits(0), logits(1), torch.tensor(CLASSES)
    ce, kl = ce_loss(s, labels)["ce"], kd_loss(s, t, 1.0, 1.0)["kd"]
    for kwargs, expected in (({"weight": 0.7}, (0.3, 0.7)), ({"weight": 3.0, "ce_weight": 1.0}, (1.0, 3.0))):
        loss = get_loss("kd", temperature=1.0, **kwargs)
        terms = loss(s, labels, teacher_logits=t)
        same(terms["ce"], expected[0] * ce)
        same(terms["kd"], expected[1] * kl)
        assert loss.hyperparameters() == {
            "temperature": 1.0,
            "label_smoothing": 0.0,
            "logit_standardization": False,
            **kwargs,
        }
        first = "ce_weight · CE" if "ce_weight" in kwargs else "(1 − weight) · CE"
        assert KDLoss.describe(loss.hyperparameters())["formula"].startswith(f"{first} + weight · t² · KL")


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
        "dkd": lambda: dkd_loss(s, t, labels),
        "dist": lambda: dist_loss(s, t),
        "wttm": lambda: wttm_loss(s, t),
        "hard": lambda: hard_loss(s, t),
        "tf_kd": lambda: tf_kd_loss(s, labels),
    }
    for run in (functions[name], lambda: module(s, labels, teacher_logits=t, aux_logits=w)):
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
        ({"labels": 2 * SOFT}, "rows that sum to 1.*multi-label.*divide each row"),
        ({"labels": changed(SOFT, torch.nan)}, r"labels holds 1 NaN or infinite value\(s\) of 42.*row 2"),
        ({"student_logits": changed(logits(0), torch.nan)}, "student_logits holds 1 NaN .*row 2"),
        ({"student_logits": changed(logits(0), -torch.inf)}, "student_logits holds 1 NaN .*row 2"),
        ({"other": changed(logits(0), torch.inf)}, "(teacher|weak|aux)_logits holds 1 NaN .*row 2"),
    ],
)
@pytest.mark.parametrize("name", LOSSES)
def test_wrong_tensors(name, arguments, message):
    given = {"student_logits": logits(0), "other": logits(1), "labels": INTEGERS} | arguments
    s, other, labels = given.values()
    functions = {
        "ce": lambda: ce_loss(s, labels),
        "kd": lambda: kd_loss(s, other),
        "nkd": lambda: nkd(s, other, labels),
        "uskd": lambda: uskd(s, other, labels),
        "dkd": lambda: dkd_loss(s, other, labels),
        "dist": lambda: dist_loss(s, other),
        "wttm": lambda: wttm_loss(s, other),
        "hard": lambda: hard_loss(s, other),
        "tf_kd": lambda: tf_kd_loss(s, labels),
    }
    if not (name in ("ce", "tf_kd") and "other" in arguments):
        with pytest.raises(ValueError, match=message):
            get_loss(name)(s, labels, teacher_logits=other, aux_logits=other)
        if not (name in ("kd", "dist", "wttm", "hard") and "labels" in arguments):
            with pytest.raises(ValueError, match=message):
                functions[name]()


def test_large_finite_logits_are_no_error():
    assert ce_loss(torch.full((B, C), 3e38), INTEGERS)["ce"].isfinite()  # their sum overflows, they do not


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("nkdd", {}, "unknown loss 'nkdd': did you mean nkd.*pass one of ce, kd, nkd, uskd, dkd"),
        ("zzz", {}, "unknown loss 'zzz': pass one of ce, kd, nkd, uskd, dkd"),
        ("nkd", {"gama": 2}, "nkd takes no argument gama=2: it accepts temperature, gamma"),
        ("kd", {"temperature": 0}, "temperature=0 is not accepted.*> 0"),
        ("kd", {"weight": 1.5}, "weight=1.5 is not accepted without ce_weight.*>= 0 and <= 1"),
        ("kd", {"weight": 1.5, "ce_weight": -0.1}, "ce_weight=-0.1 .*>= 0"),
        ("nkd", {"temperature": -1.0}, "temperature=-1.0"),
        ("nkd", {"gamma": -0.1}, "gamma=-0.1 .*>= 0"),
        ("nkd", {"gamma": math.nan}, "gamma=nan"),
        ("nkd", {"gamma": "1e-3"}, "gamma='1e-3'"),
        ("nkd", {"soft_labels": "both"}, "soft_labels='both'.*two_hot, argmax"),
        ("uskd", {"alpha": -1}, "alpha=-1"),
        ("uskd", {"beta": math.inf}, "beta=inf"),
        ("uskd", {"mu": True}, "mu=True"),
        ("dkd", {"temperature": 0}, "temperature=0 .*> 0"),
        ("dkd", {"alpha": -1}, "alpha=-1"),
        ("dkd", {"beta": -1}, "beta=-1"),
        ("dkd", {"warmup_epochs": -1}, "warmup_epochs=-1"),
        ("dist", {"temperature": 0}, "temperature=0"),
        ("dist", {"beta": -1}, "beta=-1"),
        ("dist", {"gamma": -1}, "gamma=-1"),
        ("wttm", {"exponent": 0}, "exponent=0"),
        ("wttm", {"weight": -1}, "weight=-1"),
        ("hard", {"weight": 1.5}, "weight=1.5 .*>= 0 and <= 1"),
        ("tf_kd", {"temperature": 0}, "temperature=0"),
        ("tf_kd", {"alpha": 2}, "alpha=2 .*>= 0 and <= 1"),
        ("tf_kd", {"multiplier": -1}, "multiplier=-1"),
        ("tf_kd", {"confidence": 1.1}, "confidence=1.1"),
        ("kl_onl", {}, "unknown loss 'kl_onl': did you mean kl_only"),
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
    with pytest.raises(ValueError, match="aux_logits=None.*linear head"):
        USKDLoss()(logits(0), INTEGERS)


def test_off_cpu_values_are_read_in_a_modules_first_call_only():
    # Reading a value of a meta tensor raises, as reading one on an accelerator would wait for it.
    s, labels = torch.zeros(B, C, device="meta"), torch.zeros(B, dtype=torch.int64, device="meta")
    for given in (labels, torch.zeros(B, C, device="meta")):
        assert len({**ce_loss(s, given), **kd_loss(s, s), **nkd(s, s, given), **uskd(s, s, given)}) == 5
    for name in LOSSES:
        loss = get_loss(name)
        with pytest.raises((RuntimeError, NotImplementedError)):
            loss(s, labels, teacher_logits=s, aux_logits=s)
        loss(logits(0), INTEGERS, teacher_logits=logits(1), aux_logits=logits(2))
        assert loss(s, labels, teacher_logits=s, aux_logits=s)["ce"].device.type == "meta"


# ---- torch.func ----


def batches(labels):
    """Three batches of logits, of labels of a kind, and of further logits."""
    hard = torch.tensor([CLASSES, CLASSES[::-1], [1] * B])
    soft = torch.stack([label_case("mixed")[0], label_case("smooth")[0], label_case("smooth_mixed")[0]])
    return [torch.stack([logits(i + j) for i in range(3)]) for j in (0, 5)] + [hard if labels == "int" else soft]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("labels", ["int", "soft"])
@pytest.mark.parametrize("name", list(LOSSES))
def test_vmap_over_batches_and_gradients_of_single_images(name, labels):
    loss, (s, other, targets) = get_loss(name), batches(labels)

    def total(s, other, labels):
        return sum(loss(s, labels, teacher_logits=other, aux_logits=other).values())

    expected = [total(*each) for each in zip(s, other, targets, strict=True)]
    same(torch.func.vmap(total)(s, other, targets), expected)
    one = s[0], other[0], targets[0]
    same(torch.func.vmap(total, (None, 0, None))(s[0], other, one[2]), [total(s[0], o, one[2]) for o in other])
    last = torch.func.vmap(total, (2, 2, 0))(s.movedim(0, 2), other.movedim(0, 2), targets)
    same(last, expected)

    def of_image(s, other, label):
        return total(s[None], other[None], label[None])

    got = torch.func.vmap(torch.func.grad(of_image))(*one)
    for row, image in enumerate(zip(*one, strict=True)):
        x = leaf(image[0])
        same(got[row], grad(of_image(x, *image[1:]), x))


@pytest.mark.parametrize("name", list(LOSSES))
def test_values_are_checked_under_vmap_too(name):
    loss, (s, other, hard), soft = get_loss(name), batches("int"), batches("soft")[2]

    def total(s, other, labels):
        return sum(loss(s, labels, teacher_logits=other, aux_logits=other).values())

    for wrong, message in (
        ((changed(s, torch.nan, (1, 2, 0)), other, hard), "student_logits holds 1 NaN .* of 126, the first in row 2"),
        ((s, other, changed(hard, 7, (1, 2))), "1 value.* outside .*the first is 7"),
        ((s, other, changed(soft, -0.5, (1, 2, 0))), "1 negative value.*-0.5"),
        ((s, other, changed(soft, 3.0, (1, 2, 0))), "rows that sum to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.func.vmap(total)(*wrong)
