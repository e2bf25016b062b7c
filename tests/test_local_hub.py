"""The local Hub through the real clients: what they load, upload and raise."""

import hashlib
import http.client
import json
import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import timm
import torch
from datasets import load_dataset
from datasets.exceptions import DatasetNotFoundError
from hub_routes import Handler
from huggingface_hub import HfApi, constants, errors, get_safetensors_metadata, hf_hub_download, snapshot_download
from local_hub import LocalHub, cifar100, deit_tiny
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

DEIT, CIFAR = "facebook/deit-tiny-patch16-224", "uoft-cs/cifar100"
FILES = {"config.json": "{}", "weights.safetensors": bytes(range(256)) * 40}


@pytest.fixture(scope="module")
def deit(tmp_path_factory):
    return deit_tiny(tmp_path_factory.mktemp("deit"))


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    return cifar100(tmp_path_factory.mktemp("cifar100"), n_train=120, n_test=30)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The only Hub that this process knows, without a token; it knows anna, who is also in kd-lab, and bob."""
    with LocalHub(tmp_path / "hub") as hub:
        hub.patch(monkeypatch, tmp_path / "cache")
        hub.add_token("hf_anna", "anna", orgs=["kd-lab"])
        hub.add_token("hf_bob", "bob")
        yield hub


@pytest.fixture
def anna(hub):
    return HfApi(endpoint=hub.endpoint, token="hf_anna")


@pytest.fixture
def naps(monkeypatch):
    """How long the clients would have slept, in seconds."""
    naps = []
    monkeypatch.setattr(time, "sleep", naps.append)
    return naps


def ask(hub, method, path, body=None, **headers):
    """`(status, headers, body)` of a plain request."""
    with closing(http.client.HTTPConnection(hub.endpoint.removeprefix("http://"))) as connection:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()


def contents_asked(hub):
    return [path for method, path in hub.requests if method == "GET" and ("/lfs/" in path or "/resolve/" in path)]


def test_transformers_loads_the_model_at_its_commit(hub, deit, tmp_path):
    sha = hub.add_repo(DEIT, deit)
    model = AutoModelForImageClassification.from_pretrained(DEIT)
    processor = AutoImageProcessor.from_pretrained(DEIT)
    there = AutoModelForImageClassification.from_pretrained(deit)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), there.parameters(), strict=True))
    assert (type(model).__name__, model.config.num_labels) == ("ViTForImageClassification", 1000)
    assert model.config.id2label[0] == "tench, Tinca tinca"
    assert processor(Image.new("RGB", (50, 40)), return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)
    assert "vit.encoder.layer.2.attention.attention.query.weight" in load_file(deit / "model.safetensors")
    snapshots = tmp_path / "cache" / "hub" / "models--facebook--deit-tiny-patch16-224" / "snapshots"
    assert [folder.name for folder in snapshots.iterdir()] == [sha]


def test_second_load_asks_for_no_content(hub, deit):
    hub.add_repo(DEIT, deit)
    AutoModelForImageClassification.from_pretrained(DEIT)
    assert len(contents_asked(hub)) == 2  # config and weights
    hub.requests.clear()
    AutoModelForImageClassification.from_pretrained(DEIT)
    assert hub.requests and not contents_asked(hub)


def test_new_commit_fetches_only_what_changed(hub):
    first = hub.add_repo("anna/x", FILES)
    old = Path(snapshot_download("anna/x"))
    second = hub.add_repo("anna/x", FILES | {"config.json": '{"a": 1}'})
    hub.requests.clear()
    new = Path(snapshot_download("anna/x"))
    assert (old.name, new.name) == (first, second)
    assert contents_asked(hub) == [f"/anna/x/resolve/{second}/config.json"]
    assert ((old / "config.json").read_text(), (new / "config.json").read_text()) == ("{}", '{"a": 1}')
    assert (new / "weights.safetensors").read_bytes() == FILES["weights.safetensors"]
    assert Path(hf_hub_download("anna/x", "config.json", revision=first)).read_text() == "{}"
    assert hub.files("anna/x", revision=first)["config.json"] == b"{}"
    assert hub.commits("anna/x") == ["Upload files", "initial commit"]


def test_pipeline_by_id(hub, deit):
    hub.add_repo(DEIT, deit)
    best = pipeline(model=DEIT)(Image.new("RGB", (40, 40)), top_k=2)  # the task is that of the card
    assert len(best) == 2 and best[0]["score"] >= best[1]["score"] > 0


def test_timm_loads_by_hf_hub(hub, tmp_path):
    model = timm.create_model("resnet10t", num_classes=4).eval()
    timm.models.save_for_hf(model, tmp_path / "timm", model_config={"num_classes": 4}, safe_serialization=True)
    hub.add_repo("anna/r10", tmp_path / "timm")
    loaded = timm.create_model("hf_hub:anna/r10", pretrained=True).eval()
    x = torch.rand(1, 3, 64, 64)
    assert loaded.num_classes == 4
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)  # its weights are mapped


def test_datasets_loads_all_and_streams(hub, cifar):
    sha = hub.add_repo(CIFAR, cifar, repo_type="dataset")
    hub.add_repo(CIFAR, {"README.md": "nothing left"}, repo_type="dataset")
    data = load_dataset(CIFAR, revision=sha)
    assert {split: len(rows) for split, rows in data.items()} == {"train": 120, "test": 30}
    features = data["train"].features
    assert list(features) == ["img", "fine_label", "coarse_label"]
    assert (features["fine_label"].num_classes, features["coarse_label"].num_classes) == (100, 20)
    assert features["fine_label"].int2str(99) == "worm" and data["test"][0]["img"].size == (32, 32)
    streamed = list(load_dataset(CIFAR, revision=sha, streaming=True, split="test"))
    assert [row["fine_label"] for row in streamed] == data["test"]["fine_label"][:]
    assert streamed[3]["img"].tobytes() == data["test"][3]["img"].tobytes()


@pytest.mark.slow
def test_process_with_env_knows_this_hub_alone(tmp_path, deit, cifar):
    script = """
from datasets import load_dataset
from huggingface_hub import HfApi
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained("facebook/deit-tiny-patch16-224")
assert len(load_dataset("uoft-cs/cifar100", split="test")) == 30
model.push_to_hub("student", commit_message="of a process")
assert HfApi().whoami()["name"] == "anna"
"""
    with LocalHub(tmp_path / "hub") as hub:
        hub.add_repo(DEIT, deit)
        hub.add_repo(CIFAR, cifar, repo_type="dataset")
        hub.add_token("hf_anna", "anna")
        env = hub.env(tmp_path / "cache", token="hf_anna")
        subprocess.run([sys.executable, "-c", script], env=os.environ | {"HF_TOKEN": "hf_other"} | env, check=True)
        assert hub.commits("anna/student") == ["of a process", "initial commit"]
        assert "model.safetensors" in hub.files("anna/student")
        folders = {path.name for path in (tmp_path / "cache" / "hub").glob("*--*")}
        assert {"models--facebook--deit-tiny-patch16-224", "datasets--uoft-cs--cifar100"} <= folders


# Uploads.


def test_upload_folder_by_lfs_and_plainly(hub, anna, tmp_path):
    big = os.urandom(11 * 2**20)
    given = {"config.json": b"{}", "sub/notes.txt": b"hi", "model.safetensors": b"small", "big": big, "empty.bin": b""}
    for name, data in given.items():
        path = tmp_path / "up" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert str(anna.create_repo("student", private=True)) == f"{hub.endpoint}/anna/student"
    info = anna.upload_folder(repo_id="anna/student", folder_path=tmp_path / "up", commit_message="All")
    files = hub.files("anna/student")
    assert files.pop(".gitattributes") and files == given
    assert hub.commits("anna/student") == ["All", "initial commit"]
    listed = {e.path: e for e in anna.list_repo_tree("anna/student", recursive=True) if hasattr(e, "size")}
    assert {path for path, e in listed.items() if e.lfs} == {"big", "model.safetensors"}
    assert listed["big"].lfs.sha256 == hashlib.sha256(big).hexdigest() and listed["big"].size == len(big)
    assert info.oid == anna.model_info("anna/student").sha
    sent = {path for method, path in hub.requests if method == "PUT"}
    assert sent == {f"/lfs/{hashlib.sha256(data).hexdigest()}" for data in (big, b"small")}
    hub.requests.clear()  # the same again: nothing is sent, and no commit is made
    anna.upload_folder(repo_id="anna/student", folder_path=tmp_path / "up", commit_message="Again")
    assert not [path for method, path in hub.requests if method == "PUT"]
    assert hub.commits("anna/student") == ["All", "initial commit"]
    anna.delete_folder("sub", "anna/student", commit_message="Less")
    assert "sub/notes.txt" not in hub.files("anna/student") and "sub/notes.txt" in hub.files("anna/student", info.oid)
    assert [commit.title for commit in anna.list_repo_commits("anna/student")] == ["Less", "All", "initial commit"]


def test_branches_tags_and_parents(hub, anna):
    anna.create_repo("kd-lab/x")
    with pytest.raises(errors.RevisionNotFoundError):
        anna.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="kd-lab/x", revision="v2")
    anna.create_branch("kd-lab/x", branch="dev/2")
    commit = anna.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="kd-lab/x", revision="dev/2")
    anna.create_tag("kd-lab/x", tag="best", revision="dev/2")
    refs = anna.list_repo_refs("kd-lab/x")
    heads = {ref.name: ref.target_commit for ref in refs.branches + refs.tags}
    assert heads == {"main": anna.model_info("kd-lab/x").sha, "dev/2": commit.oid, "best": commit.oid}
    assert "a" not in hub.files("kd-lab/x")
    assert Path(hf_hub_download("kd-lab/x", "a", revision="best")).read_bytes() == b"1"
    assert anna.model_info("kd-lab/x", revision=commit.oid[:8]).sha == commit.oid
    with pytest.raises(errors.HfHubHTTPError, match="412"):
        anna.upload_file(path_or_fileobj=b"2", path_in_repo="a", repo_id="kd-lab/x", parent_commit=commit.oid)
    anna.delete_branch("kd-lab/x", branch="dev/2")
    anna.delete_repo("kd-lab/x")
    with pytest.raises(errors.RepositoryNotFoundError):
        anna.model_info("kd-lab/x")


def test_damaged_and_missing_lfs_content_is_refused(hub, anna):
    anna.create_repo("anna/x")
    sha = hashlib.sha256(b"right").hexdigest()
    assert ask(hub, "PUT", f"/lfs/{sha}", b"wrong")[0] == 400
    assert ask(hub, "POST", "/lfs/verify", json.dumps({"oid": sha, "size": 5}))[0] == 404
    file = {"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": sha, "size": 5}}
    body = "\n".join(map(json.dumps, [{"key": "header", "value": {"summary": "?"}}, file]))
    path, login = "/api/models/anna/x/commit/main", "Bearer hf_anna"
    status, _, answer = ask(hub, "POST", path, body, Authorization=login)
    assert status == 400 and b"a.bin" in answer and hub.commits("anna/x") == ["initial commit"]
    assert ask(hub, "PUT", f"/lfs/{sha}", b"right")[0] == 200
    assert ask(hub, "POST", path, body, Authorization=login)[0] == 200
    assert hub.files("anna/x")["a.bin"] == b"right"


def test_headers_of_files_follow_git_and_sha256(hub):
    sha = hub.add_repo("anna/x", {"a.txt": "hello\n", "a.bin": b"hello\n"})
    status, headers, body = ask(hub, "HEAD", "/anna/x/resolve/main/a.txt")
    assert (status, body, headers["Content-Length"], headers["X-Repo-Commit"]) == (200, b"", "6", sha)
    assert headers["ETag"] == '"ce013625030ba8dba906f756967f9e9ca394464a"'  # of `git hash-object`
    status, headers, _ = ask(hub, "HEAD", "/anna/x/resolve/main/a.bin")
    sha256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"  # of `sha256sum`
    assert (status, headers["X-Linked-Etag"], headers["X-Linked-Size"]) == (302, f'"{sha256}"', "6")
    path = headers["Location"].removeprefix(hub.storage)
    assert ask(hub, "GET", path)[2] == b"hello\n"
    assert ask(hub, "GET", path, Authorization="Bearer hf_anna")[0] == 400  # a token that leaves the Hub


@pytest.mark.parametrize("name", ["a.txt", "a.bin"])
def test_ranges(hub, name):
    hub.add_repo("anna/x", {name: "0123456789"})
    path = f"/anna/x/resolve/main/{name}"
    if name == "a.bin":
        path = ask(hub, "GET", path)[1]["Location"].removeprefix(hub.storage)
    for asked, first, last in (("2-4", 2, 4), ("7-", 7, 9), ("-3", 7, 9), ("8-99", 8, 9), ("0-0", 0, 0)):
        status, headers, body = ask(hub, "GET", path, Range=f"bytes={asked}")
        assert (status, headers["Content-Range"]) == (206, f"bytes {first}-{last}/10")
        assert body == b"0123456789"[first : last + 1]
    assert ask(hub, "GET", path, Range="bytes=10-")[0] == 416
    assert ask(hub, "GET", path, Range="pages=1-2")[::2] == (200, b"0123456789")


def test_infos_and_partial_reads(hub, deit):
    hub.add_repo(DEIT, deit)
    info = HfApi().model_info(DEIT, files_metadata=True)
    weights = {file.rfilename: file for file in info.siblings}["model.safetensors"]
    assert (info.pipeline_tag, info.library_name, info.gated) == ("image-classification", "transformers", False)
    assert weights.size == weights.lfs.size == (deit / "model.safetensors").stat().st_size
    assert [file.path for file in HfApi().get_paths_info(DEIT, ["config.json", "none.json"])] == ["config.json"]
    count = sum(tensor.numel() for tensor in load_file(deit / "model.safetensors").values())
    assert sum(get_safetensors_metadata(DEIT).parameter_count.values()) == count
    assert HfApi().repo_exists(DEIT) and not HfApi().file_exists(DEIT, "none.json")


# Who may do what.


def test_what_is_not_there(hub, anna):
    sha = hub.add_repo("anna/x", FILES)
    with pytest.raises(errors.EntryNotFoundError) as error:
        hf_hub_download("anna/x", "none.json")
    assert error.value.response.headers["X-Repo-Commit"] == sha
    with pytest.raises(errors.RevisionNotFoundError):
        hf_hub_download("anna/x", "config.json", revision="v9")
    for token, status in ((None, 401), ("hf_anna", 404)):  # who is not logged in is not told what is private
        with pytest.raises(errors.RepositoryNotFoundError) as error:
            hf_hub_download("anna/y", "config.json", token=token)
        assert error.value.response.status_code == status
        with pytest.raises(errors.RepositoryNotFoundError):
            HfApi(token=token).dataset_info("anna/x")  # which is a model
    with pytest.raises(OSError, match="is not a local folder and is not a valid model identifier"):
        AutoModelForImageClassification.from_pretrained("anna/y")
    assert ask(hub, "GET", "/api/models/anna/x/xet-read-token/main")[0] == 404


def test_private_repositories_show_to_their_owners(hub, anna):
    hub.add_repo("kd-lab/secret", FILES, private=True)
    assert anna.model_info("kd-lab/secret").private
    for token in (None, "hf_bob"):
        with pytest.raises(errors.RepositoryNotFoundError):
            hf_hub_download("kd-lab/secret", "config.json", token=token)
    assert Path(hf_hub_download("kd-lab/secret", "weights.safetensors", token="hf_anna")).exists()
    assert [model.id for model in anna.list_models(search="secret")] == ["kd-lab/secret"]
    assert not list(HfApi().list_models(search="secret"))


def test_gated_repositories_open_to_those_granted(hub, cifar):
    hub.add_repo("kd-lab/gated", FILES, gated=True)
    hub.add_repo(CIFAR, cifar, repo_type="dataset", gated="manual")
    assert HfApi().model_info("kd-lab/gated").gated == "auto"  # to see that it is there is free
    for token, status in ((None, 401), ("hf_bob", 403)):
        with pytest.raises(errors.GatedRepoError) as error:
            hf_hub_download("kd-lab/gated", "config.json", token=token)
        assert error.value.response.status_code == status
        with pytest.raises(errors.GatedRepoError):
            HfApi(token=token).auth_check("kd-lab/gated")
        with pytest.raises(DatasetNotFoundError, match="gated dataset"):
            load_dataset(CIFAR, token=token)
    with pytest.raises(OSError, match="gated repo"):
        AutoModelForImageClassification.from_pretrained("kd-lab/gated")
    assert hf_hub_download("kd-lab/gated", "config.json", token="hf_anna")  # of the organisation
    hub.grant("kd-lab/gated", "bob")
    hub.grant(CIFAR, "bob", repo_type="dataset")
    assert hf_hub_download("kd-lab/gated", "weights.safetensors", token="hf_bob")
    assert len(load_dataset(CIFAR, token="hf_bob", split="test")) == 30


def test_revoked_token(hub, anna):
    hub.add_repo("anna/x", FILES)
    assert anna.whoami()["name"] == "anna"
    hub.revoke("hf_anna")
    with pytest.raises(errors.HfHubHTTPError, match="Invalid user token"):
        anna.whoami()
    for call in (anna.model_info, anna.create_repo, lambda id: hf_hub_download(id, "config.json", token="hf_anna")):
        with pytest.raises(errors.HfHubHTTPError) as error:
            call("anna/x")
        assert error.value.response.status_code == 401
        assert not isinstance(error.value, errors.RepositoryNotFoundError)


@pytest.mark.parametrize(
    "role, scopes, orgs, allowed",
    [
        ("write", None, [], {"anna/x"}),
        ("write", None, ["kd-lab"], {"anna/x", "kd-lab/x"}),
        ("write", None, {"kd-lab": "read"}, {"anna/x"}),
        ("read", None, ["kd-lab"], set()),
        ("fineGrained", {"user:anna": ["repo.write"]}, ["kd-lab"], {"anna/x"}),
        ("fineGrained", {"org:kd-lab": ["repo.write"]}, ["kd-lab"], {"kd-lab/x"}),
        ("fineGrained", {"org:kd-lab": ["repo.write"]}, {"kd-lab": "read"}, set()),
        ("fineGrained", {"user:anna": ["repo.content.read"]}, [], set()),
        ("fineGrained", {"model:anna/x": ["repo.write"]}, [], {"anna/x"}),
        ("fineGrained", {"dataset:anna/x": ["repo.write"]}, [], set()),
    ],
)
def test_scopes_say_where_a_token_may_write(hub, anna, role, scopes, orgs, allowed):
    hub.add_token("hf_asked", "anna", role, scopes, orgs)
    api, found = HfApi(token="hf_asked"), set()
    for id in ("anna/x", "kd-lab/x", "bob/x"):
        try:
            api.create_repo(id)
            api.auth_check(id, write=True)
            api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=id)
            found.add(id)
        except errors.HfHubHTTPError as error:
            assert error.response.status_code == 403 and "namespace" in str(error)
            assert ("model", id) not in hub.repos
            hub.add_repo(id, {})
            with pytest.raises(errors.HfHubHTTPError, match="403 Forbidden"):
                api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=id)
    assert found == allowed
    me = api.whoami()
    assert (me["auth"]["accessToken"]["role"], [org["name"] for org in me["orgs"]]) == (role, list(orgs))
    scoped = me["auth"]["accessToken"].get("fineGrained", {}).get("scoped", [])
    assert {f"{s['entity']['type']}:{s['entity']['name']}": s["permissions"] for s in scoped} == (scopes or {})


def test_search_finds_by_words_of_the_id(hub, anna):
    for id in (DEIT, "facebook/deit-small-patch16-224", "google/vit-base"):
        hub.add_repo(id, {})
    hub.add_repo("anna/deit-data", {}, repo_type="dataset")
    assert {model.id for model in HfApi().list_models(search="deit 224")} == {DEIT, "facebook/deit-small-patch16-224"}
    assert [model.id for model in HfApi().list_models(search="DeiT", limit=1)] == [DEIT]
    assert [model.id for model in HfApi().list_models(author="google")] == ["google/vit-base"]
    assert [data.id for data in HfApi().list_datasets(search="deit")] == ["anna/deit-data"]


# Faults.


def test_rate_limit_is_waited_for_and_then_raised(hub, anna, naps):
    anna.create_repo("anna/x")
    fault = hub.fail(r"POST .*/preupload/", 429, times=2)
    anna.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="anna/x")
    assert fault.hits == 2 and naps == [2.0, 2.0]  # Retry-After: 1, and the client adds one
    hub.fail(r"GET /api/models/", 429, times=None)
    with pytest.raises(errors.HfHubHTTPError) as error:
        anna.model_info("anna/x")
    assert error.value.response.headers["Retry-After"] == "1"


@pytest.mark.parametrize("kind, error", [(401, "HfHubHTTP"), (403, "GatedRepo"), (404, "RepositoryNotFound")])
def test_planned_refusals_of_reading(hub, kind, error):
    hub.add_repo("anna/x", FILES)
    fault = hub.fail("/api/models/anna/x", kind)
    with pytest.raises(getattr(errors, f"{error}Error")) as raised:
        HfApi().model_info("anna/x")
    assert (raised.value.response.status_code, fault.hits) == (kind, 1)
    assert HfApi().model_info("anna/x").id == "anna/x"  # once


@pytest.mark.parametrize("kind", [403, 500, "drop"])
def test_failed_commit_leaves_the_repository_as_it_was(hub, anna, naps, kind):
    sha = hub.add_repo("anna/x", FILES)
    hub.fail(r"POST /api/models/anna/x/commit/", kind, times=None)
    with pytest.raises(errors.HTTPError) as error:
        anna.upload_file(path_or_fileobj=b"new", path_in_repo="a.bin", repo_id="anna/x")
    if kind != "drop":
        assert error.value.response.status_code == kind and not isinstance(error.value, errors.GatedRepoError)
    assert anna.model_info("anna/x").sha == sha and "a.bin" not in hub.files("anna/x")


@pytest.mark.parametrize("kind", ["cut", "slow", "stall"])
@pytest.mark.parametrize("name", ["weights.safetensors", "config.json"])
def test_bodies_that_come_badly_arrive_whole(hub, naps, monkeypatch, kind, name):
    if kind == "stall":
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)  # seconds of silence
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what came short of a chunk is asked for again
    monkeypatch.setattr(hub, "delay", 0.0)
    data, ranges, content = os.urandom(100_000), [], Handler.content
    monkeypatch.setattr(Handler, "content", lambda self, *a: ranges.append(self.headers["Range"]) or content(self, *a))
    hub.add_repo("anna/x", {name: data})
    fault = hub.fail(name, kind)
    assert Path(hf_hub_download("anna/x", name)).read_bytes() == data
    assert fault.hits == 1 and ranges[-1] == (None if kind == "slow" else "bytes=50000-")


def test_body_that_is_always_cut_leaves_nothing_behind(hub, naps, tmp_path):
    hub.add_repo("anna/x", FILES)
    hub.fail("GET .*weights", "cut", times=None)
    with pytest.raises(errors.HTTPError) as error:
        hf_hub_download("anna/x", "weights.safetensors")
    assert type(error.value).__name__ == "RemoteProtocolError"  # httpx's before huggingface_hub 2, then httpx2's
    assert not [path for path in tmp_path.rglob("cache/**/*") if path.match("*.incomplete") or path.match("blobs/*")]


def test_hub_that_is_gone(hub, naps):
    hub.add_repo("anna/x", FILES)
    cached = hf_hub_download("anna/x", "config.json")
    hub.close()
    assert hf_hub_download("anna/x", "config.json") == cached
    with pytest.raises(errors.LocalEntryNotFoundError):
        hf_hub_download("anna/x", "weights.safetensors")
    with pytest.raises(ConnectionError):
        ask(hub, "GET", "/api/models")
