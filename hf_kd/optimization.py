"""Methods of the trainer: which weights are decayed, and the step schedule of the learning rate."""

from __future__ import annotations

import re
from bisect import bisect_right

from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

_NOT_DECAYED = re.compile(r"(cls|class|dist|distillation)_token|class_embedding|pos(ition)?_embed")


def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
    """Those of transformers without class tokens and position embeddings, as in the paper's code."""
    return [name for name in Trainer.get_decay_parameter_names(self, model) if not _NOT_DECAYED.search(name)]


def create_scheduler(self, num_training_steps: int, optimizer=None):
    """Adds the step schedule of `lr_step_epochs`, which the CNN settings of the paper use."""
    args = self.args
    if args.lr_step_epochs and self.lr_scheduler is None:
        steps = [round(epoch * num_training_steps / args.num_train_epochs) for epoch in args.lr_step_epochs]
        optimizer = self.optimizer if optimizer is None else optimizer
        # Not MultiStepLR, which starts from the decayed rate in a second training.
        self.lr_scheduler = LambdaLR(optimizer, lambda step: args.lr_step_factor ** bisect_right(steps, step))
        self._created_lr_scheduler = True
    return Trainer.create_scheduler(self, num_training_steps, optimizer)
