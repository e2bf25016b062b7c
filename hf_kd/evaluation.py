"""What a trainer's evaluation adds to that of transformers: the metrics, streamed over the images of all processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import gather_object

from . import engines
from .data.collators import note_skipped
from .metrics.classification import ClassificationMeter, hard_labels, sample_statistics
from .models.forward import logits_of
from .step_data import saved_without_data


class _NoData(Exception):
    """Ends a loop over `_Batches` in all processes."""


class _Batches:
    """The batches of a data loader, as many in each of several processes.

    A process whose data fails goes on with its last batch, so that no other waits for it. Then `_NoData` ends the loop
    in all of them after the last batch, or before the first if one has none; in a single process it does so at once.

    Attributes:
        skipped (`dict[str, str]`): the images that this process could not decode; see `note_skipped`.
        failed (`bool`): whether the data of any process did.
        error (`Exception | None`): that of this process.
    """

    def __init__(self, trainer, loader):
        self._trainer, self._loader, self._size = trainer, loader, trainer.num_examples(loader)
        self._several = trainer.args.world_size > 1
        self.skipped, self.failed = dict[str, str](), False
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[dict]:
        batches, batch, count = iter(self._loader), dict[str, Any](), 0
        while self.error is None:
            try:
                batch = next(batches)
                self._note_skipped(batch, self.skipped)
            except StopIteration:
                break
            except Exception as error:  # of which the other processes must know
                self.error = error
            if count == 0 or not self._several:
                self._agree()
            yield batch
            count += 1
        for _ in range(len(self) - count if self.error else 0):
            yield batch
        self._agree()
        if self._several and self._trainer._meter.counts()[1]:  # together they may have too many
            try:
                self._note_skipped({}, dict(gather_object([*self.skipped.items()])))
            except ValueError as error:
                self.error = error
            self._agree()

    def _note_skipped(self, batch: dict, skipped: dict[str, str]) -> None:
        note_skipped(batch, skipped, self._size, self._trainer.args.max_skipped_fraction)

    def _agree(self) -> None:
        self.failed = self.error is not None
        if self._several:
            number = torch.tensor([float(self.failed)], device=self._trainer.args.device)
            self.failed = bool(self._trainer.accelerator.reduce(number, "sum"))
        if self.failed:
            raise _NoData


def measured(trainer, loop: Callable[..., Any], dataloader, predicting: bool, prefix: str) -> Any:
    """What `loop`, the `evaluation_loop` of transformers, gives of a loader's batches, with the metrics.

    After an error of the data in any process, all save the state of the last step, if they train, and raise it.
    `predicting` and `prefix` are those of the call; see `DistillationTrainer.evaluation_loop`.
    """
    meter = trainer._meter = ClassificationMeter()
    batches = _Batches(trainer, dataloader)
    trainer._labelled = getattr(dataloader.dataset, "labelled", True)
    with contextlib.suppress(_NoData), trainer.average.in_student():
        engines.share_buffers(trainer)
        output = loop(batches, metric_key_prefix=prefix)
    trainer._meter = None
    if batches.failed:
        raise saved_without_data(trainer, batches.error)
    trainer.eval_skipped.update(batches.skipped)
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
