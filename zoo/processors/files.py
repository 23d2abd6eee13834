"""Reading the small files of a checkpoint, with errors that name them."""

import json
from pathlib import Path
from typing import Any

from zoo.models.core.errors import ZooError


def read_text(file: Path) -> str:
    """The text of `file`. Raises ZooError if it cannot be read or is not UTF-8."""
    try:
        return file.read_text("utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ZooError(f"{file} cannot be read: {reason}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`, an empty one if there is no such file.

    Raises:
      ZooError: it cannot be read, or holds no JSON object.
    """
    if not file.exists():
        return {}
    try:
        values = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise ZooError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ZooError(f"{file} holds a {type(values).__name__}: want a JSON object")
    return values
