"""For `evaluate.load`."""

from hf_kd.metrics.evaluate_metrics import TopKAccuracy

__all__ = ["TopKAccuracy"]
