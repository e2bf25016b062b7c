"""The base class of all losses: what a loss declares of itself, and how it is called."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .functional import at_least_float32, check_inputs, check_number, cross_entropy
from .standardize import standardize_logits

# What a trainer provides to a loss that requires it.
INPUTS = {
    "teacher_logits": "the teacher's logits, of shape (B, C)",
    "aux_logits": "the logits of a linear head on the student's pooled intermediate feature, of shape (B, C)",
    "distillation_logits": "the logits of the student's distillation head, of shape (B, C); student_logits are then "
    "those of its class head",
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
        method_needs_labels: whether `method_terms` or `diagnostics` look at the labels. If not, and label_weight is 0,
            training needs none: see `needs_labels`.
        distillation_alpha: of a student with a distillation head, see `use_distillation_head`; else None.
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
    method_needs_labels: ClassVar[bool] = True
    logit_standardization = False

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        check_number("label_smoothing", label_smoothing, 0, 1)
        self.label_smoothing = label_smoothing
        self.label_weight = 1.0
        self.progress = Progress()
        self.reduce_mean: Callable[[Tensor], Tensor] | None = None
        self.world_size = 1
        self.distillation_alpha: float | None = None
        self._values_checked = False

    def method_terms(self, student_logits: Tensor, labels: Tensor, *args: Any, **inputs: Any) -> dict[str, Tensor]:
        """The method's own scalar terms by name, already weighted, from checked inputs of any floating dtype.

        An override names what the class requires: `def method_terms(self, student_logits, labels, teacher_logits)`.
        """
        return {}

    def distillation_head_terms(
        self, student_logits: Tensor, labels: Tensor, *args: Any, **inputs: Any
    ) -> dict[str, Tensor]:
        """`method_terms` for the logits of a distillation head. A loss whose weight is the teacher's share of the
        whole may leave it out here: alpha takes its place."""
        return self.method_terms(student_logits, labels, *args, **inputs)

    def use_distillation_head(self, alpha: float | None) -> None:
        """Makes it the loss of a student with a class head and a distillation head (arXiv 2012.12877):

            (1 - alpha) * cross entropy of the class head + alpha * `distillation_head_terms` of the distillation head

        where label_weight plays no part, and label smoothing is that of the cross entropy. alpha is in [0, 1]; None:
        the student has one head. `forward` then takes "distillation_logits", and student_logits of the class head.
        """
        if alpha is not None:
            check_number("distillation_alpha", alpha, 0, 1)
        self.distillation_alpha = alpha

    @property
    def needs_labels(self) -> bool:
        """Whether it is trained with labels; else `forward` does not look at them."""
        weight = self.label_weight if self.distillation_alpha is None else 1 - self.distillation_alpha
        return self.method_needs_labels or weight != 0

    @property
    def method_weight(self) -> float:
        """The factor of the method's terms in what `forward` gives."""
        return 1.0 if self.distillation_alpha is None else self.distillation_alpha

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
            labels: int64 (B,) in [0, C), or floating point (B, C) of non-negative label values; anything if not
                `needs_labels`.
            **inputs: at least what `requires` names; the rest is ignored. Those that end in "_logits" are (B, C).

        Raises:
            ValueError: an input is missing, has a wrong shape or dtype, or (on CPU always, on other devices in the
                first call only, never while compiling) holds values out of range.
        """
        required, alpha = {}, self.distillation_alpha
        for name in sorted(self.requires if alpha is None else {*self.requires, "distillation_logits"}):
            value = inputs.get(name)
            if value is None:
                what = INPUTS.get(name, "which it requires")
                raise ValueError(f"{type(self).__name__} got {name}=None: pass {name}=, {what}")
            required[name] = value
        logits = {name: value for name, value in required.items() if name.endswith("_logits")}
        first_call = not torch.compiler.is_compiling() and not self._values_checked
        needs_labels = self.needs_labels
        check_inputs(student_logits, labels if needs_labels else None, force_values=first_call, **logits)
        if first_call:
            self._values_checked = True
        if needs_labels:
            ce = cross_entropy(student_logits, labels, self.label_smoothing)
            ce = (self.label_weight if alpha is None else 1 - alpha) * ce
        else:  # a part of the graph: DDP expects a gradient of every head
            ce = (at_least_float32(student_logits) * 0).sum()
        if alpha is not None:
            student_logits = required.pop("distillation_logits")
        if self.logit_standardization:
            student_logits = standardize_logits(student_logits)
            required["teacher_logits"] = standardize_logits(required["teacher_logits"])
        if alpha is None:
            return {"ce": ce} | self.method_terms(student_logits, labels, **required)
        terms = self.distillation_head_terms(student_logits, labels, **required)
        return {"ce": ce} | {name: alpha * term for name, term in terms.items()}

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
        formula, alpha = cls.formula, hyperparameters.get("distillation_alpha")
        if hyperparameters.get("logit_standardization"):
            formula += " The logits of both are standardized first (arXiv 2403.01427)."
        if alpha is not None:
            formula += (
                " The student has a distillation head: α times the terms besides the cross entropy trains it, and "
                f"1 − α times the cross entropy, with no other weight, its class head; α = {alpha} (arXiv 2012.12877)."
            )
        return {
            "title": cls.title,
            "formula": formula,
            "paper": cls.paper,
            "citation": cls.CITATION,
            "tags": list(cls.tags),
            "requires": sorted(cls.requires),
            "controls": cls.controls,
        }

    def extra_repr(self) -> str:
        """The constructor arguments, as in `NKDLoss(temperature=1.0, gamma=1.5, ...)`."""
        return ", ".join(f"{key}={value!r}" for key, value in self.hyperparameters().items())
