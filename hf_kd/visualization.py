"""Figures of images and predictions: soft labels, confusions, calibration.

Every plot takes tensors or arrays and returns a matplotlib Figure. A notebook shows it as the last value of a cell
(after `%matplotlib inline`), and `figure.savefig(path)` writes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .data import decode_rgb
from .losses.functional import check_inputs, top_targets
from .losses.uskd import soft_targets, zipf_weights
from .metrics.classification import IGNORED_LABEL, calibration_bins, expected_calibration_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_confusions", "plot_reliability", "plot_soft_labels", "show_images", "uskd_soft_labels"]


def show_images(images: Any, titles: Sequence[str] | None = None, columns: int = 8, side: float = 1.4) -> Figure:
    """Images in a grid, each with a title.

    Args:
        images: uint8 or float [0, 1] tensor (B, 3, H, W), or a sequence of anything that `decode_rgb` takes (PIL
            images, paths, rows of a dataset, tensors (3, H, W)), of any sizes.
        titles: B short texts; default: none.
        columns: images in a row.
        side: inches of an image.

    Raises:
        ValueError: no image, another number of titles, or an image that can't be decoded.
    """
    images = list(images)
    titles = [""] * len(images) if titles is None else titles
    if not images or len(titles) != len(images):
        raise ValueError(f"{len(images)} images and {len(titles)} titles: pass one or more, and a title for each")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    lines = max(len(title.splitlines()) for title in titles)
    figure = _figure(columns * side, rows * (side + 0.17 * lines))
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        _show(figure.add_subplot(rows, columns, i + 1), image, title, fontsize=8)
    return figure


def uskd_soft_labels(
    student_logits: Tensor, weak_logits: Tensor, labels: Tensor, target_in_rank: bool = True
) -> tuple[Tensor, Tensor]:
    """The soft labels that USKD builds for a batch instead of a teacher's (arXiv 2303.13005).

    Args and errors as of `uskd_loss`, with integer labels.

    Returns:
        `(target, non_target)`: P (B,), the weight of the target's -log S_t; and N(Z) (B, C), 0 at the target.
    """
    check_inputs(student_logits, labels, weak_logits=weak_logits)
    student, weak = student_logits.detach().float(), weak_logits.detach().float()
    targets = top_targets(labels, student.dtype)
    zipf = zipf_weights(student, weak, targets.index, target_in_rank)
    soft = soft_targets(student.softmax(1).gather(1, targets.index), targets, None)
    return soft[:, 0], zipf / zipf.sum(1, keepdim=True)


def plot_soft_labels(
    soft_labels: Any, names: Sequence[str], label: int | None = None, image: Any = None, k: int = 10, title: str = ""
) -> Figure:
    """A bar for each of the k largest soft labels of an image, largest first; the true class is marked.

    Args:
        soft_labels: (C,), at least 0, or a dict of several by name, drawn side by side and ordered by the first: a
            teacher's probabilities and the student's, say.
        names: of the C classes.
        label: the true class; always among the bars.
        image: as in `show_images`, shown on the left.

    Raises:
        ValueError: no soft labels, values that are negative or not finite, or that do not fit the names.
    """
    from matplotlib import color_sequences

    by_name = soft_labels if isinstance(soft_labels, Mapping) else {"": soft_labels}
    values = np.array([_array(value) for value in by_name.values()])
    fit = values.shape[1:] == (len(names),) and (np.isfinite(values) & (values >= 0)).all()
    if not fit or k < 1 or (label is not None and not 0 <= label < len(names)):
        raise ValueError(
            f"soft labels of shape {values.shape}, values from {values.min(initial=0):.3g} to "
            f"{values.max(initial=0):.3g}, k={k}, label={label}; expected {len(names)} finite values of at least 0 in "
            f"each of one or more, k of at least 1, and a label below {len(names)}"
        )
    order = np.argsort(-values[0], kind="stable")[:k].tolist()
    if label is not None and label not in order:
        order[-1] = label
    shown = values[:, order]

    figure = _figure(5.5 if image is None else 7.5, max(2.2, 0.8 + 0.1 * len(order) * (3 + len(values))))
    if image is None:
        axes = figure.subplots()
    else:
        left, axes = figure.subplots(1, 2, width_ratios=[1, 2.2])
        _show(left, image, "" if label is None else names[label], fontsize=10)
    height, colours = 0.8 / len(values), color_sequences["petroff10"]
    for i, (name, weights) in enumerate(zip(by_name, shown, strict=True)):
        at = np.arange(len(order)) + (i - (len(values) - 1) / 2) * height
        bars = axes.barh(at, weights, height, label=name, color=colours[i])
        texts = [f"{w:.3f}" if w >= 0.0005 else "<0.001" if w else "0" for w in weights]
        axes.bar_label(bars, texts, padding=2, fontsize=7)
    axes.set_xlim(0, 1.15 * (shown.max() or 1))
    axes.set_yticks(range(len(order)), [f"{names[c]}{' (true)' if c == label else ''}" for c in order])
    if label is not None:
        axes.get_yticklabels()[order.index(label)].set_fontweight("bold")
    axes.invert_yaxis()
    _bare(axes)
    axes.set_xlabel("weight in the soft label" if len(values) == 1 else "weight")
    if len(values) > 1:
        axes.legend(fontsize=8, loc="lower right")
    figure.suptitle(title, fontsize=11)
    return figure


def plot_confusions(
    labels: Any, predictions: Mapping[str, Any], names: Sequence[str], max_classes: int = 12
) -> Figure:
    """Confusion matrices side by side, and of exactly two (teacher and student) the difference.

    A cell is the share, in % of its row's class, of the images that were taken for its column's class.

    Args:
        labels: (N,), integers in [0, C), or -100 for an image that is left out.
        predictions: by name, the predicted classes (N,) or logits (N, C).
        names: of the C classes.
        max_classes: of more classes, those that are confused most often are shown.

    Raises:
        ValueError: shapes that do not fit, or no labelled image.
    """
    if not predictions:
        raise ValueError("no predictions to plot; pass at least one")
    labels, classes = _array(labels), len(names)
    kept = labels != IGNORED_LABEL
    counts = {}
    for name, prediction in predictions.items():
        predicted = _array(prediction)
        if predicted.ndim == 2 and predicted.shape[1] == classes:
            predicted = predicted.argmax(1)
        if labels.ndim != 1 or predicted.shape != labels.shape or not kept.any():
            raise ValueError(
                f"labels are {labels.shape} ({kept.sum()} of them not -100) and predictions of {name} "
                f"{predicted.shape}; expected (N,), and (N,) or (N, {classes})"
            )
        pairs = np.stack([labels[kept], predicted[kept]]).astype(int)
        if pairs.min() < 0 or pairs.max() >= classes:
            raise ValueError(f"classes go from {pairs.min()} to {pairs.max()}, but there are {classes} names")
        flat = np.ravel_multi_index(pairs, (classes, classes))
        counts[name] = np.bincount(flat, minlength=classes**2).reshape(classes, classes)
    chosen = _most_confused(np.sum([*counts.values()], axis=0), max_classes)
    shares = {}
    for name, count in counts.items():
        share = 100 * count / np.maximum(count.sum(1, keepdims=True), 1)
        shares[name] = share[np.ix_(chosen, chosen)]
    differences = {}
    if len(shares) == 2:
        (first, a), (second, b) = shares.items()
        differences[f"{second} − {first}, points"] = b - a

    side = 1.3 + 0.3 * len(chosen)
    panels = shares | differences
    figure = _figure(side * len(panels) + 0.8, side + 0.6)
    ticks = {"ticks": range(len(chosen)), "labels": [names[c] for c in chosen], "fontsize": 8}
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, panel) in zip(row, panels.items(), strict=True):
        if name in shares:
            _draw_matrix(axes, panel, "Blues", 0, 100, "{:.0f}")
        else:
            largest = max(1, np.abs(panel).max())
            _draw_matrix(axes, panel, "PuOr", -largest, largest, "{:+.0f}")
        axes.set_title(name, fontsize=10)
        axes.set_xticks(**ticks, rotation=90)
        axes.set_yticks(**ticks)
        axes.tick_params(length=0)
        axes.set_xlabel("predicted class")
    row[0].set_ylabel("true class")
    which = "" if len(chosen) == len(names) else f", the {len(chosen)} most confused of {len(names)} classes"
    figure.suptitle(f"% of each true class{which} ({kept.sum()} images)", fontsize=11)
    return figure


def plot_reliability(logits: Mapping[str, Any], labels: Any, n_bins: int = 15) -> Figure:
    """Reliability diagrams (Guo et al. 2017), one for each model, with a histogram of its confidences below.

    A blue bar is the accuracy of the images whose confidence (largest probability) lies in its bin, and the hatched
    one goes from there to their mean confidence: the expected calibration error is the mean length of the hatched
    bars, weighted by the histogram. `logits` are by name; the rest is as of `expected_calibration_error`.
    """
    labels = torch.as_tensor(_array(labels))
    kept = labels != IGNORED_LABEL
    models = {name: torch.as_tensor(_array(value)) for name, value in logits.items()}
    if not models:
        raise ValueError("no logits to plot; pass at least one model's")
    figure = _figure(3.1 * len(models) + 0.4, 4.2)
    grid = figure.add_gridspec(2, len(models), height_ratios=[3, 1])
    for i, (name, value) in enumerate(models.items()):
        ece = expected_calibration_error(value, labels, n_bins)  # and the checks
        confidence, predicted = value[kept].double().softmax(1).max(1)
        bins, hit = calibration_bins(confidence, n_bins).numpy(), (predicted == labels[kept]).numpy()
        count = np.bincount(bins, minlength=n_bins)
        accuracy = np.bincount(bins, hit, n_bins) / np.maximum(count, 1)
        gap = np.bincount(bins, confidence.numpy(), n_bins) / np.maximum(count, 1) - accuracy
        x, width = (np.arange(n_bins) + 0.5) / n_bins, 1 / n_bins
        above = figure.add_subplot(grid[0, i])
        above.plot([0, 1], [0, 1], color="dimgrey", linestyle="--", linewidth=1)
        above.bar(x, accuracy, width, color="cornflowerblue", edgecolor="white", label="accuracy")
        above.bar(x, gap, width, accuracy, color="none", hatch="////", edgecolor="tab:red", label="to confidence")
        above.set_title(f"{name}\ntop-1 {100 * hit.mean():.2f} %, ECE {100 * ece:.2f} %", fontsize=10)
        above.set_ylim(0, 1)
        below = figure.add_subplot(grid[1, i], sharex=above)
        below.bar(x, 100 * count / count.sum(), width, color="dimgrey", edgecolor="white")
        below.set_xlim(0, 1)
        below.set_xlabel("confidence")
        _bare(above)
        _bare(below)
        if i == 0:
            above.set_ylabel("accuracy")
            above.legend(fontsize=8, loc="upper left")
            below.set_ylabel("% of images")
    return figure


def _figure(width: float, height: float) -> Figure:
    # Slow to import, and training does not need it. Figure without pyplot leaves no global state behind.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _show(axes: Axes, image: Any, title: str, fontsize: int) -> None:
    axes.imshow(decode_rgb(image).permute(1, 2, 0).numpy())
    axes.set_axis_off()
    axes.set_title(title, fontsize=fontsize)


def _array(value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value  # numpy has no bfloat16
    return np.asarray(value)


def _most_confused(counts: np.ndarray, limit: int) -> list[int]:
    """At most `limit` classes, in order: those of the largest errors."""
    errors = counts + counts.T
    np.fill_diagonal(errors, -1)
    ranked = np.argsort(-errors, axis=None, kind="stable")
    classes = np.stack(np.unravel_index(ranked, errors.shape), axis=1).ravel().tolist()
    return sorted(list(dict.fromkeys(classes))[:limit])


def _draw_matrix(axes: Axes, values: np.ndarray, cmap: str, low: float, high: float, form: str) -> None:
    """Coloured cells with their values, where these do not round to 0."""
    axes.imshow(values, cmap=cmap, vmin=low, vmax=high)
    for row, column in np.argwhere(np.abs(values.round()) >= 1):
        value = values[row, column]
        color = "white" if abs(value) > 0.6 * high else "black"
        axes.text(column, row, form.format(value), ha="center", va="center", fontsize=7, color=color)
