"""Where the data and the weights of a trainer that was built in Python come from, as far as they tell."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, metadata_load

from ..data import ImageDataset
from ..hub import repo_name
from ..models.loading import commit_of
from .metadata import LICENSE, title
from .record import CARD_FILE


def dataset_origin(dataset: Any) -> dict[str, str | None]:
    """name, revision, config_name and split of a `datasets.Dataset`, or of one within an `ImageDataset`.

    Each is None where it is not known. A name with a revision is the id of a repository on the Hub; a name alone is
    what the dataset calls itself.
    """
    dataset = dataset._source if isinstance(dataset, ImageDataset) else dataset
    if origin := getattr(dataset, "origin", None):  # of a stream
        return dict(origin)
    info, split = getattr(dataset, "info", None), getattr(dataset, "split", None)
    origin = dict.fromkeys(("name", "revision", "config_name"))
    origin["split"] = split and str(split)
    name, builder = getattr(info, "dataset_name", None), getattr(info, "builder_name", None)
    if name is None or name == builder:  # such as "imagefolder"
        return origin
    config = getattr(info, "config_name", None)
    origin |= {"name": name, "config_name": None if config == "default" else config}
    # `datasets` writes the names in small letters only, but its cache has the commit, and that of the Hub both.
    for file in getattr(dataset, "cache_files", ()):
        if commit := re.search(r"[/\\]([0-9a-f]{40})[/\\][^/\\]+$", file["filename"]):
            for folder in Path(constants.HF_HUB_CACHE).glob(f"datasets--*/snapshots/{commit[1]}"):
                repo_id = folder.parts[-3].removeprefix("datasets--").replace("--", "/", 1)
                return origin | {"name": repo_id, "revision": commit[1]}
    return origin


def weights_license(model: Any, name: str) -> dict[str, str]:
    """license, license_name and license_link of pretrained weights, by the card beside them or by timm; {} if unknown.

    `name` is the Hub id or folder that the model was loaded from.
    """
    config, commit = getattr(model, "config", None), commit_of(model)
    found: dict[str, Any] = {"license": (getattr(config, "pretrained_cfg", None) or {}).get("license")}
    try:
        card = hf_hub_download(name, CARD_FILE, revision=commit) if commit else Path(name, CARD_FILE)
        found |= metadata_load(card) or {}
    except (OSError, ValueError):  # there is none, or none that can be read
        pass
    return {key: found[key] for key in LICENSE if isinstance(found.get(key), str)}


def repository_name(trainer: Any) -> str | None:
    """STUDENT-LOSS-DATA as the name of a repository; None where student or data have no name."""
    student = getattr(trainer.model, "name_or_path", None)
    data = dataset_origin(trainer.train_dataset)["name"]
    if not student or not data:
        return None
    run = {"student": {"id": student}, "loss": {"name": trainer.train_loss.name}, "data": {"id": data}}
    return repo_name(re.sub("[_.]", "-", title(run)))
