"""What is measured of a classifier: accuracy, calibration, and closeness to a teacher."""

from .classification import (
    ClassificationMeter,
    agreement,
    expected_calibration_error,
    sample_statistics,
    teacher_kl,
    top_k_accuracy,
)

__all__ = [
    "ClassificationMeter",
    "agreement",
    "expected_calibration_error",
    "sample_statistics",
    "teacher_kl",
    "top_k_accuracy",
]
