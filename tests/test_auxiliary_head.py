"""The auxiliary head, where it taps and what it does, against the plain models themselves."""

import copy

import pytest
import timm
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from student_helpers import NAMES, check_reopens, logits
from tiny import KINDS, tiny
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    SwinConfig,
    ViTConfig,
    ViTForImageClassification,
)

from hf_kd.models.auxiliary_head import StudentOutput, add_auxiliary_head
from hf_kd.models.features import HEAD, find_feature_layer
from hf_kd.models.forward import logits_of, tensor_of
from hf_kd.models.loading import build

# ---- where the auxiliary head taps ----


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
def test_the_aux_logits_are_a_linear_map_of_the_papers_feature(kind):
    model, _ = tiny(kind)
    plain = copy.deepcopy(model)
    head = add_auxiliary_head(model, 6, (32, 32))
    values = torch.rand(3, 3, 32, 32)
    output = model(values)
    expected = features_of(plain, values) @ head.weight.T + head.bias
    torch.testing.assert_close(output.aux_logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.logits, logits(plain, values))
    layer = {
        "vit": "vit.layers.1",
        "deit": "deit.layers.1",
        "resnet": "resnet.encoder.stages.2",
        "timm_resnet": "timm_model.layer3",
        "timm_vit": "timm_model.blocks.1",
    }[kind]
    assert head.layer.name == layer


def test_swin_is_read_featureped_before_patch_merging():
    config = SwinConfig(
        embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1] * 4, image_size=32, patch_size=2, window_size=2
    )
    model = build(config).eval()
    layer = find_feature_layer(model, (32, 32))
    seen = {}
    model.swin.encoder.layers[2].downsample.register_forward_pre_hook(lambda m, args: seen.update(stage=args[0]))
    model.get_submodule(layer.name).register_forward_hook(lambda m, a, out: seen.update(layer=tensor_of(out)))
    logits(model, torch.rand(2, 3, 32, 32))
    assert (layer.pooling, layer.channels) == ("mean_token", 32)
    torch.testing.assert_close(seen["layer"], seen["stage"])


@pytest.mark.parametrize(
    ("architecture", "size", "layer"),
    [
        ("test_convnext", 64, ("stages.2", 48, "nchw")),
        ("test_efficientnet", 64, ("blocks.3", 48, "nchw")),
        ("test_mambaout", 64, ("stages.2", 48, "nhwc")),
        ("test_vit3", 160, ("blocks.3", 96, "mean_token")),  # a register, and no class token
        ("xcit_nano_12_p16_224", 64, ("blocks.5", 128, "mean_token")),  # the class token joins the patches after them
    ],
)
def test_layers_of_small_images_and_of_maps_with_channels_last(architecture, size, layer):
    found = find_feature_layer(timm.create_model(architecture), (size, size))
    assert (found.name, found.channels, found.pooling) == layer


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


def test_a_model_of_no_known_family_is_traced_too():
    assert find_feature_layer(Unknown(), (32, 32)).name == "body.1"
    with pytest.raises(ValueError, match=r"no module named 'body\.9' gives one.*feature_module.*body \(16 × 4 × 4"):
        add_auxiliary_head(Unknown(), 6, (32, 32), feature_module="body.9")
    model, values = Unknown(), torch.rand(2, 3, 32, 32)
    head = add_auxiliary_head(model, 6, (32, 32), feature_module="body.0")
    torch.testing.assert_close(model(values).aux_logits, head(model.body[0](model.stem(values)).mean((2, 3))))


def test_feature_module_overrides_the_rule():
    model, _ = tiny("resnet")
    head = add_auxiliary_head(model, 6, (32, 32), feature_module="resnet.encoder.stages.1")
    values = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        state = model(values, output_hidden_states=True).hidden_states[-3].mean((2, 3))
    torch.testing.assert_close(model(values).aux_logits, head(state))


# ---- what the auxiliary head does ----


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_early_layers_and_the_head_only(kind):
    model, _ = tiny(kind)
    head = add_auxiliary_head(model, 6, (32, 32))
    model.train()(torch.rand(4, 3, 32, 32)).aux_logits.square().sum().backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    first = next(n for n, _ in model.named_parameters() if "proj" in n or "conv" in n)
    assert {first, f"{HEAD}.weight", f"{HEAD}.bias"} <= moved
    late = {
        "vit": "layers.2",
        "deit": "layers.2",
        "resnet": "stages.3",
        "timm_resnet": "layer4",
        "timm_vit": "blocks.2",
    }
    assert not any(late[kind] in n or "classifier" in n for n in moved)
    assert head is model.aux_head


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_the_model_is_the_plain_one(kind, tmp_path):
    model, processor = tiny(kind, names=NAMES)
    plain = copy.deepcopy(model)
    add_auxiliary_head(model, 3, (32, 32))
    values = torch.rand(2, 3, 32, 32)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            a, b = model.eval()(values), plain.eval()(values)
        assert type(a) is type(b) and a.keys() == b.keys()
        torch.testing.assert_close(a.logits, b.logits, rtol=1e-5, atol=1e-6)
    assert isinstance(model.train()(values), StudentOutput)
    model.save_pretrained(tmp_path)
    assert not any(HEAD in k for k in load_file(tmp_path / "model.safetensors"))
    check_reopens(model, processor, tmp_path / "again", NAMES)


def test_attaching_draws_no_random_numbers_and_is_reproducible():
    one, other = tiny("vit")[0], tiny("vit")[0]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    add_auxiliary_head(one, 6, (32, 32), seed=1)
    assert torch.equal(torch.rand(3), expected)
    add_auxiliary_head(other, 6, (32, 32), seed=1)
    assert torch.equal(one.aux_head.weight, other.aux_head.weight)
    assert one.training is False


def test_models_with_two_heads_work():
    config = DeiTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    model = DeiTForImageClassificationWithTeacher(config).train()
    add_auxiliary_head(model, 2, (32, 32))
    values = torch.rand(2, 3, 32, 32)
    output = model(values)
    with torch.no_grad():
        plain = model(values)
    torch.testing.assert_close(output.logits, logits_of(plain), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits_of(plain), (plain.cls_logits + plain.distillation_logits) / 2)
    assert output.aux_logits.shape == (2, 2)


def test_tuples_and_tensors_have_logits_too():
    model, _ = tiny("vit")
    values = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(values).logits
        torch.testing.assert_close(logits_of(model(values, return_dict=False)), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits_of(expected), expected)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_compiled_models_give_the_same_in_one_graph(kind):
    model, _ = tiny(kind)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    add_auxiliary_head(model, 6, (32, 32))
    values = torch.rand(2, 3, 32, 32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    a, b = model(values), compiled(values)
    torch.testing.assert_close(b.aux_logits, a.aux_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(b.logits, a.logits, rtol=1e-4, atol=1e-5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = [torch.autograd.grad(o.aux_logits.square().sum(), parameters, allow_unused=True) for o in (a, b)]
    for x, y in zip(*grads, strict=True):
        x, y = (torch.zeros(()) if g is None or not g.any() else g for g in (x, y))
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        assert "aux_logits" not in compiled(values)
    torch._dynamo.reset()


def gradients(model, values):
    model.zero_grad()
    output = model(values)
    (output.logits.square().sum() + output.aux_logits.square().sum()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["vit", "deit", "timm_vit"])
def test_activation_checkpointing_changes_nothing(kind, reentrant):
    """From transformers 5.23 on hooks run outside the checkpoint: either way works. timm has its own default."""
    model, _ = tiny(kind)
    add_auxiliary_head(model, 6, (32, 32))
    values = torch.rand(2, 3, 32, 32)
    expected = gradients(model.train(), values)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant and kind != "timm_vit" and Version(transformers.__version__) < Version("5.23"):
        with pytest.raises(RuntimeError, match="use_reentrant"):
            gradients(model, values)
        return
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
    add_auxiliary_head(model, 6, (32, 32), feature_module="body.0")
    with pytest.raises(RuntimeError, match="body.0.*use_reentrant"):
        model(torch.rand(2, 3, 32, 32))
    model.reentrant = False
    assert gradients(model, torch.rand(2, 3, 32, 32))["aux_head.weight"].any()
    copy.deepcopy(model)


@pytest.mark.parametrize("architecture", ["resnet26", "test_efficientnet", "mobilenetv3_small_050", "test_vit"])
def test_checkpointed_stages_of_timm_are_read_at_their_last_block(architecture):
    """timm checkpoints the blocks of a stage (ResNet), or of all stages (EfficientNet), and passes the stage by."""
    model = timm.create_model(architecture, num_classes=6).eval()  # batch norm would count twice
    size = model.default_cfg["input_size"][1:]
    values = torch.rand(2, 3, *size)
    add_auxiliary_head(model, 6, size)
    expected = gradients(model, values)
    model.set_grad_checkpointing()
    found = gradients(model.train(), values) if architecture == "test_vit" else gradients(model, values)
    assert found.keys() == expected.keys() and expected["aux_head.weight"].any()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_a_copy_has_a_head_of_its_own():
    model, _ = tiny("vit")
    add_auxiliary_head(model, 6, (32, 32))
    values = torch.rand(2, 3, 32, 32)
    before = model(values).aux_logits
    other = copy.deepcopy(model)
    nn.init.constant_(other.aux_head.weight, 0.0)
    nn.init.constant_(other.aux_head.bias, 7.0)
    assert (other(values).aux_logits == 7).all()
    assert torch.equal(model(values).aux_logits, before)


def test_a_half_precision_student_gets_a_head_of_its_type():
    model = ViTForImageClassification(
        ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32)
    ).bfloat16()
    add_auxiliary_head(model, 2, (32, 32))
    assert model(torch.rand(1, 3, 32, 32, dtype=torch.bfloat16)).aux_logits.dtype is torch.bfloat16
