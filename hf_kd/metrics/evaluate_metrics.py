"""The `evaluate` metrics: each folder of `evaluate_modules` holds a file with one of these classes."""

import inspect
from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import torch

from .classification import agreement, expected_calibration_error, teacher_kl, top_k_accuracy

LABEL, LOGITS = datasets.Value("int64"), datasets.List(datasets.Value("float32"))
INPUTS = """
Args:
    predictions: the (student's) logits, (N, C); kept as float32.
    references: the labels (N,), or the teacher's logits (N, C).
    Options such as `k` may be passed to `load` or to `compute`.
"""


class LogitsMetric(evaluate.Metric):
    """A function of predictions and references, its options with their defaults, and the name of its result."""

    function: Callable[..., float]
    RESULT, CITATION = "", ""
    REFERENCES: Any = LABEL
    OPTIONS: dict[str, int] = {}

    def __init__(self, *args, **kwargs):
        self.options = {name: kwargs.pop(name, default) for name, default in self.OPTIONS.items()}
        super().__init__(*args, **kwargs)

    def _info(self):
        return evaluate.MetricInfo(
            description=inspect.getdoc(self.function),
            citation=self.CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(predictions=LOGITS, references=self.REFERENCES),
        )

    def _compute(self, predictions, references, **options):
        options = self.options | options
        value = self.function(torch.tensor(predictions), torch.tensor(references), **options)
        return {self.RESULT.format(**options): value}


class TopKAccuracy(LogitsMetric):
    function = staticmethod(top_k_accuracy)
    RESULT, OPTIONS = "top{k}", {"k": 1}


class ExpectedCalibrationError(LogitsMetric):
    function = staticmethod(expected_calibration_error)
    RESULT, OPTIONS = "ece", {"n_bins": 15}
    CITATION = "Guo et al. On Calibration of Modern Neural Networks. ICML 2017."


class TeacherAgreement(LogitsMetric):
    function = staticmethod(agreement)
    RESULT, REFERENCES = "agreement", LOGITS
    CITATION = "Stanton et al. Does Knowledge Distillation Really Work? NeurIPS 2021."


class TeacherKl(LogitsMetric):
    function = staticmethod(teacher_kl)
    RESULT, REFERENCES = "kl", LOGITS
    CITATION = "Kullback, Leibler. On Information and Sufficiency. The Annals of Mathematical Statistics, 1951."
