"""A loss of one's own, from Python and the command line: training, comparison, verdict, card, and refusals."""

import hashlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from model_card_helpers import check_metadata, record
from tiny import tiny
from torch.nn import functional as F
from trainer_helpers import NAMES, config, make_teacher, rows

from hf_kd import DistillationTrainer
from hf_kd.cli import main
from hf_kd.cli.arguments import parse
from hf_kd.experiment.plan import plan
from hf_kd.losses import DistillationLoss, NKDLoss, get_loss, loss_class, loss_source
from hf_kd.reporting.card import model_card
from hf_kd.reporting.collect import make_record
from hf_kd.reporting.significance import verdicts

pytestmark = pytest.mark.usefixtures("undrawn_figures")

ROOT = Path(__file__).parents[1]


class Both(DistillationLoss):
    """The auxiliary head learns from the teacher, too: a loss with a teacher and features."""

    name = "both"
    requires = frozenset({"teacher_logits", "aux_logits"})
    title = "teacher & head [both]"
    formula = "CE + strength · KL(T ‖ S) + strength · KL(T ‖ A)"
    paper = "2606.00001"
    CITATION = "@misc{both}"
    tags = ("knowledge-distillation", "deep-supervision")
    controls = {"3xce": {"loss": "ce", "weight": 3.0}}
    seen: list = []

    def __init__(self, strength=1.0, label_smoothing=0.0):
        super().__init__(label_smoothing)
        self.strength = strength

    def method_terms(self, student_logits, labels, teacher_logits, aux_logits):
        self.seen.append(self.progress)
        target = teacher_logits.softmax(1)
        terms = {"teacher": F.cross_entropy(student_logits, target), "aux": F.cross_entropy(aux_logits, target)}
        return {name: self.strength * term for name, term in terms.items()}


def own_trainer(folder, loss=None, student="resnet", teacher=True, evaluation=None, settings=None, **kwargs):
    model, processor = tiny(student, names=NAMES)
    if "model_init" in kwargs:
        model = None
    return DistillationTrainer(
        model,
        config(folder, **(settings or {})),
        teacher=make_teacher() if teacher else None,
        train_dataset=rows(),
        eval_dataset=evaluation,
        processing_class=processor,
        loss=loss,
        **kwargs,
    )


# ---- from Python ----


def test_a_loss_with_a_teacher_and_a_head_trains_and_is_recorded(tmp_path):
    trainer = own_trainer(tmp_path, Both(0.5, label_smoothing=0.1), evaluation=rows(12, seed=1))
    given = trainer.args
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert not torch.equal(trainer.auxiliary_head.weight, before["aux_head.weight"])
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3 and {"loss_ce", "loss_teacher", "loss_aux"} <= logs[0].keys()
    run = make_record(trainer)
    assert (run["name"], run["loss"]) == ("both", {"name": "both", "strength": 0.5, "label_smoothing": 0.1})
    assert (run["settings"]["loss"], run["settings"]["loss_kwargs"]["strength"]) == ("both", 0.5)
    assert run["loss_description"]["controls"] == Both.controls
    card = model_card(run)
    assert "with teacher & head \\[both\\] from" in card
    assert f"{Both.formula} From [arXiv:2606.00001](https://arxiv.org/abs/2606.00001)." in card
    assert "```bibtex\n@misc{both}\n```" in card
    assert check_metadata(card)["tags"] == [
        "hf_kd",
        "generated_from_trainer",
        "knowledge-distillation",
        "deep-supervision",
        "both",
    ]
    assert given.build_loss() is trainer.train_loss


def test_an_instance_leaves_the_arguments_as_they_were(tmp_path):
    student, processor = tiny("vit", names=NAMES)
    args = config(tmp_path, loss="ce")
    trainer = DistillationTrainer(
        student, args, make_teacher(), processing_class=processor, loss=NKDLoss(gamma=0.7), train_dataset=rows()
    )
    assert (args.loss, args.loss_kwargs, args.build_loss().name) == ("ce", None, "ce")
    assert (trainer.args.loss, trainer.args.loss_kwargs["gamma"]) == ("nkd", 0.7)


def test_the_progress_is_that_of_the_training_after_a_resume_too(tmp_path):
    """24 rows in batches of 4, two for a step: three steps an epoch, of which a run does seven."""

    def progress(folder):
        Both.seen.clear()
        settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 7}
        trainer = own_trainer(folder, Both(), settings={**settings, "save_strategy": "steps", "save_steps": 4})
        trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
        return list(Both.seen)

    whole = progress(tmp_path)
    assert whole == [(float(step), 7.0, step / 3) for step in range(7) for _ in range(2)]
    assert whole[6].epoch == 1.0
    for file in sorted((tmp_path / "checkpoint-7").rglob("*"), reverse=True):
        file.unlink()
    assert progress(tmp_path) == whole[8:]


def test_the_progress_recompiles_no_loss_that_does_not_read_it():
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    counter, loss = CompileCounter(), NKDLoss()
    compiled = torch.compile(loss, backend=counter)
    for step in range(4):
        loss.progress = loss.progress._replace(step=float(step), max_steps=9.0, epoch=step / 3)
        compiled(torch.randn(4, 6), torch.arange(4), teacher_logits=torch.randn(4, 6))
    assert counter.frame_count == 1


@pytest.mark.parametrize("loss", ["uskd", "nkd"])
def test_model_init_trains_as_the_model_itself_does(loss, tmp_path):
    made = []

    def model_init():
        made.append(tiny("resnet", names=NAMES)[0])
        return made[-1]

    weights = []
    for name, more in (("model", {}), ("init", {"model_init": model_init})):
        trainer = own_trainer(tmp_path / name, teacher=loss == "nkd", settings={"loss": loss}, **more)
        trainer.train()
        head = trainer.auxiliary_head
        weights.append(trainer.model.state_dict() | ({} if head is None else head.state_dict()))
        assert (head is None) == (loss != "uskd") and not any(hasattr(student, "aux_head") for student in made)
    assert len(made) == 2 and trainer.model is made[1]  # for the constructor, and by the Trainer for train()
    assert weights[0].keys() == weights[1].keys()
    for key in weights[0]:
        torch.testing.assert_close(weights[0][key], weights[1][key], rtol=1e-5, atol=1e-6, msg=key)


class NeedsMore(DistillationLoss):
    name, requires = "more", frozenset({"teacher_logits", "features"})


class Stateful(DistillationLoss):
    name = "stateful"

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))


class Forgetful(DistillationLoss):
    name = "forgetful"

    def __init__(self, power=2.0):
        super().__init__()


@pytest.mark.parametrize(
    ("loss", "more", "message"),
    [
        (
            NeedsMore(),
            {},
            "'more' requires features; a trainer has teacher_logits, aux_logits, dist",
        ),
        (Stateful(), {"teacher": False}, "'stateful' has a state.*'scale'"),
        (Forgetful(), {"teacher": False}, "does not keep its argument power: set self.power"),
        ("nkd", {}, "is no subclass of hf_kd.losses.DistillationLoss"),
        (Both(), {"teacher": False}, "loss='both' learns from a teacher and none is given"),
        (Both(), {"settings": {"label_smoothing_factor": 0.1}}, "leave label_smoothing_factor out"),
        (None, {"compute_loss_func": lambda *args: 0}, "compute_loss_func= would not be called: pass loss="),
    ],
)
def test_what_would_not_do_what_it_says_is_refused(loss, more, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        own_trainer(tmp_path, loss, **more)


# ---- names of classes ----


def test_a_name_is_a_loss_of_hf_kd_a_module_or_a_file(tmp_path, monkeypatch):
    text = "from hf_kd.losses import DistillationLoss\nclass Plain(DistillationLoss):\n    name = 'plain'\n"
    file = tmp_path / "own_module.py"
    file.write_text(text)
    cls = loss_class(f"{file}:Plain")
    assert cls.name == "plain" and loss_class(f"{file}:Plain") is cls  # run once
    assert loss_source(f"{file}:Plain") == loss_source(cls)
    assert loss_source(cls) == {"path": str(file), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    file.write_text(text.replace("'plain'", "'other'"))
    assert loss_class(f"{file}:Plain").name == "other"
    monkeypatch.syspath_prepend(str(tmp_path))
    assert loss_source("own_module:Plain")["path"] == str(file) and "own_module" not in sys.modules
    assert get_loss("own_module:Plain", label_smoothing=0.1).hyperparameters() == {"label_smoothing": 0.1}
    assert loss_class("nkd") is NKDLoss and loss_source("nkd") is loss_source(NKDLoss) is None
    assert loss_source("no.such.module:Plain") is None


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("", "nkdd", "unknown loss 'nkdd': did you mean nkd.*package.module:Class or file.py:Class"),
        ("", "none.py:Loss", "none.py cannot be read: No such file"),
        (
            "",
            "no_such_package.module:Loss",
            "cannot be imported.*name its file",
        ),
        ("", "FILE:Loss", "has no class Loss; it has no subclass of DistillationLoss"),
        ("class Plain(DistillationLoss): name = 'p'", "FILE:Plian", "has no class Plian; it has Plain"),
        ("class Loss: pass", "FILE:Loss", "is no subclass of hf_kd.losses.DistillationLoss"),
        ("class Loss(DistillationLoss): pass", "FILE:Loss", "has name = '': give the class a `name`"),
        ("class Loss(DistillationLoss): name = 'a/b'", "FILE:Loss", "has name = 'a/b'"),
        ("class Loss(DistillationLoss): name = 'kd'", "FILE:Loss", "has the name 'kd' of a loss of hf_kd"),
    ],
)
def test_a_name_that_is_none_is_refused(text, name, message, tmp_path):
    (tmp_path / "own.py").write_text(f"from hf_kd.losses import DistillationLoss\n{text}\n")
    with pytest.raises(ValueError, match=message):
        get_loss(name.replace("FILE", str(tmp_path / "own.py")))


def test_nothing_is_imported_because_a_record_names_it(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("evil:Loss", f"{tmp_path}/evil.py:Loss"):
        run = {**record("nkd"), "loss": {"name": name, "weight": 2.0}}
        assert "Loss`, by [hf_kd](" in model_card(run)
        both = [{**run, "name": name, "seed": seed} for name in ("ce", "own") for seed in (0, 1)]
        assert [verdict["loss"] for verdict in verdicts(both)] == ["own"]


# ---- from the command line ----


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "data").mkdir()
    for split, n in (("train", 24), ("test", 12)):
        rows(n, seed=n).to_parquet(folder / "data" / f"{split}.parquet")
    for name, kind in (("student", "vit"), ("teacher", "resnet")):
        for part in tiny(kind, names=NAMES):
            part.save_pretrained(folder / name)
    return folder


def command(folder, out, *more):
    arguments = {"student": folder / "student", "dataset": folder / "data", "teacher": folder / "teacher"}
    arguments |= {"preset": "none", "augment": "none", "max_steps": 3, "per_device_train_batch_size": 8}
    arguments |= {"disable_tqdm": "true", "save_strategy": "no", "output_dir": out, "learning_rate": 0.01}
    options = [text for key, value in arguments.items() for text in (f"--{key}", str(value))]
    return ["--from_scratch", "--use_cpu", *options, *more]


def distill(*arguments):
    return main(["distill", *command(*arguments)])


def test_a_verdict_on_a_loss_of_a_file(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    more = ["--loss", f"{__file__}:Both", "--loss_kwargs", '{"strength": 0.5}', "--verdict", "--seeds", "1", "2"]
    assert distill(folders, out, *more) == 0
    comparison = json.loads((out / "run.json").read_text())
    assert [run["name"] for run in comparison["runs"]] == ["ce", "3xce", "both"] * 2
    (verdict,) = comparison["verdicts"]
    assert (verdict["loss"], [test["against"] for test in verdict["tests"]]) == ("both", ["ce", "3xce"])
    assert verdict["sentence"] in capsys.readouterr().out
    text = (out / "both" / "seed-1" / "run.json").read_text()
    run = json.loads(text)
    assert run["loss"] == {"name": "both", "strength": 0.5, "label_smoothing": 0.0}
    assert run["settings"]["loss"] == "test_own_loss.py:Both" and str(Path(__file__).parent) not in text
    card = (out / "both" / "seed-1" / "README.md").read_text()
    assert Both.formula in card and "against `3xce`" in card and "control `3xce`" in card and "did not help" in card


@pytest.mark.parametrize("how", [["--loss", "nkd", "--verdict"], ["--compare", f"nkd,{__file__}:Both"]])
def test_a_loss_of_a_file_is_a_baseline_by_its_name(how, folders, tmp_path):
    script, config = parse(command(folders, tmp_path / "out", *how, "--against", f"{__file__}:Both"))
    experiment = plan(script, config)
    assert experiment.against == "both" in {run.name for run in experiment.runs}


def test_a_loss_of_a_file_is_resumed_from_any_folder(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)
    assert distill(folders, tmp_path / "out", "--loss", "test_own_loss.py:Both") == 0
    (tmp_path / "out" / "run.json").unlink()
    monkeypatch.chdir(tmp_path)
    assert main(["resume", "out"]) == 0
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    assert settings["loss"] == "test_own_loss.py:Both"


def test_readme_s_own_loss_runs_as_it_stands(folders, tmp_path):
    section = (ROOT / "README.md").read_text().split("## Your own loss")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 16
    file = tmp_path / "my_loss.py"
    file.write_text(code)
    assert f"my_loss.py:{loss_class(f'{file}:LogitMatching').__name__}" in section
    out = tmp_path / "out"
    assert distill(folders, out, "--compare", f"ce,{file}:LogitMatching") == 0
    assert [run["name"] for run in json.loads((out / "run.json").read_text())["runs"]] == ["ce", "mse"]
    assert "logit matching" in (out / "mse" / "README.md").read_text()

    exec(code, names := {})
    trainer = own_trainer(tmp_path / "python", names["LogitMatching"](weight=0.5), "vit")
    trainer.train()
    terms = [entry["loss_mse"] for entry in trainer.state.log_history if "loss" in entry]
    assert terms[0] == 0 < terms[1]  # the weight grows from 0


def test_losses_import_torch_and_nothing_above_them():
    for file in (ROOT / "hf_kd" / "losses").glob("*.py"):
        names = re.findall(r"^\s*(?:from|import) (\.*[a-z_]\w*|\.+)", file.read_text(), re.M)
        allowed = {*sys.stdlib_module_names, "torch", "numpy"}
        assert not [name for name in names if name.startswith("..") or (name[0] != "." and name not in allowed)], file
