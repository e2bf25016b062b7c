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

from packaging.version import Version

# The newest versions that the tables were checked with.
SEEN = {"transformers": "5.24.0", "timm": "1.0.31", "torchvision": "0.29.1"}

# The argument of transformers' trainer, renamed in 5.23.
CHECKPOINTING_KWARGS = (
    "activation_checkpointing_kwargs"
    if Version(metadata.version("transformers")) >= Version("5.23")
    else "gradient_checkpointing_kwargs"
)

# Methods that hf_kd overrides: upstream calls them with these parameters, in this order; "?": not in every version.
OVERRIDDEN = {
    "transformers.Trainer._get_dataloader": "dataset description batch_size sampler_fn is_training dataloader_key",
    "transformers.Trainer._get_num_items_in_batch": "batch_samples device",
    "transformers.Trainer._load_best_model": "",
    "transformers.Trainer._load_from_checkpoint": "resume_from_checkpoint model",
    "transformers.Trainer._get_output_dir": "trial",
    "transformers.Trainer._save": "output_dir state_dict",
    "transformers.Trainer._save_checkpoint": "model trial",
    "transformers.Trainer.call_model_init": "trial",
    "transformers.Trainer.compute_loss": "model inputs return_outputs num_items_in_batch",
    "transformers.Trainer.create_scheduler": "num_training_steps optimizer",
    "transformers.Trainer.evaluation_loop": (
        "dataloader description prediction_loss_only ignore_keys metric_key_prefix"
    ),
    "transformers.Trainer.floating_point_ops": "inputs",
    "transformers.Trainer.get_eval_dataloader": "eval_dataset",
    "transformers.Trainer.init_hf_repo": "token private?",
    "transformers.Trainer.log": "logs start_time",
    "transformers.Trainer.prediction_step": "model inputs prediction_loss_only ignore_keys",
    "transformers.Trainer.save_model": "output_dir _internal_call",
    "torchvision.transforms.v2.RandomErasing.make_params": "flat_inputs",
    "argparse.HelpFormatter._format_action_invocation": "action",
    "argparse.HelpFormatter._get_help_string": "action",
}

# Names that hf_kd calls, with the parameters that it gives them (there may be more), or reads (None).
USED = {
    "transformers.Trainer._get_eval_sampler": "eval_dataset",
    "transformers.Trainer._prepare_inputs": "inputs",
    "transformers.Trainer._run_epoch": "epoch",
    "transformers.Trainer.create_model_card": "model_name",
    "transformers.Trainer.loss_is_scaled_for_ga": None,
    "transformers.Trainer.push_to_hub": "commit_message token revision",
    "transformers.Trainer.train": "resume_from_checkpoint",
    "transformers.TrainingArguments._VALID_DICT_FIELDS": None,
    "transformers.PreTrainedModel._keys_to_ignore_on_save": None,
    "transformers.models.timm_wrapper.image_processing_timm_wrapper.TimmWrapperImageProcessor": (
        "pretrained_cfg architecture"
    ),
    "argparse.HelpFormatter._format_args": "action default_metavar",
}

# Attributes that exist only on instances, by a function of upstream that names them.
MENTIONED = {
    "transformers.Trainer._finish_current_push": "push_in_progress",
    "transformers.Trainer.create_accelerator_and_postprocess": "gather_function is_deepspeed_enabled is_fsdp_enabled",
    "transformers.Trainer.create_scheduler": "_created_lr_scheduler",
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
def check_upstream() -> None:
    """Looks every name up, once a process.

    Raises:
        RuntimeError: a name is missing or has another signature; with the versions installed and seen.
    """
    for path, parameters in OVERRIDDEN.items():
        known = [name.rstrip("?") for name in parameters.split()]
        needed = {name for name in parameters.split() if not name.endswith("?")}
        found = _parameters(_find(path))
        if not needed <= set(found) or found != [name for name in known if name in found]:
            raise _changed(path, f"has the parameters ({', '.join(found)}), not ({', '.join(known)})")
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
