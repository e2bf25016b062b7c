"""The command line against a Hub: the command of the README as a user types it, what it pushes, and how it fails."""

import contextlib
import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from local_hub import LocalHub, cifar100, deit_tiny, imagenet
from PIL import Image
from tiny import tiny
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from hf_kd.cli import main
from hf_kd.data import load_data

pytestmark = pytest.mark.usefixtures("undrawn_figures")

REPOSITORY = Path(__file__).resolve().parents[1]
STUDENT, DATA, TOKEN = "facebook/deit-tiny-patch16-224", "uoft-cs/cifar100", "hf_" + "a" * 34
COMMAND = f"accelerate launch examples/run_distill.py --student {STUDENT} --loss uskd"
PUSHED = {
    "README.md",
    "config.json",
    "curves.png",
    "model.safetensors",
    "preprocessor_config.json",
    "classes.csv",
    "run.json",
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Folders with the student and the dataset that the command names."""
    folder = tmp_path_factory.mktemp("served")
    return deit_tiny(folder / "deit"), cifar100(folder / "cifar100", 40, 20)


@pytest.fixture
def hub(served, tmp_path):
    with LocalHub(tmp_path / "hub") as hub:
        hub.student_sha = hub.add_repo(STUDENT, served[0])
        hub.data_sha = hub.add_repo(DATA, served[1], repo_type="dataset")
        hub.add_token(TOKEN, user="anna")
        yield hub


@pytest.fixture
def here(hub, tmp_path, monkeypatch):
    """This process knows the local Hub alone, and works in an empty folder."""
    hub.patch(monkeypatch, tmp_path / "cache")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return hub


def as_user(hub, folder, command, **env):
    """A command in a folder where the repository's examples are, with a cache of its own."""
    folder.mkdir(exist_ok=True)
    if not (folder / "examples").exists():
        (folder / "examples").symlink_to(REPOSITORY / "examples")
    first, *rest = shlex.split(command)
    program = Path(sys.executable).parent / first
    env = os.environ | hub.env(folder / "cache") | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"} | env
    return subprocess.run([program, *rest], cwd=folder, env=env, capture_output=True, text=True, timeout=900)


def short(*more):
    """A run of one step in this process."""
    return main(
        ["distill", "--student", STUDENT, "--loss", "uskd", "--use_cpu", "--disable_tqdm", "true", "--max_steps", "1"]
        + ["--dataloader_num_workers", "0", *more]
    )


def test_the_literal_command(hub, tmp_path):
    done = as_user(hub, tmp_path / "user", COMMAND)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("preset "))
    assert (
        line.startswith("preset vit_finetune, chosen for the family vit: ")
        and "arXiv 2303.13005" in line
        and "hf_kd's own" in line
    )
    assert "uskd: alpha 1, beta 0.1, mu 0.005" in line and "--preset none" in line
    # Correct use is silent: besides accelerate's note on its own defaults and progress bars there is no word.
    # (The mtimes are those of checkpoints that follow each other within a second.)
    noise = r"it/s\]|s/it\]|\?it/s|ba/s\]|B/s\]|examples/s\]|values were not passed|^\s*`--|avoid this warning|mtime"
    noise += r"|^[\s\x1b\[A]*$|classes have no image to train on"  # the stand-in has fewer images than classes
    said = [text for text in re.split(r"[\r\n]", done.stderr) if not re.search(noise, text)]
    assert not said, said

    out = tmp_path / "user" / "outputs" / "deit-tiny-patch16-224-uskd-cifar100"
    run = json.loads((out / "run.json").read_text())
    assert run["student"]["revision"] == hub.student_sha and run["data"]["revision"] == hub.data_sha
    pins = f" --student_revision {hub.student_sha} --dataset_revision {hub.data_sha}"
    assert (
        run["command"] == COMMAND + pins and run["preset"]["name"] == "vit_finetune" and run["preset"]["changed"] == []
    )
    expected = {"learning_rate": 1e-4, "mixup_alpha": 0.8, "augment": "deit", "num_train_epochs": 30}
    assert {key: run["settings"][key] for key in expected} == expected
    assert run["data"]["classes"] == 100 and run["history"][-1]["epoch"] == 30
    answer = pipeline("image-classification", model=str(out))(Image.new("RGB", (32, 32), "red"))
    assert answer[0]["label"] in AutoModelForImageClassification.from_pretrained(out).config.label2id
    assert {file.name for file in out.iterdir() if file.is_file()} >= PUSHED

    hub.close()  # what has been loaded once needs no network
    again = as_user(hub, tmp_path / "user", COMMAND + " --max_steps 1 --output_dir again", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr[-3000:]
    assert json.loads((tmp_path / "user/again/run.json").read_text())["data"]["revision"] == hub.data_sha


def test_push(here, tmp_path, monkeypatch, capsys):
    here.patch(monkeypatch, tmp_path / "cache", TOKEN)
    assert short("--push_to_hub", "--output_dir", "mine") == 0
    assert f"Pushed to {here.endpoint}/anna/mine" in capsys.readouterr().out
    asked = [path for _, path in here.requests]
    assert asked.index("/api/whoami-v2") < min(i for i, path in enumerate(asked) if "parquet" in path)
    files = here.files("anna/mine")
    assert files.keys() - {".gitattributes"} == PUSHED
    assert len(here.commits("anna/mine")) == 2  # the repository's first, and the push
    for name, content in files.items():
        assert TOKEN.encode() not in content and str(tmp_path).encode() not in content, name
    assert json.loads(files["run.json"])["repo_id"] == "anna/mine"
    assert b'model="anna/mine"' in files["README.md"]

    loaded = AutoModelForImageClassification.from_pretrained("anna/mine").eval()
    saved = AutoModelForImageClassification.from_pretrained("mine").eval()
    pixels = AutoImageProcessor.from_pretrained("anna/mine")(Image.new("RGB", (40, 32), "red"), return_tensors="pt")
    with torch.no_grad():
        # Two loads of one model: its weights may lie in memory differently, which shows in the last bits.
        torch.testing.assert_close(loaded(**pixels).logits, saved(**pixels).logits, rtol=1e-5, atol=1e-5)
    assert pipeline("image-classification", model="anna/mine")(Image.new("RGB", (32, 32)))[0]["label"]


def test_a_pushed_timm_student_opens_in_timm(here, tmp_path, monkeypatch):
    import timm

    here.patch(monkeypatch, tmp_path / "cache", TOKEN)
    run = ["--student", "timm/test_resnet", "--from_scratch", "--image_size", "32", "--push_to_hub", "--hub_model_id"]
    assert short(*run, "anna/timm-student") == 0
    ours = AutoModelForImageClassification.from_pretrained("anna/timm-student").eval()
    theirs = timm.create_model("hf_hub:anna/timm-student", pretrained=True).eval()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels).logits, theirs(pixels), rtol=1e-5, atol=1e-5)
    assert tuple(theirs.pretrained_cfg["input_size"]) == (3, 32, 32) and theirs.num_classes == 100
    assert b"library_name: timm" in here.files("anna/timm-student")["README.md"]


def test_a_verdict_pushes_the_first_seed_with_its_evidence(here, tmp_path, monkeypatch):
    here.patch(monkeypatch, tmp_path / "cache", TOKEN)
    assert short("--verdict", "--seeds", "3", "4", "--push_to_hub") == 0
    name = "anna/deit-tiny-patch16-224-uskd-cifar100"
    run = json.loads(here.files(name)["run.json"])
    assert (run["name"], run["seed"]) == ("uskd", 3) and len(run["verdict"]["runs"]) == 6
    assert run["verdict"]["sentence"] in here.files(name)["README.md"].decode()
    assert not any("teacher" in file or "ce/" in file for file in here.files(name))


def test_what_diverged_is_not_pushed(here, tmp_path, monkeypatch, capsys):
    here.patch(monkeypatch, tmp_path / "cache", TOKEN)
    assert short("--push_to_hub", "--output_dir", "mine", "--learning_rate", "1e6", "--preset", "none") == 1
    assert "1 of 1 runs diverged" in capsys.readouterr().err.splitlines()[-1]
    assert ("model", "anna/mine") not in here.repos and Path("mine/model.safetensors").is_file()


def test_a_failed_push_is_an_error_with_the_command_that_retries_it(here, tmp_path, monkeypatch, capsys):
    here.patch(monkeypatch, tmp_path / "cache", TOKEN)
    here.fail("POST .*/commit/", 500, times=None)
    assert short("--push_to_hub", "--output_dir", "mine", "--hub_model_id", "theirs") == 1
    said = capsys.readouterr().err
    command = re.search(r"Push it with: (hf-kd push .*)", said)[1]
    assert "failed" in said and "(500" in said and AutoModelForImageClassification.from_pretrained("mine")
    here.faults.clear()
    assert main(shlex.split(command)[1:]) == 0
    assert here.files("anna/theirs").keys() >= PUSHED
    assert main(["push", "nowhere"]) == 1 and "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("role", "more", "message"),
    [
        (None, {}, "there is none: log in with `hf auth login`"),
        ("read", {}, "token may only read"),
        ("fineGrained", {"scopes": {"user:anna": ["repo.content.read"]}}, "may not write to anna/mine"),
        ("revoked", {}, "does not accept the token (401)"),
    ],
)
def test_whether_a_push_is_allowed_is_known_before_training(role, more, message, here, tmp_path, monkeypatch, capsys):
    token = "hf_" + "b" * 34
    here.patch(monkeypatch, tmp_path / "cache", role and token)
    if role not in (None, "revoked"):
        here.add_token(token, user="anna", role=role, **more)
    assert short("--push_to_hub", "--output_dir", "mine") == 1
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not any("parquet" in path for _, path in here.requests) and not Path("mine").exists()
    assert ("model", "anna/mine") not in here.repos


def gated(hub, monkeypatch):
    hub.add_repo("lab/gated", {"README.md": "x"}, repo_type="dataset", gated=True)


def no_network(hub, monkeypatch):
    hub.close()


def offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def fault(pattern, kind):
    return lambda hub, monkeypatch: hub.fail(pattern, kind, times=None)


def revoked(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "r" * 34)


@pytest.mark.parametrize(
    ("prepare", "more", "messages"),
    [
        (gated, ["--dataset", "lab/gated"], ["gated", "/datasets/lab/gated", "hf auth login"]),
        (None, ["--student", "facebook/deit-tiny-patch16-242"], [f"Did you mean {STUDENT}?"]),
        (None, ["--dataset", "uoft-cs/cifar10"], [f"Did you mean {DATA}?"]),
        (None, ["--student_revision", "v9"], ["'v9'", STUDENT]),
        (no_network, [], ["can't be reached", DATA, "HF_ENDPOINT"]),
        (offline, [], ["HF_HUB_OFFLINE", DATA]),
        (fault("GET /api/models", 429), [], ["too many requests", "Wait 1 s"]),
        (fault("parquet", 429), [], ["too many requests", "(429)"]),
        (fault("/resolve/.*/model.safetensors", 500), [], ["server error (500"]),
        (fault("/lfs/.*safetensors", "cut"), [], ["broke off"]),
        (revoked, [], ["does not accept the token (401)"]),
    ],
)
def test_faults_are_one_message(prepare, more, messages, here, monkeypatch, capsys):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the clients wait between their attempts
    if prepare:
        prepare(here, monkeypatch)
    assert short(*more) == 1
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and "Traceback" not in said
    for message in messages:
        assert message in said


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_gated_dataset_is_told_before_anything_is_loaded(here, tmp_path, monkeypatch, capsys, token, streaming):
    """Without a token, and with that of a user who has not accepted the conditions."""
    name = "ILSVRC/imagenet-1k"
    here.add_repo(name, imagenet(tmp_path / "imagenet", 8, 4, 1), repo_type="dataset", gated=True)
    here.patch(monkeypatch, tmp_path / "cache", token)
    here.requests.clear()
    assert main(["distill", "--student", STUDENT, "--loss", "uskd", "--dataset", name, "--use_cpu", *streaming]) == 1
    page = f"{here.endpoint}/datasets/{name}"
    message = f"dataset {name} is gated: accept its conditions on {page}, and log in as the same user with"
    assert capsys.readouterr().err == f"\nerror: {message} `hf auth login`.\n"
    assert not [path for _, path in here.requests if "/resolve/" in path or STUDENT in path]
    assert not list(Path().iterdir())
    if token:
        here.grant(name, "anna", "dataset")
        data = load_data(name, streaming=bool(streaming))
        assert (len(data.train), len(data.names)) == (8, 1000)


def test_a_full_disk_loses_nothing(here, monkeypatch, capsys):
    import transformers.modeling_utils as modeling

    write, written = modeling.safe_save_file, []

    def full(state, path, **kwargs):
        written.append(path)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(state, path, **kwargs)

    run = ["--num_train_epochs", "3", "--max_steps", "-1", "--output_dir"]
    assert short(*run, "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(modeling, "safe_save_file", full)
        assert short(*run, "mine") == 1
    said = capsys.readouterr().err
    assert "the disk is full" in said and "`hf-kd resume mine`" in said and "Traceback" not in said
    assert short(*run, "mine", "--resume_from_checkpoint", "last") == 0
    whole, mine = (json.loads(Path(name, "run.json").read_text()) for name in ("whole", "mine"))
    assert mine["metrics"] == whole["metrics"]


def test_a_continuation_starts_from_the_commits_of_its_run(here, served, tmp_path, capsys):
    run = ["--seeds", "0", "1", "--output_dir", "mine"]
    assert short(*run) == 0
    shutil.rmtree("mine/uskd/seed-1")
    moved = here.add_repo(STUDENT, deit_tiny(tmp_path / "other", seed=1))
    assert short(*run, "--resume_from_checkpoint", "last") == 0
    records = [json.loads(Path(f"mine/uskd/seed-{seed}/run.json").read_text()) for seed in (0, 1)]
    assert {record["student"]["revision"] for record in records} == {here.student_sha} != {moved}
    assert all(
        "resume" not in r["command"] and f"--student_revision {here.student_sha}" in r["command"] for r in records
    )
    shutil.rmtree("mine/uskd/seed-0")
    assert short(*run, "--resume-from-checkpoint", "last", "--student_revision", "main") == 1  # asked for now: the new
    capsys.readouterr()
    assert short(*run, "--resume_from_checkpoint", "last", "--student_revision", moved) == 1
    assert f"student.commit ({here.student_sha} there, {moved} here)" in capsys.readouterr().err


def test_foreign_code_is_not_run_unless_asked_for(here, tmp_path, capsys):
    model, processor = tiny("vit")
    model.save_pretrained(tmp_path / "own"), processor.save_pretrained(tmp_path / "own")
    config = json.loads((tmp_path / "own" / "config.json").read_text()) | {"model_type": "own"}
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForImageClassification": "own.Model"}
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    (tmp_path / "own" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    here.add_repo("lab/own", tmp_path / "own")
    assert short("--student", "lab/own") == 1
    assert "--trust_remote_code" in capsys.readouterr().err and not (tmp_path / "ran").exists()
    with contextlib.suppress(Exception):  # of code that defines nothing
        short("--student", "lab/own", "--trust_remote_code")
    assert (tmp_path / "ran").exists()
