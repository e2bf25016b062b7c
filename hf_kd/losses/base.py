"""The base class of all losses: what a loss declares of itself, and how it is called."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .functional import check_inputs, check_number, cross_entropy
from .standardize import standardize_logits

# What a trainer provides to a loss that requires it.
INPUTS = {
    "teacher_logits": "the teacher's logits, of shape (B, C)",
    "aux_logits": "the logits of a linear head on the student's pooled intermediate feature, of shape (B, C)",
}


class Progress(NamedTuple):
    """How far the training is when a loss is called. The micro-batches of one optimizer step have the same.

    step is the number of optimizer steps done, in [0, max_steps); epoch has a fraction, and is exactly 1.0 in the
    first step of the second epoch.
    """

    step: float = 0.0
    max_steps: float = 1.0
    epoch: float = 0.0


class DistillationLoss(nn.Module):
    """Base of all losses: cross entropy, plus the terms that a subclass adds in `method_terms`.

    A subclass describes itself in class attributes, which the trainer, the command line and the model card read, and
    keeps every constructor argument (no `**kwargs`) in an attribute of the same name. It has no parameters and no
    persistent buffers: they would be neither trained nor saved.

    Attributes:
        name: a word of letters, digits, `_`, `-` and `.`, by which records and folders name the loss. Required.
        requires: the inputs of `forward` beyond logits and labels; a trainer provides those of `INPUTS`.
        title, formula, paper, CITATION: for the model card: the method in words ("knowledge distillation (KD)"), its
            formula in one paragraph of Markdown, an arXiv id or a URL, and BibTeX. Each may be missing.
        tags: for the Hub, such as "knowledge-distillation".
        controls: runs that a verdict on this loss must beat besides plain cross entropy: their arguments by name,
            such as `{"2xce": {"loss": "ce", "weight": 2.0}}`.
        published: constructor arguments as published, by benchmark ("imagenet", "imagenet_deit", "cifar100").
        published_results: by benchmark, as text: top-1 in percent of students without → with the loss.
        relations: which other loss to use when, in a sentence or two.
        label_weight: of the cross entropy; 1 unless the constructor sets another.
        progress: a `Progress`, which the trainer sets before every step, after a resume too.
        reduce_mean: averages a tensor over the ranks, differentiably, or None in a single process; for statistics of
            the whole batch. The trainer sets it, and `world_size`, in distributed training.
        world_size: the number of ranks.
        logit_standardization: whether the method's terms get `standardize_logits` of both models' logits; for losses
            whose constructor takes it.
    """

    name: ClassVar[str] = ""
    requires: ClassVar[frozenset[str]] = frozenset()
    title: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    CITATION: ClassVar[str] = ""
    tags: ClassVar[tuple[str, ...]] = ()
    controls: ClassVar[dict[str, dict[str, Any]]] = {}
    published: ClassVar[dict[str, dict[str, Any]]] = {}
    published_results: ClassVar[dict[str, str]] = {}
    relations: ClassVar[str] = ""
    logit_standardization = False

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        check_number("label_smoothing", label_smoothing, 0, 1)
        self.label_smoothing = label_smoothing
        self.label_weight = 1.0
        self.progress = Progress()
        self.reduce_mean: Callable[[Tensor], Tensor] | None = None
        self.world_size = 1
        self._values_checked = False

    def method_terms(self, student_logits: Tensor, labels: Tensor, *args: Any, **inputs: Any) -> dict[str, Tensor]:
        """The method's own scalar terms by name, already weighted, from checked inputs of any floating dtype.

        An override names what the class requires: `def method_terms(self, student_logits, labels, teacher_logits)`.
        """
        return {}

    def diagnostics(self, terms: Mapping[str, Tensor], labels: Tensor, **inputs: Tensor | None) -> dict[str, Tensor]:
        """Further scalars to log beside the terms, means over the batch, which are no part of the loss.

        `terms` are what `forward` gave for these labels and inputs. The trainer asks without gradient, and logs each
        as `diagnostic_NAME`.
        """
        return {}

    def reduce_sum(self, tensor: Tensor) -> Tensor:
        """The tensor's sum over the ranks."""
        return tensor if self.reduce_mean is None else self.reduce_mean(tensor) * self.world_size

    def forward(self, student_logits: Tensor, labels: Tensor, **inputs: Tensor | None) -> dict[str, Tensor]:
        """Named, already weighted scalar terms, "ce" first; the total loss is their sum.

        Args:
            student_logits: (B, C), any floating dtype.
            labels: int64 (B,) in [0, C), or floating point (B, C) of non-negative label values.
            **inputs: at least what `requires` names; the rest is ignored. Those that end in "_logits" are (B, C).

        Raises:
            ValueError: an input is missing, has a wrong shape or dtype, or (on CPU always, on other devices in the
                first call only, never while compiling) holds values out of range.
        """
        required = {}
        for name in sorted(self.requires):
            value = inputs.get(name)
            if value is None:
                what = INPUTS.get(name, "which it requires")
                raise ValueError(f"{type(self).__name__} got {name}=None: pass {name}=, {what}")
            required[name] = value
        logits = {name: value for name, value in required.items() if name.endswith("_logits")}
        first_call = not torch.compiler.is_compiling() and not self._values_checked
        check_inputs(student_logits, labels, force_values=first_call, **logits)
        if first_call:
            self._values_checked = True
        ce = self.label_weight * cross_entropy(student_logits, labels, self.label_smoothing)
        if self.logit_standardization:
            student_logits = standardize_logits(student_logits)
            required["teacher_logits"] = standardize_logits(required["teacher_logits"])
        return {"ce": ce} | self.method_terms(student_logits, labels, **required)

    def hyperparameters(self) -> dict[str, Any]:
        """The constructor arguments: what `get_loss(name, **hyperparameters)` makes the same loss of.

        ValueError if the loss does not keep one of them.
        """
        names = list(inspect.signature(type(self)).parameters)
        if missing := [name for name in names if not hasattr(self, name)]:
            kind, name = type(self).__name__, missing[0]
            raise ValueError(f"{kind} does not keep its argument {name}: set self.{name} = {name} in its __init__")
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if not callable(value) and value is not None}

    def check_trainable(self) -> None:
        """Raise ValueError for what a trainer does not provide, and for a state, which it would not train or save."""
        if missing := sorted(self.requires - INPUTS.keys()):
            names = ", ".join(missing)
            raise ValueError(f"loss {self.name!r} requires {names}; a trainer has {', '.join(INPUTS)} only")
        if state := list(self.state_dict()):
            hint = "use numbers, or register_buffer(..., persistent=False) for constants"
            raise ValueError(f"loss {self.name!r} has a state that is neither trained nor saved, {state}: {hint}")

    @classmethod
    def describe(cls, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
        """What records keep of a loss with these hyperparameters, so that cards and verdicts need not import it."""
        standardized = " The logits of both are standardized first (arXiv 2403.01427)."
        return {
            "title": cls.title,
            "formula": cls.formula + standardized * bool(hyperparameters.get("logit_standardization")),
            "paper": cls.paper,
            "citation": cls.CITATION,
            "tags": list(cls.tags),
            "requires": sorted(cls.requires),
            "controls": cls.controls,
        }

    def extra_repr(self) -> str:
        """The constructor arguments, as in `NKDLoss(temperature=1.0, gamma=1.5, ...)`."""
        return ", ".join(f"{key}={value!r}" for key, value in self.hyperparameters().items())
