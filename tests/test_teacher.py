"""The teacher against the plain model with its own processor."""

import contextlib
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import KINDS, tiny
from torch import nn
from transformers import BitImageProcessor, DeiTConfig, DeiTForImageClassificationWithTeacher, ViTImageProcessor
from transformers.integrations import deepspeed

from hf_kd import Teacher, load_student, load_teacher
from hf_kd.losses import nkd_loss

NAMES = ["tabby cat", "fire truck", "daisy", "great white shark", "golf ball", "moped"]


def make_images(n=4, height=50, width=70, seed=0):
    return [
        Image.fromarray(np.random.default_rng(seed + i).integers(0, 256, (height, width, 3), np.uint8))
        for i in range(n)
    ]


def pixels_of(batch):
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in batch])


def own_logits(model, processor, batch):
    """The model alone, as transformers' own documentation runs it."""
    values = torch.as_tensor(processor(images=batch, return_tensors="pt")["pixel_values"])
    with torch.no_grad():
        return model.eval()(values).logits


def save(folder, kind="vit", names=NAMES, **kwargs):
    model, processor = tiny(kind, names=names, **kwargs)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


# ---- the same as the teacher alone ----


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_teacher_alone(kind, tmp_path):
    """Another size (48) than the student's, its own statistics, and a crop: none of it is the data side's business."""
    model, processor = save(tmp_path, kind, size=48)
    teacher = load_teacher(str(tmp_path))
    batch = make_images()
    expected = own_logits(model, processor, batch)
    pixels = pixels_of(batch)
    for given in (pixels, pixels.float() / 255):
        torch.testing.assert_close(teacher(given), expected, rtol=0, atol=1e-4)
    frames = teacher.preprocessing.resize_and_crop(list(pixels))
    torch.testing.assert_close(teacher(frames, cropped=True), expected, rtol=0, atol=1e-4)
    assert teacher.name == str(tmp_path) and teacher.id2label == dict(enumerate(NAMES))


def test_half_mean_and_a_crop_are_the_teachers_own():
    model, _ = tiny("resnet", names=NAMES)
    processor = BitImageProcessor(
        size={"shortest_edge": 56}, crop_size={"height": 48, "width": 48}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    batch = make_images()
    logits = load_teacher(model, processor=processor)(pixels_of(batch))
    torch.testing.assert_close(logits, own_logits(model, processor, batch), rtol=0, atol=1e-4)
    imagenet = BitImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 48, "width": 48})
    assert (logits - own_logits(model, imagenet, batch)).abs().max() > 1e-2  # it would have been noticed


def test_a_distilled_teacher_has_logits():
    config = DeiTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    model = DeiTForImageClassificationWithTeacher(config)
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    batch = make_images()
    expected = own_logits(model, processor, batch)
    torch.testing.assert_close(load_teacher(model, processor=processor)(pixels_of(batch)), expected)


def test_timms_own_modules_and_exports_teach(tmp_path):
    own = timm.create_model("resnet18", num_classes=6, layers=[1, 1, 1, 1], channels=[8, 16, 24, 32]).eval()
    with torch.no_grad():
        for module in own.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.running_mean.normal_()
    _, processor = tiny("timm_resnet")
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = own(torch.as_tensor((pixels - torch.tensor([0.5, 0.45, 0.4]).view(3, 1, 1)) / torch.tensor(
            [0.25, 0.24, 0.23]).view(3, 1, 1)))  # fmt: skip
    raw = load_teacher(own, processor=processor)
    torch.testing.assert_close(raw(pixels, cropped=True), expected, rtol=0, atol=1e-4)
    timm.models.save_for_hf(own, tmp_path, model_config={"label_names": NAMES}, safe_serialization=True)
    exported = load_teacher(tmp_path, processor=processor, id2label=NAMES[::-1])
    torch.testing.assert_close(exported(pixels, cropped=True), expected.flip(1), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="LABEL_0"):  # a bare module names no classes
        raw.aligned(NAMES)
    raw = raw.aligned(NAMES, "by_index")
    torch.testing.assert_close(raw(pixels, cropped=True), expected, rtol=0, atol=1e-4)


# ---- whose class is whose ----

ORDER = [4, 2, 0, 5, 1, 3]


def test_a_teacher_whose_classes_are_permuted_teaches_the_same():
    """The same network with its output rows and names shuffled: same logits, so same loss, in the student's order."""
    model, processor = tiny("vit", names=NAMES)
    shuffled, _ = tiny("vit", names=[NAMES[i] for i in ORDER])
    shuffled.load_state_dict(model.state_dict())
    with torch.no_grad():
        shuffled.classifier.weight.copy_(model.classifier.weight[ORDER])
        shuffled.classifier.bias.copy_(model.classifier.bias[ORDER])
    pixels, labels = pixels_of(make_images()), torch.tensor([0, 3, 5, 1])
    student = torch.randn(4, 6)
    one, other = (load_teacher(m, id2label=NAMES, processor=processor) for m in (model, shuffled))
    torch.testing.assert_close(one(pixels), other(pixels))
    losses = [sum(nkd_loss(student, t(pixels), labels).values()) for t in (one, other)]
    torch.testing.assert_close(*losses)
    unaligned = load_teacher(shuffled, processor=processor)
    assert (unaligned(pixels) - one(pixels)).abs().max() > 1e-2
    torch.testing.assert_close(unaligned.aligned(NAMES)(pixels), one(pixels))


class Reordered(nn.Module):
    """Another network's outputs in another order; to the last bit, which permuted weights do not give."""

    def __init__(self, model, order):
        super().__init__()
        self.model, self.order = model, order

    def forward(self, pixel_values):
        return self.model(pixel_values).logits[:, self.order]


def test_a_teacher_whose_classes_stand_in_another_order_equals_the_plain_one():
    model, processor = tiny("vit", names=NAMES)
    names = [NAMES[i] for i in ORDER]
    other = load_teacher(Reordered(model, ORDER), id2label=NAMES, processor=processor, class_names=names)
    pixels = pixels_of(make_images())
    assert torch.equal(other(pixels), load_teacher(model, id2label=NAMES, processor=processor)(pixels))


def test_a_class_map_is_kept_for_later():
    module, processor = tiny("vit", names=NAMES)
    other = [f"other {i}" for i in range(6)]
    for class_map, expected in (("by_index", [0, 1, 2, 3, 4, 5]), ([5, 4, 3, 2, 1, 0], [5, 4, 3, 2, 1, 0])):
        teacher = load_teacher(module, processor=processor, class_map=class_map)
        assert teacher.aligned(other).mapping.rows == expected
        assert teacher.mapping.kind == "identity"  # as long as there is nothing to map to


def test_another_order_starts_from_the_models_own_and_leaves_the_first_teacher_alone():
    model, processor = tiny("vit", names=NAMES)
    teacher = load_teacher(model, processor=processor)
    pixels = pixels_of(make_images())
    plain = teacher(pixels)
    for order in (ORDER, ORDER[::-1], list(range(6))):
        other = load_teacher(teacher, id2label={i: NAMES[j] for i, j in enumerate(order)})
        assert other is not teacher and other.model is teacher.model is model
        assert torch.equal(other(pixels), plain[:, order]) and torch.equal(teacher(pixels), plain)
        assert other.id2label == {i: NAMES[j] for i, j in enumerate(order)}
    mapped = other.aligned(NAMES, class_map=ORDER)  # a map counts even where the names are the same
    assert torch.equal(mapped(pixels), plain[:, ORDER])
    assert torch.equal(mapped.aligned(NAMES)(pixels), plain[:, ORDER])  # what the trainer does: the map stays
    assert torch.equal(mapped.aligned(dtype=torch.float32)(pixels), plain[:, ORDER])


def test_a_teacher_of_more_classes_gives_the_images_logits_of_those_that_are_asked_for():
    model, processor = tiny("vit", names=NAMES)
    batch = make_images()
    expected = own_logits(model, processor, batch).double().log_softmax(1)[:, [4, 0, 2]]
    teacher = load_teacher(model, id2label=["golf_ball", "Tabby cat", "daisy"], processor=processor)
    logits = teacher(pixels_of(batch))
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-5)
    dropped = teacher.mapping.dropped_mass(logits)
    torch.testing.assert_close(dropped.double(), 1 - expected.exp().sum(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("map_arguments", [{"id2label": NAMES[::-1]}, {}])
def test_a_plain_module_needs_its_names_statistics_and_size_and_no_more(map_arguments):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 5, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6))
    statistics = {"image_size": 24, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    teacher = load_teacher(module, class_names=NAMES, **statistics, **map_arguments)
    pixels = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    mean, std = (torch.tensor(statistics[k]).view(3, 1, 1) for k in ("image_mean", "image_std"))
    expected = module((pixels / 255 - mean) / std).detach()
    expected = expected.flip(1) if map_arguments else expected
    torch.testing.assert_close(teacher(pixels), expected, rtol=0, atol=1e-5)
    for missing in statistics:
        with pytest.raises(ValueError, match="processor=.*image_size=, image_mean= and image_std="):
            load_teacher(module, class_names=NAMES, **{k: v for k, v in statistics.items() if k != missing})
    with pytest.raises(ValueError, match="names 5 classes and gives 6 logits"):
        load_teacher(module, class_names=NAMES[:5], **statistics)


def test_a_head_that_is_not_the_configs_is_refused_at_load():
    model, processor = tiny("vit", names=NAMES)
    model.classifier = nn.Linear(32, 9)
    with pytest.raises(ValueError, match="names 6 classes and gives 9 logits"):
        load_teacher(model, processor=processor)


class FakeConfig:
    """What transformers keeps of DeepSpeed's configuration: a weak reference to an object with these."""

    def __init__(self, config):
        self.config = dict(config)
        deepspeed.set_hf_deepspeed_config(self)

    def is_zero3(self):
        return self.config["stage"] == 3


@pytest.mark.parametrize("fails", [False, True])
def test_under_zero3_models_are_loaded_whole_and_its_state_is_restored(fails, tmp_path, monkeypatch):
    save(tmp_path)
    if fails:
        (tmp_path / "model.safetensors").unlink()
    monkeypatch.setattr(deepspeed, "HfDeepSpeedConfig", FakeConfig)
    held = FakeConfig({"stage": 3})
    try:
        with pytest.raises(OSError) if fails else contextlib.nullcontext():  # else ModuleNotFoundError: deepspeed
            load_teacher(tmp_path)
        assert deepspeed.is_deepspeed_zero3_enabled()
        assert deepspeed.deepspeed_config() is held.config
    finally:
        deepspeed.unset_hf_deepspeed_config()


# ---- weights ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_a_head_that_would_be_random_is_refused_by_name(kind, fault, tmp_path):
    save(tmp_path, kind)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    head = next(k for k in state if k.endswith("weight") and len(state[k]) == 6 and state[k].ndim == 2)
    state[head] = torch.zeros(9, state[head].shape[1])
    if fault == "missing":
        del state[head]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 weights are missing.*{head.replace('.', '[.]')}"):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"x" * 1000, b"version https://git-lfs.github.com/spec/v1\n", None])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(("load", "role"), [(load_teacher, "teacher"), (load_student, "student")])
def test_weights_that_cannot_be_read_are_named_with_the_option(load, role, file, content, tmp_path):
    save(tmp_path)
    if content is None:
        content = (tmp_path / "model.safetensors").read_bytes()[:5000]
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / file).write_bytes(content)
    message = rf"the weights of {role} {tmp_path} cannot be read .*another --{role}\."
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_config_with_another_count_of_classes_is_refused(tmp_path):
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"], config["label2id"] = {"0": "a", "1": "b"}, {"a": 0, "b": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="2 weights are missing.*classifier.bias.*classifier.weight"):
        load_teacher(str(tmp_path))


def test_counts_of_batches_may_be_missing(tmp_path):
    """Old checkpoints have no num_batches_tracked, which evaluation does not use."""
    model, processor = save(tmp_path, "timm_resnet")
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "num_batches" not in k}, file, {"format": "pt"})
    batch = make_images()
    torch.testing.assert_close(load_teacher(tmp_path)(pixels_of(batch)), own_logits(model, processor, batch))


@pytest.mark.parametrize("model", ["./nope", "/nope/model", "~/nope", "outputs/x/y"])
def test_a_folder_that_is_not_there_is_called_so(model):
    with pytest.raises(ValueError, match="no such folder"):
        load_teacher(model)


def test_a_module_needs_its_processor():
    with pytest.raises(ValueError, match="processor"):
        load_teacher(tiny("vit")[0])


# ---- frozen ----


class Wrapper(nn.Module):
    def __init__(self, teacher):
        super().__init__()
        self.teacher = teacher


@pytest.mark.parametrize("kind", ["resnet", "timm_resnet", "vit"])
def test_nothing_in_the_teacher_ever_changes(kind):
    model, processor = tiny(kind, names=NAMES)
    model.train()
    teacher = Teacher(model, processor, NAMES)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    assert not any(m.training for m in teacher.modules())
    wrapper = Wrapper(teacher).train()
    teacher.train()
    assert not any(m.training for m in teacher.modules()) and wrapper.training
    pixels = torch.rand(4, 3, 40, 40, requires_grad=True)
    output = teacher(pixels, cropped=True)
    assert not output.requires_grad and output.grad_fn is None
    assert not any(p.requires_grad for p in wrapper.parameters())
    again = teacher(pixels, cropped=True)
    assert torch.equal(output, again)  # no dropout, no batch statistics
    after = teacher.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert "index" not in after  # not part of what is saved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_compute_type_is_used_under_autocast_and_logits_are_float32(dtype):
    model, processor = tiny("vit", names=NAMES)
    seen = []
    pixels = pixels_of(make_images())
    teachers = [load_teacher(model, processor=processor, dtype=d) for d in (None, dtype)]
    model.vit.layers[0].mlp.fc1.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    exact, low = (teacher(pixels) for teacher in teachers)
    assert seen == [torch.float32, dtype]
    assert low.dtype is torch.float32 and {p.dtype for p in model.parameters()} == {torch.float32}
    assert not torch.equal(low, exact)
    torch.testing.assert_close(low, exact, rtol=0.05, atol=0.02)


def test_without_a_compute_type_an_autocast_around_it_does_not_reach_the_teacher():
    model, processor = tiny("vit", names=NAMES)
    teacher = load_teacher(model, processor=processor)
    pixels = pixels_of(make_images())
    expected = teacher(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher(pixels), expected)


def test_weights_of_lower_precision_are_used_as_they_are(tmp_path):
    model, processor = tiny("vit", names=NAMES)
    model.bfloat16().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path)
    logits = teacher(pixels_of(make_images()))
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16} and logits.dtype is torch.float32
    exact = teacher.aligned(dtype=torch.float32)  # a copy
    assert {p.dtype for p in exact.parameters()} == {torch.float32}
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    assert torch.equal(teacher(pixels_of(make_images())), logits)
