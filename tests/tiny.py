"""Tiny classifiers of every family, from configs alone: hidden size 32, 4 layers, 32 px."""

import torch
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    LevitConfig,
    ResNetConfig,
    TimmWrapperConfig,
    ViTConfig,
)
from transformers import ViTImageProcessor as Processor
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

KINDS = ("vit", "deit", "resnet", "timm_resnet", "timm_vit")
MEAN, STD = [0.5, 0.45, 0.4], [0.25, 0.24, 0.23]


def tiny(kind, num_labels=6, seed=0, names=None, size=32):
    """`(model in eval mode, processor)` with random weights that depend on the seed alone.

    Args:
        kind: one of `KINDS`.
        num_labels: C; the classes are called "class 0" and so on, unless there are `names`, C texts.
        seed: of the weights.
        size: side of the input in pixels, a multiple of 8.
    """
    names = names or [f"class {i}" for i in range(num_labels)]
    config = tiny_config(kind, size, names)
    if kind.startswith("timm"):
        processor = TimmWrapperImageProcessor(pretrained_cfg=config.pretrained_cfg, architecture=config.architecture)
    else:
        processor = Processor(size={"height": size, "width": size}, image_mean=MEAN, image_std=STD)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageClassification.from_config(config)
        if kind == "timm_resnet":  # transformers' weights of standard deviation 0.02 give constant logits
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight)
    return model.eval(), processor


def tiny_distilled(kind, names, seed=0):
    """`(model in eval mode, processor)` of a student with a distillation head, of 64 px; see `tiny`.

    Args:
        kind: "deit" or "levit" of transformers, "timm_deit" or "timm_levit" in timm's wrapper.
    """
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    pixels = {"input_size": [3, 64, 64], "mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_pct": 0.9}
    config = tiny_config("deit", 64, names)
    if kind == "deit":
        config.architectures = ["DeiTForImageClassificationWithTeacher"]
    elif kind == "levit":
        config = LevitConfig(
            architectures=["LevitForImageClassificationWithTeacher"],
            image_size=64,
            hidden_sizes=[16, 24, 32],
            num_attention_heads=[1, 2, 2],
            depths=[1, 1, 1],
            key_dim=[8, 8, 8],
            **labels,
        )
    else:
        args = {"patch_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 2}
        if kind == "timm_levit":
            args = {"embed_dim": [16, 24, 32], "key_dim": 8, "num_heads": [1, 2, 2], "depth": [1, 1, 1]}
        architecture = {"timm_deit": "deit_tiny_distilled_patch16_224", "timm_levit": "levit_128s"}[kind]
        args["img_size"] = 64
        config = TimmWrapperConfig(architecture=architecture, model_args=args, pretrained_cfg=pixels, **labels)
    if kind.startswith("timm"):
        processor = TimmWrapperImageProcessor(pretrained_cfg=pixels, architecture=config.architecture)
    else:
        processor = Processor(size={"height": 64, "width": 64}, image_mean=MEAN, image_std=STD)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageClassification.from_config(config)
        if kind.endswith("levit"):  # as of timm_resnet
            for module in model.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    nn.init.kaiming_normal_(module.weight)
        return model.eval(), processor


def tiny_config(kind, size=32, names=("a", "b", "c", "d", "e", "f")):
    """The config that `tiny` builds its model from."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if kind in ("vit", "deit"):
        cls, architecture = {"vit": (ViTConfig, "ViT"), "deit": (DeiTConfig, "DeiT")}[kind]
        return cls(
            architectures=[f"{architecture}ForImageClassification"],
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=size,
            patch_size=8,
            **labels,
        )
    if kind == "resnet":
        return ResNetConfig(
            architectures=["ResNetForImageClassification"],
            embedding_size=8,
            hidden_sizes=[8, 16, 24, 32],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            **labels,
        )
    pixels = {"input_size": [3, size, size], "mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_pct": 0.9}
    if kind == "timm_resnet":
        args = {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]}
        return TimmWrapperConfig(architecture="resnet18", model_args=args, pretrained_cfg=pixels, **labels)
    if kind == "timm_vit":
        args = {"img_size": size, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
        return TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=args, pretrained_cfg=pixels, **labels)
    raise ValueError(f"kind is one of {', '.join(KINDS)}, not {kind!r}")
