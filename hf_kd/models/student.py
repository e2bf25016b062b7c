"""Loading students: from the Hub, from timm, from a folder, or from scratch; each with its image processor."""

from __future__ import annotations

import os

import torch
from torch import nn
from transformers.utils import logging

from ..labels import name_classes
from .forward import dry_run
from .loading import build, check_id, load_classifier, load_config, loading_faults, processor_for
from .preprocessing import Preprocessing

logger = logging.get_logger(__name__)


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
):
    """A student and its image processor.

    Args:
        model: a Hub id (`facebook/deit-tiny-patch16-224`, `timm/resnet18.a1_in1k`), a local folder, or a module.
            With `from_scratch`, `timm/NAME` needs no download: timm knows the architecture.
        id2label: the class names of the data, in label order. A classification head of another size is replaced.
        processor: the image processor; default: the one saved beside the model.
        from_scratch: build the architecture with random weights instead of loading them.
        image_size: side of the model's square input in pixels; images are then resized to it without a crop. A
            pretrained ViT knows only its own.
        image_mean, image_std: channel statistics of pixels in [0, 1]; default: the processor's.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run modelling code from the Hub repository. Off unless you have read it.

    Returns:
        `(model, processor)`. The model is on the CPU, in train mode if `from_scratch`.

    Raises:
        ValueError: if there is no such folder or architecture, if weights other than those of the head are missing
            (with their names), or if the model can't take `image_size` or does not have `id2label`'s count of classes.
    """
    if isinstance(model, nn.Module):
        if from_scratch:
            raise ValueError("from_scratch=True builds a model from an id or a folder, but a module was given.")
        if processor is None:
            raise ValueError("a student given as a module needs its image processor: pass processor=.")
        module, name = model, type(model).__name__
        if id2label is not None and hasattr(module, "config"):
            if module.config.num_labels != len(id2label):
                raise ValueError(f"{name} has {module.config.num_labels} classes, id2label {len(id2label)}.")
            name_classes(module.config, id2label)
    else:
        name = check_id(model)
        hub = {"revision": revision, "trust_remote_code": trust_remote_code}
        config = student_config(name, from_scratch, image_size, hub)
        if id2label is not None:
            name_classes(config, id2label)
        if from_scratch:
            module = build(config, trust_remote_code)
        else:
            # The default dtype is that of the checkpoint, which may be too coarse to train.
            module, info = load_classifier(name, config, hub, dtype=torch.float32)
            _check_loaded(module, name, info)
        processor = processor or processor_for(module, name, hub)
    processor = with_size(processor, image_size, image_mean, image_std)
    if image_size:
        try:
            dry_run(module, (image_size, image_size))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(f"{name} can't take images of image_size={image_size}: {error}") from error
    if hasattr(processor, "data_config") and hasattr(module, "timm_model"):  # timm keeps preprocessing in the config
        own = getattr(module.config, "pretrained_cfg", None) or {}
        module.config.pretrained_cfg = {**own, **processor.data_config}
    return module, processor


def student_config(name: str, from_scratch: bool, image_size: int | None, hub: dict):
    """The config that `load_student` builds on; see there for the arguments, and `load_config` for `hub`."""
    return _scratch_config(name, image_size, hub) if from_scratch else load_config(name, hub)


def _scratch_config(model: str, image_size: int | None, hub: dict):
    import timm
    from transformers import TimmWrapperConfig

    if model.startswith("timm/") and not os.path.isdir(model):
        architecture = model.removeprefix("timm/").split(".")[0]
        if not timm.is_model(architecture):
            near = timm.list_models(f"*{architecture[:6]}*")[:5]
            raise ValueError(f"timm {timm.__version__} has no {architecture!r}. Near: {', '.join(near) or '-'}.")
        # Of the weights' own settings only the preprocessing holds without them.
        data = timm.data.resolve_data_config(timm.get_pretrained_cfg(architecture).to_dict())
        config = TimmWrapperConfig(architecture=architecture, pretrained_cfg=data)
    else:
        config = load_config(model, hub)
    # Position embeddings depend on the size of the input.
    if image_size and config.model_type == "timm_wrapper":
        if timm.get_pretrained_cfg(config.architecture).fixed_input_size:
            config.model_args = {**(config.model_args or {}), "img_size": image_size}
    elif image_size and hasattr(config, "image_size"):
        config.image_size = image_size
    return config


def _check_loaded(module, name: str, info: dict) -> None:
    """Only the classification head may be new; anything else would be trained from noise without a word."""
    new = loading_faults(info)
    if hasattr(module, "timm_model"):
        parts = module.timm_model.get_classifier()
        parts = parts if isinstance(parts, (tuple, list)) else [parts]
    else:
        body, classes = f"{module.base_model_prefix}.", module.config.num_labels
        layers = [m for n, m in module.named_modules() if not n.startswith(body)]
        parts = [m for m in layers if getattr(m, "out_features", None) == classes]
    head = {id(p) for part in parts for p in part.parameters()}
    wrong = new - {n for n, p in module.named_parameters() if id(p) in head}
    if wrong:
        raise ValueError(
            f"{name}: {len(wrong)} weights besides the classification head are not in the checkpoint or have another "
            f"shape: {sorted(wrong)[:8]}. Use the architecture the weights were made for, or --from_scratch."
        )
    if new:
        logger.info(f"{name}: the classification head is new ({module.config.num_labels} classes).")


def with_size(processor, image_size, image_mean, image_std):
    """The processor with another input size (a plain square resize) and other statistics, where they are given."""
    if image_size is None and image_mean is None and image_std is None:
        return processor
    if hasattr(processor, "data_config"):  # timm wrapper
        new = dict(processor.data_config)
        if image_size:
            new |= {"input_size": (3, image_size, image_size), "crop_pct": 1.0, "crop_mode": "squash"}
        new |= {k: tuple(v) for k, v in (("mean", image_mean), ("std", image_std)) if v}
        return type(processor)(pretrained_cfg=new, architecture=processor.architecture)
    if not image_size:
        new = {k: list(v) for k, v in (("image_mean", image_mean), ("image_std", image_std)) if v}
        return type(processor).from_dict({**processor.to_dict(), **new, "do_normalize": True})
    from transformers import ViTImageProcessor

    preprocessing = Preprocessing(processor)
    if preprocessing.channels != [0, 1, 2]:
        raise ValueError(f"{type(processor).__name__} swaps channels: pass processor=, made for {image_size} px.")
    mean, std = (
        [round(v, 7) for v in x.flatten().tolist()]
        for x in (-preprocessing.offset / preprocessing.scale, 1 / preprocessing.scale)
    )
    return ViTImageProcessor(
        size={"height": image_size, "width": image_size},
        resample=getattr(processor, "resample", None) or 3,
        image_mean=image_mean or mean,
        image_std=image_std or std,
    )
