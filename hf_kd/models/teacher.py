"""The teacher: frozen, always in eval mode, its classes in the student's order, with its own preprocessing."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from ..labels import ClassMapping, label_maps, read_class_map
from . import loading
from .forward import id2label_of, logits_of
from .preprocessing import Preprocessing


class Teacher(nn.Module):
    """A frozen classifier that turns pixels into logits of the data's classes, in their order.

    It does not change: `aligned` gives another one, with the same model.

    Args:
        model: a classifier `(B, 3, H, W) -> logits` (transformers, timm, any module). It is frozen and kept in eval.
        processor: its image processor, from which its `Preprocessing` is measured.
        id2label: the class names of the data, in label order; default: the teacher's own.
        class_map: see `ClassMapping.between`; `mapping` is what it gives.
        dtype: compute type: `torch.bfloat16` or `torch.float16` (autocast), `torch.float32`, or None for the weights'
            own. Weights of another type are copied for float32.
        name: how reports call it.
        class_names: the model's own class names, in the order of its outputs; default: those of its config.

    Raises:
        ValueError: the count of class names is not that of the logits, or the classes cannot be matched.
    """

    index: torch.Tensor | None

    def __init__(
        self,
        model: nn.Module,
        processor,
        id2label=None,
        class_map=None,
        dtype: torch.dtype | None = None,
        name: str = "teacher",
        class_names=None,
    ):
        super().__init__()
        if dtype is torch.float32 and any(p.dtype is not dtype for p in model.parameters()):
            model = copy.deepcopy(model).float()  # another teacher may compute with this one as it is
        self.model = model.requires_grad_(False)
        self.eval()
        self.processor, self.preprocessing = processor, Preprocessing(processor)
        self.name, self.dtype = name, dtype
        if class_names is None:
            class_names = id2label_of(model)
            width = loading.check_width(name, model, self.preprocessing.size, class_names)
            # Of a module without class names only an explicit class_map can order the outputs.
            class_names = class_names or [f"LABEL_{i}" for i in range(width)]
        self.class_names = label_maps(class_names)["id2label"]
        self.id2label = self.class_names if id2label is None else label_maps(id2label)["id2label"]
        self.class_map = read_class_map(class_map)
        self.mapping = ClassMapping.between(self.class_names, self.id2label, None if id2label is None else class_map)
        self.register_buffer("index", self.mapping.index, persistent=False)

    def aligned(self, id2label=None, class_map=None, dtype: torch.dtype | None = None) -> Teacher:
        """A teacher with the same frozen model and another class order or compute type.

        What is not given stays: a `class_map` given at loading counts for every later order of the classes.
        """
        if id2label is None and self.id2label is not self.class_names:
            id2label = self.id2label
        class_map = self.class_map if class_map is None else class_map
        dtype = dtype or self.dtype
        return Teacher(self.model, self.processor, id2label, class_map, dtype, self.name, self.class_names)

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode: `model.train()` on a wrapper must not reach it."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor, cropped: bool = False) -> torch.Tensor:
        """Logits of images.

        Args:
            pixels, cropped: see `Preprocessing.__call__`.

        Returns:
            float32 `(B, C)` in the order of `id2label`, without gradient; see `ClassMapping.apply`.
        """
        parameter = next(self.model.parameters())
        values = self.preprocessing(pixels, cropped).to(device=parameter.device, dtype=parameter.dtype)
        enabled = self.dtype in (torch.bfloat16, torch.float16)  # otherwise an autocast around this one is off here
        with torch.autocast(parameter.device.type, dtype=self.dtype if enabled else None, enabled=enabled):
            logits = logits_of(self.model(values)).float()
        return self.mapping.apply(logits, self.index)


def load_teacher(
    model,
    id2label: list[str] | dict[int, str] | None = None,
    processor=None,
    class_map=None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    class_names: list[str] | dict[int, str] | None = None,
    image_size: int | None = None,
    image_mean: list[float] | None = None,
    image_std: list[float] | None = None,
    random_seed: int | None = None,
) -> Teacher:
    """A frozen teacher.

    Args:
        model: as for `load_student`; of a `Teacher` another one is made, see `Teacher.aligned`.
        id2label: the class names of the data, in label order. The teacher's are matched by name, and may be more:
            the probability of classes that are left out is dropped, see `ClassMapping.apply`.
        class_map: which classes are which where the names differ: `"by_index"`, a list, a dict, JSON text or the path
            of a JSON or YAML file; see `ClassMapping.between`.
        dtype, class_names: see `Teacher`.
        processor, revision, trust_remote_code, image_size, image_mean, image_std: see `load_student`.
        random_seed: not negative; the architecture of an id with random weights that depend on it alone, as its
            library initializes them, in place of the trained ones: a control. A student of that seed has others.

    Raises:
        ValueError: weights are missing or do not fit (a freshly initialised head teaches noise), or the classes
            can't be matched; with names and counts.
    """
    if random_seed is not None and isinstance(model, nn.Module):
        raise ValueError("random_seed= takes the architecture of a Hub id or folder, not a module.")
    if isinstance(model, Teacher):
        return model.aligned(id2label, class_map, dtype)
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        name, hub = loading.check_id(model), {"revision": revision, "trust_remote_code": trust_remote_code}
        config, faults = loading.load_config(name, hub), dict[str, tuple | None]()
        if random_seed is None:
            module, faults = loading.load_classifier(name, config, hub, "teacher")
        else:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(int(np.random.SeedSequence((random_seed, 1)).generate_state(1)[0]))
                module = loading.build(config, trust_remote_code)
        if faults:
            raise ValueError(
                f"teacher {name}: {len(faults)} weights are missing from its checkpoint or have another shape, and "
                f"would be random: {sorted(faults)[:8]}. Use a checkpoint with its trained classification head."
            )
        model, processor = module, processor or loading.processor_for(module, name, hub)
    processor = loading.adjust_processor(processor, image_size, image_mean, image_std)
    if class_names is not None:
        loading.check_width(name, model, Preprocessing(processor).size, class_names)
    return Teacher(model, processor, id2label, class_map, dtype, name, class_names)
