"""Checkpoints: which is the last, saving them whole, loading every weight of them, and plain student weights."""

import contextlib
import copy
import errno
import json
import math
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from .adapters import is_adapter, load_adapters
from .engines import non_finite_weights
from .hub import is_disk_full
from .models.auxiliary_head import auxiliary_head_of, without_head
from .models.features import HEAD
from .models.preprocessing import Preprocessing

logger = logging.get_logger(__name__)

HEAD_FILE = "aux_head.safetensors"
SKIPPED_FILE = "skipped_{}.json"  # of each process
STAGING, ABANDONED = ".incomplete", "abandoned"  # folders in output_dir: being saved; of an earlier course
_TIMM_DATA = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")


def _checkpoints(output_dir: str | os.PathLike) -> list[tuple[int, Path]]:
    """The checkpoints in a folder with their steps, in order of them."""
    folders = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return sorted((int(f.name.split("-")[-1]), f) for f in folders if f.name.split("-")[-1].isdigit())


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The complete checkpoint with the most steps of the run in a folder, or None."""
    for _, folder in reversed(_checkpoints(output_dir)):
        with contextlib.suppress(OSError, ValueError):
            json.loads((folder / TRAINER_STATE_NAME).read_text())  # written last
            return str(folder)
        logger.warning(f"{folder} is incomplete (the run was cut off while it was written): trying an earlier one.")
    return None


def set_aside(output_dir: str | os.PathLike, resumed_from: str | os.PathLike | None, step: int) -> None:
    """Moves the checkpoints that training, as it starts now, does not continue, into a folder `abandoned-N`.

    After going back to step 2, those of step 4 and later are of another course of the run. Also removes what a run
    that was killed while it saved has left.
    """
    output_dir = Path(output_dir)
    shutil.rmtree(output_dir / STAGING, ignore_errors=True)
    ours = resumed_from is not None and Path(resumed_from).resolve().parent == output_dir.resolve()
    later = [folder for number, folder in _checkpoints(output_dir) if not ours or number > step]
    if not later:
        return
    number = 1
    while (abandoned := output_dir / f"{ABANDONED}-{number}").exists():
        number += 1
    abandoned.mkdir()
    for folder in later:
        folder.rename(abandoned / folder.name)
    start = f"continues from {resumed_from}" if resumed_from else "starts from the beginning"
    names = ", ".join(folder.name for folder in later)
    logger.warning(f"this training {start}: moved {names} of an earlier one to {abandoned}; delete it if not needed.")


@contextlib.contextmanager
def complete_checkpoint(trainer, output_dir: str | os.PathLike):
    """A folder to save a checkpoint in, which gets its place in `output_dir` when all processes have written it.

    Thus no `checkpoint-N` is ever incomplete. Keeps `save_total_limit`: the newest, the best, and then the latest.
    Raises FloatingPointError for weights that are not finite, lest they replace the last good ones.
    """
    args, state, output_dir = trainer.args, trainer.state, Path(output_dir)
    name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    staging, final = output_dir / STAGING, output_dir / name
    if bad := non_finite_weights(trainer):
        raise FloatingPointError(
            f"{len(bad)} weights are not finite at step {state.global_step}: {bad[:5]}. Last checkpoint: "
            f"{last_checkpoint(args.output_dir)}."
        )
    try:
        yield str(staging)
        skipped = {"training": trainer.skipped, "evaluation": trainer.eval_skipped}
        (staging / name).mkdir(parents=True, exist_ok=True)  # as for the generators' state of each process
        (staging / name / SKIPPED_FILE.format(args.process_index)).write_text(json.dumps(skipped))
        best = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        if args.save_strategy != "no" and (best == final or best.is_dir()):  # the trainer looks for it in staging
            state.best_model_checkpoint = str(best)
            if args.should_save:
                state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
        trainer.accelerator.wait_for_everyone()
        with args.main_process_first(local=False):
            if args.local_process_index == 0 and (staging / name).exists():  # on each node: it may have its own disk
                if final.exists():
                    final.rename(staging / "replaced")
                (staging / name).rename(final)
            if args.should_save and (args.save_total_limit or 0) > 0:
                kept = {final, Path(state.best_model_checkpoint or final)}
                folders = [folder for _, folder in _checkpoints(output_dir)]
                excess = max(len(folders) - max(args.save_total_limit, len(kept)), 0)
                for folder in [folder for folder in folders if folder not in kept][:excess]:
                    folder.rename(staging / folder.name)  # deleted from there, since deleting can be cut off too
    finally:
        if args.local_process_index == 0:
            shutil.rmtree(staging, ignore_errors=True)


def check_finite_loss(logs: dict[str, float], step: int, output_dir: str) -> None:
    """Raises FloatingPointError for a logged loss that is not finite."""
    if not math.isfinite(logs.get("loss", 0.0)):
        terms = {name: value for name, value in logs.items() if name.startswith("loss")}
        raise FloatingPointError(
            f"the loss is {'NaN' if math.isnan(logs['loss']) else 'infinite'} at step {step}: {terms}. Lower "
            "learning_rate, set max_grad_norm, or use bf16 in the place of fp16. Last checkpoint: "
            f"{last_checkpoint(output_dir)}."
        )


def restore_skipped(trainer, checkpoint: str | os.PathLike | None) -> None:
    """Notes again which images could not be decoded before a checkpoint was saved."""
    args, files = trainer.args, sorted(Path(checkpoint).glob(SKIPPED_FILE.format("*"))) if checkpoint else []
    mine = SKIPPED_FILE.format(args.process_index)
    as_before = len(files) == args.world_size  # else the first process takes all of them
    for file in files:
        if file.name == mine if as_before else args.process_index == 0:
            before = json.loads(file.read_text())
            trainer.skipped.update(before["training"])
            trainer.eval_skipped.update(before["evaluation"])


def save_head(student: nn.Module, state_dict: dict | None, folder: str | os.PathLike) -> None:
    """Writes the auxiliary head, if there is one, beside a checkpoint's model, which does not contain it.

    `state_dict` is the student's, gathered where an engine has partitioned it; None: its own.
    """
    if auxiliary_head_of(student) is not None:
        state = student.state_dict() if state_dict is None else state_dict
        own = {key: value.contiguous() for key, value in state.items() if key.startswith(f"{HEAD}.")}
        save_file({key.removeprefix(f"{HEAD}."): value for key, value in own.items()}, Path(folder) / HEAD_FILE)


def weights_to_save(student: nn.Module, processor, state_dict: dict | None = None) -> dict | None:
    """The weights of a plain model, without the auxiliary head; None where PEFT saves an adapter.

    Weights that several modules share are written under each of their names, which safetensors alone refuses. Of a
    TimmWrapper they are named such that timm and transformers both load them: transformers begins with `timm_model.`.
    """
    if is_adapter(student):
        return state_dict
    state_dict = without_head(student, student.state_dict() if state_dict is None else state_dict)
    if hasattr(student, "timm_model"):
        _complete_timm_config(student, processor)
        state_dict = {name.removeprefix("timm_model."): value for name, value in state_dict.items()}
    return _without_sharing(state_dict)


def _complete_timm_config(student: Any, processor) -> None:
    """Adds what timm builds from to a TimmWrapper's config, which transformers leaves out."""
    config, architecture = student.config, student.timm_model.pretrained_cfg
    data = _timm_data(processor) if processor is not None else getattr(config, "pretrained_cfg", None) or architecture
    # Not licence, tag and address: those are of the weights that the student started from, or not even of them.
    known = {key: architecture.get(key) for key in ("fixed_input_size", "first_conv", "classifier")}
    config.pretrained_cfg = known | {key: data[key] for key in _TIMM_DATA if key in data}
    config.model_args = config.model_args or {}
    config.label_names = [config.id2label[i] for i in range(config.num_labels)]


def _without_sharing(state_dict: dict) -> dict:
    uses = Counter(value.untyped_storage().data_ptr() for value in state_dict.values() if value.numel())
    return {k: v.clone() if uses[v.untyped_storage().data_ptr()] > 1 else v for k, v in state_dict.items()}


def _timm_data(processor) -> dict:
    """timm's description of an image processor's preprocessing."""
    if hasattr(processor, "data_config"):
        return processor.data_config
    preprocessing, size = Preprocessing(processor), dict(getattr(processor, "size", None) or {})
    edge: Any = size.get("shortest_edge") or size.get("height")
    return {
        "input_size": (3, *preprocessing.size),
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "interpolation": preprocessing.interpolation.value,
        "crop_pct": preprocessing.size[0] / edge if getattr(processor, "do_center_crop", False) else 1.0,
        "crop_mode": "center" if size.get("shortest_edge") else "squash",
    }


def load_weights(student: nn.Module, folder: str | os.PathLike) -> None:
    """Puts a checkpoint's weights into a student; ValueError for weights that are not in it.

    Saving converts the key names of ViT, DeiT and Swin, and the trainer's loading with strict=False loses them without
    an error. Here they pass through the model's own from_pretrained.
    """
    if is_adapter(student):
        missing, unexpected = load_adapters(student, folder)
    elif isinstance(student, PreTrainedModel):
        options = {"config": copy.deepcopy(student.config), "ignore_mismatched_sizes": True}
        model_class: Any = type(student)  # the hints of from_pretrained leave the info out
        loaded, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
        missing, unexpected = _load_state(student, loaded.state_dict())
        missing |= set(info["missing_keys"]) | {str(key) for key in info["mismatched_keys"]}
    else:
        missing, unexpected = _load_state(student, load_file(os.path.join(folder, SAFE_WEIGHTS_NAME)))
    if missing or unexpected:
        raise ValueError(
            f"checkpoint {folder} does not fit the student: missing {sorted(missing)[:8]}, "
            f"unexpected {unexpected[:8]}."
        )
    head = auxiliary_head_of(student)
    if head is not None:
        file = Path(folder) / HEAD_FILE
        if not file.is_file():
            raise ValueError(f"checkpoint {folder} has no {HEAD_FILE}: its run had no auxiliary head.")
        head.load_state_dict(load_file(file))


def _load_state(student: nn.Module, state: dict) -> tuple[set[str], list[str]]:
    result = student.load_state_dict(state, strict=False)
    return set(without_head(student, dict.fromkeys(result.missing_keys))), result.unexpected_keys


@contextlib.contextmanager
def full_disk_named(folder: str | os.PathLike):
    """Names the folder in the OSError of a full disk, which the writers of weights and optimizers do not."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(folder)) from error
