"""What the pages and the committed records say of results follows from the records, and what to type works."""

import importlib.util
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from cli_helpers import images
from tiny import tiny

from hf_kd.cli import main
from hf_kd.cli.arguments import parse
from hf_kd.reporting.card import model_card

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
spec = importlib.util.spec_from_file_location("regenerate", ROOT / "benchmarks" / "regenerate.py")
regenerate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(regenerate)


@pytest.mark.parametrize(
    ("path", "blocks"), zip(regenerate.PAGES, (3, 1, 1), strict=True), ids=("README", "seeds", "losses")
)
def test_tables_and_verdicts_are_those_of_the_records(path, blocks):
    text = path.read_text("utf-8")
    assert len(regenerate.BLOCK.findall(text)) == blocks
    assert regenerate.page(text) == text


def rounded(value):
    """Without the last digits of numbers, which depend on scipy's version."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return f"{value:.6g}" if isinstance(value, float) else value


@pytest.mark.parametrize("path", regenerate.RECORDS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_verdicts_and_cards_are_those_of_the_records(path):
    record = regenerate.read(path)
    assert rounded(regenerate.with_verdicts(record)) == rounded(record)
    if path.parent.parent.name == "model_cards":
        assert path.with_name("README.md").read_text("utf-8") == model_card(record)


def block(section: str, language: str) -> str:
    """The first block of code in a section."""
    return re.search(rf"### {section}\n.*?```{language}\n(.*?)```", README, re.DOTALL)[1]


def test_the_commands_for_your_own_images(tmp_path, monkeypatch, undrawn_figures):
    monkeypatch.chdir(tmp_path)
    for name in ("resnet50.a1_in1k", "mobilenetv3_small_100.lamb_in1k"):  # a folder goes before the Hub
        for part in tiny("timm_resnet", names=[f"class {i}" for i in range(6)]):
            part.save_pretrained(tmp_path / "timm" / name)
    rows = images(60, 0)
    for i, (image, label) in enumerate(zip(rows["image"], rows["label"], strict=True)):
        folder = tmp_path / "photos" / f"class {label}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i}.png")
    quick = ["--num_train_epochs", "1", "--use_cpu", "--disable_tqdm", "true", "--dataloader_num_workers", "0"]
    teacher, student = (shlex.split(line) for line in block("Your own images", "bash").splitlines())
    assert main([*teacher[1:], *quick]) == 0
    assert main([*student[1:], *quick, "--seeds", "0", "1", "--teacher_check_batches", "0"]) == 0
    assert (tmp_path / "outputs" / "teacher" / "model.safetensors").is_file()


def test_the_job_array(tmp_path):
    """With stand-ins for what a cluster has: the first task makes the plan, the later ones continue it."""
    for name, code in {"srun": '"$@"', "scontrol": 'echo "scontrol $@"', "hf-kd": 'echo "hf-kd $@"; exit 75'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{code}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}

    def submit():
        command = ["bash", "-c", block("Job schedulers", "bash")]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 75 and not done.stderr
        return done.stdout.splitlines()

    first, again = submit()
    script, config = parse([*shlex.split(first)[2:], "--use_cpu"])
    assert (script.only, config.output_dir, again) == ("nkd:0", "outputs/array", "scontrol requeue 7_1")
    (tmp_path / "outputs" / "array").mkdir(parents=True)
    (tmp_path / "outputs" / "array" / "plan.json").touch()
    assert submit() == ["hf-kd resume outputs/array --only nkd:0", again]


# torch's own export and onnxscript announce changes to come in each other.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_export(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for part in tiny("vit"):
        part.save_pretrained(tmp_path / "outputs" / "student")
    code = block("Deployment", "python").replace("224, 224", "32, 32")
    exec(code, {})
    assert re.fullmatch(r"(.*\n)*\d+\.\d ms\n", capsys.readouterr().out)


def test_the_usage_starts_without_a_launcher_and_keeps_the_two_commands():
    usage = README.split("\n## Usage\n")[1]
    assert usage.index("\nhf-kd distill --student ") < usage.index("\naccelerate launch ")
    assert "accelerate launch --quiet --multi_gpu --num_processes 2 examples/run_distill.py" in usage
    commands = (
        "pip install -e . && accelerate launch examples/run_distill.py --config examples/configs/quickstart.yaml",
        "accelerate launch examples/run_distill.py --student facebook/deit-tiny-patch16-224 --loss uskd",
    )
    assert all(f"\n{command}\n" in README for command in commands)
