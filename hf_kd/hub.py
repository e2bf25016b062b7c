"""The Hub: which commit an id is, and what its errors, those of the network and of a full disk mean."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterator
from urllib.parse import unquote

from huggingface_hub import HfApi, ResolvedRevision, constants, is_offline_mode, resolve_revision
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import parse_ratelimit_headers

LOGIN = "`hf auth login`"
UNREACHABLE = (HTTPError, LocalEntryNotFoundError, RevisionResolutionError, OfflineModeIsEnabled)
# How safetensors, datasets, and torch.save (the last two: it only sees that fewer bytes were written) tell it.
_DISK_FULL = re.compile(
    "No space left on device|Not enough disk space|Disk quota exceeded|inline_container.*unexpected pos|"
    "PytorchStreamWriter failed writing"
)
_REVISION = re.compile("/(?:revision|resolve|commit|tree)/([^/?]+)")
_IN_URL = re.compile(
    "/api/(model|dataset)s/([^/?]+(?:/(?!revision/|tree/)[^/?]+)?)|/(datasets/)?([^/?]+(?:/[^/?]+)?)/resolve/"
)
_IN_TEXT = re.compile(r"\b([Mm]odel|[Dd]ataset|reach)(?: for)? '([\w./-]+)'")
_BROKEN = {"RemoteProtocolError", "ReadError", "ReadTimeout"}  # of httpx, of which the Hub's client uses a copy


def resolve(repo_id: str, revision: str | None = None, repo_type: str = "model") -> ResolvedRevision:
    """The commit that a branch, tag or commit stands for now.

    Returns:
        A string equal to the revision, with the commit (40 hex digits) as its attribute `resolved`. Passed on as the
        revision, it makes all files of a load be of one commit, and serves those that are cached from there.
    """
    try:
        return resolve_revision(repo_id, repo_type=repo_type, revision=revision)
    except HfHubHTTPError as error:
        if error.response.status_code != 429:
            raise
        try:  # however busy the Hub is with us, what is cached may be used
            return resolve_revision(repo_id, repo_type=repo_type, revision=revision, local_files_only=True)
        except RevisionResolutionError:
            raise error from None


def user_message(error: BaseException) -> str | None:
    """One clear message for an error that comes from the Hub, the network or a full disk; None for any other.

    Looks through the errors that transformers and datasets have wrapped around it. For an id that is not there, it
    asks the Hub for the nearest ones.
    """
    chain = list(_chain(error))
    for each in chain:
        if is_disk_full(each):
            return _disk_full(each)
    repo = _Repo(chain)
    for each in chain:  # an answer of the Hub says more than what was raised because of it
        if isinstance(each, HfHubHTTPError) and not isinstance(each, RemoteEntryNotFoundError):
            return _answer(each, repo)
    for each in chain:
        text = str(each)
        if "is a gated dataset on the Hub" in text:  # datasets drops the error that it comes from
            return repo.gated()
        if "doesn't exist on the Hub or cannot be accessed" in text:
            return repo.missing()
        if type(each).__name__ in _BROKEN and isinstance(each, HTTPError):
            return f"the connection to the Hub broke off while {repo} was loaded: run this again."
        if isinstance(each, UNREACHABLE) or re.match("Couldn't reach .* (on the|Face) Hub", text):
            return _unreachable(repo)
        if found := re.search("The repository (.+?) (?:contains|references) custom code", text):
            return (
                f"{found[1]} needs Python code of its own, which is not run unless you ask for it: read that code, "
                "then pass --trust_remote_code."
            )
        if "Dataset scripts are no longer supported" in text:
            return (
                "the dataset is made by a program of its own, which is no longer run: try the copy that the Hub made "
                "of it, --dataset_revision refs/convert/parquet."
            )
    return None


def nearest_ids(repo_id: str, repo_type: str = "model", limit: int = 3) -> list[str]:
    """Ids on the Hub that are spelt like this one, nearest first; [] if there are none or the Hub can't say."""
    api = HfApi()
    search = api.list_datasets if repo_type == "dataset" else api.list_models
    words = repo_id.split("/")[-1]
    found: dict[str, str] = {}
    try:
        while words and not found:  # "deit-tiny-patch16-242" is found by its part "deit-tiny-patch16"
            found = {each.id.lower(): each.id for each in search(search=words, limit=100) if each.id != repo_id}
            words = words.rpartition("-")[0] or words[: len(words) * 2 // 3]
    except (HTTPError, OSError):
        return []
    return [found[each] for each in difflib.get_close_matches(repo_id.lower(), found, n=limit, cutoff=0.5)]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those it was raised from, also where `from None` hides them (as datasets does)."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _url(error: BaseException) -> str:
    """The address that was asked for, or ""."""
    try:
        return str(getattr(error, "response", error).request.url)  # type: ignore[union-attr]
    except (AttributeError, RuntimeError):  # httpx raises the latter where there was no request
        return ""


class _Repo:
    """The repository that errors are about: its type ("model" or "dataset") and its id, if they tell."""

    def __init__(self, chain: list[BaseException]):
        self.type, self.id = "model", None
        for found in filter(None, (_IN_URL.search(_url(each)) for each in chain)):
            self.type = "dataset" if found[1] == "dataset" or found[3] else "model"
            self.id = unquote(found[2] or found[4])
            return
        for found in filter(None, (_IN_TEXT.search(str(each)) for each in chain)):
            self.type, self.id = "model" if found[1].lower() == "model" else "dataset", found[2]
            return

    def __str__(self) -> str:
        return f"{self.type} {self.id}" if self.id else "what is asked for"

    @property
    def page(self) -> str:
        return f"{constants.ENDPOINT}/{'datasets/' if self.type == 'dataset' else ''}{self.id or ''}"

    def gated(self) -> str:
        return f"{self} is gated: accept its conditions on {self.page}, and log in as the same user with {LOGIN}."

    def missing(self) -> str:
        near = ", ".join(nearest_ids(self.id, self.type)) if self.id else ""
        near = f" Did you mean {near}?" if near else ""
        return (
            f"there is no {self} on {constants.ENDPOINT}, or it is private.{near} If it is private, log in: {LOGIN}."
        )


def _answer(error: HfHubHTTPError, repo: _Repo) -> str:
    status, said = error.response.status_code, (error.server_message or "").strip().rstrip(".")
    said = f"{status}: {said}" if said else str(status)
    what = str(repo) if repo.id else _url(error)
    if isinstance(error, GatedRepoError):
        return repo.gated()
    if isinstance(error, RepositoryNotFoundError):
        return repo.missing()
    if isinstance(error, RevisionNotFoundError):
        revision = _REVISION.search(_url(error))
        name = f" {unquote(revision[1])!r}" if revision else ""
        return f"{what} has no revision{name}. Its branches, tags and commits are on {repo.page}."
    if status == 401:
        return (
            f"the Hub does not accept the token (401): it is revoked, expired or mistyped. Log in again with {LOGIN}; "
            "a token in HF_TOKEN or --hub_token comes first, so renew or drop that one."
        )
    if status == 403:
        return f"the token may not do this to {what} ({said}). Log in with one that may: {LOGIN}."
    if status == 429:
        headers = error.response.headers
        limit = parse_ratelimit_headers(headers)
        seconds = headers.get("Retry-After") or (limit and limit.reset_in_seconds)
        anonymous = "authorization" not in error.response.request.headers
        return (
            f"too many requests to the Hub (429), the last one for {what}. Wait "
            f"{f'{seconds} s' if seconds else 'some minutes'} and run this again"
            f"{f'; who is logged in ({LOGIN}) may ask more often' if anonymous else ''}."
        )
    if status >= 500:
        did = "does not give" if error.response.request.method in ("GET", "HEAD") else "did not take what was sent for"
        return f"the Hub has a fault of its own ({said}) and {did} {what}. Run this again in some minutes."
    return f"the Hub refuses {error.response.request.method} {_url(error)} ({said})."


def _unreachable(repo: _Repo) -> str:
    lacking = f"{repo} is not in the cache ({constants.HF_HUB_CACHE}), or not all of it"
    if is_offline_mode():
        return f"{lacking}, and HF_HUB_OFFLINE forbids asking the Hub: unset it, or load it once with a network."
    return (
        f"{lacking}, and the Hub can't be reached at {constants.ENDPOINT}: check the network, proxy and HF_ENDPOINT. "
        "What has been loaded once needs no network."
    )


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says so, by its number or only by its text."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or bool(_DISK_FULL.search(str(error)))


def _disk_full(error: BaseException) -> str:
    where = getattr(error, "filename", None)
    if where:
        return (
            f"the disk is full: {where} could not be written. What was complete is safe, the last whole checkpoint "
            "too: make room, and go on with the same command and --resume_from_checkpoint last."
        )
    return (
        f"the disk is full. What was complete is safe: make room (downloads are in {constants.HF_HOME}; HF_HOME moves "
        "them) and run the same command again, with --resume_from_checkpoint last if it trained already."
    )
