"""The trainer of a run, and how long its steps take, which decides the number of steps of ce_same_time."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PrinterCallback, TrainerCallback, set_seed

from ..config import DistillationConfig
from ..data import ImageData, as_image_dataset
from ..data.transforms import forked_rng
from ..losses import loss_source
from ..models.ensemble import TeacherEnsemble
from ..models.student import load_student
from ..models.teacher import Teacher, load_teacher
from ..reporting.controls import PERMUTED, RANDOM, SAME_TIME
from ..spec import STUDENT_OPTIONS, EnsembleSource, Experiment, RunSpec, options
from ..stopping import TrainingStopped, stop_error
from ..trainer import DistillationTrainer

WARMUP, STEPS = 2, 20  # optimizer steps that are not measured, and those that are


def config_of(
    experiment: Experiment, spec: RunSpec, token: str | None = None, other: Mapping[str, Any] | None = None
) -> DistillationConfig:
    """The arguments of a run. A loss of the user's own must be in the file that the plan was made with."""
    source = spec.loss.source
    if source and (now := loss_source(spec.loss.name)) != source:  # before the loss is imported
        raise ValueError(
            f"{source['path']} is not the file that the plan was made with (sha256 {source['sha256'][:12]} there, "
            f"{(now or {}).get('sha256', 'missing')[:12]} here): restore it, or start again in another --output_dir."
        )
    here = {"output_dir": str(experiment.folder(spec)), "hub_token": token, "resume_from_checkpoint": None}
    return DistillationConfig(**{**experiment.as_trained(spec).arguments(), **here, **(other or {})})


def teacher_of(experiment: Experiment, data: ImageData, random_seed: int | None = None) -> Teacher | None:
    """The plan's teacher, if it has one; with a seed its architecture with random weights."""
    # A seed has 32 bits: what is above makes the others' seeds, which no other run has.
    seeds = [None if random_seed is None else random_seed + (i << 32) for i in range(len(experiment.teachers))]
    teachers = [
        load_teacher(source.id, id2label=data.names, class_map=source.class_map, random_seed=seed, **source.hub)
        for source, seed in zip(experiment.teachers, seeds, strict=True)
    ]
    if isinstance(experiment.teacher, EnsembleSource):
        return TeacherEnsemble(teachers, experiment.teacher.weights, data.names)
    return teachers[0] if teachers else None


def make_trainer(
    experiment: Experiment, spec: RunSpec, config: DistillationConfig, data: ImageData, teacher: Teacher | None
) -> DistillationTrainer:
    """The trainer of a run, from its seed. The teacher is the plan's, which also evaluates a run with another one."""
    source, train = experiment.student, data.train
    learns = "teacher_logits" in config.loss_class().requires
    taught_by = teacher_of(experiment, data, spec.seed) if spec.variation == RANDOM else teacher
    if spec.variation == PERMUTED:
        train = as_image_dataset(train, dict(enumerate(data.names)), config).with_partners(spec.seed)
    set_seed(spec.seed)  # the same initial weights for every loss
    student, processor = load_student(source.id, id2label=data.names, **source.hub | options(source, STUDENT_OPTIONS))
    return DistillationTrainer(
        student,
        config,
        teacher=taught_by if learns else None,
        eval_teacher=teacher,
        train_dataset=train,
        eval_dataset=data.eval,
        processing_class=processor,
        plan=experiment.of(spec),
    )


def measured_same_time_ratio(experiment: Experiment, data: ImageData, teacher: Teacher | None) -> float:
    """The time of the slowest variant's step by that of ce, at least 1.

    All processes take part, and the first one's counts. What is trained afterwards does not depend on the measurement,
    and nothing stays on the disk.
    """
    here, folders = PartialState().is_main_process, list[Any]([None])
    if here:
        print("measuring the time of a step with each loss, for ce_same_time")
        folders = [tempfile.mkdtemp()]
    broadcast_object_list(folders)
    one_seed = [spec for spec in experiment.runs if spec.seed == experiment.runs[0].seed]
    (plain,) = (spec for spec in one_seed if spec.variation == SAME_TIME)
    try:
        with forked_rng():
            # The first reads and decodes the images that all of them see, and is not counted.
            _, ce = (_step_seconds(experiment, plain, folders[0], data, teacher) for _ in range(2))
            variants = [spec for spec in one_seed if spec.control is None]
            others = {spec.name: _step_seconds(experiment, spec, folders[0], data, teacher) for spec in variants}
    finally:
        if here:
            shutil.rmtree(folders[0], ignore_errors=True)
    slowest = max(others, key=lambda name: others[name])
    ratio = round(max(1.0, others[slowest] / ce), 3) if ce else 1.0
    if here:
        times = f"{others[slowest]:.3g} s with {slowest} and {ce:.3g} s with ce"
        print(f"a step takes {times}: ce_same_time has {ratio:g} times the steps")
    return ratio


def _step_seconds(
    experiment: Experiment, spec: RunSpec, folder: str, data: ImageData, teacher: Teacher | None
) -> float:
    """The mean time of `STEPS` steps of a run, with reading the images and without evaluations; 0 if it diverges."""
    training = {"max_steps": WARMUP + STEPS, "lr_step_epochs": None, "warmup_steps": 0, "teacher_check_batches": 0}
    if spec.settings.get("ema_decay") is not None:
        training["ema_warmup"] = True  # costs nothing, and no decay is too long for so few steps then
    silent = {
        **dict.fromkeys(("eval_strategy", "save_strategy", "logging_strategy"), "no"),
        **dict.fromkeys(("load_best_model_at_end", "eval_on_start"), False),
        "report_to": "none",
        "disable_tqdm": True,
    }
    config = config_of(experiment, spec, other={"output_dir": folder, **training, **silent})
    clock, trainer = _Clock(), make_trainer(experiment, spec, config, data, teacher)
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
    except FloatingPointError:  # as the run itself will
        pass
    except (TrainingStopped, KeyboardInterrupt):
        raise stop_error(trainer._stop.agreed or "Ctrl-C", "stopped before training") from None
    return (clock.at[1] - clock.at[0]) / STEPS if len(clock.at) == 2 else 0.0


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.at: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (WARMUP, WARMUP + STEPS):
            if args.device.type != "cpu":
                torch.accelerator.synchronize()
            self.at.append(time.perf_counter())
