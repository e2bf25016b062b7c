"""Architectures that are unlike the others: their heads, inputs, outputs and shared weights."""

import json

import pytest
import timm
import torch
from student_helpers import NAMES, check_reopens, logits
from tiny import MEAN, STD, tiny
from torch import nn
from trainer_helpers import config, rows
from transformers import (
    HieraConfig,
    HieraForImageClassification,
    ImageGPTConfig,
    ImageGPTForImageClassification,
    PerceiverConfig,
    PerceiverForImageClassificationLearned,
    PPLCNetConfig,
    PPLCNetForImageClassification,
    PvtConfig,
    PvtForImageClassification,
    TimmWrapperConfig,
    ViTImageProcessor,
)

from hf_kd import DistillationTrainer, load_student, load_teacher
from hf_kd.checkpointing import weights_to_save
from hf_kd.cli.arguments import parse
from hf_kd.experiment import plan as plans
from hf_kd.labels import label_maps
from hf_kd.models.forward import logits_of
from hf_kd.models.loading import build

SIX = [f"class {i}" for i in range(6)]


def processor_of(size):
    return ViTImageProcessor(size={"height": size, "width": size}, image_mean=MEAN, image_std=STD)


def saved(folder, model, size=32):
    model.eval().save_pretrained(folder)
    processor_of(size).save_pretrained(folder)
    return model


def perceiver():
    sizes = {"d_latents": 32, "num_latents": 8, "num_self_attends_per_block": 1, "num_self_attention_heads": 2}
    config = PerceiverConfig(**sizes, image_size=32, num_cross_attention_heads=2, **label_maps(SIX))
    return PerceiverForImageClassificationLearned(config)


def pp_lcnet():
    blocks = [[[3, 8, 8, 1, False]]] * 4 + [[[3, 8, 16, 2, False]]]
    return PPLCNetForImageClassification(
        PPLCNetConfig(stem_channels=8, block_configs=blocks, class_expand=16, **label_maps(SIX))
    )


def test_the_head_of_perceiver_is_in_its_body(tmp_path):
    old = saved(tmp_path / "old", perceiver())
    values = torch.rand(2, 3, 32, 32)
    ordered, _ = load_student(tmp_path / "old", id2label=SIX[4:1:-1])
    torch.testing.assert_close(logits(ordered, values), logits(old, values)[:, [4, 3, 2]])
    new, processor = load_student(tmp_path / "old", id2label=NAMES)
    before, after = old.state_dict(), new.state_dict()
    head = {"perceiver.decoder.decoder.final_layer.weight", "perceiver.decoder.decoder.final_layer.bias"}
    assert {name for name in before if not torch.equal(before[name], after[name])} == head
    check_reopens(new, processor, tmp_path / "new", NAMES)


def test_pvt_gets_as_many_logits_as_there_are_classes(tmp_path):
    """Its config keeps the number of classes beside their names."""
    saved(
        tmp_path, PvtForImageClassification(PvtConfig(image_size=32, depths=[1] * 4, num_labels=6, **label_maps(SIX)))
    )
    student, processor = load_student(tmp_path, id2label=NAMES)
    assert logits(student, torch.rand(1, 3, 32, 32)).shape == (1, 3)
    check_reopens(student, processor, tmp_path / "new", NAMES)


def test_logits_that_are_called_otherwise(tmp_path):
    """PP-LCNet returns them as last_hidden_state."""
    model = saved(tmp_path, pp_lcnet())
    pixels = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    values = (pixels - mean) / std
    student, _ = load_student(tmp_path, id2label=SIX[::-1])
    with torch.no_grad():
        expected = model(values).last_hidden_state
        torch.testing.assert_close(logits_of(student.eval()(values)), expected.flip(1))
    torch.testing.assert_close(load_teacher(tmp_path)(pixels, cropped=True), expected)


def test_an_architecture_that_takes_no_images_is_refused_before_the_data_are_loaded(tmp_path, monkeypatch):
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    saved(tmp_path, ImageGPTForImageClassification(ImageGPTConfig(**sizes, **label_maps(SIX))))
    message = r"does not accept images as tensors \(3, 32, 32\): its input is input_ids\."
    for load in (load_student, load_teacher):
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
    monkeypatch.setattr(plans, "load_data", lambda **arguments: pytest.fail("the data were loaded"))
    good = tmp_path / "good"
    saved(good, pp_lcnet())
    for student, more in ((tmp_path, []), (good, ["--teacher", str(tmp_path), "--loss", "nkd"])):
        arguments = [
            "--student",
            str(student),
            "--dataset",
            "any/data",
            "--preset",
            "none",
            "--output_dir",
            str(tmp_path / "out"),
        ]
        monkeypatch.setattr(plans, "_origin", lambda kind, name, *_: {"id": name})
        with pytest.raises(ValueError, match=message):
            plans.plan(*parse([*arguments, "--loss", "ce", "--use_cpu", *more]))


def test_hiera_has_an_image_size_of_two_numbers(tmp_path):
    settings = {"embed_dim": 16, "depths": [1] * 4, "image_size": [128, 128], **label_maps(NAMES)}
    saved(tmp_path, HieraForImageClassification(HieraConfig(**settings)), 128)
    student, _ = load_student(tmp_path, NAMES, from_scratch=True, image_size=64)
    assert logits(student, torch.rand(1, 3, 64, 64)).shape == (1, 3)
    with pytest.raises(ValueError, match=r"does not accept images as tensors \(3, 50, 50\).*image_size="):
        load_student(tmp_path, NAMES, image_size=50)


def test_one_class_only_is_refused(tmp_path):
    saved(tmp_path, pp_lcnet())
    with pytest.raises(ValueError, match=r"id2label names one class only, \['cat'\]"):
        load_student(tmp_path, id2label=["cat"])


# ---- weights ----


def timm_student(architecture, size=64, **model_args):
    pixels = {"input_size": [3, size, size], "mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_pct": 1.0}
    settings = {"architecture": architecture, "model_args": model_args, "pretrained_cfg": pixels, **label_maps(SIX)}
    return build(TimmWrapperConfig(**settings))


def test_weights_that_modules_share_are_saved(tmp_path):
    small = {"embed_dims": [64] * 4, "serial_depths": [1] * 4, "parallel_depth": 1, "num_heads": 8}
    student = timm_student("coat_tiny", img_size=64, **small)
    shared = student.timm_model
    assert shared.cpe1.proj.weight is shared.serial_blocks1[0].cpe.proj.weight
    trainer = DistillationTrainer(student, config(tmp_path), train_dataset=rows(), processing_class=processor_of(64))
    trainer.train()
    trainer.save_model()
    values = torch.rand(2, 3, 64, 64)
    expected = logits(student, values)
    torch.testing.assert_close(logits(load_student(tmp_path)[0], values), expected)
    reopened = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(reopened(values), expected)


def test_weights_that_layers_of_a_transformer_share_are_saved(tmp_path):
    student, processor = tiny("vit", names=SIX)
    student.vit.layers[1].mlp = student.vit.layers[0].mlp
    trainer = DistillationTrainer(student, config(tmp_path), train_dataset=rows(), processing_class=processor)
    trainer.train()
    trainer.save_model()
    values = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(logits(load_student(tmp_path)[0], values), logits(student, values))


class Shared(nn.Module):
    """A plain classifier that uses one layer under two names."""

    def __init__(self):
        super().__init__()
        self.config = TimmWrapperConfig(architecture="resnet18", **label_maps(SIX))
        self.first = self.again = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3, 6)

    def forward(self, pixel_values):
        return self.head(self.again(self.first(pixel_values)).mean((2, 3)))


def test_weights_that_a_plain_module_shares_are_saved_and_resumed(tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    data = {"train_dataset": rows(), "processing_class": processor_of(32)}
    student = Shared()
    DistillationTrainer(student, config(tmp_path, **settings), **data).train()
    resumed = DistillationTrainer(Shared(), config(tmp_path, **settings), **data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, weight in student.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


@pytest.mark.parametrize("scratch", [False, True])
def test_what_timm_builds_otherwise_for_pretrained_weights_is_built_so(scratch, tmp_path):
    """FBNet's batch norm then has another epsilon, which transformers does not ask for."""
    own = timm.create_model("fbnetc_100", num_classes=3, bn_eps=1e-3).eval()
    with torch.no_grad():
        for module in own.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.fill_(0.01)
                module.weight.fill_(0.1)
    timm.models.save_for_hf(own, tmp_path / "old", model_config={"label_names": NAMES}, safe_serialization=True)
    file = tmp_path / "old" / "config.json"  # as of the weights on the Hub, which name no arguments
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_args": None}))
    student, processor = load_student("timm/fbnetc_100" if scratch else file.parent, NAMES, from_scratch=scratch)
    values = torch.rand(1, 3, 64, 64)
    expected = logits(student, values)
    student.save_pretrained(tmp_path / "new", state_dict=weights_to_save(student, processor))
    reopened = timm.create_model(f"local-dir:{tmp_path / 'new'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(reopened(values), expected)
        if not scratch:
            torch.testing.assert_close(own(values), expected)
