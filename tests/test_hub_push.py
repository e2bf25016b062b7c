"""What is saved opens everywhere, and what is pushed to the Hub and what is not."""

import json
import pickle
import re
from pathlib import Path

import hub_helpers
import hub_routes
import huggingface_hub
import pytest
import timm
import torch
from hub_helpers import ANNA, NAMES, image, logits, told, trainer_for
from safetensors.torch import load_file
from tiny import KINDS, tiny
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    DeiTImageProcessor,
    TimmWrapperConfig,
    pipeline,
)

from hf_kd import load_student, load_teacher
from hf_kd.checkpointing import HEAD_FILE
from hf_kd.push import check_push, push

pytestmark = pytest.mark.usefixtures("undrawn_figures")

hub = hub_helpers.hub


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


# Two loads of one model, whose weights may lie in memory differently, and other libraries' arithmetic. A wrong mean or
# one grey level moves the pixel values by more than 1e-3, a wrong head the logits by more than 1e-2.
CLOSE = 1e-5


def opens(name, timm_name, student, processor, atol=CLOSE):
    """A folder or id gives the student's classes, pixels and logits in transformers, and in timm if it is timm's."""
    own = torch.as_tensor(processor(images=[image()], return_tensors="pt")["pixel_values"])
    expected = logits(student, own)
    model = AutoModelForImageClassification.from_pretrained(name)
    values = AutoImageProcessor.from_pretrained(name)(images=[image()], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(torch.as_tensor(values), own, rtol=0, atol=atol)
    torch.testing.assert_close(logits(model, own), expected, rtol=CLOSE, atol=CLOSE)
    assert model.config.id2label == dict(enumerate(NAMES))
    answers = pipeline("image-classification", name, top_k=6)(image())
    scores = dict(zip(NAMES, expected[0].softmax(0).tolist(), strict=True))
    assert {answer["label"]: answer["score"] for answer in answers} == pytest.approx(scores, abs=atol)
    if not hasattr(student, "timm_model"):
        return
    model = timm.create_model(timm_name, pretrained=True)
    config = timm.data.resolve_model_data_config(model)
    values = timm.data.create_transform(**config, is_training=False)(image())[None]
    torch.testing.assert_close(values, own, rtol=0, atol=atol)
    torch.testing.assert_close(logits(model, own), expected, rtol=CLOSE, atol=CLOSE)
    assert model.pretrained_cfg["label_names"] == NAMES and model.num_classes == 6
    assert timm.create_model(timm_name, pretrained=True, num_classes=9).num_classes == 9  # to be fine-tuned


def test_a_saved_student_opens_in_both_libraries(saved):
    folder, student, processor = saved
    opens(folder, f"local-dir:{folder}", student, processor)
    again, its_processor = load_student(folder)
    values = torch.as_tensor(its_processor(images=[image()], return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(logits(again, values), logits(student, values), rtol=CLOSE, atol=CLOSE)
    assert load_teacher(folder, id2label=NAMES).id2label == dict(enumerate(NAMES))
    weights = load_file(folder / "model.safetensors")
    assert not any("aux_head" in name for name in weights)


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
    (folder / HEAD_FILE).write_bytes(b"auxiliary head")
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


@pytest.mark.parametrize(("fault", "message"), [(500, "server error"), (429, "Wait 1 s"), ("drop", "broke off")])
def test_a_push_that_cannot_be_checked(fault, message, hub):
    hub.fail("whoami", fault, times=None)
    with pytest.raises(ValueError, match=f"can't push to student: .*{message}"):
        check_push("student", ANNA)


@pytest.mark.parametrize("missing", ["auth_check", "whoami"])
def test_a_mirror_that_cannot_be_asked_is_a_warning(missing, hub, caplog, monkeypatch):
    monkeypatch.setattr("hub_routes.ROUTES", [route for route in hub_routes.ROUTES if route[-1] != missing])
    assert check_push("anna/student", ANNA) == "anna/student"
    (record,) = caplog.records
    assert "could not check whether you may push to anna/student" in record.getMessage()
    if missing == "whoami":
        with pytest.raises(ValueError, match="can't push to student: .*Set --hub_model_id OWNER/NAME"):
            check_push("student", ANNA)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("deit uskd", "deit-uskd"),
        ("Übungsläufe/größe 3", "groe-3"),
        ("..versteckt--a..b-", "versteckt-a.b"),
        ("x" * 200, "x" * 90),
        ("日本", "image-classifier"),
        ("mine.git", "mine"),
        ("läufe & 'more' (2)", "laufe-more-2"),
    ],
)
def test_the_default_name_is_valid_whatever_the_folder_is_called(folder, name, hub, tmp_path):
    assert check_push(token=ANNA, folder=tmp_path / folder) == f"anna/{name}"


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
    own |= {"classes.csv"}
    assert files.keys() - {".gitattributes"} <= own and files.keys() >= own - {"preprocessor_config.json"}
    record = json.loads(files["run.json"])
    assert record["metrics"]["loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)
    assert record["repo_id"] == "anna/kd-run"
    assert b"hf_hub:anna/kd-run" in files["README.md"].replace(b"hf-hub", b"hf_hub")


def test_a_trainer_that_cannot_measure_pushes_the_student_alone(hub, tmp_path):
    trainer = trainer_for(*tiny("vit", names=NAMES), tmp_path / "run", hub_token=ANNA)
    trainer.eval_dataset = None
    trainer.push_to_hub()
    assert hub.files("anna/run").keys() - {".gitattributes"} <= {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }


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
    assert "server error (500" in told(trainer.push_to_hub)
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
