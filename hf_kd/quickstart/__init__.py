"""The quick start's images, student and teacher, which come with the package and are known by name."""

from pathlib import Path

_PARTS = {"quickstart": "data", "quickstart/student": "student", "quickstart/teacher": "teacher"}
FOLDERS = {name: Path(__file__).resolve().parent / part for name, part in _PARTS.items()}


def bundled(name: object) -> Path | None:
    """The folder of a bundled dataset ("quickstart") or model ("quickstart/student", "quickstart/teacher"), or None.

    These names come before those of the Hub and of local folders; "./quickstart" is always a local folder.
    """
    return FOLDERS.get(str(name))
