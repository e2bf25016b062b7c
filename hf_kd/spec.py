"""The frozen plan of an experiment: everything that its results depend on, as `plan.json` keeps it.

A field marked `resumable` may differ between a run and its continuation: it does not change what is learned.
"""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .reporting.record import plain

SCHEMA_VERSION = 1
PLAN_FILE = "plan.json"


def resumable(default: Any = None) -> Any:
    """A field in which a continuation may differ from its run."""
    return field(default=default, metadata={"resumable": True})


@dataclass(frozen=True)
class ModelSource:
    """Where a student or teacher comes from. `commit` is the 40 hex digits that `revision` stood for."""

    id: str
    revision: str | None = None
    commit: str | None = None
    trust_remote_code: bool = False
    from_scratch: bool = False
    image_size: int | None = None
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    class_map: Any = None
    # Teachers: how many images of our evaluation split it was trained on; None: its record does not tell.
    seen_evaluation_images: int | None = resumable()


@dataclass(frozen=True)
class DataSource:
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
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    train_size: int | None = None
    eval_size: int | None = None
    classes: list[str] | None = None
    fingerprint: str | None = None
    split_sizes: dict[str, int] | None = None
    split_fingerprints: dict[str, str] | None = None


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


@dataclass(frozen=True)
class Execution:
    """Arguments of the trainer that say how a run is carried out and reported, not what is learned."""

    output_dir: str | None = resumable()
    run_name: str | None = resumable()
    disable_tqdm: bool | None = resumable()
    dataloader_num_workers: int = resumable(0)
    dataloader_persistent_workers: bool = resumable(False)
    dataloader_pin_memory: bool = resumable(True)
    dataloader_prefetch_factor: int | None = resumable()
    logging_steps: float = resumable(500)
    logging_strategy: str = resumable("steps")
    logging_first_step: bool = resumable(False)
    log_level: str = resumable("passive")
    log_level_replica: str = resumable("warning")
    log_on_each_node: bool = resumable(True)
    report_to: Any = resumable()
    project: str | None = resumable()
    trackio_space_id: str | None = resumable()
    trackio_bucket_id: str | None = resumable()
    trackio_static_space_id: str | None = resumable()
    save_strategy: str = resumable("steps")
    save_steps: float = resumable(500)
    save_total_limit: int | None = resumable()
    save_on_each_node: bool = resumable(False)
    skip_memory_metrics: bool = resumable(True)
    ddp_timeout: int = resumable(1800)
    resume_from_checkpoint: str | None = resumable()
    push_to_hub: bool = resumable(False)
    hub_model_id: str | None = resumable()
    hub_strategy: str = resumable("end")
    hub_private_repo: bool | None = resumable()
    hub_revision: str | None = resumable()
    hub_always_push: bool = resumable(False)


@dataclass(frozen=True)
class RunSpec:
    """One training: a loss and a seed. `settings` are the remaining arguments of `DistillationConfig`."""

    name: str
    seed: int
    data_seed: int
    processes: int
    loss: LossSpec
    schedule: Schedule
    execution: Execution
    settings: dict[str, Any]
    folder: str = "."  # of its results, within the experiment's

    @property
    def key(self) -> str:
        """How the run is called among those of its comparison."""
        return f"{self.name}, seed {self.seed}"

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `DistillationConfig` that this run is trained with."""
        return {
            **self.settings,
            **dataclasses.asdict(self.schedule),
            **dataclasses.asdict(self.execution),
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
    teacher: ModelSource | None = None
    data: DataSource = field(default_factory=DataSource)
    train_image_size: int | None = None
    runs: tuple[RunSpec, ...] = ()
    preset: dict[str, Any] | None = resumable()  # name, source, and which of its settings the user has changed
    provenance: dict[str, str] | None = resumable()  # "you" or "preset NAME", by setting
    command: str | None = resumable()
    push: dict[str, Any] | None = resumable()  # repo_id, private, revision, and the folder of the run that is pushed
    requirements: dict[str, Any] | None = resumable()  # optimizer steps of a run, parameters, disk space in bytes
    versions: dict[str, Any] | None = resumable()
    schema_version: int = SCHEMA_VERSION

    def folder(self, run: RunSpec) -> Path:
        """Where a run's results go."""
        return Path(self.output_dir) / run.folder

    def of(self, run: RunSpec) -> Experiment:
        """The plan of one of the runs alone, in its own folder."""
        return dataclasses.replace(
            self, output_dir=str(self.folder(run)), runs=(dataclasses.replace(run, folder="."),)
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON types."""
        return plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Experiment:
        """The plan that `to_dict` described.

        Raises:
            ValueError: it was written by a version of hf_kd with another schema.
        """
        version = values.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"{PLAN_FILE} has schema version {version}, this hf_kd reads {SCHEMA_VERSION}: continue the run with "
                "the version of hf_kd that started it, which run.json and the plan name under `versions`."
            )
        return _build(cls, values)


def run_spec(config, name: str | None = None, folder: str = ".", loss_source: dict | None = None) -> RunSpec:
    """The spec of a run with these arguments.

    Args:
        config: a `DistillationConfig`.
        name: of the run; default: the loss's.
        folder: of its results, within the experiment's.
        loss_source: path and hash of the file of a loss of the user's own.
    """
    values = plain({key: value for key, value in config.to_dict().items() if not key.endswith("token")})
    values = {key: value for key, value in values.items() if key not in ("local_rank", "loss_kwargs")}
    loss, seed, data_seed = (values.pop(key) for key in ("loss", "seed", "data_seed"))
    taken = {cls: {f.name: values.pop(f.name) for f in dataclasses.fields(cls)} for cls in (Schedule, Execution)}
    return RunSpec(
        name=name or config.loss_class().name,
        seed=seed,
        data_seed=data_seed,
        processes=config.world_size,
        loss=LossSpec(loss, plain(config.build_loss().hyperparameters()), loss_source),
        schedule=Schedule(**taken[Schedule]),
        execution=Execution(**taken[Execution]),
        settings=values,
        folder=folder,
    )


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """The fields that are not resumable and differ, each as "field (old value there, new value here)".

    Args:
        old, new: specs of one class. Of experiments, the runs of one folder are compared; others may be added.
    """
    found = []
    for f in dataclasses.fields(old):
        a, b = getattr(old, f.name), getattr(new, f.name)
        name = f"{path}{f.name}"
        if f.metadata.get("resumable") or a == b:
            continue
        if f.name == "runs":
            theirs = {run.folder: run for run in b}
            for run in a:
                if run.folder in theirs:
                    found += differences(run, theirs[run.folder])
        elif f.name == "schedule":
            found += _schedule_differences(a, b)
        elif dataclasses.is_dataclass(a) and dataclasses.is_dataclass(b):
            found += differences(a, b, f"{name}.")
        elif isinstance(a, dict) and isinstance(b, dict):
            keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
            prefix = "" if f.name == "settings" else f"{name}."
            found += [_difference(f"{prefix}{key}", a.get(key), b.get(key)) for key in keys]
        else:
            found.append(_difference(name, a, b))
    return list(dict.fromkeys(found))


def _schedule_differences(old: Schedule, new: Schedule) -> list[str]:
    length = ("num_train_epochs", "max_steps")
    pairs = {f.name: (getattr(old, f.name), getattr(new, f.name)) for f in dataclasses.fields(old)}
    found = [_difference(key, *pair) for key, pair in pairs.items() if pair[0] != pair[1] and key not in length]
    for key in length:
        a, b = pairs[key]
        if a == b:
            continue
        if not new.past_is_fixed:
            found.append(
                _difference(key, a, b)
                + f": with lr_scheduler_type={new.lr_scheduler_type} and warmup_steps={new.warmup_steps:g} the "
                "learning rate of the steps so far depends on the length of training"
            )
    return found


def _difference(name: str, old: Any, new: Any) -> str:
    def short(value: Any) -> str:
        text = str(value)
        return text if len(text) <= 60 else f"{text[:57]}..."

    return f"{name} ({short(old)} there, {short(new)} here)"


def check_same(old: Experiment, new: Experiment, where: str | os.PathLike) -> None:
    """Refuses to continue one experiment as another.

    Raises:
        ValueError: naming every difference with both values.
    """
    found = differences(old, new)
    if found:
        raise ValueError(
            f"{where} holds another experiment; different are: {'; '.join(found)}. Continue it as it is with "
            f"`hf-kd resume {where}`, or choose another --output_dir."
        )


def continue_plan(plan: Experiment, checkpoint: str | os.PathLike) -> None:
    """Refuses to go on from a checkpoint of another run.

    Raises:
        ValueError: the folder of the checkpoint has no plan, or another one, with what differs; or the checkpoint is
            further than the plan goes.
    """
    folder = Path(checkpoint).absolute().parent
    old = read_plan(folder)
    if old is None:
        raise ValueError(
            f"there is no {PLAN_FILE} beside {checkpoint}, so that nothing tells which run it continues. To start a "
            f"new run from its weights, load them: load_student({str(checkpoint)!r}), or --student {checkpoint}."
        )
    check_same(old, plan, folder)
    state, schedule = json.loads(Path(checkpoint, "trainer_state.json").read_text()), plan.runs[0].schedule
    done, length = state["epoch"], schedule.num_train_epochs
    if schedule.max_steps > 0:
        done, length = state["global_step"], schedule.max_steps
    if done > length:
        what = "max_steps" if schedule.max_steps > 0 else "num_train_epochs"
        raise ValueError(f"{checkpoint} is at {done:g}, beyond {what}={length:g}: go on from an earlier checkpoint.")


def read_plan(folder: str | os.PathLike) -> Experiment | None:
    """The plan in a folder, with that folder as its `output_dir`; None if there is none.

    Raises:
        ValueError: plan.json can't be read.
    """
    file = Path(folder) / PLAN_FILE
    try:
        values = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} can't be read: {error}") from error
    return dataclasses.replace(Experiment.from_dict(values), output_dir=str(folder))


def _build(cls: Any, values: Any) -> Any:
    """A dataclass from nested dicts, by the types of its fields. Unknown keys are refused by its constructor."""
    if values is None:
        return None
    hints = typing.get_type_hints(cls)
    return cls(**{key: _value(hints.get(key), value) for key, value in values.items()})


def _value(hint: Any, value: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(iter(arg for arg in typing.get_args(hint) if dataclasses.is_dataclass(arg)), hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value)
    if typing.get_origin(hint) is tuple and value is not None:
        return tuple(_value(typing.get_args(hint)[0], item) for item in value)
    return value
