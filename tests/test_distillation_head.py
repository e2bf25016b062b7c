"""Students with a distillation head: what trains which head, and that they are saved and reopened as before."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from losses_helpers import C, grad, leaf, logits, same
from tiny import tiny, tiny_distilled
from trainer_helpers import NAMES, config, make_teacher, rows, trainer_for, weights
from transformers import AutoModelForImageClassification, DeiTForImageClassification

from hf_kd import DistillationTrainer
from hf_kd.losses import DistillationLoss, get_loss
from hf_kd.models.distillation_head import has_distillation_head, separate_heads
from hf_kd.models.forward import logits_by_head, logits_of
from hf_kd.reporting import make_record, model_card

KINDS = ["deit", "levit", "timm_deit", "timm_levit"]
HEADS = {  # of the class and of the distillation
    "deit": ("cls_classifier", "distillation_classifier"),
    "levit": ("classifier.linear", "classifier_distill.linear"),
    "timm_deit": ("timm_model.head", "timm_model.head_dist"),
    "timm_levit": ("timm_model.head.linear", "timm_model.head_dist.linear"),
}


def two_heads(loss, s, d, t, labels, alpha, **numbers):
    """A loss's terms, as a trainer asks for them."""
    module = get_loss(loss, **numbers)
    module.use_distillation_head(alpha)
    return module, module(s, labels, teacher_logits=t, distillation_logits=d)


@pytest.mark.parametrize("alpha", [0.5, 0.3, 1.0])
@pytest.mark.parametrize("loss", ["hard", "kd", "kd with ce_weight", "nkd"])
def test_the_objective_is_that_of_the_definition(loss, alpha):
    s, d, t = (leaf(logits(seed, torch.float64)) for seed in (0, 1, 2))
    labels = torch.tensor([3, 0, 6, 2, 3, 5])
    rows_, T = torch.arange(len(labels)), t.detach()
    numbers = {"kd": {"temperature": 2.0, "weight": 0.7}, "nkd": {"temperature": 2.0, "gamma": 1.2}}.get(loss, {})
    if loss == "kd with ce_weight":
        loss, numbers = "kd", {"temperature": 2.0, "weight": 3.0, "ce_weight": 0.2}
    _, terms = two_heads(loss, s, d, t, labels, alpha, label_smoothing=0.1, **numbers)

    log_s, log_d = s - s.exp().sum(1, keepdim=True).log(), d - d.exp().sum(1, keepdim=True).log()
    smooth = 0.9 * F.one_hot(labels, C) + 0.1 / C
    expected = {"ce": (1 - alpha) * -(smooth * log_s).sum(1).mean()}
    if loss == "hard":
        expected["hard"] = alpha * -log_d[rows_, T.argmax(1)].mean()  # and no weight of 1/2 besides
    elif loss == "kd":
        p, q = (T / 2).softmax(1), (d / 2).softmax(1)
        expected["kd"] = alpha * numbers["weight"] * 4 * (p * (p.log() - q.log())).sum(1).mean()
    else:
        expected["target"] = alpha * -(T.softmax(1)[rows_, labels] * log_d[rows_, labels]).mean()
        others = ~F.one_hot(labels, C).bool()
        p, q = ((x[others].reshape(-1, C - 1) / 2).softmax(1) for x in (T, d))
        expected["non_target"] = alpha * 1.2 * 4 * -(p * q.log()).sum(1).mean()
    assert list(terms) == list(expected)
    for name in expected:
        same(terms[name], expected[name])
    for x in (s, d):
        same(grad(sum(terms.values()), x), grad(sum(expected.values()), x), atol=1e-12)
    assert not grad(sum(terms.values()), t).any()


def test_the_diagnostic_of_nkd_is_zero_where_the_distillation_head_has_learned():
    s, t, labels = logits(0), logits(1), torch.tensor([3, 0, 6, 2, 3, 5])
    loss, terms = two_heads("nkd", s, t, t, labels, 0.3, gamma=2.0)
    (value,) = loss.diagnostics(terms, labels, teacher_logits=t).values()
    assert value.item() == pytest.approx(0, abs=1e-5) and terms["non_target"] > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_both_logits_come_in_training_and_their_mean_otherwise(kind):
    student, _ = tiny_distilled(kind, NAMES)
    assert has_distillation_head(student)
    values = torch.rand(3, 3, 64, 64)
    plain = student(values).logits
    separate_heads(student, True)
    assert torch.equal(student(values).logits, plain)
    student.train()
    for module in student.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()  # with the statistics of before
    output = student(values)
    of_class, of_distillation = logits_by_head(output)
    torch.testing.assert_close(logits_of(output), (of_class + of_distillation) / 2)
    assert not torch.allclose(of_class, of_distillation)
    separate_heads(student, False)
    assert student(values).logits.shape == (3, 6)


def test_other_students_have_none():
    assert not any(has_distillation_head(tiny(kind)[0]) for kind in ("vit", "deit", "resnet", "timm_vit"))
    with torch.device("meta"):
        for architecture in ("crossvit_9_240", "pit_ti_224", "iformer_t", "efficientformerv2_s0"):
            model = torch.nn.Module()
            model.timm_model = timm.create_model(architecture)
            assert has_distillation_head(model) == (architecture == "efficientformerv2_s0"), architecture
        for architecture in ("pit_ti_distilled_224", "repvit_m1", "iformer_m_distilled", "efficientformer_l1"):
            model = torch.nn.Module()
            model.timm_model = timm.create_model(architecture)
            assert has_distillation_head(model), architecture
            model.timm_model.set_distilled_training(True)
            assert isinstance(model.timm_model.train()(torch.rand(2, 3, 224, 224, device="meta")), tuple)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("alpha", "moved"), [(0.0, (True, False)), (1.0, (False, True)), (0.5, (True, True))])
def test_alpha_says_which_head_is_trained(tmp_path, kind, alpha, moved):
    trainer = trainer_for(tmp_path, f"distilled {kind}", "hard", distillation_alpha=alpha, max_steps=1)
    heads = [trainer.model.get_submodule(name).weight for name in HEADS[kind]]
    before = [weight.detach().clone() for weight in heads]
    trainer.train()
    assert tuple(not torch.equal(old, new) for old, new in zip(before, heads, strict=True)) == moved
    assert isinstance(trainer.model.train()(torch.rand(2, 3, 64, 64)).logits, torch.Tensor)  # plain again
    trainer.train()  # and once more with two heads


@pytest.mark.parametrize("loss", ["ce", "uskd", "tf_kd"])
def test_losses_without_a_teacher_train_the_mean(tmp_path, loss):
    trainer = trainer_for(tmp_path, "distilled timm_deit", loss, logging_steps=1, max_steps=1)
    student = trainer.model.train()
    inputs = next(iter(trainer.get_train_dataloader()))
    output = student(trainer._student_input(inputs))
    terms = trainer.train_loss(logits_of(output), inputs["labels"], aux_logits=output.get("aux_logits"))
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    for name, value in terms.items():
        assert logged[f"loss_{name}"] == pytest.approx(value.item(), rel=1e-4), name


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_and_reopened_as_the_plain_class(tmp_path, kind):
    trainer = trainer_for(tmp_path, f"distilled {kind}", "kd", evaluation=rows(6, seed=5), max_steps=2)
    trainer.train()
    assert trainer.evaluate()["eval_samples"] == 6
    trainer.save_model()
    values = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = trainer.model.eval()(values).logits
        again, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
        assert type(again) is type(trainer.model) and not any(info.values()), info
        assert torch.equal(again(values).logits, expected)
        if kind.startswith("timm"):
            reopened = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
            torch.testing.assert_close(reopened(values), expected, rtol=1e-5, atol=1e-6)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    options = {"loss": "nkd", "kind": "distilled timm_deit", "save_strategy": "steps", "save_steps": 2}
    whole = trainer_for(tmp_path / "whole", max_steps=4, **options)
    whole.train()
    part = trainer_for(tmp_path / "whole", max_steps=4, **options)
    part.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(weights(part), weights(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_training_compiles_to_one_graph(kind):
    student, _ = tiny_distilled(kind, NAMES)
    separate_heads(student.train(), True)
    for module in student.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    loss, labels, t = get_loss("hard"), torch.tensor([0, 5]), logits(1)[:2, :6]
    loss.use_distillation_head(0.5)

    def run(values):
        s, d = logits_by_head(student(values))
        return loss(s, labels, teacher_logits=t, distillation_logits=d)

    values = torch.rand(2, 3, 64, 64)
    torch.compiler.reset()
    for a, b in zip(run(values).values(), torch.compile(run, fullgraph=True, backend="aot_eager")(values).values(),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


def test_plan_record_and_card_say_so(tmp_path):
    trainer = trainer_for(
        tmp_path, "distilled timm_deit", "hard", evaluation=rows(6), distillation_alpha=0.25, max_steps=1
    )
    trainer.train()
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["runs"][0]["settings"]["distillation_alpha"] == 0.25
    record = make_record(trainer)
    assert record["loss"]["distillation_alpha"] == record["settings"]["distillation_alpha"] == 0.25
    card = model_card(record)
    assert "α = 0.25" in card and "CE + CE(arg max T)" in card
    record["loss"].pop("distillation_alpha")
    assert "(1 − weight) · CE + weight · CE(arg max T)" in model_card(record)


class Apart(DistillationLoss):
    name = "apart"
    requires = frozenset({"teacher_logits", "aux_logits", "distillation_logits"})

    def method_terms(self, student_logits, labels, teacher_logits, aux_logits, distillation_logits):
        apart = (student_logits - distillation_logits).square().mean()
        return {"apart": apart, "rest": 0 * (teacher_logits.mean() + aux_logits.mean())}


def test_a_loss_of_ones_own_may_require_both_logits(tmp_path):
    for kind in KINDS[:3]:  # of so small a LeViT of timm no feature layer is found
        student, processor = tiny_distilled(kind, NAMES)
        settings = {"per_device_train_batch_size": 24, "max_steps": 1}
        trainer = DistillationTrainer(student, config(tmp_path / kind, **settings), make_teacher(), loss=Apart(),
                                      train_dataset=rows(), processing_class=processor)  # fmt: skip
        trainer.train()
        assert trainer.state.log_history[0]["loss_apart"] > 1e-4, kind
        assert trainer.train_loss.distillation_alpha is None


def test_what_would_have_no_effect_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"weight=0.7 has no effect .*--distillation_alpha 0.7"):
        trainer_for(tmp_path, "distilled deit", "hard", loss_kwargs={"weight": 0.7})
    trainer_for(tmp_path, "distilled deit", "hard", loss_kwargs={"weight": 0.7}, distillation_alpha=0.7)
    with pytest.raises(ValueError, match=r"distillation_alpha=0.7 has no effect, because the student \(ViT"):
        trainer_for(tmp_path, "vit", "hard", distillation_alpha=0.7)
    with pytest.raises(ValueError, match="distillation_alpha=2"):
        config(tmp_path, distillation_alpha=2)
    student, processor = tiny("deit", names=NAMES)
    assert isinstance(student, DeiTForImageClassification)
    with pytest.raises(ValueError, match="'apart' requires distillation_logits, and the student"):
        DistillationTrainer(student, config(tmp_path), make_teacher(), loss=Apart(), processing_class=processor)
