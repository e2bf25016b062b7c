"""The quick start's images, student and teacher, which come with the package and are known by name."""

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent
FOLDERS = {
    "quickstart": _FOLDER / "data",
    "quickstart/student": _FOLDER / "student",
    "quickstart/teacher": _FOLDER / "teacher",
}


def bundled(name: object) -> Path | None:
    """The folder of a bundled dataset ("quickstart") or model ("quickstart/student", "quickstart/teacher"), or None.

    These names come before those of the Hub and of local folders; "./quickstart" is always a local folder.
    """
    return FOLDERS.get(str(name))
