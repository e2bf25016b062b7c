"""What hf_kd relies on in other packages is there, and is in the tables of `_compat`."""

import ast
import functools
import re
from pathlib import Path

import pytest
import transformers
from transformers import Trainer

import hf_kd
from hf_kd import DistillationTrainer, _compat

PACKAGE = Path(hf_kd.__file__).parent
check = functools.partial(_compat.check_upstream.__wrapped__, DistillationTrainer)
TABLES = [*(f"transformers.Trainer.{name}" for name in _compat.OVERRIDDEN), *_compat.USED]


def test_the_installed_packages_are_as_the_tables_say():
    check()


@pytest.mark.parametrize("path", [path for path in TABLES if path.startswith("transformers.Trainer.")])
def test_a_name_that_is_gone_is_found(path, monkeypatch):
    monkeypatch.delattr(Trainer, path.rpartition(".")[2])
    with pytest.raises(RuntimeError, match=rf"{re.escape(path)}, which does not exist in transformers \d"):
        check()


@pytest.mark.parametrize(
    ("name", "doctored", "message"),
    [
        (
            "_save_checkpoint",
            lambda self, model, trial, metrics=None: None,
            "has the parameters (model, trial, metric",
        ),
        ("_save_checkpoint", lambda self, model: None, "has the parameters (model), not (model, trial)"),
        (
            "prediction_step",
            lambda self, inputs, model, prediction_loss_only, ignore_keys=None: None,
            "(inputs, model",
        ),
        ("init_hf_repo", lambda self: None, "has the parameters ()"),
        ("_run_epoch", lambda self, number: None, "does not accept epoch"),
        ("create_accelerator_and_postprocess", lambda self: None, "no longer uses the attribute gather_function"),
    ],
)
def test_another_signature_is_found(name, doctored, message, monkeypatch):
    monkeypatch.setattr(Trainer, name, doctored)
    with pytest.raises(RuntimeError, match=re.escape(message)) as error:
        check()
    assert f"Trainer.{name}" in str(error.value)
    assert f"transformers {transformers.__version__}" in str(error.value)
    assert f"pip install transformers=={_compat.SEEN['transformers']}" in str(error.value)


def test_a_parameter_of_later_versions_may_be_missing(monkeypatch):
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, token=None: None)
    check()


def test_building_a_trainer_checks_once(monkeypatch):
    monkeypatch.setattr(Trainer, "_load_best_model", lambda self, which: None)
    _compat.check_upstream.cache_clear()
    with pytest.raises(RuntimeError, match="_load_best_model"):
        DistillationTrainer(None, None)
    monkeypatch.undo()
    for _ in range(2):
        with pytest.raises(ValueError, match="args must be"):
            DistillationTrainer(None, None)
    assert _compat.check_upstream.cache_info().hits == 1


def test_every_override_of_the_trainer_is_in_a_table():
    for name in vars(DistillationTrainer):
        if not name.startswith("__") and hasattr(Trainer, name):
            assert f"transformers.Trainer.{name}" in TABLES, name


def test_every_private_name_of_another_package_is_in_a_table():
    own, used = set(), {}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                mine = isinstance(node.value, ast.Name) and node.value.id == "self" and isinstance(node.ctx, ast.Store)
                own.add(node.attr) if mine else used.setdefault(node.attr, f"{file.name}:{node.lineno}")
    known = {path.rpartition(".")[2] for path in TABLES} | set(" ".join(_compat.MENTIONED.values()).split())
    assert not {name: place for name, place in used.items() if name not in own | known}
