"""`evaluate` module: mean Kullback-Leibler divergence of the student's prediction from the teacher's."""

import datasets
import evaluate
import torch

from hf_kd.metrics import teacher_kl

INPUTS = """
Args:
    predictions: the student's logits, (N, C); kept as float32.
    references: the teacher's logits, (N, C), in the student's class order; kept as float32.
Returns:
    {"kl": mean over the images of KL(teacher || student) at temperature 1, in nats, at least 0}
"""
CITATION = """@article{kullback1951information,
  title={On Information and Sufficiency},
  author={Kullback, Solomon and Leibler, Richard A.},
  journal={The Annals of Mathematical Statistics},
  year={1951}
}"""


class TeacherKl(evaluate.Metric):
    def _info(self):
        logits = datasets.List(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=__doc__,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(predictions=logits, references=logits),
        )

    def _compute(self, predictions, references):
        return {"kl": teacher_kl(torch.tensor(predictions), torch.tensor(references))}
