"""The figures show what they claim to: their numbers are read back and compared with a computation of its own."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from hf_kd.losses import uskd_loss
from hf_kd.metrics import expected_calibration_error
from hf_kd.visualization import plot_confusions, plot_reliability, plot_soft_labels, show_images, uskd_soft_labels

NAMES = ["cat", "dog", "bird", "fish", "tree"]


def drawn(figure):
    """The figure as pixels (H, W, 3): that it can be drawn at all, and is not blank."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=50)
    pixels = np.asarray(Image.open(file).convert("RGB"))
    assert pixels.std() > 5
    return pixels


def bars(container, size):
    return [getattr(bar, f"get_{size}")() for bar in container]


def logits_of(n=400, classes=5, seed=0, strength=2.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    logits = torch.randn(n, classes, generator=generator)
    logits[torch.arange(n), labels] += strength
    return logits, labels


def test_a_grid_of_images_of_any_kind():
    red = torch.zeros(3, 8, 8, dtype=torch.uint8)
    red[0] = 255
    images = [red, red / 255, Image.new("RGB", (5, 9), "red"), np.tile(np.uint8([255, 0, 0]), (4, 4, 1))]
    figure = show_images(images, ["a", "b", "c\nd", "e"], columns=3)
    drawn(figure)
    assert [axes.get_title() for axes in figure.axes] == ["a", "b", "c\nd", "e"]
    for axes in figure.axes:
        assert np.asarray(axes.images[0].get_array()).reshape(-1, 3).tolist()[0] == [255, 0, 0]
    assert len(show_images(torch.stack([red, red])).axes) == 2


@pytest.mark.parametrize(("images", "titles"), [([], None), ([torch.zeros(3, 4, 4)], ["a", "b"])])
def test_images_and_titles_that_do_not_fit(images, titles):
    with pytest.raises(ValueError, match="images and"):
        show_images(images, titles)


def test_soft_labels_are_the_bars_largest_first():
    teacher, student = torch.tensor([0.1, 0.5, 0.05, 0.3, 0.05]), [0.2, 0.2, 0.2, 0.4, 0.0]
    figure = plot_soft_labels({"teacher": teacher, "student": student}, NAMES, 2, torch.rand(3, 8, 8), k=3, title="T")
    drawn(figure)
    image, axes = figure.axes
    assert image.get_title() == "bird"
    # Of the three largest, the last gives way to the true class.
    assert [text.get_text() for text in axes.get_yticklabels()] == ["dog", "fish", "bird (true)"]
    assert bars(axes.containers[0], "width") == pytest.approx([0.5, 0.3, 0.05])
    assert bars(axes.containers[1], "width") == pytest.approx([0.2, 0.4, 0.2])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["teacher", "student"]
    alone = plot_soft_labels(teacher.bfloat16(), NAMES)
    drawn(alone)
    assert len(alone.axes) == 1 and alone.axes[0].get_legend() is None


@pytest.mark.parametrize(
    ("soft_labels", "label", "message"),
    [
        (torch.ones(4), 0, "expected 5 finite"),
        ([0.5, 0.6, -0.1, 0, 0], 0, "values from -0.1"),
        ([math.nan, 0, 0, 0, 1], None, "finite"),
        (torch.ones(5), 5, "a label below 5"),
        ({}, None, "one or more"),
    ],
)
def test_soft_labels_that_do_not_fit(soft_labels, label, message):
    with pytest.raises(ValueError, match=message):
        plot_soft_labels(soft_labels, NAMES, label)


@pytest.mark.parametrize("target_in_rank", [True, False])
def test_uskd_soft_labels_are_those_of_the_paper_and_of_the_loss(target_in_rank):
    student, labels = logits_of(n=16, classes=5, seed=1, strength=0.5)
    weak, _ = logits_of(n=16, classes=5, seed=2)
    target, non_target = uskd_soft_labels(student, weak, labels, target_in_rank)
    s, w = student.double().softmax(1).numpy(), weak.double().softmax(1).numpy()
    squares = [s[row, label] ** 2 for row, label in enumerate(labels.tolist())]
    losses = {"target": 0.0, "non_target": 0.0}
    for row, label in enumerate(labels.tolist()):
        others = [c for c in range(5) if c != label]
        n_s, n_w = (x[row] / x[row, others].sum() for x in (s, w))
        places = range(5) if target_in_rank else others
        ranked = sorted(places, key=lambda c: -(n_s[c] + n_w[c]))
        zipf = {c: 1 / (1 + ranked.index(c)) for c in others}
        expected = [zipf.get(c, 0.0) / sum(zipf.values()) for c in range(5)]
        assert non_target[row].tolist() == pytest.approx(expected, rel=1e-5)
        p = 1 + squares[row] - sum(squares) / 16
        assert target[row].item() == pytest.approx(p, rel=1e-5)
        losses["target"] -= p * math.log(s[row, label]) / 16
        losses["non_target"] -= sum(expected[c] * math.log(n_s[c]) for c in others) / 16
    terms = uskd_loss(student, weak, labels, alpha=1.0, beta=1.0, target_in_rank=target_in_rank)
    for name, value in losses.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-5)


def test_uskd_soft_labels_refuse_what_does_not_fit():
    logits, labels = logits_of(n=3)
    for student, weak, wanted in ((logits, logits[:, :4], labels), (logits, logits, labels.float())):
        with pytest.raises(ValueError, match="weak_logits has 4 classes|labels must be int64"):
            uskd_soft_labels(student, weak, wanted)


def test_confusions_are_percentages_of_the_true_class():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 4, -100])
    teacher = [0, 0, 0, 1, 1, 1, 2, 3, 4, 0]
    student = torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 1, 1, 0, 2, 3, 0, 1]), 5).float()
    figure = plot_confusions(labels, {"teacher": teacher, "student": student}, NAMES)
    drawn(figure)
    cells = {axes.get_title(): {} for axes in figure.axes}
    for axes in figure.axes:
        for text in axes.texts:
            column, row = text.get_position()
            cells[axes.get_title()][int(row), int(column)] = text.get_text()
    diagonal = {(c, c): "100" for c in (2, 3)}
    assert cells["teacher"] == {(0, 0): "75", (0, 1): "25", (1, 1): "100", (4, 4): "100", **diagonal}
    assert cells["student"] == {(0, 0): "50", (0, 1): "50", (1, 1): "50", (1, 0): "50", (4, 0): "100", **diagonal}
    difference = {(0, 0): "-25", (0, 1): "+25", (1, 1): "-50", (1, 0): "+50", (4, 0): "+100", (4, 4): "-100"}
    assert cells["student − teacher, points"] == difference
    assert "9 images" in figure.get_suptitle()


def test_of_many_classes_the_most_confused_are_shown():
    labels = np.arange(100).repeat(10)
    predicted = labels.copy()
    predicted[labels == 7] = 9
    predicted[:5] = 50  # of class 0
    figure = plot_confusions(labels, {"student": predicted}, [f"class {c}" for c in range(100)], max_classes=4)
    drawn(figure)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["class 0", "class 7", "class 9", "class 50"]
    assert "4 most confused of 100" in figure.get_suptitle()


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [
        ([0, 1], {"a": [0]}, r"predictions of a \(1,\)"),
        ([0, 1], {"a": torch.zeros(2, 3)}, r"\(2, 3\)"),
        ([0, 1], {"a": [0, 5]}, "to 5, but there are 5 names"),
        ([-100], {"a": [0]}, "0 of them"),
        ([0], {}, "at least one"),
    ],
)
def test_confusions_that_do_not_fit(labels, predictions, message):
    with pytest.raises(ValueError, match=message):
        plot_confusions(labels, predictions, NAMES)


def test_the_bars_of_the_reliability_diagram_give_the_ece():
    logits, labels = logits_of()
    logits = torch.cat([4 * logits, torch.full((2, 5), math.nan)])  # over-confident; padding counts nowhere
    labels = torch.cat([labels, torch.tensor([-100, -100])])
    figure = plot_reliability({"over": logits, "right": torch.cat([logits[:400] / 4, torch.zeros(2, 5)])}, labels, 10)
    drawn(figure)
    above, below = figure.axes[:2]
    accuracy, gap = above.containers
    share = np.array(bars(below.containers[0], "height")) / 100
    assert share.sum() == pytest.approx(1)
    ece = (share * np.abs(bars(gap, "height"))).sum()
    assert ece == pytest.approx(expected_calibration_error(logits, labels, 10), abs=1e-5)
    assert f"ECE {100 * ece:.2f} %" in above.get_title() and ece > 0.05
    hits = (logits[:400].argmax(1) == labels[:400]).double()
    top1 = (share * np.array(bars(accuracy, "height"))).sum()
    assert top1 == pytest.approx(hits.mean().item())
    # One bin by hand.
    confidence = logits[:400].double().softmax(1).amax(1)
    inside = (confidence > 0.9) & (confidence <= 1)
    assert bars(accuracy, "height")[9] == pytest.approx(hits[inside].mean().item())
    assert gap[9].get_y() + gap[9].get_height() == pytest.approx(confidence[inside].mean().item())


def test_reliability_that_does_not_fit():
    logits, labels = logits_of(n=4)
    for models, wanted, bins in (({"a": logits}, labels[:3], 15), ({"a": logits}, labels, 0), ({}, labels, 15)):
        with pytest.raises(ValueError):
            plot_reliability(models, wanted, bins)
