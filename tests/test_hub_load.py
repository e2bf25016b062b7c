"""What is loaded from the Hub, from which commit, and what each fault is told as."""

import errno
import json
import os
from pathlib import Path

import datasets
import hub_helpers
import pytest
import timm
import torch
from hub_helpers import ANNA, NAMES, image, logits, told, trainer_for
from huggingface_hub import constants
from local_hub import cifar100, deit_tiny
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny import tiny
from transformers import AutoModelForImageClassification, TrainerCallback

from hf_kd import load_student, load_teacher
from hf_kd.checkpointing import STAGING, last_checkpoint
from hf_kd.data import load_data
from hf_kd.hub import nearest_ids, user_message
from hf_kd.models.loading import commit_of

hub = hub_helpers.hub

LOADERS = {"student": load_student, "teacher": load_teacher, "data": load_data}


@pytest.fixture(scope="module")
def deit(tmp_path_factory):
    return deit_tiny(tmp_path_factory.mktemp("deit"))


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    return cifar100(tmp_path_factory.mktemp("cifar100"))


# ---- loading ----


def test_the_commit_is_known(hub, deit, tmp_path):
    first = hub.add_repo("facebook/deit-tiny-patch16-224", deit)
    second = hub.add_repo("facebook/deit-tiny-patch16-224", deit_tiny(tmp_path / "other", seed=1))
    old, _ = load_student("facebook/deit-tiny-patch16-224", revision=first[:40])
    new, _ = load_student("facebook/deit-tiny-patch16-224", id2label=NAMES)
    scratch, _ = load_student("facebook/deit-tiny-patch16-224", id2label=NAMES, from_scratch=True)
    teacher = load_teacher("facebook/deit-tiny-patch16-224")
    assert [commit_of(old), commit_of(new), commit_of(scratch)] == [first, second, second]
    assert commit_of(teacher.model) == second and commit_of(load_student(deit)[0]) is None
    assert commit_of(tiny("vit")[0]) is None and commit_of(torch.nn.Linear(1, 1)) is None
    assert not torch.equal(old.vit.embeddings.cls_token, new.vit.embeddings.cls_token)
    trainer_for(scratch, load_student(deit)[1], tmp_path / "run").save_model()
    assert (
        commit_of(load_student(tmp_path / "run")[0]) is None
        and second not in (tmp_path / "run" / "config.json").read_text()
    )


def test_all_files_of_a_load_are_of_one_commit(hub, deit, tmp_path, monkeypatch):
    """The repository is changed between the config and the weights."""
    first = hub.add_repo("facebook/deit-tiny-patch16-224", deit)
    other = deit_tiny(tmp_path / "other", seed=1, layers=2)
    real = AutoModelForImageClassification.from_pretrained

    def meanwhile(*args, **kwargs):
        hub.add_repo("facebook/deit-tiny-patch16-224", other)
        return real(*args, **kwargs)

    monkeypatch.setattr(AutoModelForImageClassification, "from_pretrained", meanwhile)
    student, _ = load_student("facebook/deit-tiny-patch16-224")
    assert commit_of(student) == first and len(student.vit.layers) == 3


@pytest.mark.parametrize("by_timm", [True, False])
def test_timm_repositories_of_either_layout_load(by_timm, hub, tmp_path):
    model, processor = tiny("timm_resnet", names=NAMES)
    if by_timm:
        names = {"label_names": NAMES}
        timm.models.save_for_hf(
            model.timm_model, tmp_path, names, safe_serialization=True, data_config=processor.data_config
        )
    else:
        trainer_for(model, processor, tmp_path).save_model()
    sha = hub.add_repo("timm/resnet18.a1_in1k", tmp_path)
    student, its_processor = load_student("timm/resnet18.a1_in1k")
    teacher = load_teacher("timm/resnet18.a1_in1k", id2label=NAMES)
    values = torch.as_tensor(processor(images=[image()], return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(its_processor(images=[image()], return_tensors="pt")["pixel_values"], values)
    torch.testing.assert_close(logits(student, values), logits(model, values))
    torch.testing.assert_close(logits(teacher.model, values), logits(model, values))
    assert student.config.id2label == dict(enumerate(NAMES)) and commit_of(student) == commit_of(teacher.model) == sha


def test_what_is_cached_needs_no_network(hub, deit, cifar, monkeypatch):
    sha = hub.add_repo("facebook/deit-tiny-patch16-224", deit)
    hub.add_repo("uoft-cs/cifar100", cifar, repo_type="dataset")
    first, _ = load_student("facebook/deit-tiny-patch16-224")
    load_data("uoft-cs/cifar100")
    hub.fail(".", 429, times=None)
    assert commit_of(load_student("facebook/deit-tiny-patch16-224")[0]) == sha
    hub.close()
    again, processor = load_student("facebook/deit-tiny-patch16-224")
    assert commit_of(again) == sha and processor.crop_size["height"] == 32
    torch.testing.assert_close(again.vit.embeddings.cls_token, first.vit.embeddings.cls_token)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert commit_of(load_student("facebook/deit-tiny-patch16-224")[0]) == sha
    assert len(load_data("uoft-cs/cifar100").train) == 200


def test_only_a_model_without_a_processor_gets_imagenets_statistics(hub, deit, monkeypatch, tmp_path):
    files = {path.name: path.read_bytes() for path in deit.iterdir()}
    hub.add_repo("facebook/with", files)
    hub.add_repo("facebook/without", {name: data for name, data in files.items() if "preprocessor" not in name})
    for fault in (500, 429, "drop"):
        hub.faults.clear()
        hub.fail("preprocessor_config.json", fault, times=None)
        assert "facebook/with" in told(load_student, "facebook/with")
        assert "facebook/with" in told(load_teacher, "facebook/with")
    hub.faults.clear()
    assert load_student("facebook/with")[1].crop_size["height"] == 32
    assert load_student("facebook/without")[1].crop_size is None
    hub.close()  # and that there is none is remembered
    assert load_student("facebook/without")[1].crop_size is None


# ---- faults ----


def repo(hub, kind, deit, cifar, name="tiny-patch16-224", **settings):
    """Adds what a loader needs, and returns its id."""
    repo_id = f"facebook/{name}"
    hub.add_repo(repo_id, cifar if kind == "data" else deit, "dataset" if kind == "data" else "model", **settings)
    return repo_id


@pytest.mark.parametrize("kind", LOADERS)
def test_no_network_and_not_cached(kind, hub, monkeypatch):
    hub.close()
    what = "dataset" if kind == "data" else "model"
    message = told(LOADERS[kind], "facebook/deit")
    assert message.startswith(f"{what} facebook/deit is not in the cache ({constants.HF_HUB_CACHE})")
    assert f"can't be reached at {hub.endpoint}: check the network" in message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = told(LOADERS[kind], "facebook/deit")
    assert f"{what} facebook/deit is not in the cache" in message and "HF_HUB_OFFLINE forbids" in message


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("token", [None, ANNA])
def test_gated(kind, token, hub, deit, cifar, monkeypatch):
    repo_id = repo(hub, kind, deit, cifar, gated=True)
    monkeypatch.setenv("HF_TOKEN", token or "")
    page = f"{hub.endpoint}/{'datasets/' if kind == 'data' else ''}{repo_id}"
    what = "dataset" if kind == "data" else "model"
    assert told(LOADERS[kind], repo_id) == (
        f"{what} {repo_id} is gated: accept its conditions on {page}, and log in as the same user with "
        "`hf auth login`."
    )
    if token:
        hub.grant(repo_id, "anna", what)
        LOADERS[kind](repo_id)


@pytest.mark.parametrize("kind", LOADERS)
def test_a_wrong_id(kind, hub, deit, cifar):
    for name in ("deit-tiny-patch16-224", "deit-small-patch16-224", "vit-base"):
        repo(hub, kind, deit, cifar, name)
    what = "dataset" if kind == "data" else "model"
    message = told(LOADERS[kind], "facebook/deit-tiny-patch16-242")
    assert message == (
        f"there is no {what} facebook/deit-tiny-patch16-242 on {hub.endpoint}, or it is private. Did you mean "
        "facebook/deit-tiny-patch16-224? If it is private, log in: `hf auth login`."
    )
    two = "Did you mean facebook/deit-tiny-patch16-224, facebook/deit-small-patch16-224?"
    assert two in told(LOADERS[kind], "facebook/deit-tyni-patch16-224")
    assert "facebook/deit-tiny-patch16-224" in told(LOADERS[kind], "deit-tiny-patch16-224")
    assert "facebook/deit-tiny-patch16-224" in told(LOADERS[kind], "Facebook/DeiT-tiny-patch16-224")
    assert "Did you mean" not in told(LOADERS[kind], "nobody/qqq")
    hub.fail("search=", 500, times=None)  # no worse for it
    assert "there is no" in told(LOADERS[kind], "facebook/deit-tiny-patch16-242")


def test_nearest_ids(hub, deit):
    for name in ("facebook/deit-tiny", "facebook/deit-small", "google/vit", "lab/deit-tiny"):
        hub.add_repo(name, {"README.md": ""})
    assert nearest_ids("facebook/deit-tiny-9") == ["facebook/deit-tiny", "lab/deit-tiny"]
    assert nearest_ids("gogle/vit") == ["google/vit"] and nearest_ids("facebook/diet", limit=1) == [
        "facebook/deit-tiny"
    ]
    assert nearest_ids("facebook/deit-tiny", "dataset") == []
    hub.add_repo("LAB/RESNET", {"README.md": ""})
    assert nearest_ids("lab/resnet") == ["LAB/RESNET"]


@pytest.mark.parametrize("kind", LOADERS)
def test_a_private_one_is_not_there_but_for_its_readers(kind, hub, deit, cifar, monkeypatch):
    hub.add_token("hf_owner", user="facebook")
    repo_id = repo(hub, kind, deit, cifar, private=True)
    assert "or it is private" in told(LOADERS[kind], repo_id)
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    LOADERS[kind](repo_id)


def test_what_datasets_itself_raises(hub, cifar):
    """It drops the errors of the Hub's client, so only the text is left."""
    hub.add_repo("own/gated", cifar, "dataset", gated=True)
    hub.add_repo("own/cifar100", cifar, "dataset")
    assert told(datasets.load_dataset, "own/gated").startswith("dataset own/gated is gated: accept")
    message = told(datasets.load_dataset, "own/cifar-100")
    assert message.startswith(f"there is no dataset own/cifar-100 on {hub.endpoint}") and "own/cifar100?" in message
    hub.close()
    message = told(datasets.load_dataset, "own/cifar100")
    assert message.startswith("dataset own/cifar100 is not in the cache") and "can't be reached" in message


@pytest.mark.parametrize("kind", LOADERS)
def test_a_wrong_revision(kind, hub, deit, cifar):
    repo_id = repo(hub, kind, deit, cifar)
    message = told(LOADERS[kind], repo_id, revision="v9")
    assert f"{repo_id} has no revision 'v9'" in message and f"/{repo_id}." in message


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("where", ["/api/", "/resolve/"])
def test_too_many_requests(kind, where, hub, deit, cifar, monkeypatch):
    repo_id = repo(hub, kind, deit, cifar)
    hub.fail(where, 429, times=None)
    message = told(LOADERS[kind], repo_id)
    assert (
        f"too many requests to the Hub (429), the last one for {'dataset' if kind == 'data' else 'model'} {repo_id}"
        in message
    )
    assert "Wait 1 s" in message and "who is logged in (`hf auth login`)" in message
    monkeypatch.setenv("HF_TOKEN", ANNA)
    assert "logged in" not in told(LOADERS[kind], repo_id)


@pytest.mark.parametrize("kind", LOADERS)
def test_a_revoked_token(kind, hub, deit, cifar, monkeypatch):
    repo_id = repo(hub, kind, deit, cifar)
    monkeypatch.setenv("HF_TOKEN", ANNA)
    LOADERS[kind](repo_id)
    hub.revoke(ANNA)
    message = told(LOADERS[kind], repo_id, revision="main")
    assert "does not accept the token (401)" in message and "`hf auth login`" in message and "HF_TOKEN" in message


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("where", ["/api/", "/resolve/"])
def test_the_hub_fails(kind, where, hub, deit, cifar):
    repo_id = repo(hub, kind, deit, cifar)
    hub.fail(where, 500, times=None)
    message = told(LOADERS[kind], repo_id)
    assert message.startswith("the Hub returned a server error (500") and repo_id in message


@pytest.mark.parametrize("kind", LOADERS)
def test_a_download_that_is_cut_goes_on(kind, hub, deit, cifar, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    repo_id = repo(hub, kind, deit, cifar)
    fault = hub.fail(r"/lfs/.*(safetensors|train.*parquet)", "cut", times=2)
    loaded = LOADERS[kind](repo_id)
    assert fault.hits == 2
    if kind == "data":
        assert len(loaded.train) == 200 and loaded.train[7]["img"].size == (32, 32)
    else:
        model = loaded[0] if kind == "student" else loaded.model
        expected = load_file(deit / "model.safetensors")["classifier.weight"]
        torch.testing.assert_close(model.classifier.weight, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", LOADERS)
def test_a_download_that_is_always_cut(kind, hub, deit, cifar):
    repo_id = repo(hub, kind, deit, cifar)
    hub.fail(r"/lfs/.*(safetensors|parquet)", "cut", times=None)
    message = told(LOADERS[kind], repo_id)
    assert "the connection to the Hub broke off" in message and "run this again" in message


@pytest.mark.parametrize("where", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_code_from_a_repository_is_not_run(where, kind, hub, deit, tmp_path):
    files = {path.name: path.read_bytes() for path in deit.iterdir()}
    settings = json.loads(files[where])
    if where == "config.json":
        settings |= {
            "model_type": "strange",
            "auto_map": {"AutoConfig": "code.C", "AutoModelForImageClassification": "code.M"},
        }
    else:
        settings = {"image_processor_type": "Strange", "auto_map": {"AutoImageProcessor": "code.P"}}
    mark = tmp_path / "was run"
    code = f"open({str(mark)!r}, 'w')\nclass C: pass\nclass M: pass\nclass P: pass\n"
    hub.add_repo("evil/vit", files | {where: json.dumps(settings), "code.py": code})
    message = told(LOADERS[kind], "evil/vit")
    assert message == (
        "evil/vit needs Python code of its own, which is not run unless you ask for it: read that code, then pass "
        "--trust_remote_code."
    )
    assert not mark.exists()
    with pytest.raises(AttributeError):  # the oracle: with leave it is run, useless as it is
        LOADERS[kind]("evil/vit", trust_remote_code=True)
    assert mark.exists()


def test_a_data_set_that_is_a_program(hub):
    hub.add_repo("own/pets", {"README.md": "# Pets\n", "pets.py": "raise SystemExit('was run')"}, "dataset")
    assert told(load_data, "own/pets").endswith("--dataset_revision refs/convert/parquet.")


class OntoAFullDisk(TrainerCallback):
    """/dev/full refuses every byte, as a full disk does: here those of the second checkpoint's optimizer."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            folder = Path(args.output_dir) / STAGING / "checkpoint-2"
            folder.mkdir(parents=True)
            (folder / "optimizer.pt").symlink_to("/dev/full")


def test_the_disk_is_full(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "loss": "ce"}
    trainer = trainer_for(*tiny("vit", names=NAMES), tmp_path, **settings)
    trainer.add_callback(OntoAFullDisk())
    assert told(trainer.train) == (
        f"the disk is full: {tmp_path} could not be written. What was complete is safe, the last whole checkpoint "
        f"too. Make room (downloads are in {constants.HF_HOME}; HF_HOME moves them), and run the same command again, "
        f"or `hf-kd resume {tmp_path}` if it has trained already."
    )
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    again = trainer_for(*tiny("vit", names=NAMES), tmp_path, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3 and last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("kind", LOADERS)
def test_the_disk_is_full_of_downloads(kind, hub, deit, cifar, monkeypatch):
    repo_id = repo(hub, kind, deit, cifar)
    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    message = told(LOADERS[kind], repo_id)
    assert message.startswith("the disk is full.") and "HF_HOME" in message and "same command again" in message
    assert "`hf-kd resume FOLDER`" in message


def test_the_disk_is_full_when_the_student_is_saved(tmp_path, monkeypatch):
    """What safetensors raises, whose writer has its own way to the disk."""
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    trainer = trainer_for(*tiny("vit"), tmp_path / "run")

    def refuse(*args, **kwargs):
        raise SafetensorError(text)

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", refuse)
    assert f"{tmp_path / 'run'} could not be written" in told(trainer.save_model)


@pytest.mark.parametrize(
    "error", [ValueError("loss='x' is unknown"), KeyError("img"), ConnectionRefusedError(111, "no")]
)
def test_other_errors_are_not_explained(error):
    assert user_message(error) is None
