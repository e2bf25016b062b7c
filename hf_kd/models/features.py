"""The intermediate layer whose output feeds the auxiliary head of USKD."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from .forward import dry_run, tensor_of

HEAD = "aux_head"

# Module names by model_type, counted from 0: `{half}` is block L/2 (the 6th of 12), `{stage}` the last stage but one,
# `{block}` the last block of that. Swin's stages themselves give what comes after patch merging.
_LAYERS = {
    "vit": ("vit.layers.{half}", "class_token"),
    "deit": ("deit.layers.{half}", "class_token"),
    "beit": ("beit.layers.{half}", "class_token"),
    "dinov2": ("dinov2.encoder.layer.{half}", "class_token"),
    "swin": ("swin.encoder.layers.{stage}.blocks.{block}", "mean_token"),
    "swinv2": ("swinv2.encoder.layers.{stage}.blocks.{block}", "mean_token"),
    "resnet": ("resnet.encoder.stages.{stage}", "nchw"),
    "regnet": ("regnet.encoder.stages.{stage}", "nchw"),
    "convnext": ("convnext.encoder.stages.{stage}", "nchw"),
    "convnextv2": ("convnextv2.encoder.stages.{stage}", "nchw"),
}


@dataclass(frozen=True)
class FeatureLayer:
    """Where USKD taps the student.

    `pooling` is how the output of the module becomes (B, channels): "class_token" (the first of (B, N, D)),
    "mean_token", "nchw" or "nhwc" (the mean over positions of a feature map), "none" (it is (B, D) already).
    """

    name: str
    channels: int
    pooling: str


def find_feature_layer(student: nn.Module, size: tuple[int, int], feature_module: str | None = None) -> FeatureLayer:
    """The layer that the paper taps: CNNs the output of the last-but-one stage, ViTs the class token after block L/2.

    One forward of a blank image of `size` (height and width) finds the feature's shape. `feature_module` names the
    module to tap instead, as in `student.named_modules()`. ValueError, with the candidates, if there is no such
    module, or no rule for this kind of model.
    """
    name, kind = (feature_module, None) if feature_module else _known_layer(student)
    if name is None or name not in dict(student.named_modules()):
        model_type = getattr(getattr(student, "config", None), "model_type", None)
        what = f"model_type {model_type!r}" if model_type else type(student).__name__
        what = f"no module is named {name!r}" if name else f"there is no rule for {what}"
        raise ValueError(
            f"USKD needs an intermediate feature of the student, but {what}. Pass feature_module= (--feature_module) "
            f"with one of: {', '.join(_candidates(student, size))}."
        )
    shape = _trace(student, size, [name])[name]
    kind = kind or _pooling(student, shape)
    return FeatureLayer(name, shape[1] if kind in ("nchw", "none") else shape[-1], kind)


def _known_layer(student: nn.Module) -> tuple[str | None, str | None]:
    config = getattr(student, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type in _LAYERS:
        name, kind = _LAYERS[model_type]
        half = (getattr(config, "num_hidden_layers", None) or 0) // 2 - 1
        depths = [0, 0, *(getattr(config, "depths", None) or ())]
        return name.format(half=half, stage=len(depths) - 4, block=depths[-2] - 1), kind
    model: Any = getattr(student, "timm_model", student)
    prefix = "" if model is student else "timm_model."
    if hasattr(model, "num_prefix_tokens") and hasattr(model, "blocks"):  # timm's vision transformers
        return f"{prefix}blocks.{len(model.blocks) // 2 - 1}", None
    stages: Any = getattr(model, "feature_info", None)  # timm: a list of dicts, or an object with one
    stages = getattr(stages, "info", stages) or ()
    return (prefix + stages[-2]["module"] if len(stages) > 1 else None), None


def _trace(student: nn.Module, size: tuple[int, int], names) -> dict[str, tuple[int, ...]]:
    """Output shapes of the named modules for one blank image, in the order in which they run."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(module, args, output, name):
        with contextlib.suppress(TypeError, IndexError, KeyError):  # no tensor in it: not a feature
            shapes[name] = tuple(tensor_of(output).shape)

    handles = [student.get_submodule(name).register_forward_hook(partial(note, name=name)) for name in names]
    try:
        dry_run(student, size)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _pooling(student: nn.Module, shape: tuple[int, ...]) -> str:
    if len(shape) == 2:
        return "none"
    model = getattr(student, "timm_model", student)
    if len(shape) == 3:
        has_token = any(name.split(".")[-1] in ("cls_token", "class_token") for name, _ in model.named_parameters())
        late = hasattr(model, "blocks_token_only") or hasattr(model, "cls_attn_blocks")  # timm's CaiT and XCiT
        return "class_token" if has_token and not late else "mean_token"
    if len(shape) == 4:
        # Channels last in timm's Swin; elsewhere the odd one out is taken for the channels of a square map.
        last = getattr(model, "output_fmt", None) == "NHWC" or shape[1] == shape[2] != shape[3]
        return "nhwc" if last else "nchw"
    raise ValueError(f"a feature of shape {shape} can't be pooled: choose a module with 2 to 4 dimensions.")


def _candidates(student: nn.Module, size: tuple[int, int]) -> list[str]:
    names = [n for n, _ in student.named_modules() if n and n.count(".") <= 3 and not n.startswith(HEAD)]
    shapes = _trace(student, size, names)
    blocks = [n for n in shapes if n.rsplit(".", 1)[-1].isdigit() and len(shapes[n]) > 2]
    return [f"{n} {shapes[n]}" for n in (blocks or [n for n in shapes if len(shapes[n]) > 2])][:40]
