"""`evaluate` module: how far a classifier's confidence is from its accuracy."""

import datasets
import evaluate
import torch

from hf_kd.metrics import expected_calibration_error

INPUTS = """
Args:
    predictions: logits, (N, C); kept as float32.
    references: labels, N integers in [0, C), or -100 for an image that is left out.
    n_bins: at least 1; default 15, or the argument of load(). Compare only with the same.
Returns:
    {"ece": expected calibration error in [0, 1]}
"""
CITATION = """@inproceedings{guo2017calibration,
  title={On Calibration of Modern Neural Networks},
  author={Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle={International Conference on Machine Learning},
  year={2017}
}"""


class ExpectedCalibrationError(evaluate.Metric):
    def __init__(self, *args, n_bins: int = 15, **kwargs):
        self.n_bins = n_bins
        super().__init__(*args, **kwargs)

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                predictions=datasets.List(datasets.Value("float32")), references=datasets.Value("int64")
            ),
        )

    def _compute(self, predictions, references, n_bins=None):
        n_bins = self.n_bins if n_bins is None else n_bins
        return {"ece": expected_calibration_error(torch.tensor(predictions), torch.tensor(references), n_bins)}
