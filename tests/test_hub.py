"""The Hub: what is saved opens everywhere, what is pushed and what is not, and what each fault is told as."""

import errno
import json
import os
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from local_hub import LocalHub, cifar100, deit_tiny
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny import KINDS, tiny
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    DeiTImageProcessor,
    TimmWrapperConfig,
    pipeline,
)

from hf_kd import DistillationConfig, DistillationTrainer, load_student, load_teacher
from hf_kd.checkpoints import HEAD_FILE, last_checkpoint
from hf_kd.data import load_data
from hf_kd.hub import explain, nearest_ids
from hf_kd.push import check_push, push
from hf_kd.student import commit_of

NAMES = ["ant", "bee", "cat", "dog", "elk", "fox"]
ANNA = "hf_" + "a" * 34
LOADERS = {"student": load_student, "teacher": load_teacher, "data": load_data}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with LocalHub(tmp_path / "hub") as hub:
        hub.patch(monkeypatch, tmp_path / "cache")
        for module in ("utils._http", "file_download"):  # between its tries the client waits
            monkeypatch.setattr(f"huggingface_hub.{module}.time", SimpleNamespace(sleep=lambda seconds: None))
        hub.add_token(ANNA, user="anna", orgs={"lab": "write", "school": "read"})
        yield hub


@pytest.fixture(scope="module")
def deit(tmp_path_factory):
    return deit_tiny(tmp_path_factory.mktemp("deit"))


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    return cifar100(tmp_path_factory.mktemp("cifar100"))


def picture(height=50, width=70):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def trainer_for(student, processor, folder, **settings):
    pixels = torch.randint(0, 256, (8, 3, 40, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pictures = [{"pixels": x, "labels": i % 6} for i, x in enumerate(pixels)]
    settings = {"loss": "uskd", "max_steps": 1, "save_strategy": "no"} | settings
    args = DistillationConfig(
        str(folder), per_device_train_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True, **settings
    )
    return DistillationTrainer(
        student, args, train_dataset=pictures, eval_dataset=pictures, processing_class=processor
    )


def logits(model, values):
    with torch.no_grad():
        output = model.eval()(values)
    return getattr(output, "logits", output)


def told(call, *args, **kwargs):
    """What `explain` says of the error that a call ends with."""
    with pytest.raises(Exception) as caught:
        call(*args, **kwargs)
    message = explain(caught.value)
    assert message is not None, caught.value
    assert "\n" not in message and "Traceback" not in message
    return message


# ---- what is saved opens everywhere ----


def sources(kind, folder):
    """A student of each origin, with its processor."""
    if kind in KINDS:
        return tiny(kind, names=NAMES)
    if kind == "timm export":  # by timm itself
        model, processor = tiny("timm_vit")
        timm.models.save_for_hf(model.timm_model, folder, safe_serialization=True, data_config=processor.data_config)
        return load_student(folder, id2label=NAMES)
    if kind == "timm/test_vit":  # at its own size, which is not the 224 px of most
        return load_student(kind, NAMES, from_scratch=True)
    if kind == "renamed":  # by transformers alone, which saves the old names
        model, processor = tiny("timm_resnet")
        model.save_pretrained(folder)
        names = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
        return AutoModelForImageClassification.from_pretrained(folder, **names), processor
    return load_student(kind, NAMES, from_scratch=True, image_size=48, image_mean=[0.5, 0.4, 0.3])


ORIGINS = (*KINDS, "timm export", "timm/vit_tiny_patch16_224", "timm/test_vit", "timm/test_resnet", "renamed")


@pytest.fixture(scope="module", params=ORIGINS)
def saved(request, tmp_path_factory):
    """`(folder, student, processor)` of a trained and saved student; the folder's name is its kind's."""
    folder = tmp_path_factory.mktemp(re.sub(r"\W", "-", request.param))
    torch.manual_seed(0)
    student, processor = sources(request.param, folder / "source")
    trainer = trainer_for(student, processor, folder / "run")
    trainer.train()
    trainer.save_model()
    return folder / "run", student, processor


def opens(name, timm_name, student, processor, atol=0):
    """A folder or id gives the student's classes, pixels and logits in transformers, and in timm if it is timm's."""
    own = torch.as_tensor(processor(images=[picture()], return_tensors="pt")["pixel_values"])
    expected = logits(student, own)
    model = AutoModelForImageClassification.from_pretrained(name)
    values = AutoImageProcessor.from_pretrained(name)(images=[picture()], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(torch.as_tensor(values), own, rtol=0, atol=atol)
    torch.testing.assert_close(logits(model, own), expected, rtol=0, atol=0)
    assert model.config.id2label == dict(enumerate(NAMES))
    answers = pipeline("image-classification", name, top_k=6)(picture())
    scores = dict(zip(NAMES, expected[0].softmax(0).tolist(), strict=True))
    assert {answer["label"]: answer["score"] for answer in answers} == pytest.approx(scores, abs=1e-6 + atol)
    if not hasattr(student, "timm_model"):
        return
    model = timm.create_model(timm_name, pretrained=True)
    config = timm.data.resolve_model_data_config(model)
    values = timm.data.create_transform(**config, is_training=False)(picture())[None]
    torch.testing.assert_close(values, own, rtol=0, atol=atol)
    torch.testing.assert_close(logits(model, own), expected, rtol=0, atol=0)
    assert model.pretrained_cfg["label_names"] == NAMES and model.num_classes == 6
    assert timm.create_model(timm_name, pretrained=True, num_classes=9).num_classes == 9  # to be fine-tuned


def test_a_saved_student_opens_in_both_libraries(saved):
    folder, student, processor = saved
    opens(folder, f"local-dir:{folder}", student, processor)
    again, its_processor = load_student(folder)
    values = torch.as_tensor(its_processor(images=[picture()], return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(logits(again, values), logits(student, values), rtol=0, atol=0)
    assert load_teacher(folder, id2label=NAMES).id2label == dict(enumerate(NAMES))
    weights = load_file(folder / "model.safetensors")
    assert not any("kd_head" in name for name in weights) and any(
        "kd_head" in n for n, _ in student.named_parameters()
    )


@pytest.mark.parametrize(
    "steps",
    [
        {"size": {"height": 40, "width": 44}, "do_center_crop": False},
        {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}},
        {"size": {"height": 40, "width": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}},
    ],
)
def test_a_timm_student_with_a_processor_of_transformers(steps, tmp_path):
    student, _ = tiny("timm_resnet", names=NAMES)
    processor = DeiTImageProcessor(**steps, image_mean=[0.4, 0.5, 0.6], resample=3)
    trainer_for(student, processor, tmp_path).save_model()
    opens(tmp_path, f"local-dir:{tmp_path}", student, processor, atol=0.05)


def test_a_timm_student_without_a_processor_keeps_the_preprocessing_of_its_architecture(tmp_path):
    model = AutoModelForImageClassification.from_config(TimmWrapperConfig(architecture="test_resnet", num_labels=6))
    trainer = trainer_for(model, None, tmp_path, loss="ce")
    trainer.save_model()
    config = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path}", pretrained=True))
    own = timm.data.resolve_model_data_config(timm.create_model("test_resnet"))
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()} == own
    assert own["input_size"] != (3, 224, 224)  # which it would be for lack of one


# ---- pushing ----


@pytest.mark.parametrize("kind", ["deit", "timm_vit"])
def test_what_is_pushed_opens_by_its_id(kind, hub, tmp_path):
    student, processor = tiny(kind, names=NAMES)
    trainer_for(student, processor, tmp_path / "run").save_model()
    url = push(tmp_path / "run", "student", token=ANNA)
    assert url == f"{hub.endpoint}/anna/student"
    opens("anna/student", "hf_hub:anna/student", student, processor)


def test_only_what_belongs_to_a_student_is_pushed(hub, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "out" / "run"
    trainer = trainer_for(
        *tiny("timm_resnet", names=NAMES), folder, save_strategy="steps", save_steps=1, hub_token=ANNA
    )
    trainer.train()
    trainer.save_model()
    assert (folder / "checkpoint-1" / HEAD_FILE).is_file() and (folder / "training_args.bin").is_file()
    (folder / HEAD_FILE).write_bytes(b"weak head")
    (folder / "notes.pkl").write_bytes(pickle.dumps({}))
    (folder / "events.out.tfevents").write_bytes(b"log")
    (folder / "curves.png").write_bytes(b"PNG")
    command = (
        f"hf-kd distill --output_dir {folder} --student {Path.home()}/x --hub_token {ANNA} --dataset {tmp_path}/data "
        "hf_short"
    )
    (folder / "run.json").write_text(json.dumps({"command": command, "student": {"id": "/m/0k4j"}}))
    (folder / "README.md").write_text(f"---\nlicense: mit\n---\n\n`{command}`\nhttps://example.org{folder}\n")
    hub.add_token("hf_short", user="anna")
    push(folder, "anna/student", token="hf_short", message="first")
    pushed = hub.files("anna/student")
    assert pushed.keys() == {
        *(".gitattributes", "config.json", "model.safetensors"),  # the first is the Hub's own; a timm student's
        *("README.md", "run.json", "curves.png"),  # preprocessing is in its config
    }
    assert hub.commits("anna/student") == ["first", "initial commit"]
    text = b"".join(pushed[name] for name in pushed if name.endswith((".json", ".md"))).decode()
    assert ANNA not in text and "https://example.org" in text
    for place in (folder, tmp_path, Path.home()):
        assert f" {place}" not in text and f'"{place}' not in text
    assert json.loads(pushed["run.json"]) == {
        "command": "hf-kd distill --output_dir . --student ~/x --hub_token <redacted> --dataset ./data <redacted>",
        "student": {"id": "/m/0k4j"},
    }
    assert pushed["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert json.loads((folder / "run.json").read_text())["command"] == command  # what is on this machine stays


def test_a_second_push_is_one_commit_more_and_a_branch_is_made(hub, tmp_path):
    trainer_for(*tiny("vit"), tmp_path).save_model()
    push(tmp_path, "anna/student", token=ANNA, private=True)
    (tmp_path / "README.md").write_text("# Card\n")
    push(tmp_path, "anna/student", token=ANNA, message="again")
    assert hub.commits("anna/student") == ["again", "Distilled with hf_kd", "initial commit"]
    assert "README.md" in hub.files("anna/student") and "preprocessor_config.json" in hub.files("anna/student")
    (tmp_path / "README.md").write_text("# Other card\n")
    push(tmp_path, "anna/student", token=ANNA, revision="v2")
    assert hub.files("anna/student", "v2")["README.md"] == b"# Other card\n"
    assert hub.files("anna/student")["README.md"] == b"# Card\n"
    with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError):
        huggingface_hub.model_info("anna/student", token=False)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_without_a_model_is_not_pushed(missing, hub, tmp_path):
    trainer_for(*tiny("vit"), tmp_path).save_model()
    (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match="there is no model in"):
        push(tmp_path, "anna/student", token=ANNA)
    assert ("model", "anna/student") not in hub.repos


def tokens(hub):
    hub.add_token("hf_read", user="anna", role="read")
    fine = {"org:lab": ["repo.write"], "user:anna": ["repo.content.read"], "model:anna/old": ["repo.write"]}
    hub.add_token("hf_fine", user="anna", role="fineGrained", scopes=fine, orgs=["lab"])
    hub.add_token("hf_none", user="anna", role="fineGrained", scopes={"user:anna": ["repo.content.read"]})
    hub.add_repo("anna/old", {"README.md": "old"})
    hub.add_repo("lab/old", {"README.md": "old"}, private=True)


@pytest.mark.parametrize(
    ("token", "repo_id", "full"),
    [
        (ANNA, "student", "anna/student"),
        (ANNA, "anna/old", "anna/old"),
        (ANNA, "lab/new", "lab/new"),
        (ANNA, None, "anna/deit-uskd"),
        ("hf_fine", "lab/old", "lab/old"),
        ("hf_fine", "anna/old", "anna/old"),
    ],
)
def test_a_push_that_is_allowed(token, repo_id, full, hub, tmp_path, monkeypatch):
    tokens(hub)
    assert check_push(repo_id, token, folder=tmp_path / "deit-uskd") == full
    monkeypatch.setenv("HF_TOKEN", token)
    assert check_push(repo_id, folder=tmp_path / "deit-uskd") == full
    assert {method for method, _ in hub.requests} == {"GET"}  # nothing was made


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        (None, "student", "there is none: log in with `hf auth login`"),
        ("hf_revoked", "student", r"can't push to student: .*not accept the token \(401\).*`hf auth login`"),
        ("hf_read", "student", "anna's token may only read.*/settings/tokens"),
        (ANNA, "facebook/student", "anna may not push to facebook, only to: anna, lab"),
        (ANNA, "school/student", "anna may not push to school, only to: anna, lab"),
        ("hf_none", "anna/old", r"can't push to anna/old: the token may not do this to model anna/old \(403"),
        ("hf_fine", "student", "fine-grained token may not write to anna/student: give it write access .* of anna on"),
        (ANNA, "my student", "'my student' can't be pushed to: .*--hub_model_id OWNER/NAME"),
        (ANNA, "a/b/c", "--hub_model_id OWNER/NAME"),
    ],
)
def test_a_push_that_is_not_allowed(token, repo_id, message, hub):
    tokens(hub)
    with pytest.raises(ValueError, match=message):
        check_push(repo_id, token)
    assert {method for method, _ in hub.requests} <= {"GET"}


def test_a_private_student_does_not_go_to_a_public_repository(hub):
    tokens(hub)
    with pytest.raises(ValueError, match="anna/old exists and is public"):
        check_push("anna/old", ANNA, private=True)
    assert check_push("lab/old", ANNA, private=True) == "lab/old"
    assert check_push("anna/new", ANNA, private=True) == "anna/new"


@pytest.mark.parametrize(("fault", "message"), [(500, "fault of its own"), (429, "Wait 1 s"), ("drop", "broke off")])
def test_a_push_that_cannot_be_checked(fault, message, hub):
    hub.fail("whoami", fault, times=None)
    with pytest.raises(ValueError, match=f"can't push to student: .*{message}"):
        check_push("student", ANNA)


def test_the_trainer_pushes_when_it_is_asked_and_not_before(hub, tmp_path):
    settings = {"push_to_hub": True, "hub_token": ANNA, "hub_strategy": "end", "hub_private_repo": True}
    student, processor = tiny("timm_resnet", names=NAMES)
    trainer = trainer_for(student, processor, tmp_path / "kd-run", save_strategy="steps", save_steps=1, **settings)
    assert trainer.hub_model_id == "anna/kd-run"
    trainer.train()
    trainer.save_model()
    assert {method for method, _ in hub.requests} == {"GET"} and not hub.repos
    url = trainer.push_to_hub(commit_message="done")
    assert url == f"{hub.endpoint}/anna/kd-run"
    assert hub.commits("anna/kd-run") == ["done", "initial commit"] and hub.repos["model", "anna/kd-run"].private
    files = hub.files("anna/kd-run")
    own = {"config.json", "model.safetensors", "preprocessor_config.json", "run.json", "curves.png", "README.md"}
    assert files.keys() - {".gitattributes"} <= own and files.keys() >= own - {"preprocessor_config.json"}
    record = json.loads(files["run.json"])
    assert record["metrics"]["top1"] == trainer.evaluate()["eval_top1"] and record["repo_id"] == "anna/kd-run"
    assert b"hf_hub:anna/kd-run" in files["README.md"].replace(b"hf-hub", b"hf_hub")


def test_the_trainer_refuses_before_training(hub, tmp_path):
    with pytest.raises(ValueError, match="`hf auth login`"):
        trainer_for(*tiny("vit"), tmp_path, push_to_hub=True, hub_strategy="end")
    with pytest.raises(ValueError, match="may not push to facebook"):
        trainer_for(
            *tiny("vit"), tmp_path, push_to_hub=True, hub_strategy="end", hub_token=ANNA, hub_model_id="facebook/x"
        )


def test_a_failed_push_leaves_the_student_on_disk(hub, tmp_path):
    student, processor = tiny("vit", names=NAMES)
    trainer = trainer_for(student, processor, tmp_path / "run", hub_token=ANNA)
    hub.fail("/commit/", 500, times=None)
    assert "fault of its own (500" in told(trainer.push_to_hub)
    opens(tmp_path / "run", None, student, processor)


def test_the_card_is_pushed_with_its_record(hub, tmp_path):
    results = Path(__file__).parents[1] / "benchmarks" / "results" / "quickstart" / "run.json"
    trainer = trainer_for(*tiny("vit", names=NAMES), tmp_path / "run", hub_token=ANNA)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "run.json").write_text(json.dumps(json.loads(results.read_text())["runs"][0]))
    trainer.push_to_hub()
    pushed = hub.files("anna/run")
    assert pushed["README.md"].startswith(b"---\n") and b"run.json" in pushed["README.md"]
    assert pushed["run.json"] == (tmp_path / "run" / "run.json").read_bytes()


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
    values = torch.as_tensor(processor(images=[picture()], return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(its_processor(images=[picture()], return_tensors="pt")["pixel_values"], values)
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
    assert message.startswith("the Hub has a fault of its own (500") and repo_id in message


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


def test_the_disk_is_full(tmp_path):
    """/dev/full refuses every byte, as a full disk does."""
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "loss": "ce"}
    trainer = trainer_for(*tiny("vit", names=NAMES), tmp_path, **settings)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "optimizer.pt").symlink_to("/dev/full")
    assert told(trainer.train) == (
        f"the disk is full: {tmp_path} could not be written. What was complete is safe, the last whole checkpoint "
        "too: make room, and go on with the same command and --resume_from_checkpoint last."
    )
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
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
    assert explain(error) is None
