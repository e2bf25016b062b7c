"""Loading students, and the weak head, against the plain models themselves."""

import copy
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import KINDS, MEAN, STD, tiny, tiny_config
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BitImageProcessor,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    EfficientNetImageProcessor,
    MobileViTImageProcessor,
    SwinConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from hf_kd import View, load_student
from hf_kd.student import build
from hf_kd.weak_head import HEAD, StudentOutput, attach_weak_head, find_feature_site, logits_of, tensor_of

NAMES = ["tabby cat", "fire truck", "daisy"]


def picture(height=41, width=57, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def saved(folder, kind, **kwargs):
    """A tiny model with its processor in a folder, as transformers writes it."""
    model, processor = tiny(kind, **kwargs)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def logits(model, values):
    with torch.no_grad():
        return model.eval()(values).logits


def check_reopens(model, processor, folder, names):
    """What transformers alone makes of the folder: the same logits for a picture, and the class names."""
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    values = torch.as_tensor(processor(images=[picture()], return_tensors="pt")["pixel_values"])
    again, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    values_again = AutoImageProcessor.from_pretrained(folder)(images=[picture()], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(torch.as_tensor(values_again), values)
    expected = logits(model, values)
    torch.testing.assert_close(logits(again, values), expected)
    assert again.config.id2label == dict(enumerate(names))
    answer = pipeline("image-classification", model=str(folder))(picture(), top_k=len(names))
    probabilities = dict(zip(names, expected.softmax(1)[0].tolist(), strict=True))
    assert {a["label"]: a["score"] for a in answer} == pytest.approx(probabilities, abs=1e-4)


# ---- loading ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_pretrained_model_gets_a_new_head_and_keeps_the_rest(kind, tmp_path):
    old, _ = saved(tmp_path / "old", kind)
    student, processor = load_student(str(tmp_path / "old"), id2label=NAMES)
    before, after = old.state_dict(), student.state_dict()
    head = {k for k in before if before[k].shape != after[k].shape}
    assert len(head) == 2 and all("classifier" in k or "fc." in k or "head." in k for k in head)
    assert all(torch.equal(before[k], after[k]) for k in before.keys() - head)
    assert student.config.num_labels == 3 and student.config.id2label == dict(enumerate(NAMES))
    check_reopens(student, processor, tmp_path / "new", NAMES)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_of_the_right_size_stays_and_its_classes_are_renamed(kind, tmp_path):
    old, own = saved(tmp_path / "old", kind, num_labels=3)
    student, processor = load_student(tmp_path / "old", id2label=dict(enumerate(NAMES)))
    values = torch.as_tensor(own(images=[picture()], return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(logits(student, values), logits(old, values))
    check_reopens(student, processor, tmp_path / "new", NAMES)


@pytest.mark.parametrize("kind", KINDS)
def test_from_scratch_out_of_a_folder(kind, tmp_path):
    tiny_config(kind).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD).save_pretrained(tmp_path)
    torch.manual_seed(0)
    one, processor = load_student(str(tmp_path), id2label=NAMES, from_scratch=True)
    other, _ = load_student(str(tmp_path), id2label=NAMES, from_scratch=True)
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert View(processor).size == (32, 32)
    check_reopens(one, processor, tmp_path / "new", NAMES)


@pytest.mark.parametrize(("name", "size"), [("timm/resnet18", 64), ("timm/vit_tiny_patch16_224", 32)])
def test_from_scratch_out_of_timm(name, size, tmp_path):
    student, processor = load_student(
        name, NAMES, from_scratch=True, image_size=size, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.21, 0.22]
    )
    expected = (torch.from_numpy(np.array(picture(size, size))).permute(2, 0, 1).double() / 255).numpy()
    expected = (expected - np.array([0.5, 0.4, 0.3])[:, None, None]) / np.array([0.2, 0.21, 0.22])[:, None, None]
    own = processor(images=[picture(size, size)], return_tensors="pt")["pixel_values"][0]
    np.testing.assert_allclose(own.numpy(), expected, atol=1e-5)
    assert student.config.id2label == dict(enumerate(NAMES))
    check_reopens(student, processor, tmp_path, NAMES)
    assert View(AutoImageProcessor.from_pretrained(tmp_path)) == View(processor)
    assert json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]["input_size"] == [3, size, size]


def test_timm_from_scratch_starts_with_timms_own_weights():
    """transformers draws every convolution from normal(0, 0.02); timm's are scaled to their fan."""
    torch.manual_seed(5)
    student = build(tiny_config("timm_resnet"))
    own = timm.create_model("resnet18", num_classes=6, layers=[1, 1, 1, 1], channels=[8, 16, 24, 32])
    weights, expected = dict(student.timm_model.named_parameters()), dict(own.named_parameters())
    assert weights.keys() == expected.keys()
    for name in ("conv1.weight", "layer2.0.conv1.weight", "layer4.0.conv2.weight"):
        assert weights[name].std().item() == pytest.approx(expected[name].std().item(), rel=0.15), name
    assert (weights["layer1.0.bn2.weight"] == 0).all() and (expected["layer1.0.bn2.weight"] == 0).all()


def test_a_config_without_architectures_is_built():
    config = DeiTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, intermediate_size=64
    )
    assert config.architectures is None
    assert type(build(config)).__name__ == "DeiTForImageClassification"


def test_timms_own_export_is_opened(tmp_path):
    own = timm.create_model("resnet18", num_classes=3, layers=[1, 1, 1, 1], channels=[8, 16, 24, 32]).eval()
    timm.models.save_for_hf(own, tmp_path, model_config={"label_names": NAMES}, safe_serialization=True)
    student, processor = load_student(tmp_path, id2label=["a", "b", "c", "d"])
    body = {k: v for k, v in student.timm_model.state_dict().items() if not k.startswith("fc.")}
    assert all(torch.equal(v, own.state_dict()[k]) for k, v in body.items())
    check_reopens(student, processor, tmp_path / "new", ["a", "b", "c", "d"])


def drop(folder, match):
    """Remove the weights whose names contain a text from a saved model."""
    state = load_file(folder / "model.safetensors")
    gone = [k for k in state if match in k]
    assert gone
    save_file({k: v for k, v in state.items() if k not in gone}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "match", "named"),
    [
        ("vit", "layer.2.", "layers.2."),
        ("resnet", "stages.1.", "stages.1."),
        ("timm_resnet", "layer2.", "layer2."),
        ("timm_vit", "blocks.1.mlp", "blocks.1.mlp"),
        ("timm_resnet", "running_mean", "running_mean"),
    ],
)
def test_missing_body_weights_are_refused_with_their_names(kind, match, named, tmp_path):
    saved(tmp_path, kind)
    drop(tmp_path, match)
    with pytest.raises(ValueError, match=rf"weights besides the classification head.*{named}"):
        load_student(str(tmp_path), id2label=NAMES)


def test_a_body_layer_as_wide_as_the_classes_is_no_head(tmp_path):
    """32 classes, and hidden layers of 32: the missing projection must not pass for a new classifier."""
    saved(tmp_path, "vit")
    drop(tmp_path, "layer.2.attention.output.dense")
    with pytest.raises(ValueError, match="2 weights besides the classification head"):
        load_student(str(tmp_path), id2label=[f"n{i}" for i in range(32)])


@pytest.mark.parametrize("kind", ["vit", "timm_resnet"])
def test_a_checkpoint_without_a_head_is_a_start(kind, tmp_path):
    saved(tmp_path, kind)
    drop(tmp_path, "classifier" if kind == "vit" else "fc.")
    student, _ = load_student(str(tmp_path), id2label=NAMES)
    assert student.config.num_labels == 3


def test_students_are_float32_whatever_the_checkpoint(tmp_path):
    model, processor = tiny("vit")
    model.bfloat16().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    for scratch in (False, True):
        student, _ = load_student(str(tmp_path), id2label=NAMES, from_scratch=scratch)
        assert {p.dtype for p in student.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["vit", "timm_vit"])
def test_image_size_is_refused_where_the_weights_do_not_allow_it(kind, tmp_path):
    saved(tmp_path, kind)
    with pytest.raises(ValueError, match="image_size=48"):
        load_student(str(tmp_path), id2label=NAMES, image_size=48)
    load_student(str(tmp_path), id2label=NAMES, image_size=32)


@pytest.mark.parametrize("kind", KINDS)
def test_image_size_from_scratch_and_for_pretrained_cnns(kind, tmp_path):
    saved(tmp_path / "old", kind)
    scratch = "resnet" not in kind
    student, processor = load_student(str(tmp_path / "old"), NAMES, image_size=48, from_scratch=scratch)
    view = View(processor)
    assert view.size == (48, 48)
    torch.testing.assert_close(-view.offset.flatten() / view.scale.flatten(), torch.tensor(MEAN))  # kept
    torch.testing.assert_close(1 / view.scale.flatten(), torch.tensor(STD))
    check_reopens(student, processor, tmp_path / "new", NAMES)


def test_other_statistics_leave_size_and_crop(tmp_path):
    model, _ = tiny("resnet")
    own = BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    _, processor = load_student(model, processor=own, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    expected = BitImageProcessor(
        size={"shortest_edge": 40},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.1, 0.2, 0.3],
        image_std=[0.4, 0.5, 0.6],
    )
    a, b = (torch.as_tensor(p(images=[picture()], return_tensors="pt")["pixel_values"]) for p in (processor, expected))
    torch.testing.assert_close(a, b)
    assert own.image_mean != processor.image_mean


def test_another_size_keeps_statistics_that_are_composed_of_several_attributes():
    model, _ = tiny("resnet")
    settings = {"include_top": True, "image_mean": [0.2] * 3, "image_std": [0.4, 0.5, 0.6]}
    settings |= {"rescale_offset": True, "rescale_factor": 1 / 127.5}
    own = EfficientNetImageProcessor(size={"height": 32, "width": 32}, **settings)
    _, processor = load_student(model, processor=own, image_size=48)
    expected = EfficientNetImageProcessor(size={"height": 48, "width": 48}, **settings)
    a, b = (torch.as_tensor(p(images=[picture()], return_tensors="pt")["pixel_values"]) for p in (processor, expected))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="swaps"):
        load_student(model, processor=MobileViTImageProcessor(), image_size=48)


def test_a_folder_without_a_processor_gets_a_stated_default(tmp_path, monkeypatch):
    tiny("vit")[0].save_pretrained(tmp_path)
    said = []
    monkeypatch.setattr("hf_kd.student.logger.warning", said.append)
    _, processor = load_student(str(tmp_path))
    assert len(said) == 1 and "no image processor" in said[0]
    assert View(processor).size == (32, 32)
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]


@pytest.mark.parametrize("model", ["./nope", "/nope/model", "~/nope", "examples/x/y", "../nope", "/"])
@pytest.mark.parametrize("scratch", [False, True])
def test_a_folder_that_is_not_there_is_called_so(model, scratch):
    with pytest.raises((ValueError, OSError), match="no such folder" if model != "/" else "config.json"):
        load_student(model, from_scratch=scratch)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"model": "timm/resnt18", "from_scratch": True}, "has no 'resnt18'"),
        ({"model": tiny("vit")[0], "from_scratch": True}, "from_scratch"),
        ({"model": tiny("vit")[0]}, "processor"),
        ({"model": tiny("vit")[0], "processor": tiny("vit")[1], "id2label": NAMES}, "6 classes, id2label 3"),
        ({"model": tiny("vit")[0], "processor": tiny("vit")[1], "id2label": {1: "a", 2: "b"}}, "classes"),
    ],
)
def test_bad_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        load_student(**kwargs)
    with pytest.raises(ValueError, match="from 0 on"):
        load_student(tiny("vit", 2)[0], processor=tiny("vit")[1], id2label={1: "a", 2: "b"})


@pytest.mark.parametrize("kind", ["vit", "timm_vit"])
def test_a_module_gets_the_names_and_its_processor(kind, tmp_path):
    model, processor = tiny(kind, 3)
    student, same = load_student(model, id2label=NAMES, processor=processor)
    assert student is model and same is processor
    check_reopens(student, same, tmp_path, NAMES)


# ---- where the weak head taps ----


def features_of(model, values):
    """The paper's feature by other means than a hook on the module that we name: (B, D)."""
    kind = type(model).__name__
    with torch.no_grad():
        if kind.startswith(("ViT", "DeiT")):
            # States start with the embeddings: number L/2 is what block L/2 (counted from 1) gives, unnormalised.
            return model(values, output_hidden_states=True).hidden_states[2][:, 0]
        if kind.startswith("ResNet"):
            return model(values, output_hidden_states=True).hidden_states[-2].mean((2, 3))
        net = model.timm_model
        if hasattr(net, "layer3"):
            x = net.maxpool(net.act1(net.bn1(net.conv1(values))))
            return net.layer3(net.layer2(net.layer1(x))).mean((2, 3))
        _, states = net.forward_intermediates(values, indices=[1], return_prefix_tokens=True, output_fmt="NLC")[:2]
        return states[0][1][:, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_weak_logits_are_a_linear_map_of_the_papers_feature(kind):
    model, _ = tiny(kind)
    plain = copy.deepcopy(model)
    head = attach_weak_head(model, 6, (32, 32))
    values = torch.rand(3, 3, 32, 32)
    output = model(values)
    expected = features_of(plain, values) @ head.fc.weight.T + head.fc.bias
    torch.testing.assert_close(output.weak_logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.logits, logits(plain, values))
    site = {
        "vit": "vit.layers.1",
        "deit": "deit.layers.1",
        "resnet": "resnet.encoder.stages.2",
        "timm_resnet": "timm_model.layer3",
        "timm_vit": "timm_model.blocks.1",
    }[kind]
    assert head.site.name == site


def test_swin_is_tapped_before_patch_merging():
    config = SwinConfig(
        embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1] * 4, image_size=32, patch_size=2, window_size=2
    )
    model = build(config).eval()
    site = find_feature_site(model, (32, 32))
    seen = {}
    model.swin.encoder.layers[2].downsample.register_forward_pre_hook(lambda m, args: seen.update(stage=args[0]))
    model.get_submodule(site.name).register_forward_hook(lambda m, a, out: seen.update(site=tensor_of(out)))
    logits(model, torch.rand(2, 3, 32, 32))
    assert (site.pooling, site.channels) == ("mean_token", 32)
    torch.testing.assert_close(seen["site"], seen["stage"])


@pytest.mark.parametrize(
    ("architecture", "size", "site"),
    [
        ("test_convnext", 64, ("stages.2", 48, "nchw")),
        ("test_efficientnet", 64, ("blocks.3", 48, "nchw")),
        ("test_mambaout", 64, ("stages.2", 48, "nhwc")),
        ("test_vit3", 160, None),
        ("xcit_nano_12_p16_224", 64, ("blocks.5", 128, "mean_token")),  # the class token joins the patches after them
        ("swin_tiny_patch4_window7_224", 224, ("layers.2", 384, "nhwc")),
    ],
)
def test_sites_in_timm_families(architecture, size, site):
    model = timm.create_model(architecture)
    found = find_feature_site(model, (size, size))
    if site is not None:
        assert (found.name, found.channels, found.pooling) == site
    else:
        assert found.pooling == ("class_token" if model.cls_token is not None else "mean_token")


class Unknown(nn.Module):
    """A classifier of no known family."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.body = nn.Sequential(nn.Conv2d(8, 12, 3, 1, 1), nn.ReLU(), nn.Conv2d(12, 16, 3, 2, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(16, 6)

    def forward(self, pixel_values):
        return self.classifier(self.pool(self.body(self.stem(pixel_values))).flatten(1))


def test_an_unknown_model_needs_feature_module_and_is_told_which():
    with pytest.raises(ValueError, match=r"(?s)no rule for Unknown.*feature_module.*body\.0 \(1, 12, 8, 8\)"):
        attach_weak_head(Unknown(), 6, (32, 32))
    with pytest.raises(ValueError, match=r"no module is named 'body\.9'.*body\.2 \(1, 16, 4, 4\)"):
        attach_weak_head(Unknown(), 6, (32, 32), feature_module="body.9")
    model, values = Unknown(), torch.rand(2, 3, 32, 32)
    head = attach_weak_head(model, 6, (32, 32), feature_module="body.0")
    torch.testing.assert_close(model(values).weak_logits, head.fc(model.body[0](model.stem(values)).mean((2, 3))))


def test_feature_module_overrides_the_rule():
    model, _ = tiny("resnet")
    head = attach_weak_head(model, 6, (32, 32), feature_module="resnet.encoder.stages.1")
    values = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        state = model(values, output_hidden_states=True).hidden_states[-3].mean((2, 3))
    torch.testing.assert_close(model(values).weak_logits, head.fc(state))


# ---- what the weak head does ----


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_early_layers_and_the_head_only(kind):
    model, _ = tiny(kind)
    head = attach_weak_head(model, 6, (32, 32))
    model.train()(torch.rand(4, 3, 32, 32)).weak_logits.square().sum().backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    first = next(n for n, _ in model.named_parameters() if "proj" in n or "conv" in n)
    assert {first, f"{HEAD}.fc.weight", f"{HEAD}.fc.bias"} <= moved
    late = {
        "vit": "layers.2",
        "deit": "layers.2",
        "resnet": "stages.3",
        "timm_resnet": "layer4",
        "timm_vit": "blocks.2",
    }
    assert not any(late[kind] in n or "classifier" in n for n in moved)
    assert head is model.kd_head


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_the_model_is_the_plain_one(kind, tmp_path):
    model, processor = tiny(kind, names=NAMES)
    plain = copy.deepcopy(model)
    attach_weak_head(model, 3, (32, 32))
    values = torch.rand(2, 3, 32, 32)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            a, b = model.eval()(values), plain.eval()(values)
        assert type(a) is type(b) and a.keys() == b.keys() and torch.equal(a.logits, b.logits)
    assert isinstance(model.train()(values), StudentOutput)
    model.save_pretrained(tmp_path)
    assert not any(HEAD in k for k in load_file(tmp_path / "model.safetensors"))
    check_reopens(model, processor, tmp_path / "again", NAMES)


def test_attaching_draws_no_random_numbers_and_is_reproducible():
    one, other = tiny("vit")[0], tiny("vit")[0]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    attach_weak_head(one, 6, (32, 32), seed=1)
    assert torch.equal(torch.rand(3), expected)
    attach_weak_head(other, 6, (32, 32), seed=1)
    assert torch.equal(one.kd_head.fc.weight, other.kd_head.fc.weight)
    assert attach_weak_head(one, 6, (32, 32)) is one.kd_head
    assert one.training is False


def test_models_with_two_heads_work():
    config = DeiTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    model = DeiTForImageClassificationWithTeacher(config).train()
    attach_weak_head(model, 2, (32, 32))
    values = torch.rand(2, 3, 32, 32)
    output = model(values)
    with torch.no_grad():
        plain = model(values)
    assert torch.equal(output.logits, logits_of(plain))
    torch.testing.assert_close(logits_of(plain), (plain.cls_logits + plain.distillation_logits) / 2)
    assert output.weak_logits.shape == (2, 2)


def test_tuples_and_tensors_have_logits_too():
    model, _ = tiny("vit")
    values = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(values).logits
        assert torch.equal(logits_of(model(values, return_dict=False)), expected)
    assert torch.equal(logits_of(expected), expected)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_compiled_models_give_the_same_in_one_graph(kind):
    model, _ = tiny(kind)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    attach_weak_head(model, 6, (32, 32))
    values = torch.rand(2, 3, 32, 32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    a, b = model(values), compiled(values)
    torch.testing.assert_close(b.weak_logits, a.weak_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(b.logits, a.logits, rtol=1e-4, atol=1e-5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = [torch.autograd.grad(o.weak_logits.square().sum(), parameters, allow_unused=True) for o in (a, b)]
    for x, y in zip(*grads, strict=True):
        x, y = (torch.zeros(()) if g is None or not g.any() else g for g in (x, y))
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        assert "weak_logits" not in compiled(values)
    torch._dynamo.reset()


def gradients(model, values):
    model.zero_grad()
    output = model(values)
    (output.logits.square().sum() + output.weak_logits.square().sum()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["vit", "deit", "timm_vit"])
def test_activation_checkpointing_changes_nothing(kind, reentrant):
    """In transformers hooks run outside the checkpoint, so that either way of it works; timm has its own default."""
    model, _ = tiny(kind)
    attach_weak_head(model, 6, (32, 32))
    values = torch.rand(2, 3, 32, 32)
    expected = gradients(model.train(), values)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(model, values)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    copy.deepcopy(model)


class Checkpointed(Unknown):
    """Checkpoints its body, hooks included, as remote code does."""

    reentrant = True

    def forward(self, pixel_values):
        x = checkpoint(
            self.body, checkpoint(self.stem, pixel_values, use_reentrant=True), use_reentrant=self.reentrant
        )
        return self.classifier(self.pool(x).flatten(1))


@pytest.mark.filterwarnings("ignore")
def test_a_feature_without_gradient_is_refused_with_the_way_out():
    model = Checkpointed()
    attach_weak_head(model, 6, (32, 32), feature_module="body.0")
    with pytest.raises(RuntimeError, match="body.0.*use_reentrant"):
        model(torch.rand(2, 3, 32, 32))
    model.reentrant = False
    assert gradients(model, torch.rand(2, 3, 32, 32))["kd_head.fc.weight"].any()
    copy.deepcopy(model)
    timm_model, _ = tiny("timm_resnet")  # its checkpoints are around the blocks of a stage, not the stage
    attach_weak_head(timm_model, 6, (32, 32))
    timm_model.train().gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="timm_model.layer3.N"):
        timm_model(torch.rand(2, 3, 32, 32))
    timm_model, _ = tiny("timm_resnet")
    attach_weak_head(timm_model, 6, (32, 32), feature_module="timm_model.layer3.0")
    timm_model.train().gradient_checkpointing_enable()
    assert gradients(timm_model, torch.rand(2, 3, 32, 32))["kd_head.fc.weight"].any()


def test_a_copy_has_a_head_of_its_own():
    model, _ = tiny("vit")
    attach_weak_head(model, 6, (32, 32))
    values = torch.rand(2, 3, 32, 32)
    before = model(values).weak_logits
    other = copy.deepcopy(model)
    nn.init.constant_(other.kd_head.fc.weight, 0.0)
    nn.init.constant_(other.kd_head.fc.bias, 7.0)
    assert (other(values).weak_logits == 7).all()
    assert torch.equal(model(values).weak_logits, before)


def test_a_half_precision_student_gets_a_head_of_its_type():
    model = ViTForImageClassification(
        ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32)
    ).bfloat16()
    attach_weak_head(model, 2, (32, 32))
    assert model(torch.rand(1, 3, 32, 32, dtype=torch.bfloat16)).weak_logits.dtype is torch.bfloat16
