"""The Hub: which commit an id is, and what its errors, those of the network and of a full disk mean."""

import difflib
import errno
import os
import re
import unicodedata
from collections.abc import Iterator
from urllib.parse import unquote

from huggingface_hub import HfApi, ResolvedRevision, constants, errors, is_offline_mode, resolve_revision
from huggingface_hub.utils import parse_ratelimit_headers

LOGIN = "`hf auth login`"
NOT_CACHED = (errors.LocalEntryNotFoundError, errors.RevisionResolutionError)
UNREACHABLE = (errors.HTTPError, errors.OfflineModeIsEnabled, *NOT_CACHED)
# How safetensors, datasets, and torch.save (the last two: it only sees that fewer bytes were written) tell it.
_DISK_FULL = re.compile(
    "No space left on device|Not enough disk space|Disk quota exceeded|inline_container.*unexpected pos|"
    "PytorchStreamWriter failed writing"
)
_REVISION = re.compile("/(?:revision|resolve|commit|tree)/([^/?]+)")
# A type and an id, three times: in addresses of the API, in those of files, and in what transformers and datasets say.
_REPO = re.compile(
    "/api/(model|dataset)s/([^/?]+(?:/(?!revision/|tree/)[^/?]+)?)|/(datasets/)?([^/?]+(?:/[^/?]+)?)/resolve/|"
    r"\b(model|dataset|reach)(?: for)? '([\w./-]+)'",
    re.IGNORECASE,
)
_BROKEN = {"RemoteProtocolError", "ReadError", "ReadTimeout"}  # of httpx, of which the Hub's client uses a copy


def resolve(repo_id: str, revision: str | None = None, repo_type: str = "model") -> ResolvedRevision:
    """The commit that a branch, tag or commit stands for now: the attribute `resolved` of the text that is returned.

    That text equals the revision. Passed on in its place, it makes all files of a load be of one commit, also cached.
    """
    try:
        return resolve_revision(repo_id, repo_type=repo_type, revision=revision)
    except errors.HfHubHTTPError as error:
        if error.response.status_code != 429:
            raise
        try:  # however busy the Hub is with us, what is cached may be used
            return resolve_revision(repo_id, repo_type=repo_type, revision=revision, local_files_only=True)
        except errors.RevisionResolutionError:
            raise error from None


def check_access(repo_id: str, repo_type: str) -> None:
    """Raises GatedRepoError for a repository whose files are not open to this user; says nothing of other errors."""
    try:
        HfApi().auth_check(repo_id, repo_type=repo_type)
    except errors.GatedRepoError:
        raise
    except (errors.HTTPError, OSError):
        pass


def user_message(error: BaseException) -> str | None:
    """One clear message for an error that comes from the Hub, the network or a full disk; None for any other.

    Looks through the errors that were wrapped around it, and asks the Hub which ids are near one that is not there.
    """
    chain = list(_chain(error))
    for each in chain:
        if is_disk_full(each):
            return _disk_full(each)
    kind, repo_id = _repository(chain)
    repo = f"{kind} {repo_id}" if repo_id else next(filter(None, map(_url, chain)), "what is asked for")
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
    for each in sorted(chain, key=_is_answer, reverse=True):  # which say more than what was raised because of them
        text = str(each)
        # datasets drops the errors of the Hub's client, and only the text is left.
        if isinstance(each, errors.GatedRepoError) or "is a gated dataset on the Hub" in text:
            return f"{repo} is gated: accept its conditions on {page}, and log in as the same user with {LOGIN}."
        if isinstance(each, errors.RepositoryNotFoundError) or "on the Hub or cannot be accessed" in text:
            nearest = ", ".join(nearest_ids(repo_id, kind)) if repo_id else ""
            hint = f" Did you mean {nearest}?" if nearest else ""
            missing = f"there is no {repo} on {constants.ENDPOINT}, or it is private."
            return f"{missing}{hint} If it is private, log in: {LOGIN}."
        if isinstance(each, errors.HfHubHTTPError) and _is_answer(each):
            return _answer(each, repo, page)
        if type(each).__name__ in _BROKEN and isinstance(each, errors.HTTPError):
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


def repo_name(text: str) -> str:
    """A name that is valid on the Hub, made of any text."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    name = re.sub(r"([-.])[-.]+", r"\1", re.sub(r"[^\w.-]+", "-", ascii_text)).strip("-.")
    return name[:90].removesuffix(".git").rstrip("-.") or "image-classifier"


def nearest_ids(repo_id: str, repo_type: str = "model", limit: int = 3) -> list[str]:
    """Ids on the Hub that are spelt like this one, nearest first; [] if there are none or the Hub can't say."""
    search = HfApi().list_datasets if repo_type == "dataset" else HfApi().list_models
    words = repo_id.split("/")[-1]
    found: dict[str, str] = {}
    try:
        while words and not found:  # "deit-tiny-patch16-242" is found by its part "deit-tiny-patch16"
            found = {each.id.lower(): each.id for each in search(search=words, limit=100) if each.id != repo_id}
            words = words.rpartition("-")[0] or words[: len(words) * 2 // 3]
    except (errors.HTTPError, OSError):
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


def _repository(chain: list[BaseException]) -> tuple[str, str]:
    """The type ("model" or "dataset") and the id that the errors' addresses name, else their texts; "" for no id."""
    for text in [*map(_url, chain), *map(str, chain)]:
        if found := _REPO.search(text):
            kind = (found[1] or found[3] or found[5] or "model").lower()
            return "model" if kind == "model" else "dataset", unquote(found[2] or found[4] or found[6])
    return "model", ""


def _is_answer(error: BaseException) -> bool:
    return isinstance(error, errors.HfHubHTTPError) and not isinstance(error, errors.RemoteEntryNotFoundError)


def is_unsupported(error: BaseException) -> bool:
    """Whether an answer of the Hub means that there is no such address, as on mirrors that serve only some."""
    if isinstance(error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)):
        return False
    return isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (404, 405, 501)


def _answer(error: errors.HfHubHTTPError, repo: str, page: str) -> str:
    request, status = error.response.request, error.response.status_code
    answer = f"{status}: {error.server_message or ''}".strip(" .:")
    if isinstance(error, errors.RevisionNotFoundError):
        revision = _REVISION.search(_url(error))
        name = f" {unquote(revision[1])!r}" if revision else ""
        return f"{repo} has no revision{name}. Its branches, tags and commits are on {page}."
    if status == 401:
        return (
            f"the Hub does not accept the token (401): it is revoked, expired or mistyped. Log in again with {LOGIN}; "
            "a token in HF_TOKEN or --hub_token comes first, so renew or drop that one."
        )
    if status == 403:
        return f"the token may not do this to {repo} ({answer}). Log in with one that may: {LOGIN}."
    if status == 429:
        headers = error.response.headers
        limit = parse_ratelimit_headers(headers)
        seconds = headers.get("Retry-After") or (limit and limit.reset_in_seconds)
        wait = f"{seconds} s" if seconds else "some minutes"
        hint = "" if "authorization" in request.headers else f"; who is logged in ({LOGIN}) may ask more often"
        return f"too many requests to the Hub (429), the last one for {repo}. Wait {wait} and run this again{hint}."
    if status >= 500:
        return f"the Hub returned a server error ({answer}) for {repo}. Run this again in some minutes."
    return f"the Hub refuses {request.method} {_url(error)} ({answer})."


def _unreachable(repo: str) -> str:
    lacking = f"{repo} is not in the cache ({constants.HF_HUB_CACHE}), or not all of it"
    if is_offline_mode():
        return f"{lacking}, and HF_HUB_OFFLINE forbids asking the Hub: unset it, or load it once with a network."
    return (
        f"{lacking}, and the Hub can't be reached at {constants.ENDPOINT}: check the network, proxy and HF_ENDPOINT. "
        "What has been loaded once needs no network."
    )


def is_temporary(error: BaseException) -> bool:
    """Whether it may pass: too many requests, a server error, or a connection that failed or broke off."""
    for each in _chain(error):
        if isinstance(each, errors.OfflineModeIsEnabled):
            return False
        if isinstance(each, errors.HfHubHTTPError):
            return each.response.status_code == 429 or each.response.status_code >= 500
        if isinstance(each, (errors.HTTPError, ConnectionError, TimeoutError)):
            return True
    return False


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says so, by its number or only by its text."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or bool(_DISK_FULL.search(str(error)))


def _disk_full(error: BaseException) -> str:
    path = getattr(error, "filename", None)
    place = f": {path} could not be written" if path else ""
    folder = path if path and os.path.isdir(path) else "FOLDER"
    return (
        f"the disk is full{place}. What was complete is safe, the last whole checkpoint too. Make room (downloads are "
        f"in {constants.HF_HOME}; HF_HOME moves them), and run the same command again, or `hf-kd resume {folder}` if "
        "it has trained already."
    )
