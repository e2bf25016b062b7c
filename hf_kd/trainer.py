"""`DistillationTrainer`: a `transformers.Trainer` whose loss is a distillation loss."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, set_seed

from . import checkpointing, engines, evaluation, optimization, push
from ._compat import check_upstream
from .adapters import check_adapter
from .batch_of_one import batch_of_one_named, check_batches_of_one
from .callbacks import LogSteps, OnTrainBegin
from .checkpointing import full_disk_named, last_checkpoint, load_weights
from .config import DistillationConfig, check_trainer_arguments
from .data import ImageDataset, as_image_dataset, augmentation_of
from .data.collators import evaluation_collator, training_collator
from .data.dataset import check_labels
from .data.order import sampler_of
from .data.wait import DataWait
from .ema import StudentAverage
from .losses import DistillationLoss, Progress, mean_over_ranks
from .metrics.classification import ClassificationMeter
from .metrics.loss_terms import LossTerms
from .models.auxiliary_head import AuxiliaryHead, add_auxiliary_head
from .models.distillation_head import separate_heads, use_distillation_head
from .models.ensemble import aligned_teacher
from .models.forward import id2label_of, logits_by_head, logits_of, num_classes_of
from .models.freezing import freeze_backbone, hold_statistics
from .models.preprocessing import Preprocessing
from .models.teacher import Teacher
from .ranks import end_cleanly, failures_named, loss_terms
from .reporting.collect import write_plan
from .spec import Experiment
from .step_data import count_samples, samples_of_step
from .stopping import SaveOnStop, protect_workers
from .teacher_check import measure_teacher, warn_near_chance


class DistillationTrainer(Trainer):
    """Trains a student with `args.loss`, evaluates it, and measures it against a teacher.

    Args:
        model: the student, an image classifier: `(B, 3, H, W) -> logits (B, C)`. Default: what `model_init` makes.
        args: a `DistillationConfig`.
        teacher: a `Teacher` (see `load_teacher`), an id to load one from, or a list of them (see `TeacherEnsemble`).
            Its classes are put in the student's order by name. It is never trained or saved, and always in eval mode.
        eval_teacher: a teacher for the agreement metrics only; default: `teacher`.
        train_dataset, eval_dataset: a `datasets.Dataset` with an image column, or any other map-style dataset of
            pairs (image, label), or of dicts with `pixels`, `image` or `img` and with `label` or `labels`. It is
            decoded and, for training, augmented (`args.augment`) here. Items with `pixel_values`, normalised for the
            student, stay as they are; the teacher is shown what inverting the student's preprocessing gives.
        processing_class: the student's image processor; its `Preprocessing` is measured from it.
        data_collator: default: `TrainingCollator` and `EvaluationCollator`. One of your own must give their keys; it
            gets the items of any dataset without an image column as they are.
        loss: a `DistillationLoss` in the place of `args.loss` and `args.loss_kwargs`; `self.args` is then a copy that
            names it.
        plan: what is trained, as plan.json and the record keep it; default: what the trainer knows of it.
        callbacks, model_init, **kwargs: as in `Trainer`.

    A term that depends on the batch as a whole (USKD's mean of S_t^2) is averaged over the ranks; with gradient
    accumulation it is that of each micro-batch. Everything else is exact for accumulation, uneven micro-batches too.

    Attributes:
        augmentation_applied (`str | None`): `args.augment` if it applies to the training dataset.
        auxiliary_head (`AuxiliaryHead | None`): of a loss that requires aux_logits. It is a submodule of the
            student, `aux_head`, until `train()` returns, and again in the next `train()`.
        average (`StudentAverage`): of `args.ema_decay`. When `train()` has returned, the student has it.
        skipped, eval_skipped (`dict[str, str]`): the images that this process could not decode in training and in
            evaluation, in order of appearance, and of which kind each is (see `UndecodableImage`).
        class_counts (`dict`): images and top-1 hits by class in the last evaluation, by its `metric_key_prefix`.
    """

    # compute_loss scales every micro-batch by its share of the optimizer step's samples.
    loss_is_scaled_for_ga = True
    args: DistillationConfig
    model: Any  # a module, with whatever its class has
    train_dataset: Any
    lr_scheduler: Any
    hub_model_id: Any
    teacher_metrics: dict[str, float] | None = None
    auxiliary_head: AuxiliaryHead | None = None
    _steps_per_epoch = 1
    _seconds_before = 0.0  # trained by earlier sessions of a run that is resumed
    _meter: ClassificationMeter | None = None  # in evaluation_loop only, as the next three
    _labelled = True  # whether what is evaluated has labels
    _evaluated = 0  # how many images are
    _skipped_now: dict[str, str] = {}  # which of them could not be decoded
    _resumed_from: str | None = None
    _diverged: str | None = None  # what this process of several has met
    _staging: str | None = None  # where the checkpoint is that is being saved

    def __init__(
        self,
        model: nn.Module | None = None,
        args: DistillationConfig | None = None,
        teacher: Teacher | str | Sequence[Teacher | str] | None = None,
        eval_teacher: Teacher | str | Sequence[Teacher | str] | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        data_collator=None,
        callbacks=None,
        loss: DistillationLoss | None = None,
        model_init=None,
        plan: Experiment | None = None,
        **kwargs,
    ):
        check_upstream(DistillationTrainer)
        check_trainer_arguments(args, data_collator, kwargs.get("compute_loss_func"))
        assert args is not None  # as the check has seen
        args = args if loss is None else args.with_loss(loss)
        args.check_teacher(teacher is not None)
        self.plan = plan
        self.preprocessing = Preprocessing(processing_class) if processing_class is not None else None
        self.train_loss = args.build_loss().to(args.device)
        self.train_loss.check_trainable()
        self.args, self.model_init, self._made, student = args, model_init, None, cast(Any, model)
        if model is None and model_init is not None:
            set_seed(args.seed)  # as the Trainer does before it calls model_init
            student = self._made = super().call_model_init()
        self._own_collator = data_collator is None
        check_adapter(student)
        engines.check_whole(student)
        self._heads_apart = use_distillation_head(self.train_loss, student, args)
        id2label = id2label_of(student)
        needs_labels = self.train_loss.needs_labels
        train_dataset = as_image_dataset(train_dataset, id2label, args, self._own_collator, needs_labels)
        if needs_labels:
            check_labels(train_dataset, args.loss)
        eval_dataset = as_image_dataset(eval_dataset, id2label, args, self._own_collator)
        self.augmentation_applied = None if train_dataset is None else augmentation_of(train_dataset, args)
        align = functools.partial(aligned_teacher, model=student, id2label=id2label, args=args)
        self.teacher = align(teacher) if "teacher_logits" in self.train_loss.requires else None
        same = eval_teacher is None or eval_teacher is teacher
        self.eval_teacher = (self.teacher or align(teacher)) if same else align(eval_teacher)
        self.skipped: dict[str, str] = {}
        self.eval_skipped: dict[str, str] = {}
        self.class_counts: dict[str, dict[str, list[int]]] = {}
        self._terms, self._stop = LossTerms(), SaveOnStop()
        self.average = StudentAverage(args.ema_decay, args.ema_warmup)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[self.average, *(callbacks or ()), OnTrainBegin(self._begin), self._stop, LogSteps()],
            model_init=model_init,
            **kwargs,
        )
        if self.train_loss.reduce_mean is None and args.world_size > 1:
            self.train_loss.reduce_mean, self.train_loss.world_size = mean_over_ranks, args.world_size
        for each in filter(None, (self.teacher, self.eval_teacher)):
            each.to(args.device)
        self._make_head(self.model)

    # ---- the student ----

    def create_accelerator_and_postprocess(self) -> None:
        engines.forget_accelerator()
        super().create_accelerator_and_postprocess()
        end_cleanly()

    def call_model_init(self, trial=None):
        made, self._made = self._made, None
        if made is None:  # for the first time in __init__, before the Trainer asks
            made = super().call_model_init(trial)
            self._make_head(made)
        return made

    def _make_head(self, student: Any) -> None:
        if self.args.freeze_backbone:
            freeze_backbone(student)
        engines.fit_for_fsdp(self, student)
        if "aux_logits" in self.train_loss.requires:
            self._remove_head()
            args, size = self.args, self._need_preprocessing().size
            self.auxiliary_head = add_auxiliary_head(
                student, num_classes_of(student), size, args.feature_module, args.seed
            )
        if self._heads_apart:
            separate_heads(student, True)

    def _add_heads(self) -> None:
        """Undoes `_remove_head`, for another training."""
        student = self.accelerator.unwrap_model(self.model)
        if self.auxiliary_head is not None:
            self.auxiliary_head.add_to(student)
        if self._heads_apart:
            separate_heads(student, True)

    def _remove_head(self) -> None:
        """Makes the student a plain model. DeepSpeed keeps the parameters: there the submodule stays."""
        student = self.accelerator.unwrap_model(self.model)
        if self.auxiliary_head is not None:
            self.auxiliary_head.remove_from(student, hooks_only=self.is_deepspeed_enabled)
        if self._heads_apart:
            separate_heads(student, False)

    def _need_preprocessing(self) -> Preprocessing:
        if self.preprocessing is None:
            raise ValueError("the student's image processor is needed here: pass processing_class=.")
        return self.preprocessing

    # ---- data ----

    @property
    def train_image_size(self) -> int | None:
        """Side in pixels of every training image, the longer one where the student's input is a rectangle: the largest
        of student, teacher and evaluation teacher, unless set. None without an image processor: images are stacked as
        they are."""
        if self.args.train_image_size or self.preprocessing is None:
            return self.args.train_image_size
        sizes = [teacher.preprocessing.size for teacher in filter(None, (self.teacher, self.eval_teacher))]
        return max(map(max, [self.preprocessing.size, *sizes]))

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        labelled = description != "test"
        with_labels = self.train_loss.needs_labels if is_training else labelled
        dataset = as_image_dataset(dataset, id2label_of(self.model), self.args, self._own_collator, with_labels)
        size: Any = self.train_image_size
        if size and self.preprocessing is not None:
            size = self.preprocessing.training_shape(size)
        if is_training and isinstance(dataset, ImageDataset):
            self.augmentation_applied = augmentation_of(dataset, self.args)
            dataset = dataset.for_training(self.augmentation_applied, size, self.args.data_seed, with_labels)
        sampler = sampler_of(self.args, dataset, batch_size, is_training)
        if is_training:
            check_batches_of_one(self, dataset, batch_size)
        if self._own_collator and is_training:
            self.data_collator = training_collator(self.args, self.model, size, self.preprocessing)
        elif self._own_collator:
            teachers = getattr(self.eval_teacher, "preprocessing", None)
            self.data_collator = evaluation_collator(self.preprocessing, teachers)
        if labelled and sampler is not None:  # predictions are in the rows' order
            sampler_fn = lambda _: sampler  # noqa: E731
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = False  # an evaluation counts every image, and training has its sampler
        try:
            loader = super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
            return protect_workers(loader)
        finally:
            self.args.dataloader_drop_last = drop_last

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        read = functools.partial(super().get_batch_samples, epoch_iterator, num_batches, device)
        with self._data_wait.waiting():
            return samples_of_step(self, read, device)

    def get_eval_dataloader(self, eval_dataset=None):
        if eval_dataset is None or isinstance(eval_dataset, str):
            return super().get_eval_dataloader(eval_dataset)
        # transformers keeps one loader for all datasets that are passed, where workers persist.
        return self._get_dataloader(eval_dataset, "Evaluation", self.args.eval_batch_size, self._get_eval_sampler)

    def _run_epoch(self, **kwargs):  # type: ignore[override]
        self._steps_per_epoch = kwargs["num_update_steps_per_epoch"]
        # accelerate and transformers forward set_epoch to some datasets and samplers only.
        batches = kwargs["train_dataloader"].batch_sampler
        for part in (self.train_dataset, getattr(batches, "batch_sampler", batches)):
            if hasattr(part, "set_epoch"):
                part.set_epoch(kwargs["epoch"])
        return super()._run_epoch(**kwargs)

    def _get_num_items_in_batch(self, batch_samples: list, device) -> torch.Tensor | int | None:
        return count_samples(self, batch_samples)

    get_decay_parameter_names = optimization.get_decay_parameter_names
    create_scheduler = optimization.create_scheduler

    # ---- one step ----

    def _student_input(self, inputs: dict) -> torch.Tensor:
        values = inputs.get("pixel_values")
        if values is None:
            values = self._need_preprocessing()(inputs["pixels"], cropped=True)
        return values.to(next(self.model.parameters()).dtype)

    def _teacher_logits(self, teacher: Teacher | None, inputs: dict) -> torch.Tensor | None:
        if teacher is None:
            return None
        pixels = inputs.get("teacher_pixels", inputs.get("pixels"))
        if pixels is None:
            pixels = self._need_preprocessing().denormalize(inputs["pixel_values"])
        return teacher(pixels, cropped=True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The sum of the loss's terms, as this micro-batch's share of the mean over the whole optimizer step."""
        if self.args.freeze_backbone and model.training:
            hold_statistics(self.model)
        # The wrapped model, with a hook's output where there is an auxiliary head; never labels: transformers would
        # compute a loss of their own, and for float labels rewrite their config.
        with batch_of_one_named(), engines.unused_weights_named():
            output = model(self._student_input(inputs))
        logits: Any = logits_of(output)
        labels = inputs["labels"]
        required: dict[str, torch.Tensor | None] = {"teacher_logits": self._teacher_logits(self.teacher, inputs)}
        if "aux_logits" in self.train_loss.requires:
            required["aux_logits"] = output["aux_logits"]
        if self._heads_apart:
            logits, required["distillation_logits"] = logits_by_head(output)
        if model.training:
            step = float(self.state.global_step)
            self.train_loss.progress = Progress(step, float(self.state.max_steps), step / self._steps_per_epoch)
        terms = loss_terms(self, logits, labels, required)
        share = 1.0
        if num_items_in_batch is not None:  # DDP averages over ranks, so each counts for `world_size`
            share = len(labels) * self.args.world_size / num_items_in_batch
        if model.training:
            with torch.no_grad():
                diagnostics = self.train_loss.diagnostics(terms, labels, **required)
            self._terms.add(terms, diagnostics, share, self.state.global_step)
        loss = sum(term * share for term in terms.values())
        return (loss, {"logits": logits}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of every term since the last log, as `loss_NAME`; they add up to `loss`. Raises
        FloatingPointError when the loss is not finite, which nothing heals. For `diagnostic_NAME` see `LossTerms`."""
        step = self.state.global_step
        if "loss" in logs:
            logs |= self._terms.means(step, self.accelerator.reduce)
            logs["data_wait"] = self._data_wait.share(self.args.dataloader_num_workers)
        if "loss" in logs or "train_runtime" in logs:  # of all sessions of a run that was resumed
            logs["seconds"] = self._seconds_before + time.perf_counter() - self._started
        super().log(logs, start_time)
        checkpointing.check_finite_loss(logs, step, self.args.output_dir)

    def floating_point_ops(self, inputs) -> int:
        return 0  # transformers estimates them from token counts, which images have none of

    # ---- evaluation ----

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Adds to the usual metrics the student's `loss` (plain cross entropy), `top1`, `macro_top1`, `top5`, `ece`,
        with a teacher `agreement`, `kl`, `teacher_top1` and `teacher_errors_repeated`, all accumulated in constant
        memory, and `samples`, the images counted.

        `predict` leaves them out without labels, and gives NaN for an image that could not be decoded. ValueError if
        another evaluation does not count every image that could be.
        """
        loop = functools.partial(super().evaluation_loop, dataloader, description, prediction_loss_only, ignore_keys)
        with self.average.in_student():
            return evaluation.measured(self, loop, dataloader, description == "Prediction", metric_key_prefix)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """`(loss, logits, labels)` of a batch: labels if there are any, no logits with `prediction_loss_only`."""
        return evaluation.prediction_step(self, model, inputs, prediction_loss_only)

    measure_teacher = measure_teacher

    # ---- training, saving, resuming ----

    @failures_named()
    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):  # type: ignore[override]
        """Trains; see `Trainer.train`. `resume_from_checkpoint=True` takes the newest complete checkpoint.

        Raises:
            KeyboardInterrupt: after Ctrl-C, once the state is saved.
            TrainingStopped: so after SIGTERM, SIGUSR1 or `max_hours`. Uncaught, it ends Python with exit status 75.
            RankFailure: another process has failed.
        """
        with self._stop.stopping(self):
            try:
                checkpoint = resume_from_checkpoint or None
                if checkpoint is True:
                    checkpoint = last_checkpoint(self.args.output_dir)
                    if checkpoint is None:
                        raise ValueError(f"there is no complete checkpoint in {self.args.output_dir} to resume from.")
                write_plan(self, checkpoint)
                if self.teacher is not None and self.args.teacher_check_batches:
                    warn_near_chance(self)
                self._resumed_from = checkpoint
                if self.model_init is None:
                    self._add_heads()
                return super().train(checkpoint, **kwargs)
            finally:
                self.average.end()
                self._remove_head()

    def _begin(self) -> None:
        """When training begins, with the state of the checkpoint that it continues from, if any."""
        self._terms, self._staging, self._diverged, self._data_wait = LossTerms(), None, None, DataWait()
        self._started = time.perf_counter()  # not before: DeepSpeed may have been compiled
        before = [entry["seconds"] for entry in self.state.log_history if "seconds" in entry]
        self._seconds_before = before[-1] if before else 0.0
        checkpointing.restore_skipped(self, self._resumed_from)
        self.average.begin(self.accelerator.unwrap_model(self.model), self.state.max_steps, self._resumed_from)
        if self.args.should_save:
            checkpointing.set_aside(self.args.output_dir, self._resumed_from, self.state.global_step)

    def _get_output_dir(self, trial):
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        folder = self._get_output_dir(trial)
        with full_disk_named(folder), checkpointing.complete_checkpoint(self, folder) as self._staging:
            super()._save_checkpoint(model, trial)
        self._staging = None
        if self._stop.agreed:  # not the end: else only the best checkpoint would be kept of the two
            self.state.best_model_checkpoint = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the student as a plain model, and the auxiliary head beside it in checkpoints only. Pushes nothing."""
        with full_disk_named(output_dir or self.args.output_dir):
            super().save_model(output_dir, _internal_call=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        student = self.accelerator.unwrap_model(self.model)
        with self.average.in_student():
            super()._save(output_dir, checkpointing.weights_to_save(student, self.processing_class, state_dict))
        if self._staging and self.args.should_save:
            checkpointing.save_head(student, state_dict, cast(str, output_dir))
            self.average.save_trained(cast(str, output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_weights(self.accelerator.unwrap_model(model or self.model), resume_from_checkpoint)

    def _load_best_model(self):
        self.average.end()  # the best one takes its place
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_best_model()
        load_weights(self.accelerator.unwrap_model(self.model), cast(str, self.state.best_model_checkpoint))

    # ---- pushing: transformers would make the repository first, and upload all that is in the folder ----

    init_hf_repo = push.init_hf_repo
    create_model_card = push.create_model_card
    push_to_hub = push.push_trained  # type: ignore[assignment]  # neither blocking nor further arguments
