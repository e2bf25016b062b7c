"""Training steps, as ratios measured in one run: DistillationTrainer against a hand-written loop, USKD against CE.

    python benchmarks/step.py --rounds 8 --markdown

ResNet-18 at 224 px. In every round each contender runs a few steps, in turn, so a change of the machine's speed meets
all of them; a step is the time from one optimizer step to the next, data loading included. The ratio is the median
over rounds of the ratio of a round's medians.
"""

import argparse
import statistics
import tempfile
import time

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from transformers import (
    PrinterCallback,
    ResNetConfig,
    ResNetForImageClassification,
    TrainerCallback,
    ViTImageProcessor,
)
from transformers.utils import logging

from hf_kd import DistillationConfig, DistillationTrainer, Preprocessing
from hf_kd.data import ImageDataset, TrainingCollator
from hf_kd.reporting.record import collect_versions

CLASSES = 1000


def student(size: int) -> tuple[ResNetForImageClassification, ViTImageProcessor]:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic")
    config.num_labels = CLASSES
    return ResNetForImageClassification(config), ViTImageProcessor(size={"height": size, "width": size})


def rows(n: int, size: int) -> datasets.Dataset:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)) for _ in range(n)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=CLASSES)})
    return datasets.Dataset.from_dict({"image": images, "label": list(range(n))}, features=features)


class Clock(TrainerCallback):
    def __init__(self):
        self.times: list[float] = []

    def on_train_begin(self, *args, **kwargs):
        self.times = []

    def on_optimizer_step(self, *args, **kwargs):
        self.times.append(time.perf_counter())

    def steps(self) -> list[float]:
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)][1:]


def by_trainer(loss: str, args, data):
    model, processor = student(args.size)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = DistillationConfig(
            folder, loss=loss, augment="none", max_steps=args.steps + 2, per_device_train_batch_size=args.batch,
            optim="sgd", optim_args="momentum=0.9", learning_rate=1e-3, lr_scheduler_type="constant",
            save_strategy="no", logging_steps=10_000, disable_tqdm=True, report_to="none",
        )  # fmt: skip
    trainer = DistillationTrainer(model, config, train_dataset=data, processing_class=processor, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)

    def run() -> list[float]:
        trainer.train()
        return clock.steps()

    return run


def by_hand(args, data):
    """The same work without the trainer: decode, preprocess, forward, CE, backward, clip, step, schedule, log."""
    model, processor = student(args.size)
    preprocessing = Preprocessing(processor)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    loader = DataLoader(
        ImageDataset(data, "image", "label"), args.batch, shuffle=True, collate_fn=TrainingCollator(size=args.size)
    )

    def run() -> list[float]:
        times, total = [], torch.tensor(0.0)
        for _, batch in zip(range(args.steps + 2), loader, strict=False):
            loss = F.cross_entropy(model(preprocessing(batch["pixels"], cropped=True)).logits, batch["labels"])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            times.append(time.perf_counter())
            schedule.step()
            model.zero_grad()
            total += loss.detach()
        return [b - a for a, b in zip(times, times[1:], strict=False)][1:]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each contender in a round")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    logging.set_verbosity_error()
    data = rows(args.batch * (args.steps + 2), args.size)
    contenders = {
        "hand-written CE": by_hand(args, data),
        "DistillationTrainer CE": by_trainer("ce", args, data),
        "DistillationTrainer USKD": by_trainer("uskd", args, data),
    }
    medians = {name: [] for name in contenders}
    for _ in range(args.rounds + 1):  # the first warms up
        for name, run in contenders.items():
            medians[name].append(statistics.median(run()))
    medians = {name: times[1:] for name, times in medians.items()}
    pairs = [
        ("DistillationTrainer CE", "hand-written CE", "at most 1.02"),
        ("DistillationTrainer USKD", "DistillationTrainer CE", "at most 1.01"),
    ]
    bar = "|" if args.markdown else " "
    print(f"{bar} step {bar} against {bar} ratio {bar} min–max {bar} asked {bar}")
    if args.markdown:
        print("|---|---|---|---|---|")
    for a, b, asked in pairs:
        ratios = [x / y for x, y in zip(medians[a], medians[b], strict=True)]
        spread = f"{min(ratios):.3f}–{max(ratios):.3f}"
        print(f"{bar} {a} {bar} {b} {bar} {statistics.median(ratios):.3f} {bar} {spread} {bar} {asked} {bar}")
    seconds = {name: f"{statistics.median(times):.3f} s" for name, times in medians.items()}
    print(f"\nmedian step: {seconds}; batch {args.batch}, {args.size} px, {args.rounds} rounds of {args.steps} steps,")
    versions = collect_versions()
    print(
        f"{torch.get_num_threads()} threads, CPU, python {versions['python']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}"
    )


if __name__ == "__main__":
    main()
