"""Loading students: from the Hub, from timm, from a folder, or from scratch; each with its image processor."""

from __future__ import annotations

from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
from transformers.utils import logging

from .views import View


logger = logging.get_logger(__name__)

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def label_maps(names: list[str] | dict[int, str]) -> dict:
    """`num_labels`-defining keyword arguments of a config, from class names in order (or an id2label)."""
    id2label = {int(i): str(n) for i, n in (names.items() if isinstance(names, dict) else enumerate(names))}
    return {"id2label": id2label, "label2id": {name: i for i, name in id2label.items()}}


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
        image_size: side of the model's square input in pixels; pictures are then resized to it without a crop.
        image_mean, image_std: channel statistics of pixels in [0, 1]; default: the processor's.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run modelling code from the Hub repository. Off unless you have read it.

    Returns:
        `(model, processor)`. The model is on the CPU, in train mode if `from_scratch`.

    Raises:
        ValueError: if weights other than those of the head are missing, with their names.
    """
    if isinstance(model, nn.Module):
        if from_scratch:
            raise ValueError("from_scratch=True builds a model from an id or a folder; a module was given, with weights.")
        if processor is None:
            raise ValueError("a student given as a module needs its image processor: load_student(module, processor=...).")
        return model, _with_size(processor, image_size, image_mean, image_std)
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    names = label_maps(id2label) if id2label is not None else {}
    if from_scratch:
        config = _scratch_config(model, image_size, names, hub)
        module = build(config, trust_remote_code)
    else:
        module, info = AutoModelForImageClassification.from_pretrained(
            model, ignore_mismatched_sizes=True, output_loading_info=True, **names, **hub
        )
        _check_loaded(module, model, info)
        fixed = getattr(module.config, "image_size", None)
        if image_size and fixed and fixed not in (image_size, (image_size, image_size), [image_size, image_size]):
            raise ValueError(
                f"{model} was pretrained at {fixed} px and its position embeddings fit no other size: "
                f"drop image_size={image_size}, or use --from_scratch."
            )
    if processor is None:
        processor = _processor_for(module, model, hub)
    processor = _with_size(processor, image_size, image_mean, image_std)
    if hasattr(processor, "data_config"):  # a timm model keeps its preprocessing in its config
        module.config.pretrained_cfg = {**(getattr(module.config, "pretrained_cfg", None) or {}), **processor.data_config}
    return module, processor


def build(config, trust_remote_code: bool = False):
    """A randomly initialised classifier of a config (which may, unlike in transformers, name no architecture)."""
    if config.architectures is None and type(config) in AutoModelForImageClassification._model_mapping:
        known = AutoModelForImageClassification._model_mapping[type(config)]
        config.architectures = [(known[0] if isinstance(known, (tuple, list)) else known).__name__]
    return AutoModelForImageClassification.from_config(config, trust_remote_code=trust_remote_code)


def _scratch_config(model: str, image_size: int | None, names: dict, hub: dict):
    if not str(model).startswith("timm/"):
        config = AutoConfig.from_pretrained(model, **names, **hub)
        if image_size and hasattr(config, "image_size"):
            config.image_size = image_size
        return config
    import timm
    from transformers import TimmWrapperConfig

    architecture = str(model).removeprefix("timm/").split(".")[0]
    if architecture not in timm.list_models():
        near = timm.list_models(f"*{architecture[:6]}*")[:5]
        raise ValueError(f"timm {timm.__version__} has no architecture {architecture!r}. Near: {', '.join(near) or '-'}.")
    default = timm.get_pretrained_cfg(architecture).to_dict()
    # Of the weights' own settings only the preprocessing holds without them.
    data = timm.data.resolve_data_config(default)
    # Position embeddings depend on the size of the input.
    model_args = {"img_size": image_size} if image_size and default.get("fixed_input_size") else None
    return TimmWrapperConfig(architecture=architecture, pretrained_cfg=data, model_args=model_args, **names)


def _check_loaded(module, name, info: dict) -> None:
    """Only the classification head may be new; anything else would be trained from noise without a word."""
    new = set(info["missing_keys"]) | {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]}
    classes = module.config.num_labels
    head = {f"{n}.{p}" for n, m in module.named_modules() if getattr(m, "out_features", None) == classes
            for p, _ in m.named_parameters(recurse=False)}
    if new - head:
        raise ValueError(
            f"{name}: {len(new - head)} weights besides the classification head are not in the checkpoint or have "
            f"another shape: {sorted(new - head)[:8]}. Use the architecture the weights were made for, or --from_scratch."
        )
    if new:
        logger.info(f"{name}: the classification head is new ({classes} classes).")


def _processor_for(module, name: str, hub: dict):
    if module.config.model_type == "timm_wrapper" and getattr(module.config, "pretrained_cfg", None):
        from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

        config = module.config
        return TimmWrapperImageProcessor(pretrained_cfg=config.pretrained_cfg, architecture=config.architecture)
    try:
        return AutoImageProcessor.from_pretrained(name, **hub)
    except OSError:
        from transformers import ViTImageProcessor

        size = getattr(module.config, "image_size", None) or 224
        size = size if isinstance(size, int) else size[0]
        logger.warning(f"{name} has no image processor: using {size} px with ImageNet statistics.")
        return ViTImageProcessor(size={"height": size, "width": size}, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)


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
    from transformers import ViTImageProcessor

    height, width = (image_size, image_size) if image_size else View(processor).size
    return ViTImageProcessor(
        size={"height": height, "width": width},
        resample=getattr(processor, "resample", None) or 3,
        image_mean=image_mean or processor.image_mean,
        image_std=image_std or processor.image_std,
    )
