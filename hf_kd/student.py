"""Loading students: from the Hub, from timm, from a folder, or from scratch; each with its image processor."""

from __future__ import annotations

import os

import torch
from huggingface_hub import hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import RemoteEntryNotFoundError
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, SAFE_WEIGHTS_NAME, logging

from .hub import resolve
from .views import View
from .weak_head import show_blank

logger = logging.get_logger(__name__)

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def label_maps(names: list[str] | dict[int, str]) -> dict:
    """`id2label` and `label2id` of a config, from class names in order (or an id2label)."""
    id2label = {int(i): str(n) for i, n in (names.items() if isinstance(names, dict) else enumerate(names))}
    if sorted(id2label) != list(range(len(id2label))):
        raise ValueError(f"id2label must number its {len(id2label)} classes from 0 on, it has {sorted(id2label)[:8]}.")
    id2label = dict(sorted(id2label.items()))
    return {"id2label": id2label, "label2id": {name: i for i, name in id2label.items()}}


def check_id(model: str | os.PathLike) -> str:
    """The Hub id or local folder, as text.

    Raises:
        ValueError: if it can only be a folder and there is none (the Hub's own message would be a riddle).
    """
    text = os.path.expanduser(os.fspath(model))
    if not os.path.isdir(text) and (text.startswith((".", "/", "~")) or text.count("/") > 1):
        raise ValueError(f"no such folder: {text} (seen from {os.getcwd()}). A Hub id has the form OWNER/NAME.")
    return text


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
        image_size: side of the model's square input in pixels; pictures are then resized to it without a crop. A
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
            _name_classes(module.config, id2label)
    else:
        name = check_id(model)
        hub = {"revision": revision, "trust_remote_code": trust_remote_code}
        config = student_config(name, from_scratch, image_size, hub)
        if id2label is not None:
            _name_classes(config, id2label)
        if from_scratch:
            module = build(config, trust_remote_code)
        else:
            # The default dtype is that of the checkpoint, which may be too coarse to train.
            module, info = load_classifier(name, config, hub, dtype=torch.float32)
            _check_loaded(module, name, info)
        processor = processor or processor_for(module, name, hub)
    processor = _with_size(processor, image_size, image_mean, image_std)
    if image_size:
        try:
            show_blank(module, (image_size, image_size))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(f"{name} can't take pictures of image_size={image_size}: {error}") from error
    if hasattr(processor, "data_config") and hasattr(module, "timm_model"):  # timm keeps preprocessing in the config
        own = getattr(module.config, "pretrained_cfg", None) or {}
        module.config.pretrained_cfg = {**own, **processor.data_config}
    return module, processor


def load_config(name: str, hub: dict):
    """The config of a model on the Hub or in a folder, from transformers or timm.

    `hub["revision"]` becomes the commit that it stands for: what is loaded with `hub` next is of the same commit.
    """
    if not os.path.isdir(name):
        hub["revision"] = resolve(name, hub["revision"])
    config = AutoConfig.from_pretrained(name, **hub)
    config._commit_hash = getattr(hub["revision"], "resolved", None)
    if getattr(config, "model_args", None):  # timm exports the count of classes, which transformers passes by itself
        config.model_args.pop("num_classes", None)
    return config


def commit_of(model: nn.Module) -> str | None:
    """The commit (40 hex digits) of the Hub repository that a student or teacher was loaded from; else None."""
    return getattr(getattr(model, "config", None), "_commit_hash", None)


def student_config(name: str, from_scratch: bool, image_size: int | None, hub: dict):
    """The config that `load_student` builds on; see there for the arguments, and `load_config` for `hub`."""
    return _scratch_config(name, image_size, hub) if from_scratch else load_config(name, hub)


def _name_classes(config, id2label) -> None:
    for key, value in label_maps(id2label).items():
        setattr(config, key, value)
    if config.model_type == "timm_wrapper":  # timm's own key, which is the one that is saved
        config.label_names = list(config.id2label.values())


def build(config, trust_remote_code: bool = False):
    """A randomly initialised classifier of a config (which may, unlike in transformers, name no architecture)."""
    if config.architectures is None and type(config) in AutoModelForImageClassification._model_mapping:
        known = AutoModelForImageClassification._model_mapping[type(config)]
        config.architectures = [(known[0] if isinstance(known, (tuple, list)) else known).__name__]
    module = AutoModelForImageClassification.from_config(
        config, dtype=torch.float32, trust_remote_code=trust_remote_code
    )
    if config.model_type == "timm_wrapper":  # transformers has overwritten timm's initialisation with normal(0, 0.02)
        import timm

        module.timm_model = timm.create_model(
            config.architecture, num_classes=config.num_labels, **(config.model_args or {})
        )
    return module


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


def kind_of(model_or_config, trust_remote_code: bool = False) -> str:
    """`"vit"` for a classifier whose blocks have attention by linear layers, else (also by convolutions) `"cnn"`.

    Args:
        model_or_config: a module, or a config from which one is built without memory.
        trust_remote_code: see `load_student`.
    """
    model = model_or_config
    if not isinstance(model, nn.Module):
        with torch.device("meta"):
            model = build(model, trust_remote_code)
    # Linear layers tell it from the channel attention of CNNs; and one alone is attention pooling.
    found = [
        name
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1].lower().startswith(("attn", "attention", "self_attn"))
        and any(isinstance(part, nn.Linear) for part in module.modules())
    ]
    return "vit" if len(found) > 1 else "cnn"


def load_classifier(name: str, config, hub: dict, **options) -> tuple[nn.Module, dict]:
    """A pretrained classifier of a config, and transformers' loading info: which of its weights may be new is for the
    caller to say, so transformers' own table of them is silenced."""
    if not is_offline_mode():  # where transformers asks nobody
        _has_file(name, SAFE_WEIGHTS_NAME, config._commit_hash)
    log = logging.get_logger("transformers.modeling_utils")

    def keep(record) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    log.addFilter(keep)
    try:
        return AutoModelForImageClassification.from_pretrained(
            name, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **hub, **options
        )
    finally:
        log.removeFilter(keep)


def loading_faults(info: dict) -> set[str]:
    """Names of the weights that from_pretrained's loading info reports as missing or of another shape."""
    mismatched = {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]}
    # Counts of batches, which old checkpoints have none of, play no part.
    return {key for key in {*info["missing_keys"], *mismatched} if not key.endswith("num_batches_tracked")}


def processor_for(module, name: str, hub: dict):
    """The image processor saved beside a model; ImageNet's statistics, with a warning, if there truly is none."""
    config = module.config
    if config.model_type == "timm_wrapper" and getattr(config, "pretrained_cfg", None):
        from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

        return TimmWrapperImageProcessor(pretrained_cfg=config.pretrained_cfg, architecture=config.architecture)
    if any(_has_file(name, file, commit_of(module)) for file in (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME)):
        return AutoImageProcessor.from_pretrained(name, **hub)
    from transformers import ViTImageProcessor

    side = getattr(config, "image_size", None) or 224
    side = side if isinstance(side, int) else side[0]
    logger.warning(f"{name} has no image processor: using {side} px with ImageNet statistics.")
    size = {"height": side, "width": side}
    return ViTImageProcessor(size=size, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)


def _has_file(name: str, file: str, commit: str | None) -> bool:
    """Whether a folder or repository has a file, which then is in the cache.

    Raises if that can't be known: transformers takes a file that the Hub fails to give for one that is not there.
    """
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


def _with_size(processor, image_size, image_mean, image_std):
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

    view = View(processor)
    if view.channels != [0, 1, 2]:
        raise ValueError(f"{type(processor).__name__} swaps channels: pass processor=, made for {image_size} px.")
    mean, std = ([round(v, 7) for v in x.flatten().tolist()] for x in (-view.offset / view.scale, 1 / view.scale))
    return ViTImageProcessor(
        size={"height": image_size, "width": image_size},
        resample=getattr(processor, "resample", None) or 3,
        image_mean=image_mean or mean,
        image_std=image_std or std,
    )
