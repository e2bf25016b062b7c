"""The notebooks as committed run from the first cell to the last, in an empty folder and without the network."""

import ast
import base64
import io
import json
import os
import re
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from local_hub import LocalHub, cifar100, deit_tiny
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from hf_kd.data import load_data

NOTEBOOKS = Path(__file__).resolve().parents[1] / "examples" / "notebooks"
NKD, USKD = "1_nkd_with_a_teacher.ipynb", "2_uskd_without_a_teacher.ipynb"
TOKEN = "hf_" + "n" * 34
# What a cell ends with that must show an image.
PLOTS = ("show_images", "plot_soft_labels", "plot_uskd_labels", "Image", "plot_confusions", "plot_reliability")


def execute(name, folder, monkeypatch, settings, scrape="{}", **env):
    """`(notebook, scraped)` of a run in `folder`.

    Args:
        settings: code that comes after the cell tagged "parameters".
        scrape: a dict to bring back from the end, with `results`, as code.
    """
    book = nbformat.read(NOTEBOOKS / name, as_version=4)
    (at,) = (i for i, cell in enumerate(book.cells) if "parameters" in cell.metadata.get("tags", ()))
    book.cells.insert(at + 1, new_code_cell(settings))
    scrape = f"{{'python': sys.executable, 'results': results, **{scrape}}}"
    book.cells.append(new_code_cell(f"import json, sys\nprint(json.dumps({scrape}))"))
    for variable in ("HOME", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(variable, str(folder / variable.lower()))
    work = folder / "work"
    work.mkdir()
    # Only the kernel of this environment, whatever others the user has installed under its name.
    specs = KernelSpecManager(kernel_dirs=[])
    client = NotebookClient(
        book,
        km=AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs),
        timeout=240,
        resources={"metadata": {"path": str(work)}},
    )
    client.execute(env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **env})
    scraped = json.loads(book.cells[-1].outputs[0].text)
    assert scraped["python"] == sys.executable
    return book, scraped


def images_of(cell):
    found = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")) for text in found]


def plots(book):
    """Names of the plots, each seen in the output of its cell."""
    names = []
    for cell in book.cells:
        last = ast.parse(cell.source).body[-1] if cell.cell_type == "code" and "%" not in cell.source[:1] else None
        name = getattr(getattr(getattr(last, "value", None), "func", None), "id", None)
        if name in PLOTS:
            (image,) = images_of(cell)
            assert min(image.shape[:2]) > 150 and image.std() > 10, name
            names.append(name)
    return names


def check_outputs(book):
    """Nothing on stderr, no error, no text that looks like a warning."""
    for cell in book.cells:
        for output in cell.get("outputs", ()):
            assert output.output_type != "error" and output.get("name") != "stderr", output
            text = "".join(output.get("data", {}).get("text/plain", output.get("text", "")))
            assert not re.search("Warning:|deprecat|Traceback", text), text


def top1(folder, data):
    """Of a saved model, with transformers alone, on images as they are."""
    model = AutoModelForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    right = []
    for row in data:
        image = next(value for value in row.values() if isinstance(value, Image.Image)).convert("RGB")
        with torch.no_grad():
            logits = model(**processor(image, return_tensors="pt")).logits[0]
        right.append(int(logits.argmax()) == row.get("fine_label", row.get("label")))
    return sum(right) / len(right)


def test_nkd_with_a_teacher(tmp_path, monkeypatch):
    settings = "TRAIN_IMAGES, EVAL_IMAGES = 384, 200\nTRAINING['num_train_epochs'] = 2"
    scrape = "{'same': [sum(p.sum().item() for p in new_student()[0].parameters()) for _ in 'ab']}"
    env = {"HF_KD_SMALL": "1", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    book, scraped = execute(NKD, tmp_path, monkeypatch, settings, scrape, **env)
    check_outputs(book)
    assert plots(book) == [
        "show_images",
        "show_images",
        "plot_soft_labels",
        "Image",
        "plot_confusions",
        "plot_reliability",
    ]
    assert scraped["same"][0] == scraped["same"][1]  # both students start from the same weights
    results = scraped["results"]
    assert set(results) == {"ce", "nkd", "teacher"}
    assert results["teacher"]["top1"] > 0.85 and results["teacher"]["n"] == 200
    assert results["nkd"]["loss"] != results["ce"]["loss"]  # two runs indeed
    for student in ("ce", "nkd"):
        assert {"top1", "top5", "ece", "agreement", "kl"} <= set(results[student])
        assert results[student]["teacher_top1"] == pytest.approx(results["teacher"]["top1"], abs=0.006)  # one of 200
    data = load_data("quickstart", max_eval_samples=200).eval
    assert top1(tmp_path / "work" / "outputs" / "nkd" / "model", data) == pytest.approx(
        results["nkd"]["top1"], abs=0.011
    )
    table = next(
        o.data["text/markdown"]
        for c in book.cells
        for o in c.get("outputs", ())
        if "text/markdown" in o.get("data", {})
    )
    for name in ("ce", "nkd"):
        assert re.search(rf"^\| {name} +\| +{100 * results[name]['top1']:.2f} \|", table, re.M)
    assert "One seed" not in table and "has no error bar" in table


def test_uskd_from_the_hub_to_the_hub(tmp_path, monkeypatch):
    with LocalHub(tmp_path / "hub") as hub:
        hub.add_repo("facebook/deit-tiny-patch16-224", deit_tiny(tmp_path / "deit"))
        hub.add_repo("uoft-cs/cifar100", cifar100(tmp_path / "cifar100"), repo_type="dataset")
        hub.add_token(TOKEN, user="anna")
        settings = "EVAL_IMAGES, PUSH = 60, True\nTRAINING['num_train_epochs'] = 1"
        env = hub.env(tmp_path / "cache", TOKEN)
        book, scraped = execute(USKD, tmp_path, monkeypatch, settings, **env)
        files = hub.files("anna/deit-tiny-cifar100-uskd")
    check_outputs(book)
    assert plots(book) == [
        "show_images",
        "plot_uskd_labels",
        "plot_uskd_labels",
        "Image",
        "plot_confusions",
        "plot_reliability",
    ]
    assert set(scraped["results"]) == {"ce", "2xce", "uskd"}
    assert {path for path in files if "." in path[1:]} == {
        "config.json", "model.safetensors", "preprocessor_config.json", "README.md", "run.json", "curves.png",
        "classes.csv",
    }  # fmt: skip
    pushed = tmp_path / "pushed"
    pushed.mkdir()
    for path, content in files.items():
        (pushed / path).write_bytes(content)
    run = json.loads(files["run.json"])
    assert run["metrics"]["top1"] == pytest.approx(scraped["results"]["uskd"]["top1"])
    assert run["student"]["id"] == "facebook/deit-tiny-patch16-224"
    card = files["README.md"].decode()
    assert "base_model: facebook/deit-tiny-patch16-224" in card and "anna/deit-tiny-cifar100-uskd" in card
    assert len(pipeline("image-classification", model=str(pushed))(Image.new("RGB", (32, 32)), top_k=5)) == 5


@pytest.mark.parametrize("name", [NKD, USKD])
def test_what_is_committed_is_the_small_run_and_tells_nothing_of_the_machine(name):
    text = (NOTEBOOKS / name).read_text()
    assert len(text) < 400_000
    book = nbformat.read(NOTEBOOKS / name, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    check_outputs(book)
    assert len(plots(book)) == 6
    plain = re.sub(r'"image/png": "[^"]*"', "", text)  # whose base64 may spell anything
    for betrayal in (
        r"/(home|root|tmp|work|usr|Users|opt|mnt)/",
        r"127\.0\.0\.1",
        "localhost",
        r"\bhf_[A-Za-z0-9]{20}",
    ):
        assert not re.search(betrayal, plain), betrayal
    assert "The outputs kept in this file are those of the small run" in text
