"""The networks of the distillation literature for CIFAR-100, with a stem for 32 px.

ResNets (arXiv 1512.03385, section 4.2; those with "x4" are four times as wide), wide ResNets (arXiv 1605.07146) and
VGGs with batch norm (arXiv 1409.1556), as "Contrastive Representation Distillation" (CRD, arXiv 1910.10699) and the
works that follow it train them. This file imports nothing of hf_kd: it is saved beside a model, which transformers
loads with `trust_remote_code=True` where hf_kd is not installed.
"""

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

# Blocks in each stage, and channels of the stem and of the stages.
RESNETS = {
    "resnet20": (3, (16, 16, 32, 64)),
    "resnet56": (9, (16, 16, 32, 64)),
    "resnet110": (18, (16, 16, 32, 64)),
    "resnet8x4": (1, (32, 64, 128, 256)),
    "resnet32x4": (5, (32, 64, 128, 256)),
}
WIDE_RESNETS = {
    "wrn_16_2": (2, (16, 32, 64, 128)),
    "wrn_40_1": (6, (16, 16, 32, 64)),
    "wrn_40_2": (6, (16, 32, 64, 128)),
}
VGGS = {"vgg8": (1, 1, 1, 1, 1), "vgg13": (2, 2, 2, 2, 2)}  # convolutions in each stage
NAMES = (*RESNETS, *WIDE_RESNETS, *VGGS)


class CifarConfig(PretrainedConfig):
    """`architecture` is one of `NAMES`; `num_labels` and `id2label` as in any config."""

    model_type = "cifar_network"

    def __init__(self, architecture: str = "resnet20", image_size: int = 32, **kwargs) -> None:
        if architecture not in NAMES:
            raise ValueError(f"architecture={architecture!r} is unknown; there are: {', '.join(NAMES)}")
        self.architecture, self.image_size = architecture, image_size
        super().__init__(**kwargs)


def conv3x3(inputs: int, outputs: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=bias)


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv3x3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.relu, self.shortcut = nn.ReLU(), nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(residual + self.shortcut(x))


class WideBlock(nn.Module):
    """With the norms before the convolutions; where the width changes, the shortcut begins behind the first norm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv3x3(inputs, outputs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv3x3(outputs, outputs)
        self.relu = nn.ReLU()
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu(self.bn1(x))
        residual = self.conv2(self.relu(self.bn2(self.conv1(activated))))
        return residual + (x if self.shortcut is None else self.shortcut(activated))


def _stages(block: type[nn.Module], blocks: int, channels: tuple[int, ...]) -> nn.Sequential:
    stages = []
    for stage, (inputs, outputs) in enumerate(zip(channels, channels[1:], strict=False)):
        strides = [1 if stage == 0 else 2] + [1] * (blocks - 1)
        widths = [inputs] + [outputs] * (blocks - 1)
        layers = [block(width, outputs, stride) for width, stride in zip(widths, strides, strict=True)]
        stages.append(nn.Sequential(*layers))
    return nn.Sequential(*stages)


def _body(architecture: str) -> tuple[nn.Module, int]:
    """The layers up to the pooling, and their number of channels."""
    if architecture in RESNETS:
        blocks, channels = RESNETS[architecture]
        stem: list[nn.Module] = [conv3x3(3, channels[0]), nn.BatchNorm2d(channels[0]), nn.ReLU()]
        return nn.Sequential(*stem, _stages(BasicBlock, blocks, channels)), channels[-1]
    if architecture in WIDE_RESNETS:
        blocks, channels = WIDE_RESNETS[architecture]
        last: list[nn.Module] = [nn.BatchNorm2d(channels[-1]), nn.ReLU()]
        return nn.Sequential(conv3x3(3, channels[0]), _stages(WideBlock, blocks, channels), *last), channels[-1]
    layers: list[nn.Module] = []
    inputs = 3
    for stage, outputs in enumerate((64, 128, 256, 512, 512)):
        for _ in range(VGGS[architecture][stage]):
            layers += [conv3x3(inputs, outputs, bias=True), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        if stage < 3:  # the last two stages have the same resolution
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers), inputs


class CifarForImageClassification(PreTrainedModel):
    """`pixel_values` (B, 3, 32, 32), normalised, to `logits` (B, num_labels)."""

    config_class = CifarConfig
    main_input_name = "pixel_values"
    base_model_prefix = "body"

    def __init__(self, config: CifarConfig) -> None:
        super().__init__(config)
        self.num_labels: int = config.num_labels or 2
        self.body, channels = _body(config.architecture)
        self.classifier = nn.Linear(channels, self.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs) -> ImageClassifierOutput:
        logits = self.classifier(self.body(pixel_values).mean((2, 3)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(CifarConfig.model_type, CifarConfig, exist_ok=True)
AutoModelForImageClassification.register(CifarConfig, CifarForImageClassification, exist_ok=True)
CifarConfig.register_for_auto_class()
CifarForImageClassification.register_for_auto_class("AutoModelForImageClassification")
