"""The weak head of USKD: a linear classifier on a pooled intermediate feature of the student.

It is a submodule of the student, fed by a forward hook at the feature site, and its logits leave through a forward
hook on the student: its parameters are used inside the student's own forward, as DDP, FSDP and torch.compile need, and
no modelling code is touched. It is kept out of the saved model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput

HEAD = "kd_head"

# Module names by model_type, counted from 0: `{half}` is block L/2 (the 6th of 12), `{stage}` the last stage but one,
# `{block}` the last block of that. Swin's stages themselves give what comes after patch merging.
_SITES = {
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


@dataclass
class StudentOutput(ModelOutput):
    """A student's output in training: `logits` (B, C) and the weak head's `weak_logits` (B, C)."""

    logits: torch.FloatTensor | None = None
    weak_logits: torch.FloatTensor | None = None


@dataclass(frozen=True)
class FeatureSite:
    """Where USKD taps the student.

    Attributes:
        name: the module whose output is the feature.
        channels: D, the size of the pooled feature.
        pooling: how the output becomes (B, D): "class_token" (the first of (B, N, D)), "mean_token", "nchw" or "nhwc"
            (the mean over positions of a feature map), "none" (it is (B, D) already).
    """

    name: str
    channels: int
    pooling: str


def tensor_of(output) -> torch.Tensor:
    """The main tensor of a module's output: itself, or the first of a tuple or ModelOutput."""
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return output


def logits_of(output) -> torch.Tensor:
    """The logits (B, C) of a classifier's output, whatever its type."""
    if isinstance(output, torch.Tensor):
        return output
    return output["logits"] if isinstance(output, dict) else tensor_of(output)


def find_feature_site(student: nn.Module, size: tuple[int, int], feature_module: str | None = None) -> FeatureSite:
    """The layer that the paper taps: CNNs the output of the last-but-one stage, ViTs the class token after block L/2.

    Args:
        student: the classifier.
        size: height and width of its input; one forward of a blank picture finds the feature's shape.
        feature_module: name of the module to tap instead, as in `student.named_modules()`.

    Raises:
        ValueError: if there is no such module, or no rule for this kind of model; with the candidates.
    """
    modules = dict(student.named_modules())
    name, kind = (feature_module, None) if feature_module else _known_site(student)
    if name not in modules:
        what = f"no module is named {name!r}" if name else f"there is no rule for {_kind_of(student)}"
        raise ValueError(
            f"USKD needs an intermediate feature of the student, but {what}. Pass feature_module= (--feature_module) "
            f"with one of: {', '.join(_candidates(student, size))}."
        )
    shape = _trace(student, size, [name])[name]
    kind = kind or _pooling(student, shape)
    channels = shape[1] if kind in ("nchw", "none") else shape[-1]
    return FeatureSite(name, channels, kind)


def _kind_of(student: nn.Module) -> str:
    model_type = getattr(getattr(student, "config", None), "model_type", None)
    return f"model_type {model_type!r}" if model_type else type(student).__name__


def _known_site(student: nn.Module) -> tuple[str | None, str | None]:
    config = getattr(student, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type in _SITES:
        name, kind = _SITES[model_type]
        half = (getattr(config, "num_hidden_layers", None) or 0) // 2 - 1
        depths = [0, 0, *(getattr(config, "depths", None) or ())]
        return name.format(half=half, stage=len(depths) - 4, block=depths[-2] - 1), kind
    prefix, model = ("timm_model.", student.timm_model) if hasattr(student, "timm_model") else ("", student)
    if hasattr(model, "num_prefix_tokens") and hasattr(model, "blocks"):  # timm's vision transformers
        return f"{prefix}blocks.{len(model.blocks) // 2 - 1}", None
    stages = getattr(model, "feature_info", None)  # timm: a list of dicts, or an object with one
    stages = getattr(stages, "info", stages)
    if stages and len(stages) > 1:
        return prefix + stages[-2]["module"], None
    return None, None


@torch.no_grad()
def show_blank(model: nn.Module, size: tuple[int, int]) -> None:
    """One forward of a blank picture in eval mode; every module's mode is left as it was."""
    modes = {module: module.training for module in model.modules()}
    parameter = next(model.parameters())
    try:
        model.eval()(torch.zeros(1, 3, *size, device=parameter.device, dtype=parameter.dtype))
    finally:
        for module, mode in modes.items():
            module.training = mode


def _trace(student: nn.Module, size: tuple[int, int], names) -> dict[str, tuple[int, ...]]:
    """Output shapes of the named modules for one blank picture, in the order in which they run."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name):
        def hook(module, args, output):
            try:
                shapes[name] = tuple(tensor_of(output).shape)
            except (TypeError, IndexError, KeyError):  # no tensor in it: not a feature
                pass

        return hook

    modules = dict(student.named_modules())
    handles = [modules[name].register_forward_hook(note(name)) for name in names]
    try:
        show_blank(student, size)
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


class WeakHead(nn.Module):
    """`W = softmax(Linear(pooled feature))`, arXiv 2303.13005: gives the logits (B, C) of W."""

    def __init__(self, site: FeatureSite, num_classes: int):
        super().__init__()
        self.site = site
        self.fc = nn.Linear(site.channels, num_classes)
        self._logits: torch.Tensor | None = None

    def forward(self, output) -> torch.Tensor:
        feature = tensor_of(output)
        if self.site.pooling == "class_token":
            feature = feature[:, 0]
        elif self.site.pooling != "none":
            feature = feature.mean({"mean_token": 1, "nchw": (2, 3), "nhwc": (1, 2)}[self.site.pooling])
        return self.fc(feature)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_logits": None}  # recomputing a checkpoint may leave some, which can't be copied

    def _tap(self, module, args, output) -> None:
        if torch.is_grad_enabled():
            self._logits = self(output)

    def _emit(self, module, args, output):
        if not torch.is_grad_enabled():  # evaluation and saving see the plain model
            return None
        weak_logits, self._logits = self._logits, None
        if weak_logits is None:
            raise RuntimeError(
                f"the weak head got no differentiable feature from {self.site.name!r}. With activation checkpointing "
                "use activation_checkpointing_kwargs={'use_reentrant': False}; where that passes the module by (in "
                f"timm), choose its last block with feature_module= (--feature_module): {self.site.name}.N."
            )
        return StudentOutput(logits=logits_of(output), weak_logits=weak_logits)


def attach_weak_head(
    student: nn.Module, num_classes: int, size: tuple[int, int], feature_module: str | None = None, seed: int = 0
) -> WeakHead:
    """Add the weak head to a student as its submodule `kd_head`, and the hooks. Call before compiling or wrapping it.

    Args:
        student: the classifier; its saved form does not change.
        num_classes: C.
        size: height and width of the student's input.
        feature_module: see `find_feature_site`.
        seed: of the head's initialisation, which leaves the global generator as it was: a run with the head draws
            the same numbers as one without.
    """
    if hasattr(student, HEAD):
        return getattr(student, HEAD)
    site = find_feature_site(student, size, feature_module)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds the GPU's too
        head = WeakHead(site, num_classes)
    parameter = next(student.parameters())
    student.add_module(HEAD, head.to(device=parameter.device, dtype=parameter.dtype))
    ignored = {f"{HEAD}.{name}" for name in head.state_dict()}
    student._keys_to_ignore_on_save = {*(getattr(student, "_keys_to_ignore_on_save", None) or ()), *ignored}
    student.get_submodule(site.name).register_forward_hook(head._tap)
    student.register_forward_hook(head._emit)
    return head
