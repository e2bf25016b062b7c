"""`hf-kd distill`: from ids to a trained, measured and saved student."""

from __future__ import annotations

import datetime
import json
import os
import re
import shlex
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import set_seed
from transformers.utils import logging

from . import report
from .arguments import ScriptArguments, make_parser, parse
from .checkpoints import last_checkpoint
from .config import DistillationConfig
from .data import ImageData, load_data
from .losses import LOSSES
from .plots import plot_curves
from .student import load_student
from .teacher import Teacher, load_teacher
from .trainer import DistillationTrainer
from .weak_head import HEAD

RUN_FILE, CURVES_FILE = "run.json", "curves.png"
METRICS = ("loss", "top1", "top5", "ece", "agreement", "kl", "teacher_top1")
logger = logging.get_logger(__name__)


def main(argv: list[str] | None = None) -> int:
    """The console command. Returns the exit status: 0, 1 for an error (with one message), 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] != "distill":
        print("usage: hf-kd distill ...   Distil an image classifier; `hf-kd distill --help` lists the arguments.")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    argv = argv[1:]
    if not argv:
        make_parser().print_help()
        return 2
    traceback = "--traceback" in argv
    try:
        script, config = parse(argv)
        traceback = script.traceback
        distill(script, config, shlex.join([*_launcher(), *argv]))
    except KeyboardInterrupt as stop:
        again = shlex.join([*_launcher(), *_resuming(argv)])
        print(f"\n{str(stop) or 'stopped'}\nResume with (and your launcher's options): {again}", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        if traceback:
            raise
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def distill(script: ScriptArguments, config: DistillationConfig, command: str = "") -> list[dict]:
    """Train what the arguments ask for, and write models, `run.json` and `curves.png`.

    Args:
        script: what to distil.
        config: how to train it; `output_dir` is where everything goes.
        command: the command line, kept in run.json.

    Returns:
        One run record (see `hf_kd.report`) for each student.
    """
    if config.output_dir == "trainer_output":  # transformers' default
        config.output_dir = default_output_dir(script, config)
    arms = script.arms(config)
    resume = _resume(config, script)
    finished = {name: _finished(arm, script) if resume is True else None for name, arm in arms.items()}
    if not resume and config.process_index == 0:  # another rank may come when this one writes already
        _check_free(config.output_dir)
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
        seed=config.seed,
    )
    teacher = None
    if script.teacher:
        teacher = load_teacher(
            script.teacher,
            id2label=data.names,
            class_map=script.class_map,
            revision=script.teacher_revision,
            trust_remote_code=script.trust_remote_code,
        )
    runs: list[dict] = []
    for name, arm in arms.items():
        if finished[name]:
            logger.warning(f"{name}: already finished, see {Path(arm.output_dir) / RUN_FILE}")
            runs.append(finished[name])
        else:
            teacher_metrics = runs[0]["teacher_metrics"] if runs else None  # the same for all, so measured once
            runs.append(_run_arm(name, arm, script, data, teacher, teacher_metrics, resume, command))
    if config.process_index == 0:
        if script.compare is not None:
            report.write_json(Path(config.output_dir) / RUN_FILE, report.redact({"command": command, "runs": runs}))
            plot_curves(runs, Path(config.output_dir) / CURVES_FILE)
        print("\n" + report.comparison_table(runs, report.teacher_row_of(runs[0])))
        print(f"\nModels, {RUN_FILE} and {CURVES_FILE} are in {config.output_dir}")
    PartialState().wait_for_everyone()  # a rank that leaves early takes the others' connections with it
    return runs


def _run_arm(
    name: str,
    config: DistillationConfig,
    script: ScriptArguments,
    data: ImageData,
    teacher: Teacher | None,
    teacher_metrics: dict | None,
    resume: str | bool,
    command: str,
) -> dict:
    """Train, evaluate and save one student; returns its run record."""
    started = time.perf_counter()
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
        print(f"\n{name}: {trainer.train_loss}")
    if teacher is not None and teacher_metrics is None:
        teacher_metrics = trainer.measure_teacher()
    trainer.teacher_metrics = teacher_metrics
    checkpoint = last_checkpoint(config.output_dir) if resume is True else resume or None
    if resume and checkpoint is None:
        logger.warning(f"no checkpoint in {config.output_dir}: starting from the beginning")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()  # before anything else can go wrong
    trained = time.perf_counter()
    metrics = {k.removeprefix("eval_"): v for k, v in trainer.evaluate().items() if k.startswith("eval_")}
    evaluated = time.perf_counter()
    skipped, eval_skipped = (sorted(set(gather_object(list(t)))) for t in (trainer.skipped, trainer.eval_skipped))
    seconds = {
        "train_seconds": [entry["seconds"] for entry in trainer.state.log_history if "seconds" in entry][-1],
        "eval_seconds": evaluated - trained,
        "total_seconds": time.perf_counter() - started,
    }
    run = report.redact(
        {
            "name": name,
            "loss": {"name": config.loss, **trainer.train_loss.numbers()},
            "student": {
                "id": script.student,
                "revision": script.student_revision,
                "from_scratch": script.from_scratch,
                **_describe(student, trainer.view.size),
                "size_mb": sum(f.stat().st_size for f in Path(config.output_dir).glob("*.safetensors")) / 1e6,
            },
            "teacher": teacher
            and {
                "id": script.teacher,
                "revision": script.teacher_revision,
                **_describe(teacher.model, teacher.view.size),
            },
            "data": {
                "id": data.name,
                "revision": data.revision,
                "train_size": len(data.train),
                "eval_size": len(data.eval),
                "classes": len(data.names),
                "skipped": {
                    "count": len(skipped),
                    "examples": skipped[:100],
                    "eval_count": len(eval_skipped),
                    "eval_examples": eval_skipped[:100],
                },
            },
            "seed": config.seed,
            "command": command,
            "versions": report.collect_versions(),
            "settings": settings,
            "metrics": {k: v for k, v in metrics.items() if k in METRICS},
            "teacher_metrics": teacher_metrics,
            "terms": _last_terms(trainer.state.log_history),
            "history": trainer.state.log_history,
            "timings": seconds,
            "device": f"{config.device}, {torch.get_num_threads()} threads, {config.world_size} processes",
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
    )
    if config.process_index == 0:
        report.write_json(Path(config.output_dir) / RUN_FILE, run)
        plot_curves([run], Path(config.output_dir) / CURVES_FILE)
    return run


def _describe(model: torch.nn.Module, size: tuple[int, int]) -> dict:
    own = [p for name, p in model.named_parameters() if not name.startswith(f"{HEAD}.")]
    values = [*own, *model.buffers()]
    config = getattr(model, "config", None)
    return {
        "architecture": getattr(config, "architecture", None) or type(model).__name__,
        "parameters": sum(p.numel() for p in own),
        "size_mb": sum(v.numel() * v.element_size() for v in values) / 1e6,
        "image_size": list(size),
    }


def _last_terms(history: list[dict]) -> dict[str, float]:
    logs = [entry for entry in history if "loss" in entry]
    return {k: v for k, v in logs[-1].items() if k.startswith("loss")} if logs else {}


def default_output_dir(script: ScriptArguments, config: DistillationConfig) -> str:
    """`outputs/STUDENT-LOSS-DATA`, from the last part of each id."""
    last = [Path(str(x)).name for x in (script.student, script.dataset) if x]
    what = "compare" if script.compare else config.loss
    return os.path.join("outputs", "-".join([*last[:1], what, *last[1:]]))


def _resume(config: DistillationConfig, script: ScriptArguments) -> str | bool:
    """`--resume_from_checkpoint`: a folder, or "true" / "last" for the newest complete checkpoint of each run."""
    given = config.resume_from_checkpoint
    if str(given).lower() in ("true", "last"):
        return True
    if given and script.compare is not None:
        raise ValueError(f"a comparison resumes each of its runs: --resume_from_checkpoint last, not {given}.")
    return given or False


def _settings(config: DistillationConfig, script: ScriptArguments) -> dict:
    return report.redact({**vars(script), **config.to_dict()})


# Settings in which a run may differ from its continuation.
_FREE = re.compile(
    "(compare|output_dir|traceback|disable_tqdm|num_train_epochs|max_steps|run_name)$|(re|log|sav|push|hub|dataloader)"
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
    loss = {"name": config.loss, **config.build_loss().numbers()}
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
    if folder.is_dir() and any(folder.iterdir()):
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
    option = "--resume_from_checkpoint"
    kept = [
        a for i, a in enumerate(argv) if a != option and not a.startswith(f"{option}=") and argv[i - 1 : i] != [option]
    ]
    return [*kept, option, "last"]
