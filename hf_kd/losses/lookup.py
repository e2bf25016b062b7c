"""Which loss a name stands for: one of `LOSSES`, or a class of your own."""

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard

from .base import DistillationLoss
from .ce import CELoss
from .dist import DISTLoss
from .dkd import DKDLoss
from .hard import HardLoss
from .kd import KDLoss
from .nkd import NKDLoss
from .tf_kd import TfKDLoss
from .uskd import USKDLoss
from .wttm import WTTMLoss

LOSSES: dict[str, type[DistillationLoss]] = {
    cls.name: cls for cls in (CELoss, KDLoss, NKDLoss, USKDLoss, DKDLoss, DISTLoss, WTTMLoss, HardLoss, TfKDLoss)
}

# Losses that are another one with some of its hyperparameters set.
SETTINGS: dict[str, dict[str, Any]] = {
    **USKDLoss.controls,
    "label_smoothing": {"loss": "ce", "label_smoothing": 0.1},
    "kl_only": {"loss": "kd", "weight": 1.0, "ce_weight": 0.0},
}


def named_settings(name: str | type[DistillationLoss]) -> dict[str, Any]:
    """The hyperparameters that a name of `SETTINGS` sets; {} for any other loss."""
    values = SETTINGS.get(name, {}) if isinstance(name, str) else {}
    return {key: value for key, value in values.items() if key != "loss"}


def loss_class(name: str | type[DistillationLoss]) -> type[DistillationLoss]:
    """The class of a loss: a key of `LOSSES` or `SETTINGS`, `package.module:Class`, `file.py:Class`, or a class, which
    is checked.

    A class of your own is imported when you name it. Readers of records look in `LOSSES` alone and import nothing.

    Raises:
        ValueError: unknown name (the nearest are named), a file or module that cannot be imported, or a class that is
            no `DistillationLoss` with a name of its own.
    """
    if isinstance(name, type):
        return _checked(name, f"{name.__module__}:{name.__qualname__}")
    if (base := SETTINGS.get(name, {}).get("loss", name)) in LOSSES:
        return LOSSES[base]
    origin, colon, attribute = str(name).rpartition(":")
    if not colon:
        near = " or ".join(difflib.get_close_matches(attribute.lower(), [*LOSSES, *SETTINGS], n=2, cutoff=0.4))
        hint = f"did you mean {near}? " if near else ""
        raise ValueError(
            f"unknown loss {name!r}: {hint}pass one of {', '.join([*LOSSES, *SETTINGS])}, or a class of your own as "
            "package.module:Class or file.py:Class"
        )
    module = _import(origin)
    found = getattr(module, attribute, None)
    if found is None:
        classes = [key for key, value in vars(module).items() if _is_loss(value)]
        near = ", ".join(difflib.get_close_matches(attribute, classes, n=3, cutoff=0))
        near = near or "no subclass of DistillationLoss"
        raise ValueError(f"loss {name!r}: {origin} has no class {attribute}; it has {near}")
    return _checked(found, name)


def get_loss(name: str, **kwargs: Any) -> DistillationLoss:
    """Build the loss `name` (see `loss_class`) with its constructor's arguments; ValueError for wrong ones."""
    cls = loss_class(name)
    accepted = inspect.signature(cls).parameters
    for key, value in kwargs.items():
        if key not in accepted:
            raise ValueError(f"{name} takes no argument {key}={value!r}: it accepts {', '.join(accepted)}")
    return cls(**named_settings(name) | kwargs)


def loss_source(loss: str | type[DistillationLoss]) -> dict[str, str] | None:
    """Where the code of a loss of your own is: its file's `path` and `sha256`. The loss itself is not imported.

    None for hf_kd's own losses, and for a class that no file holds, as in a notebook.
    """
    if loss in LOSSES or loss in SETTINGS or loss in LOSSES.values():
        return None
    try:
        if isinstance(loss, type):
            file = inspect.getsourcefile(loss)
        elif (origin := loss.rpartition(":")[0]).endswith(".py"):
            file = origin
        else:
            spec = importlib.util.find_spec(origin) if origin else None
            file = spec.origin if spec else None
        if not file:
            return None
        return {"path": str(Path(file).resolve()), "sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest()}
    except (OSError, TypeError, ImportError):
        return None


def _import(origin: str) -> ModuleType:
    """A module by its name, or a file, which is run once for each of its versions."""
    try:
        if not origin.endswith(".py"):
            return importlib.import_module(origin)
        path = Path(origin).resolve()
        code = path.read_bytes()
        version = hashlib.sha256(str(path).encode() + code).hexdigest()[:12]
    except OSError as error:
        raise ValueError(f"loss file {origin} cannot be read: {error.strerror}") from error
    except (ImportError, ValueError) as error:
        hint = "install its package, or name its file: file.py:Class"
        raise ValueError(f"the loss's module {origin!r} cannot be imported ({error}): {hint}") from error
    name = f"hf_kd_loss_{path.stem}_{version}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            # Not by the loader, whose cached byte code may be that of a version of the same second and size.
            exec(compile(code, path, "exec"), vars(sys.modules[name]))
        except BaseException as error:
            del sys.modules[name]
            if not isinstance(error, Exception):
                raise
            raise ValueError(f"loss file {origin} can't be run: {type(error).__name__}: {error}") from error
    return sys.modules[name]


def _is_loss(value: Any) -> TypeGuard[type[DistillationLoss]]:
    return inspect.isclass(value) and issubclass(value, DistillationLoss) and value is not DistillationLoss


def _checked(found: Any, name: str) -> type[DistillationLoss]:
    if not _is_loss(found):
        raise ValueError(f"loss {name!r} is no subclass of hf_kd.losses.DistillationLoss")
    if not re.fullmatch(r"\w[\w.-]*", found.name):
        raise ValueError(
            f"loss {name!r} has name = {found.name!r}: give the class a `name` of letters, digits, _, - or ."
        )
    if LOSSES.get(found.name, found) is not found:
        raise ValueError(f"loss {name!r} has the name {found.name!r} of a loss of hf_kd: give it another")
    return found
