"""Metrics of a classifier: accuracy, calibration, and agreement with a teacher.

The four functions are `evaluate` modules too, which need no network: `evaluate.load(module_path("teacher_kl"))`.
"""

from pathlib import Path

from .classification import (
    ClassificationMeter,
    agreement,
    expected_calibration_error,
    sample_statistics,
    teacher_kl,
    top_k_accuracy,
)

__all__ = [
    "ClassificationMeter", "agreement", "expected_calibration_error", "module_path", "sample_statistics", "teacher_kl",
    "top_k_accuracy",
]  # fmt: skip


def module_path(name: str) -> str:
    """The folder that `evaluate.load` takes for a metric. Predictions are logits (N, C), and may come in batches.

    Args:
        name: "top_k_accuracy" (`k=` for `load` or `compute`) or "expected_calibration_error" (`n_bins=`), whose
            references are labels (N,); "teacher_agreement" or "teacher_kl", whose references are the teacher's
            logits. The results have the names that the trainer gives them: top1, ece, agreement, kl.
    """
    folder = Path(__file__).parent / "evaluate_modules"
    known = sorted(path.parent.name for path in folder.glob("*/*.py"))
    if name not in known:
        raise ValueError(f"no evaluate module is named {name!r}: pass one of {', '.join(known)}")
    return str(folder / name)
