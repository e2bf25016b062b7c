"""What the gradients cost on a network of many GPUs, on paper: bytes a step, and the batch that hides them.

python benchmarks/network.py
"""

from __future__ import annotations

import math

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

# GPUs, how they are connected, and the bytes a second that each sends to the next one of a ring: 80 % of the links'.
NETWORKS = [
    (8, "NVLink, 300 GB/s a GPU", 240e9),
    (64, "8 × 200 Gb/s a node", 160e9),
    (64, "100 Gb/s a node", 10e9),
    (512, "8 × 200 Gb/s a node", 160e9),
    (512, "100 Gb/s a node", 10e9),
]
SPEED = {"ResNet-18": 30e12, "DeiT-B": 100e12, "ViT-L": 100e12}  # FLOP/s of a GPU in training
BACKWARD = 2 / 3  # of a step's computation
LATENCY = 10e-6  # seconds a hop
OWN = ", ".join(f"{2e3 * math.log2(gpus) * LATENCY:.2f} ms with {gpus} GPUs" for gpus in (8, 64, 512))

ABOUT = f"""A ring all-reduce of the gradients of P float32 weights sends 2 · (n − 1) / n · 4 P bytes from each
of n GPUs in a step. ZeRO-1 and ZeRO-2 send as much: a reduce-scatter of the gradients, an all-gather of the weights.
ZeRO-3 and FSDP2 send 3 · (n − 1) / n · 4 P, if they gather the weights for the forward and again for the backward. At
B bytes a second DDP needs t = 2 · (n − 1) / n · 4 P / B. A GPU that trains r images a second hides this
behind its backward, 2/3 of a step, from

    b = t · r / (2/3) images a GPU

on, the break-even; with less, the network sets the pace. For ZeRO-3 and FSDP2 it is the same: they send 1.5 times as
much, and hide a third of it behind the forward. ZeRO-1 and ZeRO-2 gather the weights after the backward, which
nothing hides.

Assumed: B is 80 % of the links. Nodes have 8 GPUs and, between them, eight network cards of 200 Gb/s (eight rings,
160 GB/s together) or one of 100 Gb/s (10 GB/s). r = F / (3 · FLOPs of the forward) at 224 px, with F = 30 TFLOP/s
for ResNet-18 and 100 TFLOP/s for the others; an A100 has 312 at most in bf16. No latency, full overlap, and data that
arrive in time. With a teacher r is smaller and the bytes are the same, so the break-even is smaller. As a batch of
all GPUs it compares with the paper's recipes, 256 images for CNNs and 1024 for DeiT.

The all-reduces of hf_kd itself hold a few numbers and cost their latency, 2 · log2(n) hops of
{LATENCY * 1e6:.0f} µs in a tree: {OWN}; twice that for USKD.
"""


def sizes(name: str) -> tuple[int, int]:
    """Parameters, and FLOPs of the forward of an image, counted on a model without storage."""
    widths = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    with torch.device("meta"):
        if name == "ResNet-18":
            model = ResNetForImageClassification(ResNetConfig(num_labels=1000, **widths))
        elif name == "DeiT-B":
            model = DeiTForImageClassification(DeiTConfig(num_labels=1000))
        else:
            model = ViTForImageClassification(ViTConfig(num_labels=1000, **large))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(torch.empty(1, 3, 224, 224))
    return sum(value.numel() for value in model.parameters()), counter.get_total_flops()


def ring_bytes(parameters: int, processes: int, passes: int = 2) -> float:
    """What each process sends in a step: 2 passes of a ring for DDP, 3 for ZeRO-3 and FSDP2."""
    return passes * (processes - 1) / processes * 4 * parameters


def break_even(seconds: float, images_per_second: float) -> int:
    """The images of a GPU a step from which its backward takes as long as the reduction of the gradients."""
    return math.ceil(seconds * images_per_second / BACKWARD)


def table() -> str:
    lines = [
        "| student | weights | images/s a GPU | GPUs | network | DDP, MB a step | ZeRO-3, MB a step | DDP, ms "
        "| break-even, images a GPU | of all GPUs |",
        "|---|---:|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for name, speed in SPEED.items():
        parameters, flops = sizes(name)
        rate = speed / (3 * flops)
        for gpus, network, bandwidth in NETWORKS:
            seconds = ring_bytes(parameters, gpus) / bandwidth
            images = break_even(seconds, rate)
            row = [name, f"{parameters / 1e6:.1f} M", f"{rate:.0f}", str(gpus), network]
            row += [f"{ring_bytes(parameters, gpus, passes) / 1e6:.0f}" for passes in (2, 3)]
            row += [f"{1e3 * seconds:.1f}", str(images), str(gpus * images)]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(ABOUT)
    print(table())
