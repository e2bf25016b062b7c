"""The command line's arguments: the script's own, those of `DistillationConfig`, and a YAML file below both."""

import argparse
import difflib
import inspect
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..config import DistillationConfig, JSONObject, check_numbers, option, read_json
from ..experiment.variants import check_only, run_configs, variant_name
from ..labels import read_class_map, read_class_names
from ..losses import LOSSES
from ..models.ensemble import normalized_weights
from ..recipes import EVERY_EPOCH, names
from ..reporting.controls import CONTROLS, SAME_TIME
from ..reporting.record import METRICS, TEACHER_METRICS


@dataclass
class ScriptArguments:
    """What to distil, from what, on which images."""

    student: str | None = option(
        "Student: a Hub id, timm/NAME, a local folder with a model or its config, or (from scratch) cifar/NAME."
    )
    teacher: list[str] | None = option("Teacher: a Hub id, timm/NAME or local folder. Several teach by their mean.")
    teacher_weights: list[float] | None = option(
        "Weights of several teachers in the mean of their probabilities; else equal."
    )
    dataset: str = option(
        "Images: a Hub id, a folder of images or of parquet files, or 'quickstart' (bundled).", "uoft-cs/cifar100"
    )
    preset: str | None = option(
        f"Settings for what you do not set: {', '.join(names())}, auto (by the student's family), or none. Default: "
        "auto; with a --config file that names no preset: none."
    )
    from_scratch: bool = option("Give the student random weights, not its pretrained ones.", False)
    compare: dict | str | list | None = option(
        "Train one student with each of these losses from one seed, and print one table: 'ce,nkd,uskd', or JSON with "
        'their numbers, \'{"ce": {}, "2xce": {"loss": "ce", "weight": 2}, "nkd": {"gamma": 1}}\'.'
    )
    verdict: bool = option(
        "Say whether --loss helped: train the student without it too (and for uskd with twice the cross entropy) from "
        "the same weights and order of data, with each of --seeds, and test the paired differences.",
        False,
    )
    against: str | None = option(
        "The variant that the others are tested against, such as kd: with --verdict any loss, with --compare one of "
        "its names. Default: ce."
    )
    controls: list[str] | None = option(
        f"Further runs that a variant must beat, any of: {', '.join(CONTROLS)}. They show how much of a gain is not "
        "due to the teacher's knowledge."
    )
    same_time_ratio: float | None = option("Length of ce_same_time, as a multiple of the others'. Default: measured.")
    seeds: list[int] | None = option("Seeds to train with. Default: --seed; with --verdict three, from --seed on.")
    image_size: int | None = option("Side of the student's square input, in pixels.")
    image_mean: list[float] | None = option("Channel means of the pixels, in [0, 1].")
    image_std: list[float] | None = option("Channel standard deviations, in [0, 1].")
    model_kwargs: JSONObject | None = option(
        "Arguments of the student's architecture, as JSON: '{\"drop_path_rate\": 0.1}'."
    )
    class_map: dict | str | list | None = option(
        "Where class names of teacher and data differ: by_index, JSON with {data name: teacher name}, or a JSON or "
        "YAML file."
    )
    class_names: list[str] | str | None = option(
        "Names of classes whose labels are integers: a file with one in each line, or with a JSON or YAML list. "
        "Default: the labels."
    )
    dataset_config: str | None = option("Configuration of a dataset on the Hub.")
    train_split: str | None = option("Split to train on. Default: train.")
    eval_split: str | None = option("Split to evaluate on. Default: validation or test.")
    eval_fraction: float = option("Share of train to hold out where there is no such split.", 0.1)
    max_train_samples: int | None = option("Train on at most so many images, chosen by their content, not a seed.")
    max_eval_samples: int | None = option("Evaluate on at most so many images, chosen by their content.")
    streaming: bool = option("Read parquet or webdataset files while training, not downloading them first.", False)
    student_revision: str | None = option("Branch, tag or commit of the student.")
    teacher_revision: list[str] | None = option("Branch, tag or commit of the teacher, or one for each of several.")
    dataset_revision: str | None = option("Branch, tag or commit of the dataset.")
    trust_remote_code: bool = option("Run code from the models' repositories.", False)
    only: str | None = option(
        "Train one run of a comparison alone: nkd:1 is that of nkd with seed 1. `hf-kd resume FOLDER` makes the table "
        "when all are finished."
    )
    dry_run: bool = option("Print the plan (runs, steps, sizes, disk) and stop.", False)
    traceback: bool = option("Show Python's traceback of an error.", False)

    explicit: ClassVar[set[str]] = set()  # names of the arguments that the user has set; no field, thus no argument

    def check(self, config: DistillationConfig) -> None:
        """Raises ValueError for all that can be wrong about the arguments without looking at data or models."""
        if self.student is None:
            raise ValueError("--student must be given (or be in the --config file); see --help.")
        if self.preset not in (None, "auto", "none", *names()):
            raise ValueError(f"--preset {self.preset} is unknown; there are: auto, none, {', '.join(names())}.")
        self.class_map, self.class_names = read_class_map(self.class_map), read_class_names(self.class_names)
        if isinstance(self.model_kwargs, str):
            self.model_kwargs = read_json("model_kwargs", self.model_kwargs)
        self._check_teachers()
        sizes = ("image_size", "max_train_samples", "max_eval_samples")
        check_numbers(self, ("seeds", "eval_fraction", *sizes), sizes, seeds=(0, 2**32 - 1), eval_fraction=(0, 1))
        if self.eval_fraction in (0, 1):
            raise ValueError(f"eval_fraction={self.eval_fraction:g} leaves no images to train or to evaluate on.")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if values and max(values) > 1:
                values = " ".join(f"{value / 255:.3f}" for value in values)
                raise ValueError(f"--{name} is of pixels in [0, 1]; of 0 … 255 it would be: --{name} {values}")
            check_numbers(self, [name], ["image_std"])
            if values and len(values) not in (1, 3):
                raise ValueError(f"--{name} has {len(values)} values: give one for each of the 3 channels.")
        seeds = self.seeds or []
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"--seeds {' '.join(map(str, seeds))} names a seed twice.")
        if self.against and not self.verdict and self.compare is None:
            raise ValueError(f"--against {self.against} goes with --verdict or --compare.")
        check_numbers(self, ["same_time_ratio"], same_time_ratio=(1, 1000))
        if self.same_time_ratio is not None and SAME_TIME not in (self.controls or ()):
            raise ValueError(f"--same_time_ratio goes with --controls {SAME_TIME}.")
        if self.verdict:
            if self.against and variant_name(self.against) == variant_name(config.loss):
                raise ValueError(f"--against {self.against} is the loss itself: name another one.")
            if self.compare is not None:
                raise ValueError("--verdict chooses what to compare with by itself: drop it, or --compare.")
            if config.loss_class().name == "ce":
                raise ValueError(
                    f"--verdict asks whether distillation helped, and {config.loss} is cross entropy, what it is "
                    "measured against: name another --loss, or --compare ce,label_smoothing,2xce."
                )
            if len(seeds) == 1:
                raise ValueError(f"--verdict needs at least two seeds for a test, got --seeds {seeds[0]}.")
        if config.push_to_hub and not self.verdict and (self.compare is not None or len(seeds) > 1):
            raise ValueError(
                "--push_to_hub pushes one student, and here are several: drop it and use `hf-kd push FOLDER` "
                "afterwards, or use --verdict, which pushes that of the first seed."
            )
        checkpoint = str(config.resume_from_checkpoint or "last")
        if checkpoint.lower() not in ("true", "last"):
            if self.compare is not None or self.verdict or seeds:
                raise ValueError(f"a comparison resumes every run: --resume_from_checkpoint last, not {checkpoint}.")
            if not Path(checkpoint, "trainer_state.json").is_file():
                raise ValueError(
                    f"--resume_from_checkpoint {checkpoint} is no checkpoint (a folder checkpoint-N of an output "
                    "folder): give one, or 'last' for the newest in --output_dir."
                )
        if self.compare is not None and config.loss_kwargs:
            raise ValueError("loss_kwargs belongs to a single run; --compare holds each loss's numbers.")
        measured: tuple[str, ...] = METRICS + TEACHER_METRICS if self.teacher else METRICS
        # There is no teacher_errors_repeated if the teacher makes no error.
        measured = tuple(name for name in measured if name != "teacher_errors_repeated")
        metric = config.metric_for_best_model
        if metric and metric.removeprefix("eval_") not in measured:
            raise ValueError(
                f"metric_for_best_model={metric!r} is not measured here; there are: {', '.join(measured)}."
            )
        runs = run_configs(self, config, None)
        if self.only is not None:
            check_only(self.only, [f"{name}:{run.seed}" for name, _, run in runs])

    def _check_teachers(self) -> None:
        count = len(self.teacher or [])
        if self.teacher_weights is not None:
            normalized_weights(self.teacher_weights, count)
        if self.teacher_revision is not None and len(self.teacher_revision) != count:
            raise ValueError(
                f"--teacher_revision {' '.join(self.teacher_revision)}: {count} teachers need as many revisions, such "
                f"as {' '.join(['main'] * max(1, count))}, or none."
            )
        if count > 1 and self.class_map is not None:
            raise ValueError(
                f"--class_map is for one teacher, and here are {count}: leave it out where all have the data's class "
                "names, or make a TeacherEnsemble in Python, of teachers that are loaded with a class_map each."
            )


# Of the many arguments of transformers, those that a distillation run usually sets; --help_all shows the rest.
_COMMON = (
    "output_dir num_train_epochs max_steps per_device_train_batch_size per_device_eval_batch_size "
    "gradient_accumulation_steps learning_rate weight_decay optim optim_args lr_scheduler_type lr_scheduler_kwargs "
    "warmup_steps max_grad_norm label_smoothing_factor bf16 fp16 torch_compile seed eval_strategy save_strategy "
    "save_total_limit load_best_model_at_end logging_steps report_to dataloader_num_workers resume_from_checkpoint "
    "use_cpu push_to_hub hub_model_id hub_private_repo"
).split()


class _Formatter(argparse.HelpFormatter):
    """One spelling for each option, its default behind the text."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=110)

    def _format_action_invocation(self, action):
        if not action.option_strings:
            return super()._format_action_invocation(action)
        option = action.option_strings[0]
        if action.nargs in (0, "?"):
            return option
        if action.choices is not None and len(action.choices) > 6:
            return f"{option} NAME"
        return f"{option} {self._format_args(action, 'N' if action.type in (int, float) else 'VALUE')}"

    def _get_help_string(self, action):
        shown = action.default not in (None, False, argparse.SUPPRESS, "") and action.option_strings
        return f"{action.help}{' [%(default)s]' if shown and '[' not in action.help else ''}"


def make_parser(help_all: bool = False) -> HfArgumentParser:
    """The parser of both argument classes; `help_all` lists every argument of transformers too."""
    ScriptArguments._argument_group_name = "what to distil"  # type: ignore[attr-defined]
    parser = HfArgumentParser(
        [ScriptArguments, DistillationConfig],  # type: ignore[list-item]  # DataClassType is no type of dataclasses
        prog="hf-kd distill",
        usage="hf-kd distill [--config FILE] [--student ID] [--teacher ID] [--dataset ID] [--loss NAME] ...",
        description="Distil an image classifier with a teacher (nkd, kd) or without (uskd), or train it plainly (ce).",
        epilog="Example: hf-kd distill --student facebook/deit-tiny-patch16-224 --loss uskd. Under "
        "`accelerate launch` or `torchrun`: examples/run_distill.py, same options.",
        formatter_class=_Formatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with these arguments; the command line wins.")
    parser.add_argument("--help_all", action="help", help="Also list every argument of transformers' Trainer.")
    own = {f.name for f in fields(DistillationConfig)} - {f.name for f in fields(TrainingArguments)}
    shown = {*ScriptArguments.__dataclass_fields__, *own, *_COMMON, "config", "help", "help_all"}
    for action in parser._actions:
        action.help = " ".join((action.help or "").split("\n\n")[0].split())
        if action.dest == "resume_from_checkpoint":
            action.help = "Go on from a checkpoint: its folder, or 'last' for the newest complete one of every run."
        if not help_all and (action.dest not in shown or action.option_strings[0].startswith("--no_")):
            action.help = argparse.SUPPRESS
    what, rest = parser._action_groups.pop(), parser._optionals
    how = parser.add_argument_group("how to distil")
    how._group_actions = [action for action in rest._group_actions if action.dest in own]
    rest._group_actions = [action for action in rest._group_actions if action.dest not in own]
    rest.title = "how to train (arguments of transformers; --help_all lists the rest)"
    parser._action_groups = [what, how, rest]
    return parser


def parse(argv: list[str]) -> tuple[ScriptArguments, DistillationConfig]:
    """Arguments from the command line over those of `--config FILE` over the defaults.

    Raises ValueError for all that can be wrong about them without looking at data or models.
    """
    for word, before in zip(argv, ["", *argv], strict=False):
        if word == "" or (word.startswith("--") and word.endswith("=")):
            raise ValueError(f"{word.rstrip('=') or before} is empty: give it a value, or leave it out.")
    parser = make_parser(help_all="--help_all" in argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config")
    first.add_argument("--preset")
    try:
        early = first.parse_known_args(argv)[0]
        values = _read_config(early.config, parser) if early.config is not None else {}
        preset = early.preset or values.get("preset") or ("none" if early.config else "auto")
        # What all presets set is known now; else load_best_model_at_end would be refused before they are applied.
        parser.set_defaults(**({} if preset == "none" else EVERY_EPOCH) | values)
        script, config, _, unknown = parser.parse_args_into_dataclasses(
            argv, look_for_args_file=False, return_remaining_strings=True
        )
    except argparse.ArgumentError as error:
        raise ValueError(_named(error)) from error
    if unknown:
        option, _, value = unknown[0].partition("=")
        if not value and unknown[1:] and not unknown[1].startswith("--"):
            value = unknown[1]
        raise ValueError(_unknown(option, value, parser))
    options = {argument.split("=")[0] for argument in argv}
    script.explicit = {action.dest for action in parser._actions if options.intersection(action.option_strings)}
    script.explicit |= {*values}
    script.preset = preset
    script.check(config)
    return script, config


def _named(error: argparse.ArgumentError) -> str:
    """The error's text with one spelling of the argument."""
    return f"{(error.argument_name or '').split('/')[0]}: {error.message}"


def _unknown(option: str, value: Any, parser: argparse.ArgumentParser) -> str:
    """What to type in the place of an argument that there is not: in a file without the dashes."""
    name, dashes = option.lstrip("-").replace("-", "_"), "--" if option.startswith("--") else ""
    losses = [loss for loss, cls in LOSSES.items() if name in inspect.signature(cls).parameters]
    if losses:
        if value in (None, ""):
            value = inspect.signature(LOSSES[losses[0]]).parameters[name].default
        try:
            value = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            pass
        loss_kwargs = json.dumps({name: value}, default=str)
        how = f"--loss_kwargs '{loss_kwargs}'" if dashes else f"loss_kwargs: {loss_kwargs}"
        return f"there is no argument {option}: it is a hyperparameter of {', '.join(losses)}. Write {how}"
    near = difflib.get_close_matches(name, sorted({action.dest for action in parser._actions}), n=3)
    names = ", ".join(dashes + other for other in near if other != name)
    return f"there is no argument {option}. Nearest: {names or 'none; see --help'}."


def _read_config(path: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The arguments in a YAML file, each as the parser makes it of the same text on the command line."""
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} can't be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} must hold `name: value` lines, it holds a {type(values).__name__}.")
    known = {action.dest: action for action in reversed(parser._actions)}
    types = get_type_hints(ScriptArguments) | get_type_hints(DistillationConfig)
    words: list[str] = []
    objects: dict[str, Any] = {}  # which are no text on the command line
    for key, value in values.items():
        if key not in types:
            raise ValueError(f"--config {path}: {_unknown(str(key), value, parser)}")
        action, several, accepted = known[key], value if isinstance(value, list) else [value], str(types[key])
        structured = isinstance(value, (dict, list)) and action.nargs is None
        nested = any(item == "" or isinstance(item, (dict, list, type(None))) for item in several)
        if (value is None and action.default is None) or (
            structured and type(value).__name__ in accepted and not (nested and "list[" in accepted)
        ):
            objects[key] = value
        elif structured or nested:
            raise ValueError(f"--config {path}: {key} can't be {value!r}.")
        elif action.nargs == "+":
            words += [f"--{key}", *map(str, several)]
        else:  # YAML reads `no` as False
            words.append(f"--{key}={'no' if value is False and 'no' in (action.choices or ()) else value}")
    try:
        parsed = vars(parser.parse_known_args(words)[0])
    except argparse.ArgumentError as error:
        raise ValueError(f"--config {path}: {_named(error)}") from error
    return {key: objects[key] if key in objects else parsed[key] for key in values}


# Of a command, what says how to push, resume and show errors is not needed to reproduce its run.
_NOT_RECORDED = (
    "resume_from_checkpoint push_to_hub hub_model_id hub_token hub_private_repo hub_revision dry_run traceback only "
    "max_hours"
).split()


def command_to_record(argv: list[str]) -> list[str]:
    """The arguments without those that do not describe the run, and without any token."""
    kept, dropped = [], False
    for argument in argv:
        if argument.startswith("--"):
            dropped = argument[2:].split("=")[0].replace("-", "_") in _NOT_RECORDED
        if not dropped:
            kept.append(argument)
    return kept
