"""`evaluate` module: share of the images whose class is among the k largest logits."""

import datasets
import evaluate
import torch

from hf_kd.metrics import top_k_accuracy

INPUTS = """
Args:
    predictions: logits, (N, C); kept as float32.
    references: labels, N integers in [0, C), or -100 for an image that is left out.
    k: at least 1; default 1, or the argument of load().
Returns:
    {"top1": share in [0, 1]}, and so on for every other k. Of equal logits the lower class ranks first.
"""


class TopKAccuracy(evaluate.Metric):
    def __init__(self, *args, k: int = 1, **kwargs):
        self.k = k
        super().__init__(*args, **kwargs)

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(
                predictions=datasets.List(datasets.Value("float32")), references=datasets.Value("int64")
            ),
        )

    def _compute(self, predictions, references, k=None):
        k = self.k if k is None else k
        return {f"top{k}": top_k_accuracy(torch.tensor(predictions), torch.tensor(references), k)}
