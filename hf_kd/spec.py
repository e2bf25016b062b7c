"""The frozen plan of an experiment: everything that its results depend on, as `plan.json` keeps it.

A field marked `resumable` may differ between a run and its continuation: it does not change what is learned.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from .launcher import resume_command
from .reporting.controls import SAME_TIME, TRAINED_OTHERWISE
from .reporting.record import plain
from .reporting.significance import BASELINE

SCHEMA_VERSION = 2  # 1: the images of an epoch were in another order
PLAN_FILE = "plan.json"
PYTHON_RESUME = "trainer.train(resume_from_checkpoint=True)"  # of a trainer that was built in Python
# Options of the command line that are fields of a source and arguments of `load_student` and `load_data`.
STUDENT_OPTIONS = ("trust_remote_code", "from_scratch", "image_size", "image_mean", "image_std", "model_kwargs")
DATA_OPTIONS = (
    "train_split eval_split eval_fraction image_column label_column class_names max_train_samples max_eval_samples "
    "streaming"
).split()
# Arguments of the trainer that say how a run is carried out and reported, not what is learned.
EXECUTION = (
    "output_dir run_name disable_tqdm dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory "
    "dataloader_prefetch_factor logging_steps logging_strategy logging_first_step log_level log_level_replica "
    "log_on_each_node report_to project trackio_space_id trackio_bucket_id trackio_static_space_id save_strategy "
    "save_steps save_total_limit save_on_each_node skip_memory_metrics ddp_timeout resume_from_checkpoint push_to_hub "
    "hub_model_id hub_strategy hub_private_repo hub_revision hub_always_push max_hours"
).split()
# Arguments that are newer than plans which are still continued, and off by another value than None or False.
OFF = {"distillation_alpha": 0.5}
# Of lr_scheduler_kwargs, those that count steps.
STEPS_OF_SCHEDULERS = {"num_stable_steps", "num_decay_steps", "timescale"}


def options(source: Any, keys: Sequence[str]) -> dict[str, Any]:
    return {key: getattr(source, key) for key in keys}


def resumable(default: Any = None) -> Any:
    return field(default=default, metadata={"resumable": True})


class _Source:
    def __str__(self) -> str:
        source: Any = self
        revision = source.commit or source.revision
        text = f"{source.id} at {revision[:12]}" if revision else str(source.id)
        return f"{text}, from scratch" if getattr(source, "from_scratch", False) else text


@dataclass(frozen=True)
class ModelSource(_Source):
    """Where a student or teacher comes from. `commit` is the 40 hex digits that `revision` stood for."""

    id: str
    revision: str | None = None
    commit: str | None = None
    trust_remote_code: bool = False
    from_scratch: bool = False
    image_size: int | None = None
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    model_kwargs: dict[str, Any] | None = None
    class_map: Any = None
    # Teachers: how many images of our evaluation split it was trained on; None: its record does not tell.
    seen_evaluation_images: int | None = resumable()

    @property
    def hub(self) -> dict[str, Any]:
        """What all functions that load it take."""
        return {"revision": self.commit or self.revision, "trust_remote_code": self.trust_remote_code}


@dataclass(frozen=True)
class EnsembleSource:
    """Several teachers, of whose probabilities the mean is taken with `weights`, which add up to 1."""

    teachers: tuple[ModelSource, ...]
    weights: tuple[float, ...]

    def __str__(self) -> str:
        return " + ".join(f"{weight:.4g} × {each}" for weight, each in zip(self.weights, self.teachers, strict=True))


@dataclass(frozen=True)
class DataSource(_Source):
    """Which images are trained and evaluated on. `fingerprint` identifies them; see `hf_kd.data.ImageData`."""

    id: str | None = None
    config_name: str | None = None
    revision: str | None = None
    commit: str | None = None
    train_split: str | None = None
    eval_split: str | None = None
    eval_fraction: float | None = None
    image_column: str | None = None
    label_column: str | None = None
    class_names: list[str] | None = None
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    streaming: bool = False
    allow_unlabelled: bool = False  # no loss needs labels in training; see `load_data`
    stream_workers: int | None = None  # loader workers, on which the order of a stream depends
    train_size: int | None = None
    eval_size: int | None = None
    classes: list[str] | None = None
    fingerprint: str | None = None
    split_sizes: dict[str, int] | None = None
    split_fingerprints: dict[str, str] | None = None

    @property
    def load_arguments(self) -> dict[str, Any]:
        """What `load_data` takes to load it."""
        origin = {"name": self.id, "config_name": self.config_name, "revision": self.commit or self.revision}
        return origin | options(self, (*DATA_OPTIONS, "allow_unlabelled"))


@dataclass(frozen=True)
class LossSpec:
    """A loss by name, its hyperparameters, and for a loss of the user's own the file and its hash."""

    name: str
    hyperparameters: dict[str, Any]
    source: dict[str, str] | None = None


@dataclass(frozen=True)
class Schedule:
    """How long to train and with which learning rate. The length may change where the past does not depend on it."""

    num_train_epochs: float
    max_steps: int
    learning_rate: float
    lr_scheduler_type: str
    lr_scheduler_kwargs: dict | None
    lr_step_epochs: list[float] | None
    lr_step_factor: float
    warmup_steps: float

    @property
    def past_is_fixed(self) -> bool:
        """Whether the learning rate of the steps so far is the same however long training goes on."""
        if self.lr_step_epochs or self.lr_scheduler_type == "constant":
            return True
        return self.lr_scheduler_type == "constant_with_warmup" and self.warmup_steps >= 1

    def stretched(self, ratio: float) -> Self:
        """The same schedule with `ratio` times the steps."""
        options, warmup = dict(self.lr_scheduler_kwargs or {}), self.warmup_steps
        if self.lr_scheduler_type == "inverse_sqrt" and not warmup:
            options.setdefault("timescale", 10_000)  # transformers' default
        options |= {key: round(ratio * options[key]) for key in STEPS_OF_SCHEDULERS & options.keys()}
        return dataclasses.replace(
            self,
            num_train_epochs=ratio * self.num_train_epochs,
            max_steps=round(ratio * self.max_steps) if self.max_steps > 0 else self.max_steps,
            lr_scheduler_kwargs=options or self.lr_scheduler_kwargs,
            lr_step_epochs=self.lr_step_epochs and [ratio * epoch for epoch in self.lr_step_epochs],
            warmup_steps=round(ratio * warmup) if warmup >= 1 else warmup,  # below 1: a share of the steps
        )


@dataclass(frozen=True)
class RunSpec:
    """One training: a loss and a seed. `settings` are the remaining arguments of `DistillationConfig`."""

    name: str
    seed: int
    data_seed: int
    processes: int
    loss: LossSpec
    schedule: Schedule
    settings: dict[str, Any]
    execution: dict[str, Any] = resumable()  # the arguments named in EXECUTION
    folder: str = "."  # of its results, within the experiment's
    engine: str = "ddp"  # of the training, as `DistillationConfig.engine` has it
    control: dict[str, Any] | None = resumable()  # kind and of, see `hf_kd.reporting.controls`
    # random_teacher, permuted_teacher or ce_same_time, if that is how it is trained
    variation: str | None = None

    @property
    def key(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def name_and_seed(self) -> str:
        """As `--only` names it."""
        return f"{self.name}:{self.seed}"

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `DistillationConfig` that this run is trained with."""
        return {
            **self.settings,
            **dataclasses.asdict(self.schedule),
            **self.execution,
            "loss": self.loss.name,
            "loss_kwargs": self.loss.hyperparameters,
            "seed": self.seed,
            "data_seed": self.data_seed,
        }


@dataclass(frozen=True)
class Experiment:
    """A comparison, or a single run: what is shared by its runs, and the runs."""

    output_dir: str = resumable("")
    student: ModelSource = field(default_factory=lambda: ModelSource(""))
    teacher: ModelSource | EnsembleSource | None = None
    data: DataSource = field(default_factory=DataSource)
    train_image_size: int | None = None
    runs: tuple[RunSpec, ...] = ()
    preset: dict[str, Any] | None = resumable()  # name, source, and which of its settings the user has changed
    provenance: dict[str, str] | None = resumable()  # "you" or "preset NAME", by setting
    command: str | None = resumable()
    against: str = resumable(BASELINE)  # the variant that the others are tested against
    push: dict[str, Any] | None = resumable()  # repo_id, private, revision, and the folder of the run that is pushed
    requirements: dict[str, Any] | None = resumable()  # optimizer steps of a run, parameters, disk space in bytes
    same_time_ratio: float | None = resumable()  # steps of ce_same_time by those of the others; None: not known yet
    versions: dict[str, Any] | None = resumable()
    schema_version: int = SCHEMA_VERSION

    @property
    def teachers(self) -> tuple[ModelSource, ...]:
        """All of them, whether none, one or several."""
        if isinstance(self.teacher, EnsembleSource):
            return self.teacher.teachers
        return (self.teacher,) if self.teacher else ()

    def folder(self, run: RunSpec) -> Path:
        return Path(self.output_dir) / run.folder

    def as_trained(self, run: RunSpec) -> RunSpec:
        """A run with the schedule that it is trained with, which is longer for ce_same_time."""
        if run.variation != SAME_TIME or self.same_time_ratio is None:
            return run
        return dataclasses.replace(run, schedule=run.schedule.stretched(self.same_time_ratio))

    def with_same_time_ratio(self, ratio: float | None) -> Self:
        """The plan with that ratio, and a command that repeats it."""
        command = self.command
        if command and ratio and "--same_time_ratio" not in command:
            command += f" --same_time_ratio {ratio:g}"
        return dataclasses.replace(self, same_time_ratio=ratio, command=command)

    def control(self, run: RunSpec) -> dict[str, Any] | None:
        """What the record says of a run that is a control."""
        ratio = {"ratio": self.same_time_ratio} if run.variation == SAME_TIME else {}
        return run.control and {**run.control, **ratio}

    def of(self, run: RunSpec) -> Self:
        """The plan of one of the runs alone, in its own folder."""
        return dataclasses.replace(
            self, output_dir=str(self.folder(run)), runs=(dataclasses.replace(run, folder="."),)
        )

    def to_dict(self) -> dict[str, Any]:
        return plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The plan that `to_dict` described; ValueError if its schema is another."""
        version = values.get("schema_version")
        if version != SCHEMA_VERSION:
            versions = f"{PLAN_FILE} has schema version {version}, this hf_kd reads {SCHEMA_VERSION}"
            raise ValueError(f"{versions}: go on with the hf_kd of the plan's `versions`.")
        fields = {
            "student": ModelSource(**values["student"]),
            "teacher": values["teacher"] and _teacher_from_dict(values["teacher"]),
            "data": DataSource(**values["data"]),
            "runs": tuple(_run_from_dict(run) for run in values["runs"]),
        }
        return cls(**{**values, **fields})


def _teacher_from_dict(values: Mapping[str, Any]) -> ModelSource | EnsembleSource:
    if "teachers" not in values:
        return ModelSource(**values)
    return EnsembleSource(tuple(ModelSource(**each) for each in values["teachers"]), tuple(values["weights"]))


def _run_from_dict(values: Mapping[str, Any]) -> RunSpec:
    fields = {"loss": LossSpec(**values["loss"]), "schedule": Schedule(**values["schedule"])}
    return RunSpec(**{**values, **fields})


def run_spec(
    config,
    name: str | None = None,
    folder: str = ".",
    loss_source: dict | None = None,
    control: dict[str, Any] | None = None,
) -> RunSpec:
    """The spec of a run with these arguments, a `DistillationConfig`; `folder` is within the experiment's."""
    left_out = {"local_rank", "loss_kwargs"}
    values = {key: v for key, v in config.to_dict().items() if key not in left_out and not key.endswith("token")}
    values = plain(values)
    loss = values.pop("loss")
    if loss_source and ".py:" in loss:  # absolute, to resume from anywhere
        loss = f"{loss_source['path']}:{loss.rpartition(':')[2]}"
    return RunSpec(
        name=name or config.loss_class().name,
        seed=values.pop("seed"),
        data_seed=values.pop("data_seed"),
        processes=config.world_size,
        loss=LossSpec(loss, plain(config.build_loss().hyperparameters()), loss_source),
        schedule=Schedule(**{key: values.pop(key) for key in Schedule.__dataclass_fields__}),
        execution={key: values.pop(key) for key in EXECUTION},
        settings=values,  # the remaining ones
        folder=folder,
        engine=config.engine,
        control=control,
        variation=control["kind"] if control and control["kind"] in TRAINED_OTHERWISE else None,
    )


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """The fields of two specs that are not resumable and differ, each as "field (old value there, new value here)".

    Of experiments, the runs of one folder are compared; others may be added.
    """
    found: list[str] = []
    for f in dataclasses.fields(old):
        name, there, here = f"{path}{f.name}", getattr(old, f.name), getattr(new, f.name)
        if f.name == "schedule" and here.past_is_fixed:
            there = dataclasses.replace(there, num_train_epochs=here.num_train_epochs, max_steps=here.max_steps)
        if f.metadata.get("resumable") or there == here:
            continue
        prefix = "" if f.name in ("schedule", "settings") else f"{name}."
        if f.name == "runs":
            runs = {run.folder: run for run in here}
            for run in there:
                now = runs.get(run.folder, run)
                found += differences(run, now if new.data.streaming else _launched_alike(run, now))
        elif dataclasses.is_dataclass(there) and type(there) is type(here):
            found += differences(there, here, prefix)
        elif f.name == "teachers" and len(there) == len(here):
            for i, pair in enumerate(zip(there, here, strict=True)):
                found += differences(*pair, f"{name}[{i}].")
        elif isinstance(there, dict) and isinstance(here, dict):
            keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
            # What an earlier hf_kd did not have yet, and is off, is no difference.
            keys = [key for key in keys if key in there or here[key] != OFF.get(key, False)]
            found += [_difference(f"{prefix}{key}", there.get(key), here.get(key)) for key in keys]
        else:
            found.append(_difference(name, there, here))
    return list(dict.fromkeys(found))


def _launched_alike(old: RunSpec, new: RunSpec) -> RunSpec:
    """`new` with the processes of `old`, if its steps have the same images and the engine's checkpoints allow it."""
    key = "per_device_train_batch_size"
    batch, images = old.settings.get(key), [run.processes * run.settings.get(key, 0) for run in (old, new)]
    if old.engine != new.engine or old.engine.startswith("zero") or images[0] != images[1]:
        return new
    return dataclasses.replace(new, processes=old.processes, settings=new.settings | {key: batch})


def _difference(name: str, there: Any, here: Any) -> str:
    old, new = (text if len(text) <= 60 else f"{text[:57]}..." for text in (str(there), str(here)))
    text = f"{name} ({old} there, {new} here)"
    if name in ("num_train_epochs", "max_steps"):
        text += ": with this schedule the learning rate so far depends on the length of training"
    if name == "processes":
        text += (
            ": checkpoints of DeepSpeed are for as many processes; DDP and FSDP take another number if there are as "
            "many images a step, by --per_device_train_batch_size"
        )
    return text


def check_same(old: Experiment, new: Experiment, where: str | os.PathLike) -> None:
    """Refuses to continue one experiment as another: raises ValueError with every difference and both values."""
    found = differences(old, new)
    if found:
        how = resume_command(where) if old.data.id else PYTHON_RESUME
        raise ValueError(
            f"{where} holds another experiment; different are: {'; '.join(found)}. Continue it as it is with "
            f"`{how}`, or choose another --output_dir."
        )


def continue_plan(plan: Experiment, checkpoint: str | os.PathLike) -> None:
    """Refuses to go on from a checkpoint of another plan or none, without an optimizer's state, or beyond the end."""
    folder = Path(checkpoint).absolute().parent
    old = read_plan(folder)
    if old is None:
        raise ValueError(
            f"there is no {PLAN_FILE} beside {checkpoint}, so that nothing tells which run it continues. To start a "
            f"new run from its weights, load them: load_student({str(checkpoint)!r}), or --student {checkpoint}."
        )
    check_same(old, plan, folder)
    if plan.runs[0].settings["save_only_model"]:
        raise ValueError(
            f"{checkpoint} was saved with save_only_model, without the state of the optimizer: training can't go on "
            "from it as it was. Start again in another --output_dir."
        )
    state = json.loads(Path(checkpoint, "trainer_state.json").read_text())
    schedule = plan.as_trained(plan.runs[0]).schedule
    key, done = "num_train_epochs", state["epoch"]
    if schedule.max_steps > 0:
        key, done = "max_steps", state["global_step"]
    length = getattr(schedule, key)
    # Where the last step began, which may end beyond a part of an epoch.
    if done * (1 - 1 / max(1, state["global_step"])) > length - 1e-6:
        raise ValueError(f"{checkpoint} is at {done:g}, beyond {key}={length:g}: go on from an earlier checkpoint.")


def read_plan(folder: str | os.PathLike) -> Experiment | None:
    """The plan in a folder, with that folder as its `output_dir`; None if there is none."""
    file = Path(folder) / PLAN_FILE
    try:
        values = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} can't be read: {error}") from error
    return dataclasses.replace(Experiment.from_dict(values), output_dir=str(folder))
