"""The layer that feeds the auxiliary head, found by tracing: in the paper's own models, and where rules go wrong."""

import dataclasses
import re

import pytest
import timm
import torch
from tiny import KINDS, tiny
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from hf_kd.models.features import find_feature_layer

TOKEN, MEAN = "class_token", "mean_token"
# Module, shape of its output and pooling. The first eight are the paper's.
TIMM = {
    "resnet18": ("layer3", (256, 14, 14), "nchw"),
    "resnet50": ("layer3", (1024, 14, 14), "nchw"),
    "mobilenetv1_100": ("blocks.3", (512, 14, 14), "nchw"),
    "mobilenetv2_100": ("blocks.6", (320, 7, 7), "nchw"),
    "regnetx_016": ("s3", (408, 14, 14), "nchw"),
    "swin_tiny_patch4_window7_224": ("layers.2", (14, 14, 384), "nhwc"),
    "deit_tiny_patch16_224": ("blocks.5", (197, 192), TOKEN),
    "deit_tiny_distilled_patch16_224": ("blocks.5", (198, 192), TOKEN),
    "convit_tiny": ("blocks.5", (196, 192), MEAN),  # its class token comes later
    "cait_xxs24_224": ("blocks.11", (196, 192), MEAN),
    "pvt_v2_b0": ("stages.2", (160, 14, 14), "nchw"),
    "ghostnet_100": ("blocks.6", (112, 14, 14), "nchw"),
    "mixer_s32_224": ("blocks.3", (49, 512), MEAN),
    "resmlp_12_224": ("blocks.5", (196, 384), MEAN),
    "samvit_base_patch16_224": ("blocks.5", (14, 14, 768), "nhwc"),
    "tnt_s_patch16_224": ("blocks.5", (197, 384), TOKEN),
    "densenet121": ("features.denseblock3", (1024, 14, 14), "nchw"),
    "convnext_atto": ("stages.2", (160, 14, 14), "nchw"),
    "efficientnet_b0": ("blocks.4", (112, 14, 14), "nchw"),
    "inception_v3": ("Mixed_6e", (768, 17, 17), "nchw"),
    "naflexvit_base_patch16_gap": ("blocks.5", (580, 768), MEAN),
    "volo_d1_224": ("network.0", (28, 28, 192), "nhwc"),  # the list of class attention blocks comes after it
    # The stage after it begins with a block of the same resolution, before its downsampling.
    "efficientvit_m0": ("stages.1", (128, 7, 7), "nchw"),
    "repvit_m0_9": ("stages.2", (192, 14, 14), "nchw"),
    "shvit_s1": ("stages.1", (224, 7, 7), "nchw"),
}
SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
TRANSFORMERS = {
    "vit": (SMALL, "vit.layers.1", (197, 32), TOKEN),
    "beit": (SMALL, "beit.layers.1", (197, 32), TOKEN),
    "data2vec-vision": (SMALL, "data2vec_vision.encoder.layer.1", (197, 32), TOKEN),
    "dinov2_with_registers": (SMALL, "dinov2_with_registers.encoder.layer.1", (201, 32), TOKEN),
    "vit_msn": (SMALL, "vit.layers.1", (197, 32), TOKEN),
    "ijepa": (SMALL, "ijepa.layers.1", (196, 32), MEAN),
    "clip": ({"vision_config": SMALL}, "vision_model.encoder.layers.1", (50, 32), TOKEN),
    "siglip": ({"vision_config": SMALL}, "vision_model.encoder.layers.1", (196, 32), MEAN),
    "mobilenet_v1": ({}, "mobilenet_v1.layer.21", (512, 14, 14), "nchw"),
    "mobilenet_v2": ({}, "mobilenet_v2.layer.15", (320, 7, 7), "nchw"),
    "efficientnet": ({}, "efficientnet.encoder.blocks.37", (224, 37, 37), "nchw"),
    "swin": ({}, "swin.encoder.layers.2.blocks.5", (196, 384), MEAN),
    "swinv2": ({}, "swinv2.encoder.layers.2.blocks.5", (196, 384), MEAN),
    "hiera": ({}, "hiera.encoder.stages.2", (196, 384), MEAN),
    "segformer": ({}, "segformer.stages.2", (160, 14, 14), "nchw"),
    "pvt": ({}, "pvt.encoder.block.2.1", (196, 320), MEAN),
    "pvt_v2": ({}, "pvt_v2.encoder.layers.2.blocks.1", (196, 160), MEAN),
    "focalnet": ({}, "focalnet.encoder.stages.2.layers.5", (196, 384), MEAN),
    "bit": ({}, "bit.encoder.stages.2", (1024, 14, 14), "nchw"),
    "hgnet_v2": ({}, "encoder.stages.2", (1024, 14, 14), "nchw"),
    "levit": ({}, "levit.encoder.stages.1.layers.7", (49, 256), MEAN),
    "mobilevit": ({}, "mobilevit.encoder.layer.3", (128, 16, 16), "nchw"),
    "mobilevitv2": ({}, "mobilevitv2.encoder.layer.3", (384, 16, 16), "nchw"),
    "poolformer": ({}, "poolformer.encoder.block.2.5", (320, 14, 14), "nchw"),
    "swiftformer": ({}, "swiftformer.encoder.network.4", (112, 14, 14), "nchw"),
    "cvt": ({}, "cvt.encoder.stages.1", (192, 28, 28), "nchw"),
    "resnet": ({}, "resnet.encoder.stages.2", (1024, 14, 14), "nchw"),
    "regnet": ({}, "regnet.encoder.stages.2", (512, 14, 14), "nchw"),
    "convnextv2": ({}, "convnextv2.encoder.stages.2", (384, 14, 14), "nchw"),
}


@pytest.mark.parametrize("architecture", TIMM)
def test_layers_of_timm(architecture):
    with torch.device("meta"):  # shapes and autograd's graph are all that is needed
        model = timm.create_model(architecture)
    layer = find_feature_layer(model, model.default_cfg["input_size"][1:])
    assert (layer.name, layer.shape, layer.pooling) == TIMM[architecture]


@pytest.mark.parametrize("model_type", TRANSFORMERS)
def test_layers_of_transformers(model_type):
    settings, *expected = TRANSFORMERS[model_type]
    config = CONFIG_MAPPING[model_type](**settings)
    cls = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    with torch.device("meta"):
        model = (cls[0] if isinstance(cls, tuple) else cls)(config)
    size = getattr(getattr(config, "vision_config", config), "image_size", 224)
    layer = find_feature_layer(model, (size, size) if isinstance(size, int) else tuple(size))
    assert (layer.name, layer.shape, layer.pooling) == tuple(expected)


class Wrapper(nn.Module):
    """A student in a module without its attributes, a few levels down."""

    def __init__(self, model):
        super().__init__()
        self.around = nn.ModuleDict({"net": nn.ModuleList([model])})

    def forward(self, pixel_values):
        return self.around["net"][0](pixel_values)


SIDE_BY_SIDE = {  # the right module, which the message must name
    "hrnet_w18_small": ("incre_modules.2", (512, 14, 14), "nchw"),
    "crossvit_9_240": ("blocks.1.blocks.1", (197, 256), TOKEN),
    "coat_tiny": ("serial_blocks3.1", (197, 152), TOKEN),
    "mobilenetv5_base": ("blocks.2", (512, 16, 16), "nchw"),
}


@pytest.mark.parametrize("wrap", [lambda model: model, Wrapper], ids=["plain", "wrapped"])
@pytest.mark.parametrize("architecture", SIDE_BY_SIDE)
def test_branches_side_by_side_need_feature_module(architecture, wrap):
    with torch.device("meta"):
        model = timm.create_model(architecture)
    size, student = model.default_cfg["input_size"][1:], wrap(model)
    with pytest.raises(ValueError, match="no single module of .* gives it.*feature_module") as error:
        find_feature_layer(student, size)
    candidates = re.findall(r"([\w.]+) \(", str(error.value).partition("one of: ")[2])
    name, *expected = SIDE_BY_SIDE[architecture]
    name = f"around.net.0.{name}" if student is not model else name
    assert name in candidates and len(candidates) <= 40
    layer = find_feature_layer(student, size, name)
    assert [layer.shape, layer.pooling] == expected


@pytest.mark.parametrize("architecture", ["mobilenetv2_100", "vit_tiny_patch16_224", "ghostnet_100"])
def test_a_wrapper_changes_the_names_only(architecture):
    with torch.device("meta"):
        model = timm.create_model(architecture)
    layer, wrapped = (find_feature_layer(student, (224, 224)) for student in (model, Wrapper(model)))
    assert wrapped == dataclasses.replace(layer, name=f"around.net.0.{layer.name}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_with_lora_has_the_same_layer(kind):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    plain, (student, _) = find_feature_layer(tiny(kind)[0], (32, 32)), tiny(kind)
    layers = [name for name, m in student.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))][:-1]
    student = peft.get_peft_model(student, peft.LoraConfig(target_modules=layers, r=2))
    assert find_feature_layer(student, (32, 32)) == dataclasses.replace(plain, name=f"base_model.model.{plain.name}")


def test_small_images_of_a_network_for_large_ones():
    """At 32 px the last two stages have 1 and 4 positions; the layer is the same one."""
    with torch.device("meta"):
        layer = find_feature_layer(timm.create_model("resnet18"), (32, 32))
    assert (layer.name, layer.shape) == ("layer3", (256, 2, 2))


def test_registers_are_left_out_of_the_mean():
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_siglip_gap_224", class_token=False, reg_tokens=4)
    layer = find_feature_layer(model, (224, 224))
    assert (layer.pooling, layer.skipped, layer.shape) == (MEAN, 4, (200, 768))


def test_padding_in_the_last_stage_is_no_resolution_of_its_own():
    """At 128 px the padding before the last downsampling makes 8 × 8 positions 11 × 11."""
    config = CONFIG_MAPPING["efficientnet"](
        image_size=128, width_coefficient=0.5, depth_coefficient=0.5, hidden_dim=640
    )
    student = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)](config)
    assert str(find_feature_layer(student, (128, 128))).startswith("efficientnet.encoder.blocks.6 (56 × 8 × 8,")
