"""What a trainer's evaluation adds to that of transformers: the metrics, streamed over the images of all processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import engines
from .data.collators import note_skipped
from .metrics.classification import ClassificationMeter, hard_labels, sample_statistics
from .models.forward import logits_of


def measured(trainer, loop: Callable[..., Any], dataloader, predicting: bool, prefix: str) -> Any:
    """What `loop`, the `evaluation_loop` of transformers, gives of a loader's batches, with the metrics.

    `predicting` and `prefix` are those of the call; see `DistillationTrainer.evaluation_loop`.
    """
    meter = trainer._meter = ClassificationMeter()
    trainer._evaluated, trainer._skipped_now = trainer.num_examples(dataloader), dict[str, str]()
    trainer._labelled = getattr(dataloader.dataset, "labelled", True)
    engines.share_buffers(trainer)
    output = loop(prefix)
    trainer._meter = None
    trainer.eval_skipped.update(trainer._skipped_now)
    counted, undecodable = meter.counts()
    trainer.class_counts[prefix] = meter.class_counts()
    metrics: dict[str, float] = {"skipped": undecodable} if undecodable else {}
    if not predicting:
        meter.check_size(output.num_samples)
    if counted or not predicting:
        metrics |= meter.compute() | {"samples": counted}
        del metrics["n"]
    else:
        output.metrics.pop(f"{prefix}_loss", None)
    output.metrics.update({f"{prefix}_{name}": value for name, value in metrics.items()})
    return output


def prediction_step(trainer, model, inputs: dict, prediction_loss_only: bool) -> tuple[Any, Any, Any]:
    """`DistillationTrainer.prediction_step`."""
    if trainer._meter is not None:
        note_skipped(inputs, trainer._skipped_now, trainer._evaluated, trainer.args.max_skipped_fraction)
    inputs = trainer._prepare_inputs(inputs)
    labels = hard_labels(inputs["labels"])
    with torch.no_grad(), trainer.compute_loss_context_manager():
        logits = logits_of(model(trainer._student_input(inputs))).float()
    decoded = inputs.get("decoded")
    statistics = sample_statistics(logits, labels, trainer._teacher_logits(trainer.eval_teacher, inputs), decoded)
    if decoded is not None:
        logits = logits.masked_fill(~decoded[:, None], torch.nan)
    if trainer._meter is not None:
        trainer._meter.update(trainer.gather_function(statistics), logits.shape[1])
    loss = statistics[:, 1].sum() / (statistics[:, 0] > 0).sum().clamp(min=1)
    return (loss, None, None) if prediction_loss_only else (loss, logits, labels if trainer._labelled else None)
