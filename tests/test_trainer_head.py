"""The auxiliary head while a trainer trains, and the plain student before and after."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from student_helpers import image
from tiny import tiny
from torch import nn
from trainer_helpers import NAMES, config, rows, trainer_for
from transformers import TrainerCallback, pipeline

from hf_kd import DistillationTrainer
from hf_kd.checkpointing import HEAD_FILE

KINDS = ["vit", "resnet", "timm_resnet"]


def uskd_trainer(folder, student, processor, **settings):
    return DistillationTrainer(
        student, config(folder, loss="uskd", **settings), train_dataset=rows(), processing_class=processor
    )


def assert_plain(student, like):
    """The student is as a model that no trainer has seen: its modules, keys, hooks and output."""
    assert [name for name, _ in student.named_modules()] == [name for name, _ in like.named_modules()]
    assert student.state_dict().keys() == like.state_dict().keys()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())
    assert student._keys_to_ignore_on_save == like._keys_to_ignore_on_save
    assert type(student.train()(torch.rand(2, 3, 32, 32))) is type(like(torch.rand(2, 3, 32, 32)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_student_is_plain_when_training_returns(kind, tmp_path):
    student, processor = tiny(kind, names=NAMES)
    trainer = uskd_trainer(tmp_path, student, processor)
    head = student.aux_head
    assert isinstance(head, nn.Linear) and head is trainer.auxiliary_head and head.out_features == 6
    before = head.weight.detach().clone()
    trainer.train()
    assert_plain(student, tiny(kind, names=NAMES)[0])
    assert not torch.equal(head.weight, before)
    student.save_pretrained(tmp_path / "saved")
    assert not any("aux_head" in key for key in load_file(tmp_path / "saved" / "model.safetensors"))
    assert trainer.evaluate(rows(8))["eval_loss"] > 0
    assert len(pipeline("image-classification", model=student, image_processor=processor)(image())) == 5


def test_a_second_training_goes_on_with_the_same_head(tmp_path):
    student, processor = tiny("vit", names=NAMES)
    trainer = uskd_trainer(tmp_path, student, processor)
    trainer.train()
    head, weight = trainer.auxiliary_head, trainer.auxiliary_head.weight.detach().clone()
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(model.aux_head is head)

    trainer.add_callback(Look())
    trainer.train()
    assert seen == [True] * 3 and trainer.auxiliary_head is head and not torch.equal(head.weight, weight)
    groups = trainer.optimizer.param_groups
    assert sum(parameter is head.weight for group in groups for parameter in group["params"]) == 1
    assert_plain(student, tiny("vit", names=NAMES)[0])


def test_a_head_of_another_trainer_is_refused_or_replaced(tmp_path):
    student, processor = tiny("vit", names=NAMES)
    first = uskd_trainer(tmp_path, student, processor)
    with pytest.raises(ValueError, match=r"another trainer, on vit.layers.1.*student.aux_head.remove_from\(student\)"):
        uskd_trainer(tmp_path, student, processor)
    student.aux_head.remove_from(student)
    second = uskd_trainer(tmp_path, student, processor, feature_module="vit.layers.2", seed=9)
    assert student.aux_head is second.auxiliary_head and second.auxiliary_head.layer.name == "vit.layers.2"
    assert not torch.equal(second.auxiliary_head.weight, first.auxiliary_head.weight)
    with pytest.raises(ValueError, match="another trainer, on vit.layers.2"):
        first.train()
    second.train()
    first.train()  # one after the other is fine
    third = uskd_trainer(tmp_path, student, processor, feature_module="vit.layers.0")
    assert third.auxiliary_head.layer.name == "vit.layers.0"


def test_deepspeed_keeps_the_submodule_without_its_hooks(tmp_path, monkeypatch):
    """DeepSpeed's engine owns the parameters: here only the trainer believes that there is one."""
    student, processor = tiny("vit", names=NAMES)
    trainer = uskd_trainer(tmp_path, student, processor)
    trainer.train()
    trainer.auxiliary_head.add_to(student)
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    trainer._remove_head()
    assert student.aux_head is trainer.auxiliary_head
    assert not any(module._forward_hooks for module in student.modules())
    trainer.auxiliary_head.add_to(student)
    assert student.train()(torch.rand(2, 3, 32, 32)).aux_logits.shape == (2, 6)
    student.save_pretrained(tmp_path / "saved")
    assert not any("aux_head" in key for key in load_file(tmp_path / "saved" / "model.safetensors"))


def test_a_failed_construction_leaves_no_head(tmp_path):
    student, processor = tiny("vit", names=NAMES)
    with pytest.raises(TypeError):
        DistillationTrainer(
            student, config(tmp_path, loss="uskd"), train_dataset=rows(), processing_class=processor, typo=1
        )
    assert_plain(student, tiny("vit", names=NAMES)[0])


class At(TrainerCallback):
    def __init__(self, action):
        self.action = action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.action()


def fail():
    raise RuntimeError("in the middle")


@pytest.mark.parametrize(
    ("action", "error"), [(fail, RuntimeError), (lambda: os.kill(os.getpid(), signal.SIGINT), KeyboardInterrupt)]
)
def test_errors_and_ctrl_c_take_the_head_off(action, error, tmp_path):
    student, processor = tiny("resnet", names=NAMES)
    trainer = uskd_trainer(tmp_path, student, processor)
    trainer.add_callback(At(action))
    with pytest.raises(error):
        trainer.train()
    assert_plain(student, tiny("resnet", names=NAMES)[0])
    trainer = uskd_trainer(tmp_path / "other", student, processor)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    assert_plain(student, tiny("resnet", names=NAMES)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_checkpoint_brings_its_head(kind, tmp_path):
    trainer = trainer_for(
        tmp_path, kind, "uskd", evaluation=rows(24, seed=1), max_steps=3, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="top1",
    )  # fmt: skip
    accuracy, evaluate = iter([0.2, 0.9, 0.4]), trainer.evaluate
    trainer.evaluate = lambda *args, **kwargs: evaluate(*args, **kwargs) | {"eval_top1": next(accuracy)}
    trainer.train()
    best = load_file(tmp_path / "checkpoint-2" / HEAD_FILE)
    assert torch.equal(trainer.auxiliary_head.weight, best["weight"])
    assert not torch.equal(best["weight"], load_file(tmp_path / "checkpoint-3" / HEAD_FILE)["weight"])


def test_auto_find_batch_size_starts_again_with_the_first_rate_and_the_same_head(tmp_path):
    student, processor = tiny("vit", names=NAMES)
    trainer = uskd_trainer(
        tmp_path, student, processor, per_device_train_batch_size=16, auto_find_batch_size=True, max_steps=-1,
        num_train_epochs=2, lr_step_epochs=[1], lr_step_factor=0.1,
    )  # fmt: skip
    compute, sizes, heads = trainer.compute_loss, [], []

    def full(model, inputs, **kwargs):
        sizes.append(len(inputs["labels"]))
        heads.append(student.aux_head)
        if sizes[-1] > 8 and len(sizes) > 2:  # in the second epoch, where the rate is lower
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compute(model, inputs, **kwargs)

    trainer.compute_loss = full
    trainer.train()
    assert sizes[0] == 16 and max(sizes[-3:]) <= 8 and all(head is trainer.auxiliary_head for head in heads)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates[0] == pytest.approx(0.05) and rates[-1] == pytest.approx(0.005)
    assert len(rates) == trainer.state.global_step == trainer.state.max_steps
    assert_plain(student, tiny("vit", names=NAMES)[0])


class WithOwnHead(nn.Module):
    """A student that has a submodule of the auxiliary head's name."""

    def __init__(self):
        super().__init__()
        self.config = tiny("resnet", names=NAMES)[0].config
        self.body, self.aux_head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 6)

    def forward(self, pixel_values):
        return self.aux_head(self.body(pixel_values).mean((2, 3)))


def test_a_submodule_of_the_students_own_is_kept(tmp_path):
    processor = tiny("resnet")[1]
    trainer = DistillationTrainer(WithOwnHead(), config(tmp_path), train_dataset=rows(), processing_class=processor)
    trainer.train()
    trainer.save_model()
    assert "aux_head.weight" in load_file(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="aux_head of its own"):
        uskd_trainer(tmp_path, WithOwnHead(), processor, feature_module="body")
