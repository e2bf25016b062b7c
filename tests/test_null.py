"""The null experiment: kd with weight 0 is cross entropy, with any teacher, size and augmentation, exactly."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny
from trainer_helpers import NAMES, config, make_teacher

from hf_kd import DistillationTrainer
from hf_kd.config import AUGMENTS


def mixed_sizes(n=20, sizes=(24, 32, 41, 48)):
    rng = np.random.default_rng(0)
    shapes = [(sizes[i % len(sizes)], sizes[(i // 2) % len(sizes)], 3) for i in range(n)]
    images = [Image.fromarray(rng.integers(0, 256, shape, np.uint8)) for shape in shapes]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    return datasets.Dataset.from_dict({"image": images, "label": [i % 6 for i in range(n)]}, features=features)


def trained(folder, data, loss, **settings):
    student, processor = tiny("vit", names=NAMES)
    teacher = make_teacher(size=settings.pop("teacher_size"))
    args = config(
        folder,
        loss=loss,
        loss_kwargs={"weight": 0.0} if loss == "kd" else None,
        per_device_train_batch_size=3,  # the batches differ in the sizes of their images
        max_steps=4,
        **settings,
    )
    trainer = DistillationTrainer(
        student,
        args,
        teacher=teacher if loss == "kd" else None,
        eval_teacher=teacher,
        train_dataset=data,
        eval_dataset=data,
        processing_class=processor,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    measured = {k: v for k, v in trainer.evaluate().items() if not k.endswith(("runtime", "per_second"))}
    return trainer, losses, measured


CASES = [(augment, size, "mixed") for augment in (*AUGMENTS, "mixing") for size in (32, 48)]


@pytest.mark.parametrize(("augment", "teacher_size", "sizes"), [*CASES, ("pad_crop", 48, "one")])
def test_kd_with_weight_0_is_ce(tmp_path, augment, teacher_size, sizes):
    data = mixed_sizes() if sizes == "mixed" else mixed_sizes(sizes=(32,))
    settings = {"augment": augment, "teacher_size": teacher_size}
    if augment == "mixing":
        settings |= {"augment": "pad_crop", "mixup_alpha": 0.8, "cutmix_alpha": 1.0}
    (ce, *by_ce), (kd, *by_kd) = (trained(tmp_path / loss, data, loss, **settings) for loss in ("ce", "kd"))
    assert ce.train_image_size == kd.train_image_size == max(32, teacher_size)
    assert by_ce == by_kd
    for (name, expected), value in zip(ce.model.state_dict().items(), kd.model.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name
    initial = tiny("vit", names=NAMES)[0].state_dict()
    assert not torch.equal(initial["classifier.weight"], kd.model.state_dict()["classifier.weight"])
