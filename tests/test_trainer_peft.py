"""Students with a LoRA adapter of PEFT: only the adapter is trained; it is what is saved, resumed and reopened."""

import json

import pytest
import torch
from tiny import tiny
from trainer_helpers import NAMES, config, rows

from hf_kd import DistillationTrainer
from hf_kd.checkpointing import HEAD_FILE
from hf_kd.models.forward import logits_of
from hf_kd.push import push
from hf_kd.reporting.collect import make_record

peft = pytest.importorskip("peft")
# What peft calls of transformers is its own.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

LORA = {
    "vit": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]},
    "resnet": {"target_modules": ["convolution"], "modules_to_save": ["classifier", "normalization"]},
    "timm_vit": {"target_modules": ["qkv"], "modules_to_save": ["head"]},
}


def lora(kind, adapter_name="default", **settings):
    student, processor = tiny(kind, names=NAMES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = {"r": 2, "lora_dropout": 0.1, **LORA.get(kind, {}), **settings}
        return peft.get_peft_model(student, peft.LoraConfig(**settings), adapter_name), processor


def lora_trainer(folder, kind, loss="uskd", evaluation=None, adapter_name="default", **settings):
    student, processor = lora(kind, adapter_name)
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "optim": "adamw_torch"} | settings
    args = config(folder, loss=loss, **settings)
    return DistillationTrainer(
        student, args, train_dataset=rows(), eval_dataset=evaluation, processing_class=processor
    )


def weights(trainer):
    head = {} if trainer.auxiliary_head is None else trainer.auxiliary_head.state_dict()
    return {name: value.clone() for name, value in (trainer.model.state_dict() | head).items()}


@pytest.mark.parametrize("kind", LORA)
def test_an_adapter_resumes_bit_identically(kind, tmp_path):
    whole = lora_trainer(tmp_path / "whole", kind)
    start = weights(whole)
    whole.train()
    resumed = lora_trainer(tmp_path / "resumed", kind)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected, got = weights(whole), weights(resumed)
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(expected[name], got[name]), name
    expected = whole.model.state_dict()
    moved = {name for name in expected if not torch.equal(start[name], expected[name])}
    assert moved and all("lora_" in name or "modules_to_save" in name for name in moved)
    assert (tmp_path / "whole" / "checkpoint-2" / HEAD_FILE).is_file()


@pytest.mark.parametrize(("kind", "adapter_name"), [("vit", "default"), ("resnet", "mine")])
def test_the_best_adapter_is_loaded_saved_and_reopened(kind, adapter_name, tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer = lora_trainer(tmp_path, kind, "ce", rows(24, seed=1), adapter_name, learning_rate=0.3, **best)
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses.values()), rel=1e-5)
    assert len(set(losses.values())) == 4
    trainer.save_model()
    folder = tmp_path if adapter_name == "default" else tmp_path / adapter_name
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert not (tmp_path / "model.safetensors").exists()
    reopened = peft.PeftModel.from_pretrained(tiny(kind, names=NAMES)[0], folder).eval()
    values = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found = logits_of(trainer.model.eval()(values))
        torch.testing.assert_close(logits_of(reopened(values)), found)
        merged = trainer.model.merge_and_unload()
        torch.testing.assert_close(logits_of(merged(values)), found, rtol=1e-4, atol=1e-5)
    assert make_record(trainer)["metrics"]["loss"] > 0


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path):
    lora_trainer(tmp_path, "vit", "ce").train()
    student, processor = lora("vit", target_modules=["q_proj"])
    trainer = DistillationTrainer(student, config(tmp_path), train_dataset=rows(), processing_class=processor)
    with pytest.raises(ValueError, match="does not fit the student.*unexpected.*v_proj"):
        trainer._load_from_checkpoint(str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize("kind", ["resnet", "timm_resnet"])
def test_batch_norms_that_an_adapter_would_lose_are_refused(kind, tmp_path):
    """Training changes their statistics, which are in no adapter: it would be reopened with other predictions."""
    targets = {"target_modules": ["convolution"] if kind == "resnet" else ["conv1", "conv2"]}
    student, processor = lora(kind, **targets, modules_to_save=None)
    with pytest.raises(ValueError, match="batch norm.*modules_to_save=") as error:
        DistillationTrainer(student, config(tmp_path), train_dataset=rows(), processing_class=processor)
    names = json.loads(str(error.value).split("modules_to_save=")[1].rsplit("]", 1)[0].replace("'", '"') + "]")
    student, processor = lora(kind, **targets, modules_to_save=names)
    trainer = DistillationTrainer(student, config(tmp_path), train_dataset=rows(), processing_class=processor)
    trainer.train()
    trainer.save_model()
    reopened = peft.PeftModel.from_pretrained(tiny(kind, names=NAMES)[0], tmp_path).eval()
    values = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(reopened(values)), logits_of(trainer.model.eval()(values)))


def test_an_adapter_of_transformers_own_is_refused(tmp_path):
    student, processor = tiny("vit", names=NAMES)
    student._hf_peft_config_loaded = True  # as add_adapter() sets it, which asks for a version of its own of peft
    with pytest.raises(ValueError, match=r"add_adapter\(\).*peft.get_peft_model\(student"):
        DistillationTrainer(student, config(tmp_path), train_dataset=rows(), processing_class=processor)


def test_pushing_an_adapter_says_what_to_do(tmp_path):
    lora_trainer(tmp_path, "vit", "ce").save_model()
    with pytest.raises(ValueError, match="holds an adapter of PEFT.*merge_and_unload"):
        push(tmp_path, "me/adapter", token="no token")
