"""Loading students: from the Hub, from timm, from a folder, or from scratch; each with its image processor."""

from __future__ import annotations

import difflib
import os
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..labels import head_rows, name_classes
from . import loading
from .cifar_networks import CifarConfig
from .preprocessing import Preprocessing

logger = logging.get_logger(__name__)

# What transformers' MobileNets have for their dropout before the head, in the classes and in the configs on the Hub.
_PROBABILITY_TO_KEEP = {"mobilenet_v1": 0.999, "mobilenet_v2": 0.8}


def load_student(
    model,
    id2label: list[str] | dict[int, str] | None = None,
    processor=None,
    from_scratch: bool = False,
    image_size: int | None = None,
    image_mean: list[float] | None = None,
    image_std: list[float] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    model_kwargs: dict[str, Any] | None = None,
):
    """A student and its image processor.

    Args:
        model: a Hub id (`facebook/deit-tiny-patch16-224`, `timm/resnet18.a1_in1k`), a local folder, a module, or, with
            from_scratch, `cifar/NAME`: one of `cifar_networks.NAMES`.
        id2label: the class names of the data, in label order. If the pretrained model knows them all (see
            `ClassMapping.between`), its head keeps their rows, in this order. If not, a head of as many classes stays
            (the names it knows keep their rows, the others take the rest in order), and any other is replaced.
        processor: the image processor; default: the one saved beside the model. A module needs it, or size and
            statistics.
        from_scratch: build the architecture with random weights; of `timm/NAME` nothing is downloaded.
        image_size: side of the model's square input in pixels; images are then resized to it without a crop. A
            pretrained ViT knows only its own.
        image_mean, image_std: channel statistics of pixels in [0, 1]; default: the processor's.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run modelling code from the Hub repository. Off unless you have read it.
        model_kwargs: arguments of the architecture, such as {"drop_path_rate": 0.1}: of timm's `create_model`, or
            attributes of a config of transformers.

    Returns:
        `(model, processor)`. The model is on the CPU, in train mode if `from_scratch`.

    Raises:
        ValueError: no such folder or architecture, weights other than the head's are missing, another number of class
            names than logits, or an `image_size` that the model can't take.
    """
    module: Any
    config: Any
    if id2label is not None and len(id2label) < 2:
        raise ValueError(f"id2label names one class only, {id2label}: a classifier needs two or more.")
    if isinstance(model, nn.Module):
        if from_scratch:
            raise ValueError("from_scratch=True builds a model from an id or a folder, but a module was given.")
        module, name, config = model, type(model).__name__, getattr(model, "config", None)
    else:
        name, hub = loading.check_id(model), {"revision": revision, "trust_remote_code": trust_remote_code}
        module, config = None, student_config(name, from_scratch, image_size, hub, model_kwargs)
    rows, renamed = None, 0
    if config is not None and id2label is not None and not from_scratch:
        rows, renamed = head_rows(config.id2label, id2label)
        if module is not None and rows is None:
            raise ValueError(
                f"{name} has {config.num_labels} classes, id2label {len(id2label)}, and some of them by other names."
            )
    if module is None:
        own = config.num_labels
        if id2label is not None and rows is None:
            name_classes(config, id2label)
        if from_scratch:
            module = loading.build(config, trust_remote_code)
        else:
            # The default dtype is that of the checkpoint, which may be too coarse to train.
            module, faults = loading.load_classifier(name, config, hub, "student", dtype=torch.float32)
            _check_loaded(module, name, faults, own)
        processor = processor or loading.processor_for(module, name, hub)
    processor = loading.adjust_processor(processor, image_size, image_mean, image_std)
    names = id2label if config is None else config.id2label
    loading.check_width(name, module, Preprocessing(processor).size, names)
    if rows is not None:
        if rows != list(range(config.num_labels)):
            loading.select_classes(module, rows, Preprocessing(processor).size)
        name_classes(module.config, id2label)
        if renamed:
            logger.warning(f"{name}: {renamed} of the {len(rows)} classes are new names for rows of its trained head.")
    if hasattr(processor, "data_config") and hasattr(module, "timm_model"):  # timm keeps preprocessing in the config
        before = getattr(module.config, "pretrained_cfg", None) or {}
        module.config.pretrained_cfg = {**before, **processor.data_config}
    return module, processor


def student_config(
    name: str, from_scratch: bool, image_size: int | None, hub: dict, model_kwargs: dict[str, Any] | None = None
):
    """The config that `load_student` builds on; see there for the arguments, and `load_config` for `hub`."""
    if not from_scratch:
        return _with_kwargs(loading.load_config(name, hub), model_kwargs)
    import timm
    from transformers import TimmWrapperConfig

    known: Any = timm.get_pretrained_cfg  # None for an unknown name
    config: Any
    if loading.is_built(name):
        config = CifarConfig(name.removeprefix("cifar/"))
    elif name.startswith("timm/") and not os.path.isdir(name):
        architecture = name.removeprefix("timm/").split(".")[0]
        if not timm.is_model(architecture):
            near = timm.list_models(f"*{architecture[:6]}*")[:5]
            raise ValueError(f"timm {timm.__version__} has no {architecture!r}. Near: {', '.join(near) or '-'}.")
        # Of the weights' own settings only the preprocessing holds without them.
        data = timm.data.resolve_data_config(known(architecture).to_dict())
        config = TimmWrapperConfig(architecture=architecture, pretrained_cfg=data)  # type: ignore[call-arg]  # taken by **kwargs
        loading.complete_timm_config(config)
    else:
        config = loading.load_config(name, hub)
    # Position embeddings depend on the size of the input.
    if image_size and config.model_type == "timm_wrapper":
        if known(config.architecture).fixed_input_size:
            config.model_args = {**(config.model_args or {}), "img_size": image_size}
    elif image_size and hasattr(config, "image_size"):
        config.image_size = image_size if isinstance(config.image_size, int) else [image_size] * 2
    kept = _PROBABILITY_TO_KEEP.get(config.model_type)
    if kept and config.classifier_dropout_prob == kept:
        config.classifier_dropout_prob = round(1 - kept, 3)
        logger.warning_once(
            f"{name}: its config drops {kept:.1%} of the features before the head (classifier_dropout_prob). That is "
            f"TensorFlow's probability to keep one: training with {1 - kept:.1%}."
        )
    return _with_kwargs(config, model_kwargs)


def _with_kwargs(config, model_kwargs: dict[str, Any] | None):
    for key, value in (model_kwargs or {}).items():
        if config.model_type == "timm_wrapper":
            config.model_args = {**(config.model_args or {}), key: value}
        elif key in config.to_dict():
            setattr(config, key, value)
        else:
            near = ", ".join(difflib.get_close_matches(key, config.to_dict(), n=3)) or "-"
            raise ValueError(f"--model_kwargs: a {config.model_type} has no {key!r}. Near: {near}.")
    return config


def _check_loaded(module: Any, name: str, faults: dict, own: int) -> None:
    """Only the head may be new, of a checkpoint that names `own` classes: all else would be trained from noise."""
    head = {id(p) for layer in loading.head_layers(module) for p in layer.parameters()}
    wrong = sorted(faults.keys() - {n for n, p in module.named_parameters() if id(p) in head})
    if wrong:
        raise ValueError(
            f"{name}: {len(wrong)} weights besides the classification head are not in the checkpoint or have another "
            f"shape: {wrong[:8]}. Use the architecture the weights were made for, or --from_scratch."
        )
    widths = {shape[0] for shape in faults.values() if shape} - {own}
    if widths:
        raise ValueError(f"{name}: its config names {own} classes, its head has {widths.pop()}: correct config.json.")
    if faults:
        logger.info(f"{name}: the classification head is new ({module.config.num_labels} classes).")
