"""`hf-kd distill`: from ids to a trained, measured and saved student."""

from __future__ import annotations

import datetime
import json
import os
import shlex
import sys
import time
from pathlib import Path

import torch
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
    command = _command(argv)
    try:
        script, config = parse(argv)
        distill(script, config, command)
    except KeyboardInterrupt as stop:
        print(f"\n{stop or 'stopped'}\nResume with: {_resume_command(command)}", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        if "--traceback" in argv:
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
    resume = _resume(config)
    if not resume:
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
            class_map=json.loads(script.class_map) if (script.class_map or "").startswith("{") else script.class_map,
            revision=script.teacher_revision,
            trust_remote_code=script.trust_remote_code,
        )
    runs: list[dict] = []
    for name, arm in arms.items():
        done = Path(arm.output_dir) / RUN_FILE
        if resume and done.is_file():
            runs.append(json.loads(done.read_text()))
        else:
            teacher_metrics = runs[0]["teacher_metrics"] if runs else None  # the same for all, so measured once
            runs.append(_run_arm(name, arm, script, data, teacher, teacher_metrics, resume, command))
    if config.process_index == 0:
        if script.compare is not None:
            report.write_json(Path(config.output_dir) / RUN_FILE, report.redact({"command": command, "runs": runs}))
            plot_curves(runs, Path(config.output_dir) / CURVES_FILE)
        print("\n" + report.comparison_table(runs, report.teacher_row_of(runs[0])))
        print(f"\nModels, {RUN_FILE} and {CURVES_FILE} are in {config.output_dir}")
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
    checkpoint = last_checkpoint(config.output_dir) if resume is True else resume or None
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trained = time.perf_counter()
    metrics = {k.removeprefix("eval_"): v for k, v in trainer.evaluate().items() if k.startswith("eval_")}
    evaluated = time.perf_counter()
    trainer.save_model()
    metrics.pop("skipped", None)
    skipped, eval_skipped = (gather_object(list(texts)) for texts in (trainer.skipped, trainer.eval_skipped))
    seconds = {
        "train_seconds": result.metrics["train_runtime"],
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
            "settings": {**vars(script), **config.to_dict()},
            "metrics": {k: v for k, v in metrics.items() if k in METRICS},
            "teacher_metrics": teacher_metrics,
            "teacher_check": trainer.teacher_check,
            "terms": _last_terms(trainer.state.log_history),
            "history": trainer.state.log_history,
            "timings": seconds,
            "device": f"{config.device}, {torch.get_num_threads()} threads, {config.world_size} processes",
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
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


def _resume(config: DistillationConfig) -> str | bool:
    """`--resume_from_checkpoint`: a folder, or "true" / "last" for the newest complete checkpoint of each run."""
    given = config.resume_from_checkpoint
    return True if str(given).lower() in ("true", "last") else given or False


def _check_free(output_dir: str) -> None:
    folder = Path(output_dir)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"output_dir {output_dir} is in use. Continue that run with --resume_from_checkpoint last, choose another "
            "--output_dir, or remove it."
        )


def _command(argv: list[str]) -> str:
    script = Path(sys.argv[0])
    if script.suffix != ".py":
        return shlex.join(["hf-kd", "distill", *argv])
    try:  # no path of this machine in a record that may be published
        script = script.resolve().relative_to(Path.cwd())
    except ValueError:
        script = Path(script.name)
    return shlex.join(["accelerate", "launch", str(script), *argv])


def _resume_command(command: str) -> str:
    if "--resume_from_checkpoint" in command:
        return command
    return f"{command} --resume_from_checkpoint last"
