"""Every term of the loss reaches the trackers of `--report_to`, and nothing but the run's own folders hears of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from local_hub import LocalHub
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
TERMS = ("ce", "target", "non_target", "weak")
STEPS = (2, 4, 6)
TOKEN = "hf_" + "x" * 34

# In a process of its own, since trackio reads the environment on import. The audit hook sees every connection, every
# look-up of a name, every new process, and every file that Python or sqlite opens to write.
SCRIPT = """
import json, os, sys

seen = {"network": [], "processes": [], "files": []}

def hook(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        seen["network"].append(str(args))
    elif event in ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.system"):
        seen["processes"].append(str(args[:2]))
    elif event == "sqlite3.connect":
        seen["files"].append(os.path.realpath(args[0]))
    elif event == "open" and isinstance(args[0], (str, bytes)) and args[2] & (os.O_WRONLY | os.O_RDWR):
        seen["files"].append(os.path.realpath(os.fsdecode(args[0])))

sys.addaudithook(hook)
from hf_kd.cli import main

for run in json.loads(sys.argv[1]):
    assert main(run) == 0
import psutil

seen["children"] = [child.cmdline() for child in psutil.Process().children(recursive=True)]
print("ANSWER " + json.dumps(seen))
"""
# Afterwards, since trackio writes its last entries when the process ends.
READ = """
import json, trackio
from trackio.sqlite_storage import SQLiteStorage

runs = list(trackio.Api().runs("tiny"))
logs = [[run.name, run.config, SQLiteStorage.get_logs("tiny", run.name, run_id=run.id)] for run in runs]
print("ANSWER " + json.dumps(logs, default=str))
"""


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """`(folder, seen, logs, hub)` of one USKD run for each tracker, as the command line runs it."""
    folder = tmp_path_factory.mktemp("trackers")
    common = "distill --student quickstart/student --dataset quickstart --from_scratch --loss uskd".split()
    common += "--preset none --max_train_samples 96 --max_eval_samples 32 --per_device_train_batch_size 16".split()
    common += "--max_steps 6 --logging_steps 2 --eval_strategy steps --eval_steps 3 --save_strategy no".split()
    common += "--disable_tqdm true --use_cpu --seed 0".split()
    runs = [
        [*common, "--report_to", "tensorboard", "--output_dir", str(folder / "tensorboard")],
        [*common, "--report_to", "trackio", "--output_dir", str(folder / "trackio")]
        + "--project tiny --run_name uskd-0".split(),
    ]
    places = {"HOME": "home", "HF_HOME": "hf", "TRACKIO_DIR": "tracks", "TMPDIR": "tmp", "MPLCONFIGDIR": "mpl"}
    for place in places.values():
        (folder / place).mkdir()
    unset = ("HF_", "HUGGINGFACE", "TRACKIO_", "TENSORBOARD_", "XDG_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(unset)}
    with LocalHub(folder / "hub") as hub:
        # Logged in, and with a Hub that would take an upload.
        hub.add_token(TOKEN, user="anna")
        env |= hub.env(folder / "hf", TOKEN) | {key: str(folder / place) for key, place in places.items()}
        env |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        seen = run_python(SCRIPT, json.dumps(runs), env=env)
        logs = run_python(READ, env=env)
        yield folder, seen, logs, hub


def run_python(code, *argv, env):
    """What the code prints behind ANSWER."""
    command = [sys.executable, "-c", code, *argv]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(next(line[7:] for line in done.stdout.splitlines() if line.startswith("ANSWER ")))


def logged(folder: Path) -> dict[str, dict[int, float]]:
    """What run.json says was logged: for each name its value by step; the terms are there and add up."""
    history = json.loads((folder / "run.json").read_text())["history"]
    values = {}
    for entry in history:
        for key, value in entry.items():
            values.setdefault(key, {})[entry["step"]] = value
    assert tuple(values["loss"]) == STEPS
    for step in STEPS:
        assert sum(values[f"loss_{term}"][step] for term in TERMS) == pytest.approx(values["loss"][step], rel=1e-5)
        assert all(values[f"loss_{term}"][step] > 0 for term in TERMS)
    return values


def test_terms_reach_tensorboard(tracked):
    folder, *_ = tracked
    wanted = logged(folder / "tensorboard")
    (run,) = (folder / "tensorboard" / "runs").iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    for term in TERMS:
        scalars = {event.step: event.value for event in events.Scalars(f"train/loss_{term}")}
        assert scalars == pytest.approx(wanted[f"loss_{term}"], rel=1e-6)  # float32 there
    assert [event.step for event in events.Scalars("eval/top1")] == [3, 6]
    assert events.Scalars("eval/top1")[-1].value == pytest.approx(wanted["eval_top1"][6])


def test_terms_reach_trackio(tracked):
    folder, _, logs, _ = tracked
    wanted = logged(folder / "trackio")
    ((name, _, entries),) = logs  # one run
    assert name == "uskd-0"
    for term in TERMS:
        key = f"train/loss_{term}"
        found = {entry["train/global_step"]: entry[key] for entry in entries if key in entry}
        assert found == pytest.approx(wanted[f"loss_{term}"], rel=1e-12)
    top1 = [(entry["train/global_step"], entry["eval/top1"]) for entry in entries if "eval/top1" in entry]
    assert [step for step, _ in top1] == [3, 6]
    assert top1[-1][1] == wanted["eval_top1"][6]


def test_tracking_stays_on_this_machine(tracked):
    folder, seen, logs, hub = tracked
    # trackio asks who is logged in, and huggingface_hub with the first request for a list of its own. Nothing is sent.
    assert {method for method, _ in hub.requests} <= {"GET"}
    assert {path for _, path in hub.requests} <= {"/api/whoami-v2", "/api/agent-harnesses"}
    host, port = hub.endpoint.removeprefix("http://").split(":")
    assert all(host in address and port in address for address in seen["network"])
    assert TOKEN not in json.dumps(logs)


def test_tracking_leaves_nothing_behind(tracked):
    folder, seen, *_ = tracked
    assert seen["children"] == []
    started = " ".join(seen["processes"])  # others ask ldconfig, fc-list and the like
    assert not [word for word in ("python", "trackio", "tensorboard") if word in started]
    assert [p for p in seen["files"] if not p.startswith((str(folder.resolve()), "/dev/"))] == []
    assert any(path.endswith("tracks/tiny.db") for path in seen["files"])  # the hook does see
