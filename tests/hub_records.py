"""What the local Hub (local_hub.py) keeps: repositories, commits, files, tokens, faults; how the Hub lists them."""

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

REGULAR_LIMIT = 10 * 2**20  # bytes; larger files are LFS whatever they are called
LFS_SUFFIXES = tuple(
    ".safetensors .bin .pt .pth .ckpt .h5 .onnx .msgpack .parquet .arrow .npz .zip .gz .tar .png .jpg".split()
)
BODY_FAULTS = ("cut", "slow", "stall")


class HubError(Exception):
    """Answered with `status`, the Hub's X-Error-Code (or none) and X-Error-Message, `headers` and more of the body."""

    def __init__(self, status, code, message, headers=None, body=None):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.headers, self.body = headers or {}, body or {}


@dataclass
class File:
    """A file of a commit: `oid` is git's id of the blob (of the pointer, for LFS), `sha256` that of the content."""

    sha256: str
    size: int
    oid: str
    lfs: bool


@dataclass
class Commit:
    sha: str
    message: str
    files: dict  # path: File
    parent: str | None
    date: str
    card: dict  # what `model_info` says of the README's metadata


@dataclass
class Repo:
    id: str
    type: str
    private: bool
    gated: bool | str
    commits: dict = field(default_factory=dict)  # sha: Commit
    branches: dict = field(default_factory=dict)  # name: sha
    tags: dict = field(default_factory=dict)
    granted: set = field(default_factory=set)  # users who may read a gated repository

    @property
    def owner(self):
        return self.id.split("/")[0]

    def commit(self, revision):
        """The commit of a branch, a tag or a sha of 7 digits or more; HubError if there is none."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        found = [c for c in self.commits.values() if len(sha) >= 7 and c.sha.startswith(sha)]
        if len(found) != 1:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found[0]


@dataclass
class Token:
    user: str
    role: str
    scopes: dict
    orgs: dict  # name: role in the organisation

    def may(self, write, repo_id, repo_type):
        """Whether it may write to a repository (or make it), or read it though it is private."""
        owner = repo_id.split("/")[0]
        role = "admin" if owner == self.user else self.orgs.get(owner)
        if role is None or (write and "read" in (role, self.role)):
            return False
        if self.role != "fineGrained":
            return True
        whole = f"{'user' if owner == self.user else 'org'}:{owner}"
        given = {*self.scopes.get(whole, ()), *self.scopes.get(f"{repo_type}:{repo_id}", ())}
        return "repo.write" in given or (not write and "repo.content.read" in given)


@dataclass
class Fault:
    """A planned fault: `left` requests will still meet it, `hits` have."""

    pattern: re.Pattern
    kind: int | str
    left: float
    hits: int = 0


def is_lfs(path, size):
    return size > 0 and (size > REGULAR_LIMIT or path.endswith(LFS_SUFFIXES))


def pointer(sha256, size):
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (sha256.encode(), size)


def history(repo, revision):
    """The commits of a revision, newest first."""
    commit = repo.commit(revision)
    while commit:
        yield commit
        commit = repo.commits.get(commit.parent)


def hex_id(text):
    return hashlib.sha1(text.encode()).hexdigest()[:24]


def prefix(repo):
    return repo.id if repo.type == "model" else f"{repo.type}s/{repo.id}"


def describe(repo, commit):
    """A repository as lists, `model_info` and `dataset_info` have it."""
    answer = {"_id": hex_id(repo.id), "id": repo.id, "author": repo.owner, "sha": commit.sha, "tags": []}
    answer |= {"lastModified": commit.date, "createdAt": commit.date, "private": repo.private, "gated": repo.gated}
    answer |= {"disabled": False, "downloads": 0, "likes": 0}
    return answer | ({"modelId": repo.id} | commit.card if repo.type == "model" else {})


def sibling(path, file, blobs):
    """A file as `model_info` lists it, with sizes if asked for."""
    if not blobs:
        return {"rfilename": path}
    lfs = {"sha256": file.sha256, "size": file.size, "pointerSize": len(pointer(file.sha256, file.size))}
    return {"rfilename": path, "size": file.size, "blobId": file.oid} | ({"lfs": lfs} if file.lfs else {})


def tree_entries(commit):
    """`{path: entry}` of all files and of the folders above them, as `tree` and `paths-info` list them."""
    entries, last = {}, {"lastCommit": {"id": commit.sha, "title": commit.message, "date": commit.date}}
    for path, file in commit.files.items():
        for folder in [parent.as_posix() for parent in Path(path).parents][:-1]:
            entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": hex_id(folder) + "0" * 16} | last
        entries[path] = {"type": "file", "path": path, "size": file.size, "oid": file.oid} | last
        if file.lfs:
            size = len(pointer(file.sha256, file.size))
            entries[path]["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": size}
    return dict(sorted(entries.items()))
