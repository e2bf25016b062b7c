"""For `evaluate.load`."""

from hf_kd.metrics.evaluate_metrics import TeacherAgreement

__all__ = ["TeacherAgreement"]
