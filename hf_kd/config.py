"""`DistillationConfig`: everything about a run that can be wrong is found here, before any download."""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from transformers import SchedulerType, TrainingArguments

from .losses import LOSSES, SETTINGS, DistillationLoss, get_loss, loss_class, named_settings
from .losses.functional import check_number

AUGMENTS = ("none", "flip", "pad_crop", "resized_crop", "deit")
MAX_IMAGE_PIXELS = 178_956_970  # where Pillow raises
DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# The lowest and the highest value of numbers; all others are finite and not negative.
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, 0.999999)),
    **dict.fromkeys(("label_smoothing_factor", "max_skipped_fraction", "distillation_alpha"), (0, 1)),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1)),
    "max_steps": (-1, math.inf),
    "ema_decay": (0, 0.9999999),
    "local_rank": (-1, math.inf),
}
_POSITIVE = (
    "num_train_epochs per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
    "eval_accumulation_steps logging_steps eval_steps save_steps adam_epsilon lr_step_factor train_image_size "
    "max_image_pixels dataloader_prefetch_factor ddp_timeout max_hours ema_decay"
).split()


if TYPE_CHECKING:  # text becomes an object in __post_init__
    JSONObject = dict[str, Any]
else:
    JSONObject = dict | str


def read_json(name: str, text: str) -> dict:
    """The object in an argument's JSON text; a ValueError names the argument."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        pairs = re.findall(r"(\w+)\W*[=:]\s*([-+.\w]+)", text) if text.count("{") < 2 else []  # gamma=1, {gamma: 1}
        hint = "{" + ", ".join(f'"{key}": {number}' for key, number in pairs) + "}"
        hint = f"; write '{hint}'" if pairs else ""
        raise ValueError(f"{name} is not valid JSON ({error}): {text}{hint}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object such as '{{\"gamma\": 1.0}}', got {text}")
    return value


def check_numbers(
    values: Any, names: Sequence[str], positive: Sequence[str] = (), **ranges: tuple[float, float]
) -> None:
    """Raises ValueError for attributes that are no finite numbers in their range, by default from 0 on.

    None passes where it is the default. Of lists every number is checked.
    """
    for name in names:
        low, high = ranges.get(name, (0, math.inf))
        given = getattr(values, name)
        for value in given if isinstance(given, (list, tuple)) else [given]:
            if value is not None or getattr(type(values), name) is not None:
                check_number(name, value, low, high, above=name in positive)


def option(help: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class DistillationConfig(TrainingArguments):
    """Arguments of a distillation run: those of `TrainingArguments`, and the ones below.

    Defaults that differ: `remove_unused_columns` is False (it would drop the image column), `hub_strategy` is "end"
    (checkpoints hold more than a student), `logging_nan_inf_filter` is False (it hides a NaN loss, and costs a device
    sync a step), `ddp_find_unused_parameters` is False, `metric_for_best_model` is top-1 where a best model is asked
    for.

    Raises:
        ValueError: for an unknown loss or augmentation (with the nearest names) and for numbers out of range.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "loss_kwargs"]
    # An instance in the place of `loss` and `loss_kwargs`, see `with_loss`; no field.
    _loss: ClassVar[DistillationLoss | None] = None

    if TYPE_CHECKING:
        output_dir: str  # None is replaced in __post_init__

    loss: str = option(
        f"What to train with: {', '.join([*LOSSES, *SETTINGS])} (see `hf-kd losses`), or a class of your own: "
        "package.module:Class or file.py:Class.",
        "uskd",
    )
    loss_kwargs: JSONObject | None = option(
        "Hyperparameters of the loss, as JSON: '{\"gamma\": 1.0}'. Default: as published."
    )
    logit_standardization: bool = option(
        "Standardize both models' logits in the teacher's terms of --loss (kd or dkd).", False
    )
    distillation_alpha: float = option(
        "With a distillation head (DeiT, LeViT) and a teacher: (1 - alpha) * cross entropy trains the class head, "
        "alpha * the loss's other terms the distillation head.",
        0.5,
    )
    augment: str = option(
        f"Training augmentation of images: {', '.join(AUGMENTS)}. pad_crop is the CIFAR standard, resized_crop "
        "ImageNet's, deit adds RandAugment and random erasing. Default: resized_crop.",
        "",
    )
    mixup_alpha: float = option("Alpha of mixup; 0: off. DeiT uses 0.8.", 0.0)
    cutmix_alpha: float = option("Alpha of cutmix; 0: off. DeiT uses 1.0.", 0.0)
    train_image_size: int | None = option(
        "Longer side in pixels of every training image, in all runs of a comparison. Default: the largest input of "
        "student, teacher and evaluation teacher."
    )
    image_column: str | None = option("Column of the images. Default: found by type.")
    label_column: str | None = option("Column of the labels. Default: found by type.")
    lr_step_epochs: list[float] | None = option(
        "Multiply the learning rate by lr_step_factor after these epochs (in place of lr_scheduler_type)."
    )
    lr_step_factor: float = option("See lr_step_epochs. The CIFAR standard is 0.2.", 0.1)
    max_skipped_fraction: float = option("Stop when more than this share of the images seen can't be decoded.", 0.01)
    max_image_pixels: int = option("Images of more pixels are skipped like broken ones.", MAX_IMAGE_PIXELS)
    max_hours: float | None = option(
        "Stop at the end of a step after so many hours, with the state saved, and exit with status 75. Counted from "
        "the start of the process, for all runs; in Python from train()."
    )
    ema_decay: float | None = option(
        "Evaluate and save an exponential moving average of the student's weights with this decay. 0.999 averages "
        "over about 1,000 steps. Default: no average."
    )
    ema_warmup: bool = option("Let the decay rise up to ema_decay as 1 - step^(-2/3), as in timm.", False)
    freeze_backbone: bool = option(
        "Train the classification head only (and USKD's auxiliary head); batch norms keep their statistics.", False
    )
    feature_module: str | None = option("USKD: module of the student whose output feeds the auxiliary head.")
    teacher_dtype: str | None = option("Compute type of the teacher: fp32, bf16 or fp16. Default: as the student's.")
    teacher_check_batches: int = option("Batches to check the teacher's top-1 on before training; 0: no check.", 4)
    remove_unused_columns: bool = option("Not supported: it would remove the image column.", False)
    logging_nan_inf_filter: bool = option("Show an earlier loss in the place of a NaN. Hides failures; off.", False)
    hub_strategy: str = option("Only 'end' is supported: the student is pushed once, after it is saved.", "end")

    def __post_init__(self):
        if str(getattr(self.hub_strategy, "value", self.hub_strategy)) != "end":
            raise ValueError(f"hub_strategy={self.hub_strategy!r} is not supported: the student is pushed at the end.")
        if isinstance(self.loss_kwargs, str):  # parsed here: TrainingArguments' own parser names no argument
            self.loss_kwargs = read_json("loss_kwargs", self.loss_kwargs)
        if isinstance(self.lr_scheduler_kwargs, str):
            self.lr_scheduler_kwargs = read_json("lr_scheduler_kwargs", self.lr_scheduler_kwargs)
        if self.logit_standardization:  # of this loss, not of those that it is compared with
            self.loss_kwargs = {**(self.loss_kwargs or {}), "logit_standardization": True}
            self.logit_standardization = False
        check_numbers(self, _NUMBERS, _POSITIVE, **_RANGES)
        self.build_loss()
        self.augment_given = bool(self.augment)  # the default is not refused where it cannot apply
        self.augment = self.augment or "resized_crop"
        if self.augment not in AUGMENTS:
            raise ValueError(f"augment={self.augment!r} is unknown; there are: {', '.join(AUGMENTS)}.")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would drop the image column: leave it False.")
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} goes by the length of texts, which images "
                "do not have: use random or sequential."
            )
        if self.teacher_dtype is not None and self.teacher_dtype not in DTYPES:
            raise ValueError(f"teacher_dtype={self.teacher_dtype!r} is unknown; there are: {', '.join(DTYPES)}.")
        if self.max_steps == 0:
            raise ValueError("max_steps=0 trains nothing: give at least 1, or -1 to train for num_train_epochs.")
        if sorted(self.lr_step_epochs or []) != list(self.lr_step_epochs or []):
            raise ValueError(f"lr_step_epochs={self.lr_step_epochs} must be in rising order.")
        if self.lr_step_epochs and (self.max_steps > 0 or self.warmup_steps):
            raise ValueError("lr_step_epochs goes with num_train_epochs, not with max_steps or warmup_steps.")
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.save_strategy == "best"):
            self.metric_for_best_model = "top1"
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith(("kl", "ece")):
            self.greater_is_better = False  # transformers asks only whether it is a loss
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # transformers' default costs a collective a step
        if self.label_names is None:
            self.label_names = ["labels"]  # models with a distillation token hide theirs
        super().__post_init__()
        if self.load_best_model_at_end and self.eval_strategy == "no":
            raise ValueError("load_best_model_at_end needs evaluations to choose by: set eval_strategy.")
        _check_trackers(cast(list[str], self.report_to))
        _check_optimizer(self)
        _check_average(self)
        _check_saving(self)
        if self.data_seed is None:
            self.data_seed = self.seed  # the order of the data depends on nothing else
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to pin for, and torch would warn

    @property
    def engine(self) -> str:
        """What spreads the training over processes: "zero0" to "zero3", "fsdp", or "ddp", also where there is one."""
        if self.deepspeed_plugin is not None:
            return f"zero{self.deepspeed_plugin.zero_stage}"
        asked = self.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        return "fsdp" if asked and self.world_size > 1 else "ddp"

    def loss_class(self) -> type[DistillationLoss]:
        return loss_class(self.loss) if self._loss is None else type(self._loss)

    def build_loss(self) -> DistillationLoss:
        """The loss module that `loss`, `loss_kwargs` and `label_smoothing_factor` describe."""
        if self._loss is not None:
            return self._loss
        numbers = named_settings(self.loss) | (self.loss_kwargs or {})
        if self.label_smoothing_factor:
            numbers.setdefault("label_smoothing", self.label_smoothing_factor)
        return get_loss(self.loss, **numbers)

    def with_loss(self, loss: DistillationLoss) -> Self:
        """A copy whose `build_loss` gives this loss, and which names it in `loss` and `loss_kwargs`.

        Raises:
            ValueError: no loss with a name of its own, one with a state, or another label smoothing than these
                arguments ask for.
        """
        name, smoothing = loss_class(type(loss)).name, self.label_smoothing_factor
        if smoothing and loss.label_smoothing != smoothing:
            raise ValueError(
                f"label_smoothing_factor={smoothing} and a loss with label_smoothing={loss.label_smoothing}: leave "
                "label_smoothing_factor out, and give the loss label_smoothing="
            )
        copied = object.__new__(type(self))  # copy.copy would go by __getstate__
        copied.__dict__.update(self.__dict__, loss=name, loss_kwargs=loss.hyperparameters(), _loss=loss)
        return copied

    def check_teacher(self, has_teacher: bool) -> None:
        """Raises ValueError for a teacher loss without a teacher, and for a self-distillation loss with one."""
        requires = self.loss_class().requires
        needs = "teacher_logits" in requires
        others = ", ".join(name for name, loss in LOSSES.items() if ("teacher_logits" in loss.requires) != needs)
        if needs and not has_teacher:
            raise ValueError(
                f"loss={self.loss!r} learns from a teacher and none is given: pass teacher= (--teacher ID), or train "
                f"without one: {others}."
            )
        if requires and not needs and has_teacher:
            raise ValueError(
                f"loss={self.loss!r} is self-distillation and uses no teacher: drop it, or use one of {others}. To "
                f"measure agreement with a teacher only, pass eval_teacher= (or --compare {self.loss})."
            )

    def __getstate__(self) -> dict:
        # The trainer pickles its arguments into every checkpoint: no token may travel with them.
        return {k: None if k.endswith("token") else v for k, v in self.__dict__.items() if k != "_loss"}


_NUMBERS = [f.name for f in fields(DistillationConfig) if re.search(r"\b(int|float)\b", str(f.type))]


def _check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError for trackers that transformers does not know, or that are not installed."""
    if not names:
        return
    from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

    installed = [*get_available_reporting_integrations(), "flyte"]  # which transformers does not look for
    for name in names:
        try:
            get_reporting_integration_callbacks([name])
        except ValueError as error:
            raise ValueError(f"report_to={name!r}: {error} Or none, or all.") from error
        if name not in installed:
            raise ValueError(
                f"report_to={name!r} needs its package: install it, or choose of {', '.join(installed)}, none."
            )


def _check_average(config: DistillationConfig) -> None:
    """Raises ValueError for an average of the weights under an engine that does not keep them whole."""
    if config.ema_warmup and config.ema_decay is None:
        raise ValueError("ema_warmup=True has no effect without ema_decay: set it, to 0.9999 for example.")
    if config.ema_decay is not None and config.engine != "ddp":
        raise ValueError(
            f"ema_decay={config.ema_decay} is supported in one process and with DDP, not with {config.engine}, which "
            "keeps the weights in parts or copies of its own: leave ema_decay out, or launch with DDP."
        )


def _check_saving(config: DistillationConfig) -> None:
    """Raises ValueError for a configuration of ZeRO-3 that saves no student, or of FSDP that loads no teacher."""
    if config.engine == "fsdp" and os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "").lower() == "true":
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading leaves all processes but the first without weights, also of the teacher: "
            "set fsdp_cpu_ram_efficient_loading: false in fsdp_config of accelerate's configuration."
        )
    if config.engine != "zero3":
        return
    zero = config.deepspeed_plugin.deepspeed_config["zero_optimization"]  # type: ignore[union-attr]
    if str(zero.get("stage3_gather_16bit_weights_on_model_save")).lower() != "true":
        raise ValueError(
            "under ZeRO-3 the student is saved only if its weights are gathered. Add to zero_optimization in the "
            'configuration of DeepSpeed: "stage3_gather_16bit_weights_on_model_save": true (or to deepspeed_config in '
            "that of accelerate: zero3_save_16bit_model: true)."
        )


def _check_optimizer(config: DistillationConfig) -> None:
    """Raises ValueError for arguments that the optimizer or the scheduler does not take, and for missing packages."""
    kind = SchedulerType(config.lr_scheduler_type).value
    if config.lr_scheduler_kwargs or kind not in ("linear", "cosine", "constant", "constant_with_warmup"):
        from transformers import get_scheduler  # slow to import

        try:
            optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
            get_scheduler(kind, optimizer, 1, 100, cast(Any, config.lr_scheduler_kwargs))
        except (TypeError, ValueError) as error:
            raise ValueError(f"lr_scheduler_kwargs={config.lr_scheduler_kwargs} do not fit {kind}: {error}") from error
    if config.optim_args or not _optim(config).startswith(("adamw_torch", "sgd")):
        try:
            _optimizer_made_with(config, config.optim_args)
        except (TypeError, ValueError, ImportError, AttributeError) as error:
            given = f" with optim_args={config.optim_args!r} (name=value,...)" if config.optim_args else ""
            raise ValueError(f"optim={_optim(config)!r}{given}: {error}") from error


def check_optim_args(config: DistillationConfig) -> None:
    """Raises ValueError for `optim_args` that the optimizer ignores: transformers drops what it does not know."""
    parts, without = (config.optim_args or "").split(","), _optimizer_made_with(config, None)
    ignored = [part for part in parts if without and part and _optimizer_made_with(config, part) == without]
    if ignored:
        raise ValueError(f"optim_args={','.join(ignored)!r} has no effect on optim={_optim(config)!r}: leave it out.")


def _optim(config: DistillationConfig) -> str:
    return str(getattr(config.optim, "value", config.optim))


def _optimizer_made_with(config: DistillationConfig, optim_args: str | None) -> Any:
    """The class and arguments of the optimizer; None if these depend on the model."""
    from transformers import Trainer  # slow to import

    if any(word in _optim(config) for word in ("galore", "apollo", "lomo")):
        return None
    arguments: Any = SimpleNamespace(**vars(config) | {"optim_args": optim_args})
    return Trainer.get_optimizer_cls_and_kwargs(arguments)


def check_trainer_arguments(args, data_collator, compute_loss_func) -> None:
    """Raises ValueError for what `DistillationTrainer` does not support of a Trainer's arguments."""
    if not isinstance(args, DistillationConfig):
        raise ValueError(f"args must be a DistillationConfig, got {type(args).__name__}.")
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process (DataParallel) are not supported: start one process for each, with "
            "`accelerate launch` or `torchrun`, or choose one with CUDA_VISIBLE_DEVICES."
        )
    if args.parallelism_config is not None and args.parallelism_config.non_data_parallel_size > 1:
        raise ValueError("parallelism_config: tensor, context and sequence parallelism are not supported.")
    for name in ("dispatch_batches", "split_batches"):
        if getattr(args.accelerator_config, name):
            raise ValueError(f"accelerator_config.{name} is not supported: each process reads its own batches.")
    if data_collator is not None and (args.mixup_alpha or args.cutmix_alpha):
        raise ValueError("mixup_alpha and cutmix_alpha need the trainer's own collator: drop them or data_collator=.")
    if compute_loss_func is not None:
        raise ValueError("compute_loss_func= would not be called: pass loss=, a loss of your own (see README).")
