"""`evaluate` module: share of the images for which student and teacher predict the same class."""

import datasets
import evaluate
import torch

from hf_kd.metrics import agreement

INPUTS = """
Args:
    predictions: the student's logits, (N, C); kept as float32.
    references: the teacher's logits, (N, C), in the student's class order; kept as float32.
Returns:
    {"agreement": share in [0, 1]}
"""
CITATION = """@inproceedings{stanton2021does,
  title={Does Knowledge Distillation Really Work?},
  author={Stanton, Samuel and Izmailov, Pavel and Kirichenko, Polina and Alemi, Alexander A. and Wilson, Andrew G.},
  booktitle={Advances in Neural Information Processing Systems},
  year={2021}
}"""


class TeacherAgreement(evaluate.Metric):
    def _info(self):
        logits = datasets.List(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=__doc__,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(predictions=logits, references=logits),
        )

    def _compute(self, predictions, references):
        return {"agreement": agreement(torch.tensor(predictions), torch.tensor(references))}
