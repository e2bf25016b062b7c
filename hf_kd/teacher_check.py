"""What a trainer's teacher is worth on the data, and a warning before the run about one near chance."""

from __future__ import annotations

import math

import torch
from torch.utils.data import Subset
from transformers.utils import logging

from .data.order import groups_of, spaced_rows
from .metrics.classification import ClassificationMeter, hard_labels, sample_statistics
from .models.ensemble import members
from .models.forward import num_classes_of
from .models.teacher import Teacher

logger = logging.get_logger(__name__)


def measure_teacher(trainer, samples: int | None = None, teacher: Teacher | None = None) -> dict[str, float]:
    """The teacher's own `loss`, `top1`, `macro_top1`, `top5` and `ece` on the evaluation data (without any: the
    training data), and `dropped_mass`, its mean probability of classes that the data does not have, if any.

    Args:
        trainer: the `DistillationTrainer`, of which this is a method.
        samples: measure on so many images, evenly spaced; default: on all, and keep it as `teacher_metrics`.
        teacher: default: `eval_teacher`.
    """
    teacher, eval_teacher = teacher or trainer.eval_teacher, trainer.eval_teacher
    source = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    source = next(iter(source.values())) if isinstance(source, dict) else source
    if samples is not None and samples < len(source):  # spaced, since many datasets are sorted by class
        groups = groups_of(source)
        rows = spaced_rows(groups, samples) if groups else [i * len(source) // samples for i in range(samples)]
        source = Subset(source, rows)
    meter, dropped = ClassificationMeter(), torch.zeros(())
    with torch.random.fork_rng(devices=[]):  # the run draws the same numbers with and without the measurement
        batch_size, sampler = trainer.args.eval_batch_size, trainer._get_eval_sampler
        trainer.eval_teacher = teacher  # for whose preprocessing images are resized and cropped
        try:
            loader = trainer._get_dataloader(source, "Teacher", batch_size, sampler)
        finally:
            trainer.eval_teacher = eval_teacher
        for inputs in loader:
            inputs.pop("skipped", None)
            inputs = trainer._prepare_inputs(inputs)
            logits = trainer._teacher_logits(teacher, inputs)
            statistics = sample_statistics(logits, hard_labels(inputs["labels"]), decoded=inputs.get("decoded"))
            mass = teacher.mapping.dropped_mass(logits) * (statistics[:, 0] > 0)  # 0 for what counts nowhere
            gathered = trainer.accelerator.gather_for_metrics(torch.column_stack([statistics, mass]))
            meter.update(gathered[:, :-1], logits.shape[1])
            dropped = dropped.to(gathered.device) + gathered[:, -1].sum()
    meter.check_size(len(source))
    metrics = meter.compute()
    if teacher.mapping.kind in ("subset", "many-to-one"):
        metrics["dropped_mass"] = dropped.item() / metrics["n"]
    if samples is None:
        trainer.teacher_metrics = metrics
    return metrics


def warn_near_chance(trainer) -> None:
    """Warns about a teacher near chance, of several about each: wrong classes, wrong preprocessing or no training.
    Without labels it cannot be known."""
    if trainer.eval_dataset is None and not trainer.train_loss.needs_labels:
        return
    samples = trainer.args.teacher_check_batches * trainer.args.eval_batch_size * trainer.args.world_size
    chance, teachers = 1 / num_classes_of(trainer.model), members(trainer.teacher)
    known = trainer.teacher_metrics if teachers == [trainer.eval_teacher] else None
    for teacher in teachers:
        metrics = known or measure_teacher(trainer, samples, teacher)
        top1, n = metrics["top1"], metrics["n"]
        which = "the teacher" if len(teachers) == 1 else f"the teacher {teacher.name}"
        if top1 < chance + 3 * math.sqrt(chance * (1 - chance) / n):
            logger.warning_once(
                f"{which} is right on {top1:.1%} of {n:.0f} images, chance is {chance:.1%}: check its class "
                "names, its preprocessing, and that it was trained for these classes."
            )
        if "dropped_mass" in metrics:
            (logger.warning_once if metrics["dropped_mass"] > 0.5 else logger.info)(
                f"{metrics['dropped_mass']:.1%} of the probability of {which} is on those of its "
                f"{len(teacher.class_names)} classes that the data does not have, and is left out: if that is "
                "much, check class_map, and that the teacher was trained for such images."
            )
