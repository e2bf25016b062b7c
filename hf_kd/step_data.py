"""The images of an optimizer step: how many there are, and what happens where they cannot be had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .data.collators import note_skipped
from .data.order import groups_of
from .hub import user_message
from .ranks import agree

FEWEST = 1000  # images that `max_skipped_fraction` is a share of at least, if there are so many


def count_samples(trainer, batches: list[dict]) -> int | None:
    """The images in a step's batches of this process; None if the epoch is over. Also notes what was skipped."""
    args = trainer.args
    seen = (trainer.state.global_step + 1) * args.train_batch_size * args.gradient_accumulation_steps
    seen = min(len(trainer.train_dataset), max(seen, FEWEST))
    for batch in batches:
        note_skipped(batch, trainer.skipped, seen, args.max_skipped_fraction)
    return sum(len(batch["labels"]) for batch in batches) if batches else None


def samples_of_step(
    trainer, read: Callable[[], tuple[list[dict], Any]], device
) -> tuple[list[dict], torch.Tensor | int | None]:
    """What `read` gives, the batches of this process and their images, with the sum over all processes of the latter.

    After an error in a single process, or in one of several that read a stream, all save the state of the last step
    and raise it, those without one as an OSError.
    """
    batches, count, error = list[dict](), None, None
    try:
        batches, count = read()
    except Exception as caught:  # of which the other processes must know
        error = caught
    return batches, _count_in_all_processes(trainer, count, error, device)


def _count_in_all_processes(trainer, count: int | None, error: Exception | None, device) -> torch.Tensor | int | None:
    if trainer.args.world_size == 1:
        if error is None:
            return count
    else:
        # Looking at it makes a GPU wait, which is not worth it where no network is involved.
        streams = groups_of(trainer.train_dataset) is not None
        if error is not None and not streams:
            raise error
        if error is None and count is None:
            return None
        total, no_data = agree(trainer, count or 0, device, no_data=error is not None)
        if not streams or not no_data:
            return total
    raise saved_without_data(trainer, error)


def saved_without_data(trainer, error: Exception | None) -> Exception:
    """Saves the state of the last step in all processes, while they train, after `error` in this or another one.

    Returns what this one raises: its own error, if any, else an OSError that names those of the others.
    """
    step = trainer.state.global_step if trainer.is_in_train else 0
    folder = Path(trainer.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
    text = None if error is None else user_message(error) or str(error) or type(error).__name__
    found = [(text, folder.exists())]
    if trainer.args.world_size > 1:
        found = gather_object(found)
    if step and not all(is_saved for _, is_saved in found):
        trainer._save_checkpoint(trainer.model, trial=None)
    texts = [f"process {rank} has no data: {text}" for rank, (text, _) in enumerate(found) if text]
    raised = error or OSError("; ".join(texts))
    if step:
        raised.add_note(f"The state of step {step} is saved in {folder}.")
    return raised
