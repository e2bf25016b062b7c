"""Tiny datasets, teachers and trainers on the CPU."""

import datasets
import numpy as np
import torch
from PIL import Image
from tiny import tiny, tiny_distilled
from torch import nn

from hf_kd import DistillationConfig, DistillationTrainer, load_teacher
from hf_kd.losses import LOSSES

NAMES = [f"class {i}" for i in range(6)]


def rows(n=24, size=32, seed=0):
    rng = np.random.default_rng(seed)
    images = [Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)) for _ in range(n)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    return datasets.Dataset.from_dict({"image": images, "label": [i % 6 for i in range(n)]}, features=features)


def config(folder, **kwargs):
    settings = {
        "loss": "ce",
        "augment": "none",
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "max_steps": 3,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
        "seed": 3,
    }
    return DistillationConfig(output_dir=str(folder), **(settings | kwargs))


def make_teacher(kind="resnet", seed=7, size=48, names=NAMES):
    module, processor = tiny(kind, seed=seed, size=size, names=names)
    return load_teacher(module, id2label=names, processor=processor)


def freeze_batch_norm(model):
    """Batch statistics depend on the micro-batch by design; everything else must not."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module


def trainer_for(folder, kind="vit", loss="ce", teacher=None, train=None, evaluation=None, collate=None, **kwargs):
    student, processor = tiny_distilled(kind[10:], NAMES) if kind.startswith("distilled ") else tiny(kind, names=NAMES)
    teacher = teacher or (make_teacher() if "teacher_logits" in LOSSES[loss].requires else None)
    return DistillationTrainer(
        student,
        config(folder, loss=loss, **kwargs),
        teacher=teacher,
        train_dataset=rows() if train is None else train,
        eval_dataset=evaluation,
        processing_class=processor,
        data_collator=collate,
    )


def noted(trainer):
    """The images of each batch that this process trains on, from now on."""
    seen, keep = [], trainer._prepare_inputs

    def noting(inputs):
        if trainer.model.training:
            seen.append(inputs["index"].tolist())
        return keep(inputs)

    trainer._prepare_inputs = noting
    return seen


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
