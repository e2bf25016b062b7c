"""For `evaluate.load`."""

from hf_kd.metrics.evaluate_metrics import ExpectedCalibrationError

__all__ = ["ExpectedCalibrationError"]
