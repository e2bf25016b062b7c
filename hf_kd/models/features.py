"""The intermediate layer whose output feeds the auxiliary head of USKD, found by tracing the student."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from .forward import in_eval_mode, logits_of

HEAD = "aux_head"

# Where the paper taps another layer than the last-but-one stage: the module, by how the architecture's name begins.
# Of MobileNetV2 it is the last inverted residual block (320 channels at width 1), in timm and in transformers.
EXCEPTIONS = {"mobilenetv2": "blocks.6", "mobilenet_v2": "mobilenet_v2.layer.15"}
_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")  # how the names of their parameters begin
_BATCH, _MOST_TOKENS = 2, 16  # images in the trace; tokens before those of the grid
_CANDIDATES = 40  # named in an error


@dataclass(frozen=True)
class FeatureLayer:
    """Where USKD taps the student.

    Attributes:
        name: the module whose output is the feature.
        channels: D, the size of the pooled feature.
        pooling: how the output becomes (B, D): "class_token" (the first of (B, N, D)), "mean_token" (the mean of
            those after the first `skipped`), "nchw" or "nhwc" (the mean over positions of a feature map), "none" (it
            is (B, D) already).
        shape: of the output for one image, without the batch dimension.
        skipped: how many tokens come first that stand for no position of the image (class token, registers).
        item: which part of the module's output it is, where that is a tuple.
    """

    name: str
    channels: int
    pooling: str
    shape: tuple[int, ...] = ()
    skipped: int = 0
    item: int | None = None

    def __str__(self) -> str:
        pooled = {"class_token": "its class token", "none": "as it is"}.get(self.pooling, "its mean over positions")
        return f"{self.name} ({' × '.join(map(str, self.shape))}, {pooled})"


@dataclass(frozen=True)
class _Output:
    """What a module gave for images: the feature, and its number of positions."""

    layer: FeatureLayer
    positions: int
    nodes: frozenset  # of autograd's graph, for all tensors of the output
    is_layer: bool  # a single one, or without weights: no block

    @property
    def tokens(self) -> bool:
        return len(self.layer.shape) == 2


def find_feature_layer(student: nn.Module, size: tuple[int, int], feature_module: str | None = None) -> FeatureLayer:
    """The layer that the paper taps: CNNs the output of the last-but-one stage, ViTs the class token after block L/2.

    The student is traced with blank images of `size` (height and width). A module can be tapped if all that the
    logits learn of the image passes through its output. If the blocks have several resolutions, it is the last such
    module at the second-lowest; if they all have one (ViT, Mixer), it is the block in the middle, the 6th of 12.
    `feature_module` names the module to tap instead, as in `student.named_modules()`.

    Raises:
        ValueError: there is no such module, or no single one is found; with the candidates.
    """
    trace, name = _Trace(student, size), feature_module or _exception(student)
    if name is None:
        seen = _larger_trace(student, size) or trace
        found = _middle_block(student, seen) or _end_of_the_last_but_one_stage(student, seen)
        name = found.layer.name if found is not None else None
    if name in trace.outputs:
        return trace.outputs[name].layer
    what = f"no module named {name!r} gives one" if name else f"no single module of {type(student).__name__} gives it"
    inner = [output.layer for output in trace.outputs.values() if not output.is_layer and output.positions > 1]
    blocks = [layer for layer in inner if layer.name[-1].isdigit()] or inner
    outermost = sorted(blocks, key=lambda layer: layer.name.count("."))[:_CANDIDATES]
    raise ValueError(
        f"USKD needs an intermediate feature of the student, but {what}. Pass feature_module= (--feature_module), the "
        f"name of one of: {'; '.join(str(layer) for layer in blocks if layer in outermost)}."
    )


def _exception(student: nn.Module) -> str | None:
    for network in student.modules():  # the network itself may be in a wrapper, at any depth
        config: Any = getattr(network, "config", None)
        timm_config = getattr(network, "default_cfg", None) or {}
        architecture = timm_config.get("architecture") or getattr(config, "model_type", None) or ""
        for beginning, module in EXCEPTIONS.items():
            if architecture.startswith(beginning):
                names = [name for name, _ in student.named_modules()]
                return next((name for name in names if f".{name}".endswith(f".{module}")), module)
    return None


def _middle_block(student: nn.Module, trace: _Trace) -> _Output | None:
    """Block L/2 of a network whose blocks all have one resolution. Convolutions before tokens do not count."""
    lists: list[list[_Output]] = []
    for name, module in student.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1:
            blocks = [trace.outputs.get(f"{name}.{i}") for i, _ in module.named_children()]
            whole = [block for block in blocks if block is not None and not block.is_layer and block.positions > 1]
            if len({type(child) for child in module.children()}) == 1 and len(whole) == len(module):
                lists += [whole] if all(map(trace.is_cut, whole)) else []
    if any(each[-1].tokens for each in lists):
        lists = [blocks for blocks in lists if blocks[-1].layer.pooling != "nchw"]
    longest = max(lists, key=len, default=[])
    isotropic = {block.positions for each in lists for block in each} == {trace.last and trace.last.positions}
    return longest[len(longest) // 2 - 1] if isotropic else None


def _end_of_the_last_but_one_stage(student: nn.Module, trace: _Trace) -> _Output | None:
    last = trace.last
    earlier = [output for output in trace.maps if last is not None and output.positions > last.positions]
    first = next(filter(trace.is_cut, earlier), None)
    if last is None or first is None:
        return None
    # Padding may make a map a little larger. Not what the last stage begins with, if there is anything else.
    stage = [output for output in earlier if last.positions < output.positions < 1.5 * first.positions]
    whole = [output for output in stage if not output.is_layer and trace.is_cut(output)]
    found = next((o for o in whole if not _begins_the_last_stage(student, o, trace)), whole[0] if whole else first)
    # Where timm lists stages, it knows their resolutions: of branches that run side by side none is a cut.
    stages: Any = next((m.feature_info for m in student.modules() if hasattr(m, "feature_info")), None)
    reductions = sorted({each["reduction"] for each in getattr(stages, "info", stages) or () if "reduction" in each})
    positions = math.prod(trace.size) / reductions[-2] ** 2 if len(reductions) > 1 else math.inf
    return found if found.positions < 2 * positions else None


def _begins_the_last_stage(student: nn.Module, output: _Output, trace: _Trace) -> bool:
    """Whether it is in a module that starts at its resolution, ends at a lower one, and has most weights after it.

    A stage that ends with its downsampling has most of them before.
    """
    ours, modules = output.layer.name, dict(student.named_modules())
    later = trace.order[trace.order.index(ours) + 1 :]
    for name, around in trace.outputs.items():
        if not ours.startswith(f"{name}.") or not 1 < around.positions < output.positions:
            continue
        parts = ((modules[n], inner) for n, inner in trace.outputs.items() if n.startswith(f"{name}."))
        inside = [inner.positions for part, inner in parts if [*part.parameters()]]  # padding is no resolution
        is_one_of_a_list = isinstance(modules[name], nn.Sequential) and name == ours.rpartition(".")[0]
        if is_one_of_a_list or max(inside) >= 1.5 * output.positions:
            continue
        after = [p for n in later if n.startswith(f"{name}.") for p in modules[n].parameters(recurse=False)]
        if 2 * sum(p.numel() for p in after) > sum(p.numel() for p in modules[name].parameters()):
            return True
    return False


def _larger_trace(student: nn.Module, size: tuple[int, int]) -> _Trace | None:
    """Of a CNN with an input below 128 px: at 32 px the last stages of one for ImageNet have a single position."""
    scale = math.ceil(128 / min(size))
    try:
        trace = _Trace(student, (scale * size[0], scale * size[1])) if scale > 1 else None
    except (AssertionError, RuntimeError, ValueError):  # it takes images of its own size only
        return None
    return None if trace is None or any(output.tokens for output in trace.outputs.values()) else trace


class _Trace:
    """The outputs of all modules that run once, in the order in which they end."""

    def __init__(self, student: nn.Module, size: tuple[int, int]):
        self.outputs: dict[str, _Output] = {}
        self.size = size
        has_class_token = any(n.split(".")[-1].startswith(_CLASS_TOKENS) for n, _ in student.named_parameters())
        calls: Counter[str] = Counter()

        def note(module: nn.Module, args, output, name: str) -> None:
            calls[name] += 1
            parts = [output] if isinstance(output, torch.Tensor) else _parts(output)
            found = {i: each for i, part in enumerate(parts) if (each := _feature(name, part, size, has_class_token))}
            if len({positions for _, positions in found.values()}) == 1:  # else none, or several branches
                item, (layer, positions) = next(iter(found.items()))
                layer = layer if isinstance(output, torch.Tensor) else replace(layer, item=item)
                nodes = frozenset(part.grad_fn for part in parts if isinstance(part, torch.Tensor))
                inner = getattr(module, "base_layer", module)  # PEFT's layers contain the one that they adapt
                is_layer = not any(inner.children()) or all(p.ndim < 2 for p in inner.parameters())
                self.outputs[name] = _Output(layer, positions, nodes, is_layer)

        modules = {name: module for name, module in student.named_modules() if name and not name.startswith(HEAD)}
        handles = [module.register_forward_hook(partial(note, name=name)) for name, module in modules.items()]
        like = next(student.parameters())
        try:
            with in_eval_mode(student), torch.enable_grad():
                self.image = torch.zeros(_BATCH, 3, *size, device=like.device, dtype=like.dtype, requires_grad=True)
                self.logits = logits_of(student(self.image))
        finally:
            for handle in handles:
                handle.remove()
        self.order = [*calls]
        self.outputs = {name: output for name, output in self.outputs.items() if calls[name] == 1}
        self.maps = [output for output in reversed(self.outputs.values()) if output.positions > 1]

    @cached_property
    def last(self) -> _Output | None:
        """The last map that everything passes through."""
        return next(filter(self.is_cut, self.maps), None)

    def is_cut(self, output: _Output) -> bool:
        """Whether every way from the image to the logits, in autograd's graph, passes through this output."""
        seen, left = set(output.nodes), [self.logits.grad_fn]
        while left:
            node = left.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if getattr(node, "variable", None) is self.image:
                return False
            left += [following for following, _ in node.next_functions]
        return True


def _parts(output: Any) -> list[Any]:
    if isinstance(output, dict):
        return [*output.values()]
    return [*output] if isinstance(output, (tuple, list)) else []


def _feature(name: str, part: Any, size: tuple[int, int], has_class_token: bool) -> tuple[FeatureLayer, int] | None:
    """How a tensor is pooled, and its number of positions; None if it is no feature of each image."""
    if not isinstance(part, torch.Tensor) or part.ndim < 2 or part.shape[0] != _BATCH:
        return None
    shape = tuple(part.shape[1:])
    if part.ndim == 2:
        return FeatureLayer(name, shape[0], "none", shape), 1
    if part.ndim == 3 and shape[1] > 1:
        strides = range(1, max(size) + 1)
        grids = [round_(size[0] / s) * round_(size[1] / s) for s in strides for round_ in (math.floor, math.ceil)]
        grid = max((positions for positions in grids if positions <= shape[0]), default=0)
        skipped = shape[0] - grid if shape[0] - grid <= _MOST_TOKENS else 0
        pooling = "class_token" if skipped and has_class_token else "mean_token"
        return FeatureLayer(name, shape[1], pooling, shape, skipped), shape[0] - skipped
    if part.ndim == 4:
        for first, channels, pooling in ((1, 0, "nchw"), (0, 2, "nhwc")):
            rows, columns = shape[first : first + 2]
            if abs(rows - columns * size[0] / size[1]) <= 1:  # else heads of attention, say
                return FeatureLayer(name, shape[channels], pooling, shape), rows * columns
    return None
