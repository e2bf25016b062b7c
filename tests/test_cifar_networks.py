"""The networks of the literature for CIFAR-100: sizes, loading, saving, the feature layer, and opening elsewhere."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_kd import load_student
from hf_kd.models.auxiliary_head import add_auxiliary_head
from hf_kd.models.cifar_networks import NAMES
from hf_kd.models.loading import model_family
from hf_kd.recipes import choose

CLASSES = [f"class {i}" for i in range(100)]
MILLIONS = {  # with 100 classes, as the literature gives them
    "resnet20": 0.28, "resnet56": 0.86, "resnet110": 1.74, "resnet8x4": 1.23, "resnet32x4": 7.43, "wrn_16_2": 0.70,
    "wrn_40_1": 0.57, "wrn_40_2": 2.26, "vgg8": 3.97, "vgg13": 9.46,
}  # fmt: skip
# Of the layer that feeds USKD's auxiliary head: the last at the second-lowest resolution.
CHANNELS = {"resnet20": 32, "resnet8x4": 128, "wrn_16_2": 64, "vgg8": 256}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_shapes(name):
    student, processor = load_student(f"cifar/{name}", CLASSES, from_scratch=True)
    assert round(sum(p.numel() for p in student.parameters()) / 1e6, 2) == MILLIONS[name]
    assert student(torch.zeros(2, 3, 32, 32)).logits.shape == (2, 100) and processor.size["height"] == 32
    assert student.config.id2label[7] == "class 7" and choose(model_family(student.config), True, "x") == "cifar_crd"


@pytest.mark.parametrize("name", CHANNELS)
def test_the_feature_layer(name):
    student, _ = load_student(f"cifar/{name}", CLASSES, from_scratch=True)
    assert add_auxiliary_head(student, 100, (32, 32), None, 0).in_features == CHANNELS[name]


def test_saved_it_is_opened_here_and_where_hf_kd_is_not(tmp_path):
    torch.manual_seed(0)
    student, processor = load_student("cifar/wrn_16_2", CLASSES, from_scratch=True)
    student.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    images = torch.randn(2, 3, 32, 32)
    expected = student.eval()(images).logits
    again, other = load_student(tmp_path / "model", CLASSES)
    assert torch.equal(again.eval()(images).logits, expected) and other.image_mean == processor.image_mean
    torch.save((images, expected), tmp_path / "expected.pt")
    code = """
import sys, torch
sys.modules["hf_kd"] = None
from transformers import AutoModelForImageClassification
images, expected = torch.load("expected.pt")
model = AutoModelForImageClassification.from_pretrained("model", trust_remote_code=True).eval()
assert torch.equal(model(images).logits, expected)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path / "model")) is type(student)


def test_errors_say_what_to_type():
    with pytest.raises(ValueError, match=r"cifar/resnet20 has no trained weights: add --from_scratch"):
        load_student("cifar/resnet20", CLASSES)
    with pytest.raises(ValueError, match="architecture='resnet21' is unknown; there are: resnet20, resnet56"):
        load_student("cifar/resnet21", CLASSES, from_scratch=True)
