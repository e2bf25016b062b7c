"""Loading configs, classifiers and image processors, as students and teachers both need it."""

from __future__ import annotations

import contextlib
import os
import pickle
from typing import Any

import torch
from huggingface_hub import hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.integrations import deepspeed
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, SAFE_WEIGHTS_NAME, logging

from ..hub import resolve
from ..quickstart import bundled
from .forward import dry_run
from .preprocessing import Preprocessing

logger = logging.get_logger(__name__)

# What timm changes for pretrained weights only, which transformers does not let it load: by architecture.
_TIMM_ARGUMENTS = {"fbnetc_100": {"bn_eps": 1e-3}}

_deepspeed_config = None


# CIFAR-100's mean and standard deviation of pixels in [0, 1].
CIFAR_STATISTICS = [0.50707, 0.48655, 0.44092], [0.26733, 0.25644, 0.27615]


def is_built(name: str) -> bool:
    """Whether a name stands for an architecture of hf_kd's own, `cifar/NAME`."""
    return name.startswith("cifar/") and not os.path.isdir(name)


def check_id(model: str | os.PathLike) -> str:
    """The Hub id or local folder, as text; of a bundled model its folder. ValueError if there is no such folder."""
    text = os.path.expanduser(os.fspath(bundled(model) or model))
    if not os.path.isdir(text) and (text.startswith((".", "/", "~")) or text.count("/") > 1):
        raise ValueError(f"no such folder: {text} (seen from {os.getcwd()}). A Hub id has the form OWNER/NAME.")
    return text


def load_config(name: str, hub: dict):
    """The config of a model on the Hub or in a folder. In `hub`, the revision becomes the commit it stands for."""
    name = check_id(name)
    if is_built(name):
        raise ValueError(f"{name} has no trained weights: add --from_scratch (from_scratch=True), or name a folder.")
    if not os.path.isdir(name):
        hub["revision"] = resolve(name, hub["revision"])
    config = AutoConfig.from_pretrained(name, **hub)
    config._commit_hash = getattr(hub["revision"], "resolved", None)
    if config.model_type == "timm_wrapper":
        complete_timm_config(config)
    return config


def complete_timm_config(config) -> None:
    """Makes transformers build the network of a TimmWrapperConfig as timm does."""
    config.model_args = _TIMM_ARGUMENTS.get(config.architecture, {}) | (config.model_args or {})
    config.model_args.pop("num_classes", None)  # which timm exports, and transformers passes by itself


def commit_of(model: nn.Module) -> str | None:
    """The commit (40 hex digits) of the Hub repository that a student or teacher was loaded from; else None."""
    return getattr(getattr(model, "config", None), "_commit_hash", None)


def build(config, trust_remote_code: bool = False):
    """A randomly initialised classifier of a config (which may, unlike in transformers, name no architecture)."""
    if config.architectures is None and type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        known: Any = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
        config.architectures = [(known[0] if isinstance(known, (tuple, list)) else known).__name__]
    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": trust_remote_code}
    with outside_deepspeed():
        module = AutoModelForImageClassification.from_config(config, **options)
    if config.model_type == "timm_wrapper":  # transformers has overwritten timm's initialisation with normal(0, 0.02)
        import timm

        options = {"num_classes": config.num_labels, **(config.model_args or {})}
        module.timm_model = timm.create_model(config.architecture, **options)
    return module


def model_family(config) -> str:
    """The family of a classifier's config, as its module is called in transformers ("resnet", "vit") or, of a timm
    model, in timm ("resnet", "vision_transformer"); "" if it has none."""
    if getattr(config, "model_type", "") != "timm_wrapper":
        return getattr(config, "model_type", "")
    import timm

    architecture = config.architecture
    return timm.models.model_entrypoint(architecture).__module__.split(".")[-1] if timm.is_model(architecture) else ""


@contextlib.contextmanager
def outside_deepspeed():
    """Loads models whole under ZeRO-3: nothing gathers a teacher's parts, and a student's head must be replaceable.

    accelerate's `zero3_init_context_manager(enable=False)` does not help: transformers' ZeRO-3 stays on (1.15).
    """
    global _deepspeed_config  # of which transformers keeps a weak reference only
    if not deepspeed.is_deepspeed_zero3_enabled():
        yield
        return
    config = deepspeed.deepspeed_config()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        _deepspeed_config = deepspeed.HfDeepSpeedConfig(config)
        _deepspeed_config.config = config  # which the Trainer completes later


def load_classifier(name: str, config, hub: dict, role: str, **options) -> tuple[nn.Module, dict[str, tuple | None]]:
    """A pretrained classifier of a config, and its weights that are not the checkpoint's: by name, the shape that they
    have there, or None. transformers' own table of them is silenced: which may be new is for the caller to say. `role`
    is "student" or "teacher". ValueError for files that cannot be read."""
    if not is_offline_mode():  # offline, transformers sends no request
        _has_file(name, SAFE_WEIGHTS_NAME, config._commit_hash)
    log: Any = logging.get_logger("transformers.modeling_utils")

    def keep(record) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    log.addFilter(keep)
    try:
        with outside_deepspeed():
            model, info = AutoModelForImageClassification.from_pretrained(
                name, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **hub, **options
            )
    except (SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(
            f"the weights of {role} {name} cannot be read ({_first_line(error)}): the file is damaged or not "
            f"complete. Download or copy it again, or choose another --{role}."
        ) from error
    finally:
        log.removeFilter(keep)
    faults = dict.fromkeys(info["missing_keys"]) | {key: shape for key, shape, _ in info["mismatched_keys"]}
    # Counts of batches, which old checkpoints have none of, play no part.
    return model, {key: shape for key, shape in faults.items() if not key.endswith("num_batches_tracked")}


def head_layers(module: Any) -> list[Any]:
    """The linear layers as wide as there are classes in timm's own head, or outside the body of a classifier.

    Where the body gives the logits (Perceiver), it is the body's last one.
    """
    if hasattr(module, "timm_model"):
        heads = module.timm_model.get_classifier()
        heads = heads if isinstance(heads, (tuple, list)) else [heads]
        layers = [("", m) for head in heads for m in head.modules()]
    else:
        layers = [*module.named_modules()]
    # A convolution of size 1 is linear, too: its weight has one value for each input and output.
    linear = [(n, m) for n, m in layers if isinstance(m, (nn.Linear, nn.Conv2d)) and m.weight[0, 0].numel() == 1]
    wide = [(name, m) for name, m in linear if len(m.weight) == module.config.num_labels]
    body = f"{getattr(module, 'base_model_prefix', None)}."
    return [m for name, m in wide if not name.startswith(body)] or [m for _, m in wide[-1:]]


def check_width(name: str, model: nn.Module, size: tuple[int, int], names) -> int:
    """The number of a model's logits for images of `size`.

    Raises ValueError if it gives none, or if there are class names and another number of them.
    """
    try:
        logits = dry_run(model, size)
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{_first_line(error).rstrip('.')}. If it is their size, image_size=N gives another."
        if (input_name := getattr(model, "main_input_name", "pixel_values")) not in ("pixel_values", "inputs"):
            reason = f"its input is {input_name}."
        raise ValueError(f"{name} does not accept images as tensors (3, {size[0]}, {size[1]}): {reason}") from error
    if logits.ndim != 2:
        raise ValueError(f"{name} gives {tuple(logits.shape)} for an image, not one logit for each class.")
    width = logits.shape[1]
    if names is not None and width != len(names):
        raise ValueError(f"{name} names {len(names)} classes and gives {width} logits.")
    return width


def check_architecture(name: str, config, size: tuple[int, int], trust_remote_code: bool = False) -> None:
    """Raises ValueError if the architecture of a config gives no logits for images of `size`. Reads no weights."""
    for device in ("meta", "cpu"):  # what does not run without memory for its weights gets it
        with torch.device(device):
            model = build(config, trust_remote_code)
        try:
            check_width(name, model, size, config.id2label)
            return
        except ValueError:
            if device == "cpu":
                raise


def select_classes(module: Any, rows: list[int], size: tuple[int, int]) -> None:
    """Makes the i-th output of a classifier what its output `rows[i]` was, by the weights of its head, in place."""
    before = dry_run(module, size)
    for layer in head_layers(module):
        for name, parameter in layer.named_parameters(recurse=False):
            setattr(layer, name, nn.Parameter(parameter.detach()[rows].clone(), parameter.requires_grad))
        setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", len(rows))
    module.num_labels = len(rows)
    if hasattr(module, "timm_model"):
        module.timm_model.num_classes = len(rows)
    if not torch.allclose(dry_run(module, size), before[:, rows], atol=1e-4):
        raise ValueError(
            f"the classes of {type(module).__name__} cannot be put in the order of id2label: its head is not made of "
            "linear layers alone. Use data with the classes in its order, or from_scratch=True."
        )


def processor_for(module, name: str, hub: dict):
    """The image processor saved beside a model; ImageNet's statistics, with a warning, if there truly is none."""
    config, name = module.config, check_id(name)
    if config.model_type == "timm_wrapper" and getattr(config, "pretrained_cfg", None):
        from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

        return TimmWrapperImageProcessor(pretrained_cfg=config.pretrained_cfg, architecture=config.architecture)
    if is_built(name):
        return _square_processor(config.image_size, *CIFAR_STATISTICS)
    if any(_has_file(name, file, commit_of(module)) for file in (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME)):
        return AutoImageProcessor.from_pretrained(name, **hub)
    side = getattr(config, "image_size", None) or 224
    side = side if isinstance(side, int) else side[0]
    logger.warning_once(f"{name} has no image processor: using {side} px with ImageNet statistics.")
    return _square_processor(side, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resample=2)


def adjust_processor(processor, image_size, image_mean, image_std):
    """The processor with another input size (a plain square resize) and statistics; without one, made of all three."""
    if processor is None:
        if not (image_size and image_mean and image_std):
            hint = "pass processor=, or image_size=, image_mean= and image_std="
            raise ValueError(f"a model given as a module needs its image processor: {hint}.")
        return _square_processor(image_size, image_mean, image_std)
    statistics = {key: list(values) for key, values in (("mean", image_mean), ("std", image_std)) if values}
    if not image_size and not statistics:
        return processor
    if hasattr(processor, "data_config"):  # timm wrapper
        square = {"input_size": (3, image_size, image_size), "crop_pct": 1.0, "crop_mode": "squash"}
        data = {**processor.data_config, **(square if image_size else {}), **statistics}
        return type(processor)(pretrained_cfg=data, architecture=processor.architecture)
    if not image_size:
        settings = {f"image_{key}": values for key, values in statistics.items()}
        return type(processor).from_dict({**processor.to_dict(), **settings, "do_normalize": True})
    preprocessing = Preprocessing(processor)
    if preprocessing.channels != [0, 1, 2]:
        raise ValueError(f"{type(processor).__name__} swaps channels: pass processor=, made for {image_size} px.")
    mean, std = ([round(v, 7) for v in values] for values in (preprocessing.mean, preprocessing.std))
    resample = getattr(processor, "resample", None) or 3
    return _square_processor(image_size, image_mean or mean, image_std or std, resample)


def _square_processor(side: int, mean, std, resample: int = 3):
    from transformers import ViTImageProcessor

    size = {"height": side, "width": side}
    return ViTImageProcessor(size=size, resample=resample, image_mean=list(mean), image_std=list(std))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _has_file(name: str, file: str, commit: str | None) -> bool:
    """Whether a folder or repository has a file. Raises if that can't be known, where transformers would take a file
    that the Hub fails to give for one that is not there."""
    if os.path.isdir(name):
        return os.path.isfile(os.path.join(name, file))
    known = try_to_load_from_cache(name, file, revision=commit)  # a path, a mark for "not there", or None
    if known is not None:
        return isinstance(known, str)
    try:
        hf_hub_download(name, file, revision=commit)
    except RemoteEntryNotFoundError:
        return False
    return True
