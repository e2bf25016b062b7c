"""What hf_kd relies on in other packages beyond their public names, and the check that it is as it was.

Public names that are imported or called fail loudly by themselves. Overrides, private names and names whose signature
matters go into one of the three tables; tests/test_compat.py finds overrides and private names that are in none.
"""

from __future__ import annotations

import functools
import inspect
import pkgutil
from importlib import metadata
from typing import Any

# The newest versions that the tables were checked with.
SEEN = {
    "accelerate": "1.15.0", "transformers": "5.24.0", "timm": "1.0.31", "torch": "2.14.1", "torchvision": "0.29.1"
}  # fmt: skip

# Methods of transformers.Trainer that DistillationTrainer overrides. Upstream calls them with the same parameters.
OVERRIDDEN = (
    "_get_dataloader _get_num_items_in_batch _get_output_dir _load_best_model _load_from_checkpoint _save "
    "_save_checkpoint call_model_init compute_loss create_accelerator_and_postprocess create_scheduler "
    "evaluation_loop floating_point_ops get_batch_samples get_decay_parameter_names get_eval_dataloader init_hf_repo "
    "log prediction_step save_model"
).split()
LATER = {"private"}  # parameters that not all of the supported versions have

# Other names that hf_kd calls or overrides, with the parameters that count (there may be more), or reads (None).
USED = {
    "accelerate.state.AcceleratorState._reset_state": "reset_partial_state",
    "accelerate.state.AcceleratorState._shared_state": None,
    "transformers.Trainer._get_eval_sampler": "eval_dataset",
    "transformers.Trainer._prepare_inputs": "inputs",
    "transformers.Trainer._run_epoch": "epoch num_update_steps_per_epoch train_dataloader",
    "transformers.Trainer.create_model_card": "model_name",
    "transformers.Trainer.loss_is_scaled_for_ga": None,
    "transformers.Trainer.push_to_hub": "commit_message token revision",
    "transformers.Trainer.train": "resume_from_checkpoint",
    "transformers.TrainingArguments._VALID_DICT_FIELDS": None,
    "transformers.PreTrainedModel._hf_peft_config_loaded": None,
    "transformers.PreTrainedModel._keys_to_ignore_on_save": None,
    "transformers.PreTrainedModel._no_split_modules": None,
    "transformers.models.timm_wrapper.image_processing_timm_wrapper.TimmWrapperImageProcessor": (
        "pretrained_cfg architecture"
    ),
    "os._exit": None,
    "torch.distributed.distributed_c10d._get_default_store": None,
    "torchvision.transforms.v2.RandomErasing.make_params": "flat_inputs",
    "argparse.HelpFormatter._format_action_invocation": "action",
    "argparse.HelpFormatter._format_args": "action default_metavar",
    "argparse.HelpFormatter._get_help_string": "action",
}

# Attributes that exist only on instances, and values, by a function of upstream that names them.
MENTIONED = {
    "accelerate.state.PartialState.__init__": "_cpu",
    "transformers.Trainer._finish_current_push": "push_in_progress",
    "transformers.Trainer.create_accelerator_and_postprocess": "gather_function is_deepspeed_enabled is_fsdp_enabled",
    "transformers.Trainer.create_scheduler": "_created_lr_scheduler",
    "transformers.Trainer.get_test_dataloader": "test",
    "transformers.Trainer.predict": "Prediction",
    "transformers.Trainer.push_to_hub": "hub_model_id",
    "transformers.PreTrainedConfig._remove_keys_not_serialized": "_commit_hash",
    "transformers.HfArgumentParser._add_dataclass_arguments": "_argument_group_name",
    "timm.data.auto_augment.AugmentOp.__init__": "aug_fn",
    "timm.data.auto_augment.RandAugment.__init__": "ops",
    "argparse._ActionsContainer.__init__": "_actions _action_groups",
    "argparse._ArgumentGroup.__init__": "_group_actions",
    "argparse.ArgumentParser.__init__": "_optionals",
}


@functools.cache
def check_upstream(trainer: type) -> None:
    """Looks every name up, once a process; `trainer` is DistillationTrainer.

    Raises:
        RuntimeError: a name is missing or has another signature; with the versions installed and seen.
    """
    for name in OVERRIDDEN:
        path = f"transformers.Trainer.{name}"
        found, own = _parameters(_find(path)), _parameters(getattr(trainer, name))
        if found != [parameter for parameter in own if parameter in found or parameter not in LATER]:
            raise _changed(path, f"has the parameters ({', '.join(found)}), not ({', '.join(own)})")
    for path, used in USED.items():
        found = _find(path)
        if used and (missing := set(used.split()) - set(_parameters(found))):
            raise _changed(path, f"does not accept {', '.join(sorted(missing))}")
    for path, names in MENTIONED.items():
        code = getattr(inspect.unwrap(_find(path)), "__code__", None)
        mentioned = f"{code.co_names} {code.co_consts}" if code else ""
        for name in names.split():
            if f"'{name}'" not in mentioned:
                raise _changed(path, f"no longer uses the attribute {name}")


def default_store() -> Any:
    """The store through which the processes have found each other."""
    return _find("torch.distributed.distributed_c10d._get_default_store")()


def _find(path: str) -> Any:
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError) as error:
        raise _changed(path, "does not exist") from error


def _parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def _changed(path: str, what: str) -> RuntimeError:
    package = path.split(".")[0]
    if package not in SEEN:
        return RuntimeError(f"hf_kd relies on {path}, which {what}: this version of Python is not supported.")
    return RuntimeError(
        f"hf_kd relies on {path}, which {what} in {package} {metadata.version(package)}. It was last seen in "
        f"{package} {SEEN[package]}: pip install {package}=={SEEN[package]}"
    )
