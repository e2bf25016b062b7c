"""What importing hf_kd brings in, and which names are public."""

import ast
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import hf_kd

NOTEBOOKS = sorted((Path(hf_kd.__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))
MODULES = (
    "hf_kd",
    "hf_kd.data",
    "hf_kd.losses",
    "hf_kd.metrics",
    "hf_kd.push",
    "hf_kd.reporting",
    "hf_kd.visualization",
)
HEAVY = ("torchvision", "transformers", "timm", "datasets", "accelerate", "evaluate", "matplotlib", "scipy")
# In this order in one process: a later one may bring in what an earlier one may not.
ABSENT = {
    "hf_kd": ("torch", "numpy", *HEAVY),
    "hf_kd._compat": ("torch", "numpy", *HEAVY),
    "hf_kd.reporting": ("torch", "numpy", *HEAVY),
    "hf_kd.losses": HEAVY,
    "hf_kd.metrics": HEAVY,
    "hf_kd.push": HEAVY,
    "hf_kd.config": ("torchvision", "timm", "datasets", "evaluate", "matplotlib", "scipy"),
    "hf_kd.trainer": ("timm", "evaluate", "matplotlib"),
    "hf_kd.visualization": ("timm", "evaluate", "matplotlib"),
}


def test_an_import_brings_in_no_more_than_it_needs():
    code = f"""
import importlib, sys
sys.modules["peft"] = None  # where it is installed, transformers imports it, and it torchvision and scipy
for module, absent in {ABSENT}.items():
    importlib.import_module(module)
    found = sys.modules.keys() & set(absent)
    assert not found, f"{{module}} brings in {{sorted(found)}}"
"""
    run = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("module", MODULES)
def test_public_names_exist_and_are_documented(module):
    module = importlib.import_module(module)
    assert module.__doc__ and module.__all__
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        value = getattr(module, name)
        assert name in dir(module)
        assert not callable(value) or inspect.getdoc(value), name


@pytest.mark.parametrize("module", ["hf_kd", "hf_kd.reporting"])
def test_type_checkers_see_the_names_that_are_imported_late(module):
    module = importlib.import_module(module)
    (block,) = (node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.If))
    assert {alias.name for node in block.body for alias in node.names} == set(module.__all__)
    with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'nothing'"):
        _ = module.nothing


def test_the_version_is_a_literal():
    assert f'__version__ = "{hf_kd.__version__}"' in Path(hf_kd.__file__).read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_use_public_names_only(path):
    cells = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    lines = [line for cell in cells for line in "".join(cell["source"]).splitlines() if line[:1] not in ("%", "!")]
    found = 0
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("hf_kd.") for alias in node.names), ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "hf_kd":
            public = importlib.import_module(node.module).__all__
            for alias in node.names:
                assert alias.name in public, f"{node.module}.{alias.name}"
                found += 1
    assert found >= 8
