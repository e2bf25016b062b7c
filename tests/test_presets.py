"""Settings that nobody gave: chosen by the student's kind, and never over what was given."""

import pytest
from tiny import KINDS, tiny, tiny_config

from hf_kd import presets
from hf_kd.arguments import parse
from hf_kd.losses import LOSSES


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_is_seen_in_the_model_and_in_the_config_alone(kind):
    expected = "vit" if kind in ("vit", "deit", "timm_vit") else "cnn"
    assert presets.kind_of(tiny_config(kind)) == expected
    assert presets.kind_of(tiny(kind)[0]) == expected


@pytest.mark.parametrize(
    ("kind", "scratch", "data", "name"),
    [
        ("vit", False, "uoft-cs/cifar100", "vit_finetune"),
        ("vit", True, "uoft-cs/cifar100", "vit_scratch"),
        ("cnn", True, "imagenet-1k", "cnn_scratch"),
        ("cnn", True, "uoft-cs/cifar100", "cnn_scratch_cifar"),
        ("cnn", False, "uoft-cs/cifar100", "cnn_finetune"),
    ],
)
def test_choice(kind, scratch, data, name):
    assert presets.choose(kind, scratch, data) == name


@pytest.mark.parametrize("name", presets.PRESETS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_preset_makes_a_valid_run_of_every_loss(name, loss):
    script, config = parse(["--student", "x", "--teacher", "y", "--loss", loss, "--use_cpu", "--compare", loss])
    config = presets.apply(name, config, script.given)
    preset = presets.PRESETS[name]
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == preset.batch
    for key, value in preset.values.items():
        got = getattr(config, key)
        assert getattr(got, "value", got) == value, key
    (_, arm), *_ = script.arms(config, name)
    assert arm.build_loss().numbers()["label_smoothing"] == preset.values.get("label_smoothing_factor", 0.0)


def test_the_papers_numbers():
    assert presets.loss_numbers("nkd", "vit_finetune") == ({"temperature": 1.0, "gamma": 1.0}, "imagenet_deit")
    assert presets.loss_numbers("nkd", "cnn_scratch")[0] == {"temperature": 1.0, "gamma": 1.5}
    assert presets.loss_numbers("nkd", "cnn_scratch_cifar")[0] == {"temperature": 3.0, "gamma": 3.5}
    assert presets.loss_numbers("uskd", "vit_scratch")[0] == {"alpha": 1.0, "beta": 0.1, "mu": 0.005}
    assert presets.loss_numbers("uskd", "cnn_scratch_cifar")[0] == {"alpha": 0.1, "beta": 0.1, "mu": 0.1}


def test_what_was_given_stays():
    argv = ["--student", "x", "--use_cpu", "--learning_rate=3e-4", "--per_device_train_batch_size", "8"]
    script, config = parse(argv)
    config = presets.apply("vit_finetune", config, script.given)
    assert (config.learning_rate, config.per_device_train_batch_size) == (3e-4, 8)
    assert config.gradient_accumulation_steps == 1 and config.mixup_alpha == 0.8


def test_a_shorter_run_keeps_the_shape_of_the_schedule():
    script, config = parse(["--student", "x", "--use_cpu", "--num_train_epochs", "10"])
    assert presets.apply("cnn_scratch", config, script.given).lr_step_epochs == pytest.approx([3, 6, 9])
    script, config = parse(["--student", "x", "--use_cpu", "--max_steps", "10"])
    config = presets.apply("cnn_scratch", config, script.given)
    assert config.lr_step_epochs is None and config.lr_scheduler_type == "cosine"


def test_a_config_file_is_a_recipe_of_its_own(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("student: x\nlearning_rate: 0.5\n")
    script, _ = parse(["--config", str(file), "--use_cpu"])
    assert script.preset == "none"
    script, config = parse(["--config", str(file), "--use_cpu", "--preset", "cnn_scratch"])
    config = presets.apply(script.preset, config, script.given)
    assert config.learning_rate == 0.5 and config.weight_decay == 1e-4
