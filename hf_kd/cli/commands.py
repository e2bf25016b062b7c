"""`hf-kd distill`: from ids to a trained, measured and saved student."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import set_seed
from transformers.utils import logging

from .. import hub, recipes
from ..checkpointing import last_checkpoint
from ..config import DistillationConfig
from ..data import ImageData, load_data
from ..losses import LOSSES
from ..models.loading import model_family
from ..models.student import load_student, student_config
from ..models.teacher import Teacher, load_teacher
from ..push import check_push, publish
from ..reporting import record as records
from ..reporting.card import title, write_card
from ..reporting.collect import describe_model, make_record, write_record
from ..reporting.curves import plot_curves
from ..reporting.record import CURVES_FILE, RUN_FILE
from ..reporting.significance import verdicts
from ..reporting.tables import comparison_table, teacher_row_of
from ..trainer import DistillationTrainer
from .arguments import ScriptArguments, make_parser, parse

PINS_FILE = "revisions.json"
# What a command says of pushing and resuming is not what another needs to reproduce its run.
_NOT_THE_RUN = tuple(
    f"--{name}"
    for name in "resume_from_checkpoint push_to_hub hub_model_id hub_token hub_private_repo hub_revision".split()
)
logger = logging.get_logger(__name__)


def main(argv: list[str] | None = None) -> int:
    """The console command. Returns the exit status: 0, 1 for an error (with one message), 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in ("distill", "push"):
        print(
            "usage: hf-kd distill ...   Distil an image classifier; `hf-kd distill --help` lists the arguments.\n"
            "       hf-kd push ...      Push a distilled student to the Hub; see `hf-kd push --help`."
        )
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    command, argv = argv[0], argv[1:]
    if not argv:
        (make_parser() if command == "distill" else push_parser()).print_help()
        return 2
    traceback = "--traceback" in argv
    try:
        if command == "push":
            _push_command(argv)
        else:
            script, config = parse(argv)
            traceback = script.traceback
            distill(script, config, shlex.join([*_launcher(), *_without(argv, _NOT_THE_RUN)]))
    except KeyboardInterrupt as stop:
        again = f"\nResume with (and your launcher's options): {shlex.join([*_launcher(), *_resuming(argv)])}"
        print(f"\n{str(stop) or 'stopped'}{again if command == 'distill' else ''}", file=sys.stderr)
        return 130
    except Exception as error:
        message = hub.user_message(error)
        if message is None and isinstance(error, (ValueError, OSError, FloatingPointError)):
            message = str(error)
        if traceback or message is None:  # of what nobody foresaw, the traceback is what helps
            raise
        print(f"\nerror: {message}", file=sys.stderr)
        return 1
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def distill(script: ScriptArguments, config: DistillationConfig, command: str = "") -> list[dict]:
    """Train what the arguments ask for, and write models, `run.json`, `curves.png` and cards; push if asked.

    Args:
        script: what to distil.
        config: how to train it; `output_dir` is where everything goes.
        command: the command line, kept in run.json with the commits that it meant.

    Returns:
        One run record (see `hf_kd.reporting.tables`) for each student.
    """
    main_process = config.process_index == 0
    script.check(config)
    if config.output_dir == "trainer_output":  # transformers' default
        name = default_name(script, config)
        config.output_dir = os.path.join("outputs", f"{name}-verdict" if script.verdict else name)
        config.hub_model_id = config.hub_model_id or name
    repo_id = None
    if config.push_to_hub:
        repo_id = check_push(
            config.hub_model_id, config.hub_token, private=config.hub_private_repo, folder=config.output_dir
        )
    resume = _resume(config, script)
    if not resume and main_process:  # another rank may come when this one writes already
        _check_free(config.output_dir)
    pins = _pin(script, config.output_dir if resume else None)
    if command:
        command += "".join(f" --{key}_revision {pin['commit']}" for key, pin in pins.items())
    preset, changed = _preset(script), []
    if preset:
        config, changed = recipes.apply(preset, config, script.given)
    arms = script.arms(config, preset)
    if preset and main_process:
        print(recipes.describe(preset, changed, arms))
    finished = [_finished(arm, script) if resume is True else None for _, arm in arms]
    data = load_data(
        script.dataset,
        config_name=script.dataset_config,
        revision=script.dataset_revision,
        train_split=script.train_split,
        eval_split=script.eval_split,
        image_column=config.image_column,
        label_column=config.label_column,
        eval_fraction=script.eval_fraction,
        max_train_samples=script.max_train_samples,
        max_eval_samples=script.max_eval_samples,
    )
    known = {
        "command": command,
        "preset": preset and {"name": preset, "source": recipes.PRESETS[preset].source, "changed": changed},
        "teacher": None,
    }
    teacher = None
    if script.teacher:
        teacher = load_teacher(
            script.teacher,
            id2label=data.names,
            class_map=script.class_map,
            revision=script.teacher_revision,
            trust_remote_code=script.trust_remote_code,
        )
        if main_process:
            known["teacher"] = describe_model(teacher.model, script.teacher, teacher.preprocessing.size)
    if main_process and pins:
        records.write_json(Path(config.output_dir) / PINS_FILE, pins)
    runs: list[dict] = []
    for (name, arm), record in zip(arms, finished, strict=True):
        if record:
            logger.warning(f"{name}: already finished, see {Path(arm.output_dir) / RUN_FILE}")
        else:
            measured = runs[0]["teacher_metrics"] if runs else None  # the same for all, so measured once
            record = _run_arm(name, arm, script, data, teacher, measured, resume, known)
        runs.append(record)
    if main_process:
        _report(runs, [Path(arm.output_dir) for _, arm in arms], Path(config.output_dir), command)
        if repo_id:
            chosen = next(arm for name, arm in arms if name == config.loss)  # of the first seed, whatever came of it
            _push(chosen.output_dir, repo_id, config)
    PartialState().wait_for_everyone()  # a rank that leaves early takes the others' connections with it
    return runs


def _pin(script: ScriptArguments, resumed: str | None) -> dict[str, dict]:
    """Makes each revision the commit that it stands for; returns those that were none, by argument.

    All arms start from the same, and a continuation from what its run has started from, which its folder keeps.
    """
    file, pins = Path(resumed or "") / PINS_FILE, {}
    before = json.loads(file.read_text()) if resumed and file.is_file() else {}
    for key, kind in (("student", "model"), ("teacher", "model"), ("dataset", "dataset")):
        name, asked = getattr(script, key), getattr(script, f"{key}_revision")
        scratch = key == "student" and script.from_scratch and name.startswith("timm/")
        on_hub = name and re.fullmatch(r"\w[\w.-]*/[\w.-]+(?<!\.parquet)", name) and not os.path.exists(name)
        if on_hub and not scratch:
            pin, known = {"name": name, "asked": asked}, dict(before.get(key, {}))
            commit = known.pop("commit", None)
            commit = commit if known == pin else hub.resolve(name, asked, kind).resolved
            setattr(script, f"{key}_revision", commit)
            if asked != commit:
                pins[key] = {**pin, "commit": commit}
    return pins


def _preset(script: ScriptArguments) -> str | None:
    """The name of the preset in use; its arguments for the student are set."""
    name = script.preset or "auto"
    if name == "none":
        return None
    if name == "auto":
        trust = script.trust_remote_code
        hub_options = {"revision": script.student_revision, "trust_remote_code": trust}
        config = student_config(script.student, script.from_scratch, script.image_size, hub_options)
        name = recipes.choose(model_family(config, trust), script.from_scratch, script.dataset)
    for key, value in recipes.PRESETS[name].student.items():
        if key not in script.given:
            setattr(script, key, value)
    return name


def _report(runs: list[dict], folders: list[Path], output_dir: Path, command: str) -> None:
    """Prints the table and the verdicts, and writes what needs all runs: the comparison and the cards."""
    found = verdicts(runs)
    print("\n" + comparison_table(runs, teacher_row_of(runs[0])))
    for verdict in found:
        print(f"\n{verdict['sentence']}")
    if len(runs) > 1:
        comparison = {"command": command, "runs": runs, "verdicts": found}
        records.write_json(output_dir / RUN_FILE, records.redact(comparison))
        plot_curves(runs, output_dir / CURVES_FILE)
        brief = [{key: run.get(key) for key in ("name", "seed", "loss", "metrics", "timings")} for run in runs]
        for run, folder in zip(runs, folders, strict=True):
            own = next((verdict for verdict in found if verdict["loss"] == run["name"]), None)
            own = own and {**own, "runs": brief}
            if own != run.get("verdict"):
                run |= {"verdict": own, "command": records.redact({"command": command})["command"]}
                records.write_json(folder / RUN_FILE, run)
    for folder in folders:
        write_card(folder)
    print(f"\nModels, cards, {RUN_FILE} and {CURVES_FILE} are in {output_dir}")


def _push(folder: str, repo_id: str, config: DistillationConfig) -> None:
    try:
        url = publish(
            folder, repo_id, token=config.hub_token, private=config.hub_private_repo, revision=config.hub_revision
        )
    except Exception as error:  # the model is safe on disk, and nothing that the Hub answers may hide that
        branch = ["--revision", config.hub_revision] if config.hub_revision else []
        private = ["--private"] if config.hub_private_repo else []
        again = shlex.join(["hf-kd", "push", folder, repo_id, *branch, *private])
        print(
            f"\nwarning: the push to {repo_id} failed: {hub.user_message(error) or error}\n"
            f"The model is in {folder}. Push it with: {again}",
            file=sys.stderr,
        )
    else:
        print(f"Pushed to {url}")


def push_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("hf-kd push", description="Push a student that hf_kd has saved, with its card.")
    parser.add_argument("folder", help="The folder with the model, run.json and the card.")
    parser.add_argument("repo_id", nargs="?", help="OWNER/NAME on the Hub. Default: the card's title, as yours.")
    parser.add_argument("--revision", help="Branch to push to; made if there is none. Default: main.")
    parser.add_argument("--private", action="store_true", default=None, help="Make the new repository private.")
    parser.add_argument("--traceback", action="store_true", help="Show Python's traceback of an error.")
    return parser


def _push_command(argv: list[str]) -> None:
    given = push_parser().parse_args(argv)
    file = Path(given.folder) / RUN_FILE
    record = json.loads(file.read_text()) if file.is_file() else {}
    if "runs" in record:
        students = ", ".join(sorted({str(path.parent) for path in Path(given.folder).rglob("model.safetensors")})[:9])
        raise ValueError(f"{given.folder} holds a comparison: push one of its students, such as {students}.")
    name = given.repo_id or record.get("repo_id") or (title(record) if record else None)
    private = given.private or record.get("settings", {}).get("hub_private_repo")
    repo_id = check_push(name, private=private, folder=given.folder)
    print(f"Pushed to {publish(given.folder, repo_id, private=private, revision=given.revision)}")


def _run_arm(
    name: str,
    config: DistillationConfig,
    script: ScriptArguments,
    data: ImageData,
    teacher: Teacher | None,
    teacher_metrics: dict | None,
    resume: str | bool,
    known: dict,
) -> dict:
    """Train, evaluate and save one student; returns its run record."""
    set_seed(config.seed)  # the same first weights for every arm
    student, processor = load_student(
        script.student,
        id2label=data.names,
        from_scratch=script.from_scratch,
        image_size=script.image_size,
        image_mean=script.image_mean,
        image_std=script.image_std,
        revision=script.student_revision,
        trust_remote_code=script.trust_remote_code,
    )
    settings = _settings(config, script)  # as asked for: the columns are found anew
    config.image_column, config.label_column = data.image_column, data.label_column
    trainer = DistillationTrainer(
        student,
        config,
        teacher=teacher if LOSSES[config.loss].needs_teacher else None,
        eval_teacher=teacher,
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=processor,
    )
    if config.process_index == 0:
        print(f"\n{name}, seed {config.seed}: {trainer.train_loss}")
    if teacher is not None and teacher_metrics is None:
        teacher_metrics = trainer.measure_teacher()
    trainer.teacher_metrics = teacher_metrics
    checkpoint = last_checkpoint(config.output_dir) if resume is True else resume or None
    if resume and checkpoint is None:
        logger.warning(f"no checkpoint in {config.output_dir}: starting from the beginning")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()  # before anything else can go wrong
    metrics = trainer.evaluate()
    skipped = tuple(sorted(set(gather_object(list(t)))) for t in (trainer.skipped, trainer.eval_skipped))
    if config.process_index:
        return {"teacher_metrics": teacher_metrics}  # the record is the first process's
    own = {"id": script.student, "from_scratch": script.from_scratch}
    run = make_record(trainer, metrics, data, own, skipped, name=name, settings=settings, **known)
    write_record(run, config.output_dir)
    return run


def default_name(script: ScriptArguments, config: DistillationConfig) -> str:
    """`STUDENT-LOSS-DATA`, from the last part of each id."""
    what = "compare" if script.compare else config.loss
    return "-".join([Path(script.student).name, what, Path(script.dataset).name])


def _resume(config: DistillationConfig, script: ScriptArguments) -> str | bool:
    """`--resume_from_checkpoint`: a folder, or "true" / "last" for the newest complete checkpoint of each run."""
    given = config.resume_from_checkpoint
    if str(given).lower() in ("true", "last"):
        return True
    if given and (script.compare is not None or script.verdict or script.seeds):
        raise ValueError(f"a comparison resumes each of its runs: --resume_from_checkpoint last, not {given}.")
    return given or False


def _settings(config: DistillationConfig, script: ScriptArguments) -> dict:
    return records.redact({**dataclasses.asdict(script), **config.to_dict()})


# Settings in which a run may differ from its continuation.
_FREE = re.compile(
    "(compare|seeds|verdict|preset|output_dir|traceback|disable_tqdm|num_train_epochs|max_steps|run_name)$"
    "|(resume|report|log|sav|push|hub)|dataloader_(num_workers|pin|pers|pref)"
)


def _finished(config: DistillationConfig, script: ScriptArguments) -> dict | None:
    """The record of a run that has nothing left to do, or None.

    Raises:
        ValueError: if what is in the folder is another run than the one that is asked for.
    """
    file = Path(config.output_dir) / RUN_FILE
    if not file.is_file():
        return None
    record = json.loads(file.read_text())
    loss = {"name": config.loss, **config.build_loss().hyperparameters()}
    if record.get("loss") != loss:
        what = "a comparison" if "runs" in record else record.get("loss")
        raise ValueError(f"{config.output_dir} holds {what}, not a run with {loss}: choose another --output_dir.")
    old, new = record["settings"], _settings(config, script)
    differ = {key for key in new if key in old and old[key] != new[key]}
    fixed = sorted(key for key in differ if not _FREE.match(key))
    if fixed:
        texts = "; ".join(f"{key} ({old[key]} there, {new[key]} here)" for key in fixed)
        raise ValueError(f"{config.output_dir} holds a run with other settings: {texts}: choose another folder.")
    return None if differ & {"num_train_epochs", "max_steps"} else record


def _check_free(output_dir: str) -> None:
    folder = Path(output_dir)
    if folder.is_dir() and any(file.name != PINS_FILE for file in folder.iterdir()):
        raise ValueError(
            f"output_dir {output_dir} is in use. Continue that run with --resume_from_checkpoint last, choose another "
            "--output_dir, or remove it."
        )


def _launcher() -> list[str]:
    """How this process was started, as far as it can tell."""
    if not sys.argv[0].endswith(".py"):
        return ["hf-kd", "distill"]
    world = os.environ.get("WORLD_SIZE", "1")
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # set by accelerate launch
        start = ["accelerate", "launch", *(["--num_processes", world] if world != "1" else [])]
    else:
        start = ["torchrun", "--nproc_per_node", world] if world != "1" else ["python"]
    return [*start, sys.argv[0]]


def _resuming(argv: list[str]) -> list[str]:
    """The arguments that go on with a run."""
    return [*_without(argv, ("--resume_from_checkpoint",)), "--resume_from_checkpoint", "last"]


def _without(argv: list[str], options: tuple[str, ...]) -> list[str]:
    """The arguments without these options and their values."""
    kept, dropping = [], False
    for argument in argv:
        if argument.startswith("--"):
            dropping = argument.split("=")[0].replace("-", "_").replace("__", "--", 1) in options
        if not dropping:
            kept.append(argument)
    return kept
