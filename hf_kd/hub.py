"""The Hub: which commit an id is, what of a run is pushed, whether it may be, and what its errors mean."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import parse_ratelimit_headers, validate_repo_id
from transformers.utils import logging

logger = logging.get_logger(__name__)

# What is pushed of a run's folder, as patterns; nothing else ever is.
PUSHED = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "README.md",
    "run.json",
    "curves.png",
)
LOGIN = "`hf auth login`"
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")
_DISK_FULL = re.compile(
    r"No space left on device|os error 28\b|Not enough disk space|Disk quota exceeded|PytorchStreamWriter failed writing"
)
_REPOSITORY = re.compile(
    r"/api/(?P<api>model|dataset)s/(?P<a>[^/?]+/[^/?]+)|/(?P<data>datasets/)?(?P<b>[^/?]+/[^/?]+)/resolve/"
)
_NAMED = re.compile(r"\b(?P<type>[Mm]odel|[Dd]ataset|reach) '(?P<id>[\w./-]+)'")


def resolve(repo_id: str, revision: str | None = None, repo_type: str = "model") -> str:
    """The commit that a branch, tag or commit stands for now.

    Returns:
        A string equal to the revision, with the commit (40 hex digits) as its attribute `resolved`. Passed on as the
        revision, it makes all files of a load be of one commit, and serves those that are cached from there.
    """
    try:
        return huggingface_hub.resolve_revision(repo_id, repo_type=repo_type, revision=revision)
    except HfHubHTTPError as error:
        if error.response.status_code != 429:
            raise
        try:  # however busy the Hub is with us, what is cached may be used
            return huggingface_hub.resolve_revision(
                repo_id, repo_type=repo_type, revision=revision, local_files_only=True
            )
        except RevisionResolutionError:
            raise error from None


# ---- pushing ----


def check_push(
    repo_id: str | None = None,
    token: str | None = None,
    private: bool | None = None,
    folder: str | os.PathLike = ".",
) -> str:
    """Whether a push would be allowed, found out before training and without creating anything.

    Args:
        repo_id: "owner/name", or "name" in the user's own namespace; default: the name of `folder`.
        token: default: the one of `hf auth login` or HF_TOKEN.
        private: what is asked of the repository; one that exists stays as it is.

    Returns:
        The full "owner/name".

    Raises:
        ValueError: no token, one that is not valid, or that may not write there; a name that can't be one; a public
            repository where a private one is asked for; or a Hub that can't be asked. With the way out.
    """
    repo_id = repo_id or Path(folder).resolve().name
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"{repo_id!r} can't be pushed to: {error} Choose another --hub_model_id OWNER/NAME."
        ) from error
    token = token or huggingface_hub.get_token()
    if not token:
        raise ValueError(f"pushing to the Hub needs a token that may write, and there is none: log in with {LOGIN}.")
    api = HfApi(token=token)
    try:
        me = api.whoami()
        repo_id = repo_id if "/" in repo_id else f"{me['name']}/{repo_id}"
        _check_namespace(me, repo_id.split("/")[0])
        try:
            api.auth_check(repo_id, write=True)
            exists = True
        except RepositoryNotFoundError:
            exists = False
        _check_scopes(me, repo_id, exists)
        if private and exists and not api.model_info(repo_id).private:
            raise ValueError(f"{repo_id} exists and is public, but a private one is asked for: choose another name.")
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise ValueError(f"can't push to {repo_id}: {explain(error) or error}") from error
    return repo_id


def _check_namespace(me: dict, owner: str) -> None:
    role = ((me.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise ValueError(
            f"{me['name']}'s token may only read: log in with one that may write ({LOGIN}; make it on "
            f"{constants.ENDPOINT}/settings/tokens)."
        )
    refused = ("read", "no_access")
    allowed = [me["name"], *(org["name"] for org in me.get("orgs", ()) if org.get("roleInOrg") not in refused)]
    if owner not in allowed:
        raise ValueError(f"{me['name']} may not push to {owner}, only to: {', '.join(allowed)}. Set --hub_model_id.")


def _check_scopes(me: dict, repo_id: str, exists: bool) -> None:
    """A fine-grained token must name the owner, or (where it need not be created) the repository."""
    granted = ((me.get("auth") or {}).get("accessToken") or {}).get("fineGrained")
    if granted is None:
        return
    scopes = {scope["entity"].get("name"): scope["permissions"] for scope in granted.get("scoped", ())}
    owner = repo_id.split("/")[0]
    if not any("repo.write" in scopes.get(name, ()) for name in ((owner, repo_id) if exists else (owner,))):
        raise ValueError(
            f"{me['name']}'s fine-grained token may not write to {repo_id}: give it write access to the repositories "
            f"of {owner} on {constants.ENDPOINT}/settings/tokens, or log in with another ({LOGIN})."
        )


def push(
    folder: str | os.PathLike,
    repo_id: str,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Distilled with hf_kd",
) -> str:
    """Upload a saved student, its card and its record in one commit: the files of `PUSHED` and nothing else.

    Args:
        folder: where the run was saved.
        repo_id: "owner/name", or "name" in the user's own namespace; made if there is none.
        token: default: the one of `hf auth login` or HF_TOKEN.
        private: whether a new repository is private; default: as the owner's settings have it.
        revision: branch; made if there is none. Default: main.
        message: of the commit.

    Returns:
        The repository's address.

    Raises:
        ValueError: there is no model in `folder`.
        HfHubHTTPError: the Hub refuses; see `explain`.
    """
    folder = Path(folder)
    files = sorted({file for pattern in PUSHED for file in folder.glob(pattern) if file.is_file()})
    names = [file.name for file in files]
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise ValueError(
            f"there is no model in {folder} (config.json and model.safetensors): give a run's own folder."
        )
    token = token or huggingface_hub.get_token()
    operations = [CommitOperationAdd(file.name, _content(file, token)) for file in files]
    api = HfApi(token=token)
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    if revision:
        api.create_branch(url.repo_id, branch=revision, exist_ok=True)
    api.create_commit(url.repo_id, operations, commit_message=message, revision=revision)
    return str(url)


def _content(file: Path, token: str | None) -> str | bytes:
    """The path of a file to upload; of one that names folders of this machine or a token, the text without them."""
    if file.suffix not in (".json", ".md"):
        return str(file)
    old = text = file.read_text()
    places = {
        str(file.parent.resolve()): ".",
        str(file.parent.absolute()): ".",
        os.getcwd(): ".",
        str(Path.home()): "~",
    }
    for place in sorted(places, key=len, reverse=True):
        if place != "/":
            text = re.sub(rf"(?<![\w.~-]){re.escape(place)}(?![\w.-])", places[place], text)
    text = _TOKEN.sub("<redacted>", text.replace(token, "<redacted>") if token else text)
    if text == old:
        return str(file)
    logger.warning(f"{file.name}: what names folders of this machine, or a token, is left out of the push.")
    return text.encode()


# ---- errors ----


def explain(error: BaseException) -> str | None:
    """One clear message for an error that comes from the Hub, the network or a full disk; None for any other.

    Looks through the errors that transformers and datasets have wrapped around it. For an id that is not there, it
    asks the Hub for the nearest ones.
    """
    chain = list(_chain(error))
    for each in chain:
        if _is_disk_full(each):
            return _disk_full(each)
    repo_type, repo_id = _wanted(chain)
    what = f"{repo_type} {repo_id}" if repo_id else "what is wanted"
    for each in chain:  # before what only tells that nothing was loaded
        if isinstance(each, HfHubHTTPError) and not isinstance(each, RemoteEntryNotFoundError):
            return _answer(each, repo_type, repo_id)
    for each in chain:
        text = str(each)
        if "is a gated dataset on the Hub" in text:  # datasets drops the error below
            return _gated(repo_type, repo_id)
        if "doesn't exist on the Hub or cannot be accessed" in text:
            return _missing(repo_type, repo_id)
    for each in chain:
        unreachable = isinstance(
            each, (HTTPError, LocalEntryNotFoundError, RevisionResolutionError, OfflineModeIsEnabled)
        )
        if unreachable or re.match("Couldn't reach .* on the Hub|Couldn't reach the Hugging Face Hub", str(each)):
            return _unreachable(what)
    if any("trust_remote_code" in str(each) for each in chain):
        return (
            f"{repo_id or 'the model'} comes with Python code of its own, which is not run unless you ask for it: read "
            "the code in its repository, then pass --trust_remote_code."
        )
    return None


def nearest_ids(repo_id: str, repo_type: str = "model", limit: int = 3) -> list[str]:
    """Ids on the Hub that are spelt like this one, nearest first; [] if there are none or the Hub can't say."""
    api = HfApi()
    find = api.list_datasets if repo_type == "dataset" else api.list_models
    words = repo_id.split("/")[-1]
    found: set[str] = set()
    try:
        while words and not found:  # the Hub finds parts of names: "deit-tiny-patch16-242", then "deit-tiny-patch16"
            found = {each.id for each in find(search=words, limit=50)}
            words = words.rpartition("-")[0] or (words[: len(words) // 2] if len(words) > 5 else "")
    except (HTTPError, OSError):
        return []
    return difflib.get_close_matches(repo_id, sorted(found), n=limit, cutoff=0.5)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those it was raised from, also where `from None` hides them (datasets does)."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _wanted(chain: list[BaseException]) -> tuple[str, str | None]:
    """Type and id of the repository that the errors are about."""
    for each in chain:
        try:
            request = getattr(each, "request", None)  # httpx's raises if there is none
        except RuntimeError:
            request = None
        if request is not None and (found := _REPOSITORY.search(str(request.url))):
            dataset = found["api"] == "dataset" or found["data"]
            return "dataset" if dataset else "model", unquote(found["a"] or found["b"])
    for each in chain:
        if found := _NAMED.search(str(each)):
            dataset = found["type"].lower() != "model"
            return "dataset" if dataset else "model", found["id"]
    return "model", None


def _answer(error: HfHubHTTPError, repo_type: str, repo_id: str | None) -> str:
    """What an HTTP error status means."""
    status, said = error.response.status_code, (error.server_message or "").strip().rstrip(".")
    what = f"{repo_type} {repo_id}" if repo_id else str(error.request.url)
    if isinstance(error, GatedRepoError):
        return _gated(repo_type, repo_id)
    if isinstance(error, RepositoryNotFoundError):
        return _missing(repo_type, repo_id)
    if isinstance(error, RevisionNotFoundError):
        found = re.search("/(?:revision|resolve|commit|tree)/([^/?]+)", str(error.request.url))
        return f"{what} has no revision {unquote(found[1]) if found else ''!r}: its branches, tags and commits are on {_page(repo_type, repo_id)}."
    if status == 401:
        return (
            "the Hub refuses the token (401): it is expired, revoked or mistyped. Log in again with "
            f"{LOGIN}; a token in HF_TOKEN or --hub_token comes before that one, so set it anew or drop it."
        )
    if status == 403:
        return f"the Hub forbids this to your token (403{said and f', {said}'}): {what}. Log in with one that may ({LOGIN})."
    if status == 429:
        limit = parse_ratelimit_headers(error.response.headers)
        wait = error.response.headers.get("Retry-After") or (limit and limit.reset_in_seconds)
        login = "" if "authorization" in error.request.headers else f" Logged in ({LOGIN}), you may ask more often."
        return (
            f"the Hub has had too many requests from here (429), the last one for {what}: wait "
            f"{f'{wait} seconds' if wait else 'some minutes'}, then run this again.{login}"
        )
    if status >= 500:
        return f"the Hub has a fault of its own ({status}) and does not give {what}: run this again in some minutes."
    return f"the Hub refuses {error.request.method} {error.request.url} ({status}{said and f', {said}'})."


def _page(repo_type: str, repo_id: str | None) -> str:
    return f"{constants.ENDPOINT}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id or ''}"


def _gated(repo_type: str, repo_id: str | None) -> str:
    return (
        f"{repo_type} {repo_id} is gated: accept its conditions on {_page(repo_type, repo_id)}, and log in as who "
        f"accepted them with {LOGIN}."
    )


def _missing(repo_type: str, repo_id: str | None) -> str:
    near = nearest_ids(repo_id, repo_type) if repo_id else []
    return (
        f"there is no {repo_type} {repo_id} on {constants.ENDPOINT}, or it is private: check the id"
        f"{near and f' (near it: {chr(44).join(near)})' or ''}, or log in with {LOGIN} as someone who may read it."
    )


def _unreachable(what: str) -> str:
    if huggingface_hub.is_offline_mode():
        return (
            f"{what} is not in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE forbids to ask the Hub: unset "
            "it, or load it once where there is a network."
        )
    return (
        f"{what} is not (wholly) in the cache ({constants.HF_HUB_CACHE}), and the Hub at {constants.ENDPOINT} can't be "
        "reached or broke off: check the network, the proxy and HF_ENDPOINT, then run this again. What was loaded once "
        "needs no network."
    )


def _is_disk_full(error: BaseException) -> bool:
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or bool(_DISK_FULL.search(str(error)))


def _disk_full(error: BaseException) -> str:
    where = getattr(error, "filename", None)
    return (
        f"the disk is full{f': {where}' if where else ''}. Nothing that was complete is lost, the last whole checkpoint "
        "too. Make room, then go on with the same command and --resume_from_checkpoint last."
    )
