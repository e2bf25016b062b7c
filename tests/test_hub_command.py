"""The command line against a Hub: the command of the README as a user types it, what it pushes, and how it fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from local_hub import LocalHub, cifar100, deit_tiny
from transformers import pipeline

REPOSITORY = Path(__file__).resolve().parents[1]
COMMAND = "accelerate launch examples/run_distill.py --student facebook/deit-tiny-patch16-224 --loss uskd"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Folders with the student and the data set that the command names."""
    folder = tmp_path_factory.mktemp("served")
    return deit_tiny(folder / "deit"), cifar100(folder / "cifar100", 40, 20)


@pytest.fixture
def hub(served, tmp_path):
    with LocalHub(tmp_path / "hub") as hub:
        hub.add_repo("facebook/deit-tiny-patch16-224", served[0])
        hub.add_repo("uoft-cs/cifar100", served[1], repo_type="dataset")
        yield hub


def run(hub, folder, command, token=None, **env):
    """The command in a folder where the repository's examples are, with a cache of its own."""
    folder.mkdir(exist_ok=True)
    if not (folder / "examples").exists():
        (folder / "examples").symlink_to(REPOSITORY / "examples")
    first, *rest = command.split()
    program = Path(sys.executable).parent / first
    env = os.environ | hub.env(folder / "cache", token) | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"} | env
    return subprocess.run([program, *rest], cwd=folder, env=env, capture_output=True, text=True, timeout=600)


def test_the_literal_command(hub, tmp_path):
    done = run(hub, tmp_path / "user", COMMAND)
    assert done.returncode == 0, done.stderr[-3000:]
