"""Settings that nobody gave: chosen by the student's kind, and never over what was given."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import yaml
from tiny import tiny, tiny_config
from transformers import RegNetConfig, TimmWrapperConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from hf_kd import recipes
from hf_kd.cli.arguments import parse
from hf_kd.config import DistillationConfig
from hf_kd.experiment.plan import plan
from hf_kd.experiment.variants import run_configs
from hf_kd.losses import LOSSES
from hf_kd.models.loading import model_family

CONFIGS = Path(__file__).resolve().parents[1] / "examples" / "configs"
LOSS_KWARGS = {key for loss in LOSSES.values() for key in inspect.signature(loss).parameters}
CIFAR = {
    "augment": "pad_crop",
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "learning_rate": 0.1,
    "weight_decay": 5e-4,
    "max_grad_norm": 0,
    "lr_scheduler_type": "constant",
    "lr_step_epochs": [60, 120, 160],
    "lr_step_factor": 0.2,
    "num_train_epochs": 200,
    "per_device_train_batch_size": 128,
    "gradient_accumulation_steps": 1,
    "eval_strategy": "epoch",
    "save_total_limit": 1,
    "seed": 0,
}
CIFAR_STUDENT = {
    "image_size": 128,
    "image_mean": [0.50707, 0.48655, 0.44092],
    "image_std": [0.26733, 0.25644, 0.27615],
    "from_scratch": True,
}
# What the files in examples/configs set in full before they named a recipe, and the hyperparameters of their losses.
SHIPPED = {
    "cifar100_resnet18_nkd": (CIFAR, CIFAR_STUDENT, {"nkd": {"temperature": 3.0, "gamma": 3.5}}),
    "cifar100_resnet18_uskd": (CIFAR, CIFAR_STUDENT, {"uskd": {"alpha": 0.1, "beta": 0.1, "mu": 0.1}}),
    "cifar100_resnet34_teacher": (CIFAR, CIFAR_STUDENT, {"ce": {}}),
    "cifar100_deit_tiny_uskd": (
        {
            "augment": "deit",
            "mixup_alpha": 0.8,
            "cutmix_alpha": 1.0,
            "label_smoothing_factor": 0.1,
            "num_train_epochs": 50,
            "per_device_train_batch_size": 128,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.06,
            "weight_decay": 0.05,
            "optim": "adamw_torch",
            "max_grad_norm": 5.0,
            "seed": 0,
        },
        {"image_size": None, "from_scratch": False},
        {"uskd": {"alpha": 1.0, "beta": 0.1, "mu": 0.005}},
    ),
} | {
    f"cifar100_cpu_{student}": (
        {"augment": "pad_crop", "per_device_train_batch_size": 128, "warmup_steps": 400, "max_grad_norm": 1.0},
        {"image_size": size, "image_mean": None, "seeds": [0, 1, 2]},
        {
            "ce": {},
            "2xce": {"weight": 2.0},
            "kd": {"temperature": 4.0, "weight": 0.9},
            "nkd": {"temperature": 3.0, "gamma": 3.5},
            "uskd": {"alpha": 0.1, "beta": 0.1, "mu": 0.1},
        },
    )
    for student, size in (("cnn", 48), ("vit", None))
}


# Optimizers of the papers: SGD for classic CNNs; AdamW for all with attention, token mixing or layer norm.
SGD = (
    "resnet18 resnetv2_50x1_bit regnetx_016 mobilenetv1_100 mobilenetv2_100 mobilenetv3_large_100 efficientnet_b0 "
    "vgg16_bn densenet121 repvgg_a0 resnet50_clip seresnet18 hrnet_w18 ghostnet_100"
).split()
ADAMW = (
    "convnext_tiny mixer_b16_224 resmlp_12_224 poolformer_s12 coatnet_0_224 efficientformer_l1 focalnet_tiny_srf "
    "levit_128 swin_tiny_patch4_window7_224 deit_tiny_patch16_224 mobilevit_s efficientvit_b0 edgenext_small "
    "tiny_vit_5m_224"
).split()


@pytest.mark.parametrize("name", SGD + ADAMW)
def test_an_architecture_of_timm_gets_the_optimizer_that_it_is_trained_with(name):
    recipe = recipes.choose(model_family(TimmWrapperConfig(architecture=name)), True, "imagenet-1k")
    assert recipes.load(recipe).settings["optim"] == ("sgd" if name in SGD else "adamw_torch")


def test_a_family_of_transformers_gets_the_optimizer_that_it_is_trained_with():
    with_sgd = {
        family
        for family in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
        if recipes.choose(family, True, "imagenet-1k") == "cnn_scratch"
    }
    assert with_sgd == {
        "bit",
        "efficientnet",
        "hgnet_v2",
        "mobilenet_v1",
        "mobilenet_v2",
        "pp_lcnet",
        "regnet",
        "resnet",
    }
    assert model_family(RegNetConfig()) == "regnet" and model_family(tiny_config("deit")) == "deit"


def test_every_family_of_the_table_exists():
    modules = {timm.models.model_entrypoint(name).__module__.split(".")[-1] for name in timm.list_models()}
    assert recipes.SGD_FAMILIES - {"cifar_network"} <= modules | set(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)


@pytest.mark.parametrize(
    ("family", "scratch", "data", "name"),
    [
        ("vit", False, "uoft-cs/cifar100", "vit_finetune"),
        ("vit", True, "uoft-cs/cifar100", "vit_scratch"),
        ("resnet", True, "imagenet-1k", "cnn_scratch"),
        ("resnet", True, "uoft-cs/cifar100", "cnn_scratch_cifar"),
        ("resnet", False, "uoft-cs/cifar100", "cnn_finetune"),
        ("unknown", True, "uoft-cs/cifar100", "vit_scratch"),
        ("", False, "imagenet-1k", "vit_finetune"),
        ("cifar_network", True, "uoft-cs/cifar100", "cifar_crd"),
    ],
)
def test_choice(family, scratch, data, name):
    assert recipes.choose(family, scratch, data) == name


@pytest.mark.parametrize(("side", "size", "said"), [(32, None, True), (160, 128, False)])
def test_a_student_smaller_than_the_preset_keeps_its_size(tmp_path, things, side, size, said):
    student = tmp_path / "student"
    model, processor = tiny("resnet", size=side)
    model.save_pretrained(student)
    processor.save_pretrained(student)
    (tmp_path / "cifar10").symlink_to(things / "data")
    argv = ["--student", str(student), "--from_scratch", "--dataset", str(tmp_path / "cifar10"), "--use_cpu"]
    script, config = parse([*argv, "--loss", "ce", "--output_dir", str(tmp_path / "out")])
    experiment = plan(script, config)
    assert experiment.student.image_size == size
    assert experiment.train_image_size == min(side, 128)
    text = experiment.preset["text"]
    assert text.startswith("preset cnn_scratch_cifar, chosen for the family resnet")
    assert ("but the student keeps its 32 px" in text) == said
    assert ("image_size" in experiment.provenance) != said


@pytest.mark.parametrize("name", recipes.names())
@pytest.mark.parametrize("loss", LOSSES)
def test_every_preset_makes_a_valid_run_of_every_loss(name, loss):
    script, config = parse(["--student", "x", "--teacher", "y", "--loss", loss, "--use_cpu", "--compare", loss])
    config, _ = recipes.apply(name, config, script.explicit)
    recipe = recipes.load(name)
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == recipe.global_batch_size
    for key, value in recipe.settings.items():
        got = getattr(config, key)
        assert getattr(got, "value", got) == value, key
    (_, _, run), *_ = run_configs(script, config, name)
    assert run.build_loss().hyperparameters()["label_smoothing"] == recipe.settings.get("label_smoothing_factor", 0.0)


def test_the_papers_numbers(tmp_path):
    assert recipes.published_hyperparameters("nkd", "vit_finetune") == (
        {"temperature": 1.0, "gamma": 1.0},
        "imagenet_deit",
    )
    assert recipes.published_hyperparameters("nkd", "cnn_scratch")[0] == {"temperature": 1.0, "gamma": 1.5}
    assert recipes.published_hyperparameters("nkd", "cnn_scratch_cifar")[0] == {"temperature": 3.0, "gamma": 3.5}
    assert recipes.published_hyperparameters("uskd", "vit_scratch")[0] == {"alpha": 1.0, "beta": 0.1, "mu": 0.005}
    assert recipes.published_hyperparameters("uskd", "cnn_scratch_cifar")[0] == {"alpha": 0.1, "beta": 0.1, "mu": 0.1}
    assert recipes.published_hyperparameters("uskd", "vit_finetune")[1] == "imagenet"  # one set for all models
    (tmp_path / "mine.py").write_text(
        "from hf_kd.losses import CELoss\n\n\nclass Mine(CELoss):\n    name, published = 'mine', {}\n"
    )
    assert recipes.published_hyperparameters(f"{tmp_path / 'mine.py'}:Mine", "cnn_scratch_cifar") == ({}, None)
    vit, cnn, cifar = (recipes.load(name) for name in ("vit_scratch", "cnn_scratch", "cnn_scratch_cifar"))
    assert [recipe.global_batch_size for recipe in (vit, cnn, cifar)] == [1024, 256, 128]
    for recipe, epochs, decay in ((cnn, [30, 60, 90, 100], 1e-4), (cifar, [60, 120, 160, 200], 5e-4)):
        settings = recipe.settings
        assert [*settings["lr_step_epochs"], settings["num_train_epochs"]] == epochs
        assert (settings["learning_rate"], settings["weight_decay"]) == (0.1, decay)
    assert vit.settings["warmup_steps"] * vit.settings["num_train_epochs"] == pytest.approx(20)
    assert (vit.settings["learning_rate"], vit.settings["weight_decay"]) == (1e-3, 0.05)


def test_what_was_given_stays():
    argv = ["--student", "x", "--use_cpu", "--learning_rate=3e-4", "--per_device_train_batch_size", "8"]
    script, config = parse(argv)
    config, changed = recipes.apply("vit_finetune", config, script.explicit)
    assert (config.learning_rate, config.per_device_train_batch_size) == (3e-4, 8)
    assert config.gradient_accumulation_steps == 16 and config.mixup_alpha == 0.8  # in all the preset's batch
    assert changed == ["learning_rate", "per_device_train_batch_size"]


def test_a_shorter_run_keeps_the_shape_of_the_schedule():
    script, config = parse(["--student", "x", "--use_cpu", "--num_train_epochs", "10"])
    assert recipes.apply("cnn_scratch", config, script.explicit)[0].lr_step_epochs == pytest.approx([3, 6, 9])
    script, config = parse(["--student", "x", "--use_cpu", "--max_steps", "10"])
    config, _ = recipes.apply("cnn_scratch", config, script.explicit)
    assert config.lr_step_epochs is None and config.lr_scheduler_type == "cosine"


def test_settings_that_do_not_go_with_the_preset_s_others():
    script, config = parse(["--student", "x", "--use_cpu", "--lr_step_epochs", "10", "20"])
    config, _ = recipes.apply("cnn_finetune", config, script.explicit)
    assert config.lr_step_epochs == [10, 20] and config.warmup_steps == 0
    script, config = parse(["--student", "x", "--use_cpu", "--load_best_model_at_end", "true"])
    assert recipes.apply("vit_finetune", config, script.explicit)[0].load_best_model_at_end
    script, config = parse(["--student", "x", "--use_cpu", "--gradient_accumulation_steps", "2"])
    assert recipes.apply("vit_scratch", config, script.explicit)[0].per_device_train_batch_size == 512


def test_the_printed_line_says_what_is_used():
    script, config = parse(["--student", "x", "--use_cpu", "--loss_kwargs", '{"alpha": 9}', "--eval_strategy", "no"])
    config, changed = recipes.apply("vit_finetune", config, script.explicit)
    runs = {name: run for name, _, run in run_configs(script, config, "vit_finetune")}
    line = recipes.describe("vit_finetune", changed, runs)["text"]
    assert "uskd: beta 0.1, mu 0.005 (published for imagenet)" in line and "alpha" not in line
    assert "as you set them: eval_strategy, loss_kwargs" in line


def test_a_config_file_is_a_recipe_of_its_own(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("student: x\nlearning_rate: 0.5\n")
    script, _ = parse(["--config", str(file), "--use_cpu"])
    assert script.preset == "none"
    file.write_text("student: x\nlearning_rate: 0.5\npreset: cnn_scratch\nload_best_model_at_end: true\n")
    script, config = parse(["--config", str(file), "--use_cpu"])
    config, _ = recipes.apply(script.preset, config, script.explicit)
    assert config.learning_rate == 0.5 and config.weight_decay == 1e-4


def test_a_recipe_has_settings_and_no_hyperparameters_of_losses():
    for recipe in map(recipes.load, recipes.names()):
        assert set(recipe.settings) <= set(DistillationConfig.__dataclass_fields__) - LOSS_KWARGS - {"loss_kwargs"}
        assert set(recipe.student) <= {"image_size", "image_mean", "image_std"}
        assert any(recipe.benchmark in loss.published for loss in LOSSES.values())
    with pytest.raises(ValueError, match="--preset cnn is unknown; there are: cifar_crd, cnn_finetune, cnn_scratch"):
        recipes.load("cnn")


@pytest.mark.parametrize("file", SHIPPED)
def test_shipped_configs_mean_what_they_meant_in_full(file):
    path = CONFIGS / f"{file}.yaml"
    settings, arguments, losses = SHIPPED[file]
    script, config = parse(["--config", str(path), "--use_cpu"])
    preset = None if script.preset == "none" else script.preset
    if preset:
        config, changed = recipes.apply(preset, config, script.explicit)
        assert set(changed) <= {"num_train_epochs", "warmup_steps"}
        arguments = arguments | {"preset": preset}
        for key, value in recipes.load(preset).student.items():
            assert key not in script.explicit
            setattr(script, key, value)
    for key, value in settings.items():
        got = getattr(config, key)
        assert getattr(got, "value", got) == value, key
    assert {key: getattr(script, key) for key in arguments} == arguments
    runs = {name: run for name, _, run in run_configs(script, config, preset)}
    assert {name: run.loss_kwargs for name, run in runs.items()} == losses
    if preset:  # nothing of the recipe and of the loss classes stands in the file again
        given = yaml.safe_load(path.read_text())
        assert not {"loss_kwargs", *recipes.load(preset).student} & given.keys()
        same = [key for key, value in recipes.load(preset).settings.items() if given.get(key) == value]
        assert same == []


def test_a_recipe_gives_the_published_hyperparameters_and_yours_win():
    argv = ["--student", "x", "--teacher", "y", "--use_cpu", "--loss", "nkd", "--loss_kwargs", '{"gamma": 9}']
    script, config = parse([*argv, "--preset", "cnn_scratch_cifar"])
    script.check(config)
    assert run_configs(script, config, "cnn_scratch_cifar")[0][2].loss_kwargs == {"temperature": 3.0, "gamma": 9}
    assert run_configs(script, config, None)[0][2].loss_kwargs == {"gamma": 9}


def test_named_settings_stand_over_published_hyperparameters():
    script, config = parse(
        ["--student", "x", "--teacher", "y", "--use_cpu", "--compare", "kd,kl_only,label_smoothing"]
    )
    runs = {name: run for name, _, run in run_configs(script, config, "cnn_scratch_cifar")}
    assert runs["kd"].loss_kwargs == {"temperature": 4.0, "weight": 0.9}
    assert runs["kl_only"].loss_kwargs == {"temperature": 4.0, "weight": 1.0, "ce_weight": 0.0}
    assert runs["label_smoothing"].build_loss().label_smoothing == 0.1
    other = DistillationConfig("out", loss="label_smoothing", label_smoothing_factor=0.05, use_cpu=True)
    assert other.build_loss().label_smoothing == 0.1


def test_logit_standardization_is_of_the_loss_and_not_of_its_baseline():
    argv = ["--student", "x", "--teacher", "y", "--use_cpu", "--logit_standardization", "--verdict", "--loss"]
    script, config = parse([*argv, "dkd"])
    runs = {name: run for name, _, run in run_configs(script, config, "cnn_scratch_cifar")}
    assert runs["dkd"].loss_kwargs["logit_standardization"] is True and runs["dkd"].loss_kwargs["beta"] == 8.0
    assert "logit_standardization" not in runs["ce"].loss_kwargs
    with pytest.raises(ValueError, match="nkd takes no argument logit_standardization"):
        parse([*argv, "nkd"])


def test_where_each_setting_came_from():
    script, config = parse(["--student", "x", "--use_cpu", "--learning_rate", "1", "--loss_kwargs", '{"alpha": 9}'])
    before = recipes.provenance("cnn_scratch_cifar", config, script.explicit)
    assert (before["learning_rate"], before["weight_decay"]) == ("you", "preset cnn_scratch_cifar")
    assert (before["student"], before["image_size"]) == ("you", "preset cnn_scratch_cifar")
    assert "seed" not in before  # the default, which neither has set
    after, changed = recipes.apply("cnn_scratch_cifar", config, script.explicit)
    assert recipes.provenance("cnn_scratch_cifar", after, script.explicit) == before
    assert set(changed) <= {key for key, source in before.items() if source == "you"}
    assert set(recipes.provenance(None, config, script.explicit).values()) == {"you"}
    runs = {name: run for name, _, run in run_configs(script, after, "cnn_scratch_cifar")}
    line = recipes.describe("cnn_scratch_cifar", changed, runs)["text"]
    assert "uskd: beta 0.1, mu 0.1 (published for cifar100)." in line  # alpha is the user's
    assert "target_in_rank" not in line  # a default


def test_the_names_of_the_recipes_cost_no_heavy_import():
    # hf_kd itself is replaced by an empty package, so that only this module's imports count.
    code = (
        "import sys, types; package = types.ModuleType('hf_kd'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['hf_kd'] = package; import hf_kd.recipes, hf_kd.quickstart; print(*hf_kd.recipes.names())\n"
        "print(*sorted({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)))"
    )
    folder = str(Path(recipes.__file__).parents[1])
    lines = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True).stdout
    assert lines == "cifar_crd cnn_finetune cnn_scratch cnn_scratch_cifar vit_finetune vit_scratch\n\n"
