"""Pushing a student: whether it is allowed, and what of a run's folder goes; and the record that goes with it."""

import logging
import os
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi, constants, errors
from huggingface_hub.utils import validate_repo_id

from .hub import LOGIN, is_unsupported, repo_name, user_message
from .reporting.card import write_card
from .reporting.record import CARD_FILE, CLASSES_FILE, CURVES_FILE, RUN_FILE, TOKEN, read_record, write_json

__all__ = ["check_push", "publish", "push"]

logger = logging.getLogger(__name__)

# What is pushed of a run's folder, as patterns; nothing else ever is.
MODEL_FILES = ("config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
MODEL_CODE = "cifar_networks.py"  # beside a model of hf_kd's own architectures
PUSHED = (*MODEL_FILES, MODEL_CODE, "preprocessor_config.json", CARD_FILE, RUN_FILE, CURVES_FILE, CLASSES_FILE)


def check_push(
    repo_id: str | None = None, token: str | None = None, private: bool | None = None, folder: str | os.PathLike = "."
) -> str:
    """Finds out before training, without creating anything, whether a push would be allowed.

    Args:
        repo_id: "owner/name", or "name" in the user's own namespace; default: `repo_name` of the name of `folder`.
        token: default: the one of `hf auth login` or HF_TOKEN.
        private: what is asked of the repository; one that exists stays as it is.

    Returns:
        The full "owner/name".

    Raises:
        ValueError: it would not be allowed, or can't be asked; with the reason and what to change. A mirror of the Hub
            that does not answer such questions is only warned about.
    """
    repo_id = repo_id or repo_name(Path(folder).resolve().name)
    try:
        validate_repo_id(repo_id)
    except errors.HFValidationError as error:
        raise ValueError(f"{repo_id!r} can't be pushed to: {error} Set --hub_model_id OWNER/NAME.") from error
    token = token or huggingface_hub.get_token()
    if not token:
        raise ValueError(f"pushing to the Hub needs a token that may write, and there is none: log in with {LOGIN}.")
    api = HfApi(token=token)
    try:
        me = huggingface_hub.whoami(token, cache=True)  # asked by every trainer of a process, and the Hub limits that
        repo_id = repo_id if "/" in repo_id else f"{me['name']}/{repo_id}"
        try:
            api.auth_check(repo_id, write=True)
            exists = True
        except errors.RepositoryNotFoundError:
            exists = False
        if not exists:
            _check_may_create(me, repo_id)
        elif private and not api.model_info(repo_id).private:
            raise ValueError(f"{repo_id} exists and is public, but a private one is asked for: choose another name.")
    except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:
        if "/" in repo_id and is_unsupported(error):
            logger.warning(f"could not check whether you may push to {repo_id}, and will try: {user_message(error)}")
            return repo_id
        hint = " Set --hub_model_id OWNER/NAME." if is_unsupported(error) else ""
        raise ValueError(f"can't push to {repo_id}: {user_message(error) or error}{hint}") from error
    return repo_id


def _check_may_create(me: dict, repo_id: str) -> None:
    """By what the Hub says of the user and the token; a fine-grained one must be granted all of the owner's."""
    owner, user, tokens_page = repo_id.split("/")[0], me["name"], f"{constants.ENDPOINT}/settings/tokens"
    token = (me.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise ValueError(f"{user}'s token may only read: log in ({LOGIN}) with one that may write ({tokens_page}).")
    refused = ("read", "no_access")
    allowed = [user, *(org["name"] for org in me.get("orgs", ()) if org.get("roleInOrg") not in refused)]
    if owner not in allowed:
        raise ValueError(f"{user} may not push to {owner}, only to: {', '.join(allowed)}. Set --hub_model_id.")
    granted = token.get("fineGrained")
    if granted is None:
        return
    scopes = {scope["entity"].get("name"): scope["permissions"] for scope in granted.get("scoped", ())}
    if "repo.write" not in scopes.get(owner, ()):
        raise ValueError(
            f"{user}'s fine-grained token may not write to {repo_id}: give it write access to the repositories of "
            f"{owner} on {tokens_page}, or log in with another ({LOGIN})."
        )


def push(
    folder: str | os.PathLike,
    repo_id: str,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Distilled with hf_kd",
) -> str:
    """Uploads a saved student, its card and its record in one commit: the files of `PUSHED` and nothing else.

    Args:
        folder: where the run was saved.
        repo_id, token, private: as of `check_push`; the repository is made if there is none.
        revision: branch; made if there is none. Default: main.
        message: of the commit.

    Returns:
        The repository's address.

    Raises:
        ValueError: there is no model in `folder`, or that of a run that diverged.
        HfHubHTTPError: the Hub refuses; see `hf_kd.hub.user_message`.
    """
    folder = Path(folder)
    if reason := read_record(folder).get("diverged"):
        raise ValueError(f"{folder} holds a run that diverged, which is no result and is not pushed: {reason}")
    files = sorted({file for pattern in PUSHED for file in folder.glob(pattern) if file.is_file()})
    names = [file.name for file in files]
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        if (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"{folder} holds an adapter of PEFT, which is not pushed: save the plain model first, with trainer."
                "model.merge_and_unload().save_pretrained(FOLDER), or push the adapter with its own push_to_hub."
            )
        raise ValueError(f"there is no model in {folder} (config.json and model.safetensors): give a run's folder.")
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
    old = text = file.read_text("utf-8")
    here = dict.fromkeys((str(file.parent.resolve()), str(file.parent.absolute()), os.getcwd()), ".")
    places = {str(Path.home()): "~"} | here
    for place in sorted(places.keys() - {"/"}, key=len, reverse=True):
        text = re.sub(rf"(?<![\w.~-]){re.escape(place)}(?![\w.-])", places[place], text)
    text = re.sub(TOKEN, "<redacted>", text.replace(token, "<redacted>") if token else text)
    if text == old:
        return str(file)
    logger.warning(f"{file.name}: what names folders of this machine, or a token, is left out of the push.")
    return text.encode("utf-8")


def publish(folder: str | os.PathLike, repo_id: str, **options) -> str:
    """`push`, after the repository's name is in the run's record and card."""
    record = read_record(folder)
    if record and not record.get("diverged") and record.get("repo_id") != repo_id:
        write_json(Path(folder) / RUN_FILE, {**record, "repo_id": repo_id})
        write_card(folder)
    return push(folder, repo_id, **options)


def add_missing_record(trainer) -> None:
    """On all ranks: writes run.json, curves and card where run.json is missing or behind the training."""
    from accelerate.utils import broadcast_object_list  # slow to import, as what comes next

    from .reporting.collect import make_record, write_record

    missing = [False]
    if trainer.eval_dataset is not None and trainer.preprocessing is not None and trainer.is_world_process_zero():
        history = read_record(trainer.args.output_dir).get("history")
        missing = [not history or history[-1].get("step", 0) < trainer.state.global_step]
    broadcast_object_list(missing)
    if not missing[0]:  # on all ranks, as the first one has found
        return
    if trainer.eval_teacher is not None and trainer.teacher_metrics is None:
        trainer.measure_teacher()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        write_record(make_record(trainer, metrics), trainer.args.output_dir)


def create_model_card(self, *args, **kwargs) -> None:
    """A trainer's method. Writes the card, README.md in `args.output_dir`, from run.json, and uses nothing that is
    passed. A single process makes run.json first where it is missing (it takes an evaluation)."""
    folder = self.args.output_dir
    if self.args.world_size == 1:
        add_missing_record(self)
    if self.is_world_process_zero() and read_record(folder):
        write_card(folder)
    elif self.is_world_process_zero():
        logger.warning(f"no card is written: it comes from {RUN_FILE}, and there is none in {folder}")


def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
    """A trainer's method. With `args.push_to_hub`: checks, before training, that a push will be allowed. Creates
    nothing."""
    from .reporting.origin import repository_name

    args = self.args
    self.hub_model_id = self.push_in_progress = None
    if self.is_world_process_zero():
        private = args.hub_private_repo if private is None else private
        name = args.hub_model_id or repository_name(self)
        self.hub_model_id = check_push(name, token or args.hub_token, private, args.output_dir)


def push_trained(self, commit_message="Distilled with hf_kd", *, token=None, revision=None, private=None):
    """A trainer's `push_to_hub`. Saves the student in `args.output_dir`, and pushes it from there, with its run.json,
    curves and card.

    Makes run.json first where there is none of this training, if there are an evaluation set and a processor; for what
    a trainer does not know see `hf_kd.reporting.make_record`. token, revision and private default to
    `args.hub_token`, `args.hub_revision` and `args.hub_private_repo`.

    Returns:
        The address of the repository; None on further ranks. Its name is `args.hub_model_id`, by default made of
        student, loss and data, or where these have no names the folder's.

    Raises:
        ValueError, HfHubHTTPError: see `check_push` and `push`. The student has been saved by then.
    """
    args = self.args
    token, revision = token or args.hub_token, revision or args.hub_revision
    private = args.hub_private_repo if private is None else private
    self.save_model()
    add_missing_record(self)
    self.init_hf_repo(token, private)
    if not self.is_world_process_zero():
        return None
    options = {"token": token, "private": private, "revision": revision, "message": commit_message}
    return publish(args.output_dir, self.hub_model_id, **options)
