"""Settings that nobody gave: chosen by the student's kind, and never over what was given."""

import pytest
from tiny import KINDS, tiny, tiny_config
from transformers import RegNetConfig, TimmWrapperConfig

from hf_kd import recipes
from hf_kd.cli.arguments import parse
from hf_kd.losses import LOSSES
from hf_kd.models.loading import model_family


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_is_seen_in_the_model_and_in_the_config_alone(kind):
    expected = "vit" if kind in ("vit", "deit", "timm_vit") else "cnn"
    assert model_family(tiny_config(kind)) == expected
    assert model_family(tiny(kind)[0]) == expected


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
    assert recipes.choose(kind, scratch, data) == name


@pytest.mark.parametrize("name", recipes.PRESETS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_preset_makes_a_valid_run_of_every_loss(name, loss):
    script, config = parse(["--student", "x", "--teacher", "y", "--loss", loss, "--use_cpu", "--compare", loss])
    config, _ = recipes.apply(name, config, script.given)
    preset = recipes.PRESETS[name]
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == preset.batch
    for key, value in preset.values.items():
        got = getattr(config, key)
        assert getattr(got, "value", got) == value, key
    (_, arm), *_ = script.arms(config, name)
    assert arm.build_loss().hyperparameters()["label_smoothing"] == preset.values.get("label_smoothing_factor", 0.0)


def test_the_papers_numbers():
    assert recipes.published_hyperparameters("nkd", "vit_finetune") == (
        {"temperature": 1.0, "gamma": 1.0},
        "imagenet_deit",
    )
    assert recipes.published_hyperparameters("nkd", "cnn_scratch")[0] == {"temperature": 1.0, "gamma": 1.5}
    assert recipes.published_hyperparameters("nkd", "cnn_scratch_cifar")[0] == {"temperature": 3.0, "gamma": 3.5}
    assert recipes.published_hyperparameters("uskd", "vit_scratch")[0] == {"alpha": 1.0, "beta": 0.1, "mu": 0.005}
    assert recipes.published_hyperparameters("uskd", "cnn_scratch_cifar")[0] == {"alpha": 0.1, "beta": 0.1, "mu": 0.1}


def test_what_was_given_stays():
    argv = ["--student", "x", "--use_cpu", "--learning_rate=3e-4", "--per_device_train_batch_size", "8"]
    script, config = parse(argv)
    config, changed = recipes.apply("vit_finetune", config, script.given)
    assert (config.learning_rate, config.per_device_train_batch_size) == (3e-4, 8)
    assert config.gradient_accumulation_steps == 16 and config.mixup_alpha == 0.8  # in all the preset's batch
    assert changed == ["learning_rate", "per_device_train_batch_size"]


def test_a_shorter_run_keeps_the_shape_of_the_schedule():
    script, config = parse(["--student", "x", "--use_cpu", "--num_train_epochs", "10"])
    assert recipes.apply("cnn_scratch", config, script.given)[0].lr_step_epochs == pytest.approx([3, 6, 9])
    script, config = parse(["--student", "x", "--use_cpu", "--max_steps", "10"])
    config, _ = recipes.apply("cnn_scratch", config, script.given)
    assert config.lr_step_epochs is None and config.lr_scheduler_type == "cosine"


def test_settings_that_do_not_go_with_the_preset_s_others():
    script, config = parse(["--student", "x", "--use_cpu", "--lr_step_epochs", "10", "20"])
    config, _ = recipes.apply("cnn_finetune", config, script.given)
    assert config.lr_step_epochs == [10, 20] and config.warmup_steps == 0
    script, config = parse(["--student", "x", "--use_cpu", "--load_best_model_at_end", "true"])
    assert recipes.apply("vit_finetune", config, script.given)[0].load_best_model_at_end
    script, config = parse(["--student", "x", "--use_cpu", "--gradient_accumulation_steps", "2"])
    assert recipes.apply("vit_scratch", config, script.given)[0].per_device_train_batch_size == 512


@pytest.mark.parametrize("name", ["per_device_train_batch_size", "gradient_accumulation_steps"])
def test_a_batch_of_nothing_is_refused(name):
    script, config = parse(["--student", "x", "--use_cpu"])
    setattr(config, name, 0)
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        recipes.apply("vit_finetune", config, {name})


def test_the_printed_line_says_what_is_used():
    script, config = parse(["--student", "x", "--use_cpu", "--loss_kwargs", '{"alpha": 9}', "--eval_strategy", "no"])
    config, changed = recipes.apply("vit_finetune", config, script.given)
    line = recipes.describe("vit_finetune", changed, script.arms(config, "vit_finetune"))
    assert "uskd: beta 0.1, mu 0.005 (published for imagenet)" in line and "alpha" not in line
    assert "as you set them: eval_strategy, loss_kwargs" in line


@pytest.mark.parametrize(
    ("name", "expected"),
    [("repvgg_a0", "cnn"), ("resnet50_clip", "cnn"), ("seresnet18", "cnn"), ("swin_tiny_patch4_window7_224", "vit")],
)
def test_the_kind_of_what_has_attention_in_its_names_only(name, expected):
    assert model_family(TimmWrapperConfig(architecture=name)) == expected


def test_the_squeeze_and_excitation_of_regnet_is_no_attention():
    assert model_family(RegNetConfig(layer_type="y", architectures=["RegNetForImageClassification"])) == "cnn"


def test_a_config_file_is_a_recipe_of_its_own(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("student: x\nlearning_rate: 0.5\n")
    script, _ = parse(["--config", str(file), "--use_cpu"])
    assert script.preset == "none"
    file.write_text("student: x\nlearning_rate: 0.5\npreset: cnn_scratch\nload_best_model_at_end: true\n")
    script, config = parse(["--config", str(file), "--use_cpu"])
    config, _ = recipes.apply(script.preset, config, script.given)
    assert config.learning_rate == 0.5 and config.weight_decay == 1e-4
