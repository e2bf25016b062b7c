"""Loading students, against the plain models themselves."""

import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from student_helpers import NAMES, check_reopens, image, logits
from tiny import KINDS, MEAN, STD, tiny, tiny_config
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    EfficientNetImageProcessor,
    MobileNetV1Config,
    MobileNetV2Config,
    MobileViTImageProcessor,
    ViTImageProcessor,
)

from hf_kd import Preprocessing, load_student
from hf_kd.labels import label_maps
from hf_kd.models.loading import build


def saved(folder, kind, **kwargs):
    """A tiny model with its processor in a folder, as transformers writes it."""
    model, processor = tiny(kind, **kwargs)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


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
    values = torch.as_tensor(own(images=[image()], return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(logits(student, values), logits(old, values))
    check_reopens(student, processor, tmp_path / "new", NAMES)


@pytest.mark.parametrize(
    ("config", "given", "used"),
    [(MobileNetV1Config, None, 0.001), (MobileNetV2Config, None, 0.2), (MobileNetV2Config, 0.3, 0.3)],
)
def test_a_dropout_that_is_the_probability_to_keep_is_corrected(tmp_path, caplog, config, given, used):
    options = {} if given is None else {"classifier_dropout_prob": given}
    config(image_size=32, **options).save_pretrained(tmp_path)
    arguments = {"from_scratch": True, "image_size": 32, "image_mean": MEAN, "image_std": STD, "id2label": NAMES}
    student, _ = load_student(tmp_path, **arguments)
    assert student.dropout.p == student.config.classifier_dropout_prob == used
    assert ("classifier_dropout_prob" in caplog.text) == (given is None)


@pytest.mark.parametrize("kind", KINDS)
def test_from_scratch_out_of_a_folder(kind, tmp_path):
    tiny_config(kind).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD).save_pretrained(tmp_path)
    torch.manual_seed(0)
    one, processor = load_student(str(tmp_path), id2label=NAMES, from_scratch=True)
    other, _ = load_student(str(tmp_path), id2label=NAMES, from_scratch=True)
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert Preprocessing(processor).size == (32, 32)
    check_reopens(one, processor, tmp_path / "new", NAMES)


@pytest.mark.parametrize(("name", "size"), [("timm/resnet18", 64), ("timm/vit_tiny_patch16_224", 32)])
def test_from_scratch_out_of_timm(name, size, tmp_path):
    student, processor = load_student(
        name, NAMES, from_scratch=True, image_size=size, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.21, 0.22]
    )
    expected = (torch.from_numpy(np.array(image(size, size))).permute(2, 0, 1).double() / 255).numpy()
    expected = (expected - np.array([0.5, 0.4, 0.3])[:, None, None]) / np.array([0.2, 0.21, 0.22])[:, None, None]
    own = processor(images=[image(size, size)], return_tensors="pt")["pixel_values"][0]
    np.testing.assert_allclose(own.numpy(), expected, atol=1e-5)
    assert student.config.id2label == dict(enumerate(NAMES))
    check_reopens(student, processor, tmp_path, NAMES)
    assert Preprocessing(AutoImageProcessor.from_pretrained(tmp_path)) == Preprocessing(processor)
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
    with pytest.raises(ValueError, match=r"does not accept images as tensors \(3, 48, 48\).*image_size="):
        load_student(str(tmp_path), id2label=NAMES, image_size=48)
    load_student(str(tmp_path), id2label=NAMES, image_size=32)


@pytest.mark.parametrize("kind", KINDS)
def test_image_size_from_scratch_and_for_pretrained_cnns(kind, tmp_path):
    saved(tmp_path / "old", kind)
    scratch = "resnet" not in kind
    student, processor = load_student(str(tmp_path / "old"), NAMES, image_size=48, from_scratch=scratch)
    preprocessing = Preprocessing(processor)
    assert preprocessing.size == (48, 48)
    torch.testing.assert_close(
        -preprocessing.offset.flatten() / preprocessing.scale.flatten(), torch.tensor(MEAN)
    )  # kept
    torch.testing.assert_close(1 / preprocessing.scale.flatten(), torch.tensor(STD))
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
    a, b = (torch.as_tensor(p(images=[image()], return_tensors="pt")["pixel_values"]) for p in (processor, expected))
    torch.testing.assert_close(a, b)
    assert own.image_mean != processor.image_mean


def test_another_size_keeps_statistics_that_are_composed_of_several_attributes():
    model, _ = tiny("resnet")
    settings = {"include_top": True, "image_mean": [0.2] * 3, "image_std": [0.4, 0.5, 0.6]}
    settings |= {"rescale_offset": True, "rescale_factor": 1 / 127.5}
    own = EfficientNetImageProcessor(size={"height": 32, "width": 32}, **settings)
    _, processor = load_student(model, processor=own, image_size=48)
    expected = EfficientNetImageProcessor(size={"height": 48, "width": 48}, **settings)
    a, b = (torch.as_tensor(p(images=[image()], return_tensors="pt")["pixel_values"]) for p in (processor, expected))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="swaps"):
        load_student(model, processor=MobileViTImageProcessor(), image_size=48)


def test_a_folder_without_a_processor_gets_a_stated_default(tmp_path, monkeypatch):
    tiny("vit")[0].save_pretrained(tmp_path)
    said = []
    monkeypatch.setattr("hf_kd.models.loading.logger.warning", said.append)
    _, processor = load_student(str(tmp_path))
    assert len(said) == 1 and "no image processor" in said[0]
    assert Preprocessing(processor).size == (32, 32)
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


# ---- the rows of a pretrained head ----

SIX = [f"class {i}" for i in range(6)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [[4, 2, 0, 5, 1, 3], [5, 1]])
def test_a_head_is_put_in_the_order_of_the_data(kind, order, tmp_path):
    """Every name the model knows keeps its row, from a folder and as a module."""
    old, own = saved(tmp_path / "old", kind)
    names = [f"Class_{i}" for i in order]
    values = torch.as_tensor(own(images=[image()], return_tensors="pt")["pixel_values"])
    expected = logits(old, values)[:, order]
    student, processor = load_student(tmp_path / "old", id2label=names)
    torch.testing.assert_close(logits(student, values), expected)
    check_reopens(student, processor, tmp_path / "new", names)
    assert load_student(old, id2label=names, processor=own)[0] is old
    torch.testing.assert_close(logits(old, values), expected)
    assert old.config.num_labels == len(order) and all(p.requires_grad for p in old.parameters())


def test_both_heads_of_a_distilled_model_are_put_in_order(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = DeiTConfig(**sizes, image_size=32, patch_size=8, **label_maps(SIX))
    old, processor = DeiTForImageClassificationWithTeacher(config).eval(), tiny("deit")[1]
    old.save_pretrained(tmp_path / "deit")
    processor.save_pretrained(tmp_path / "deit")
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    config = tiny_config("timm_vit", names=SIX)
    config.architecture, config.model_args = "deit_tiny_distilled_patch16_224", arguments
    build(config).save_pretrained(tmp_path / "timm")
    values = torch.rand(2, 3, 32, 32)
    for folder, heads in (("deit", ["cls_classifier", "distillation_classifier"]), ("timm", ["head", "head_dist"])):
        before, _ = load_student(tmp_path / folder)
        after, _ = load_student(tmp_path / folder, id2label=SIX[::-1])
        torch.testing.assert_close(logits(after, values), logits(before, values).flip(1))
        for head in heads:
            rows = [getattr(getattr(model, "timm_model", model), head).weight for model in (before, after)]
            assert torch.equal(rows[1], rows[0].flip(0)), head


def test_new_names_take_the_rows_that_are_left(tmp_path, monkeypatch):
    old, own = saved(tmp_path, "vit")
    warned = []
    monkeypatch.setattr("hf_kd.models.student.logger.warning", warned.append)
    student, _ = load_student(tmp_path, id2label=["class 3", "x", "class 0", "y", "class 5", "class 4"])
    assert torch.equal(student.classifier.weight, old.classifier.weight[[3, 1, 0, 2, 5, 4]])
    assert len(warned) == 1 and "2 of the 6 classes" in warned[0]
    load_student(tmp_path, id2label=SIX[::-1])
    load_student(tmp_path, id2label=["x", "y"])
    assert len(warned) == 1


def test_rows_without_names_keep_their_places(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_kd.models.student.logger.warning", pytest.fail)
    old, _ = saved(tmp_path, "vit", names=[f"LABEL_{i}" for i in range(3)])
    student, _ = load_student(tmp_path, id2label=NAMES)
    assert torch.equal(student.classifier.weight, old.classifier.weight)


def test_a_head_that_is_no_linear_layer_is_refused():
    model, processor = tiny("vit")
    model.classifier = torch.nn.Sequential(model.classifier, torch.nn.BatchNorm1d(6))
    model.classifier[1].bias.data = torch.arange(6.0)
    with pytest.raises(ValueError, match="cannot be put in the order"):
        load_student(model, id2label=SIX[::-1], processor=processor)


def test_a_head_of_another_width_than_the_names_is_refused(tmp_path):
    model, processor = saved(tmp_path, "vit")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for names in (None, ["b", "a"], NAMES):
        with pytest.raises(ValueError, match="names 2 classes, its head has 6"):
            load_student(tmp_path, id2label=names)
    model.classifier = torch.nn.Linear(32, 9)
    for names in (None, SIX):
        with pytest.raises(ValueError, match="names 6 classes and gives 9 logits"):
            load_student(model, id2label=names, processor=processor)


def test_a_module_with_its_size_and_statistics_needs_no_processor():
    student, processor = load_student(tiny("vit")[0], image_size=32, image_mean=MEAN, image_std=STD)
    assert Preprocessing(processor) == Preprocessing(
        ViTImageProcessor(size={"height": 32, "width": 32}, resample=3, image_mean=MEAN, image_std=STD)
    )
