"""For `evaluate.load`."""

from hf_kd.metrics.evaluate_metrics import TeacherKl

__all__ = ["TeacherKl"]
