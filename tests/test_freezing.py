"""Training of the head alone: the rest stays as it was, to the last bit."""

import json
import logging

import pytest
import torch
from cli_helpers import distill
from test_checkpoints import StopAt
from tiny import tiny
from torch import nn
from trainer_helpers import NAMES, config, rows, trainer_for

from hf_kd import DistillationTrainer
from hf_kd.models.freezing import freeze_backbone
from hf_kd.models.loading import head_layers
from hf_kd.spec import read_plan

FAMILIES = ["vit", "deit", "resnet", "timm_resnet", "timm_vit"]
SETTINGS = {"freeze_backbone": True, "weight_decay": 0.1, "gradient_accumulation_steps": 2, "max_steps": 4}


def state_of(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def head_of(model):
    head = {id(parameter) for layer in head_layers(model) for parameter in layer.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in head}


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("loss", ["uskd", "nkd"])
def test_only_the_heads_change(kind, loss, tmp_path):
    trainer = trainer_for(tmp_path, kind, loss, **SETTINGS)
    before = {k: v for k, v in state_of(trainer).items() if "aux_head" not in k}
    aux = None if loss == "nkd" else trainer.auxiliary_head.weight.detach().clone()
    trainer.train()
    after = state_of(trainer)
    assert before.keys() == after.keys()
    assert changed(before, after) == head_of(trainer.model) != set()
    optimized = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    heads = sum(after[name].numel() for name in head_of(trainer.model))
    assert optimized == heads + (0 if aux is None else sum(p.numel() for p in trainer.auxiliary_head.parameters()))
    assert aux is None or not torch.equal(aux, trainer.auxiliary_head.weight)


def test_a_step_is_the_hand_written_one_of_a_linear_classifier(tmp_path):
    """On the features of batch norms in eval mode."""
    train = rows(8)
    trainer = trainer_for(tmp_path, "resnet", train=train, max_steps=1, freeze_backbone=True)
    trainer.train()
    student, processor = tiny("resnet", names=NAMES)
    pixels = processor(list(train["image"]), return_tensors="pt")["pixel_values"]
    nn.functional.cross_entropy(student(pixels).logits, torch.tensor(train["label"])).backward()
    for own, trained in zip(student.classifier.parameters(), trainer.model.classifier.parameters(), strict=True):
        torch.testing.assert_close(trained.detach(), own.detach() - 0.05 * own.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["uskd", "ce"])
def test_resumed_is_uninterrupted(loss, tmp_path):
    settings = {**SETTINGS, "save_strategy": "steps", "save_steps": 2, "optim_args": "momentum=0.9"}
    whole = trainer_for(tmp_path / "whole", "resnet", loss, **settings)
    whole.train()
    cut = trainer_for(tmp_path / "cut", "resnet", loss, **settings)
    cut.add_callback(StopAt(2))
    cut.train()
    with pytest.raises(ValueError, match=r"freeze_backbone \(True there, False here\)"):
        other = trainer_for(tmp_path / "cut", "resnet", loss, **settings | {"freeze_backbone": False})
        other.train(resume_from_checkpoint=True)
    resumed = trainer_for(tmp_path / "cut", "resnet", loss, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert not changed(state_of(whole), state_of(resumed))
    assert read_plan(tmp_path / "cut").runs[0].settings["freeze_backbone"] is True


def test_a_plan_of_before_these_options_is_continued(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    trainer_for(tmp_path, **settings, max_steps=2).train()
    plan = json.loads((tmp_path / "plan.json").read_text())
    for key in ("freeze_backbone", "ema_decay", "ema_warmup", "distillation_alpha"):
        del plan["runs"][0]["settings"][key]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match=r"freeze_backbone \(None there, True here\)"):
        trainer_for(tmp_path, **settings, max_steps=4, freeze_backbone=True).train(resume_from_checkpoint=True)
    trainer = trainer_for(tmp_path, **settings, max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4


def test_a_student_made_by_model_init_is_frozen_too(tmp_path):
    trainer = DistillationTrainer(
        args=config(tmp_path, freeze_backbone=True),
        model_init=lambda: tiny("resnet", names=NAMES)[0],
        processing_class=tiny("resnet", names=NAMES)[1],
        train_dataset=rows(),
    )
    before = tiny("resnet", names=NAMES)[0].state_dict()
    trainer.train()
    assert changed(before, state_of(trainer)) == {"classifier.1.weight", "classifier.1.bias"}


def test_a_student_without_a_head_that_can_be_found_is_refused():
    with pytest.raises(ValueError, match="no classification head is found in Linear"):
        freeze_backbone(nn.Linear(2, 2))


def test_a_random_backbone_is_warned_about(things, tmp_path, undrawn_figures, caplog):
    def warnings(*more):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert distill(things, "--freeze_backbone", "--dry_run", "--output_dir", tmp_path / "out", *more) == 0
        return [r for r in caplog.records if "random, and stay so" in r.getMessage()]

    assert len(warnings()) == 1 and len(warnings("--from_scratch", "false")) == 0
