"""Checkpoints by their names on the Hugging Face hub."""

import re
from pathlib import Path

from zoo.convert.folder import WEIGHTS
from zoo.models.core.errors import ZooError

CARRIED = ("*.json", "*.model", "*.txt", "*.jinja", "*.md", "LICENSE*", "NOTICE*")
"""Patterns of the files that belong to a checkpoint beside its weights: configuration, tokenizer,
preprocessing, chat templates, card and licence. Code is never among them.
"""

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def folder_of(source: str | Path) -> Path:
    """The folder of a checkpoint: `source` itself, or a copy of what the hub has under that name.

    Args:
      source: a folder, or "organisation/name", if need be with "@" and a branch, tag or commit.

    Raises:
      ZooError: there is no such folder, and the hub cannot be reached or has no such checkpoint.
    """
    name, _, revision = str(source).partition("@")
    if Path(source).exists() or not _NAME.fullmatch(name):
        return Path(source)
    return _download(name, revision or None)


def _download(name: str, revision: str | None) -> Path:
    """Fetch one form of weights and what goes with them, but for what the cache has already."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    refused = (HfHubHTTPError, HFValidationError)

    try:
        try:
            files = HfApi().list_repo_files(name, revision=revision)
        except refused:
            raise
        except Exception:  # no connection, in as many ways as there are: what is here may do
            return Path(snapshot_download(name, revision=revision, local_files_only=True))
        safe = any(file.endswith(".safetensors") and "/" not in file for file in files)
        weights = [pattern for pattern in WEIGHTS if ("safetensors" in pattern) == safe]
        patterns = [*CARRIED, *weights]
        # The patterns of the library match folders too, where other forms of weights may be.
        found = snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*.*"]
        )
        return Path(found)
    except LocalEntryNotFoundError as error:
        raise ZooError(
            f"{name} is no folder here, and the Hugging Face hub cannot be reached: name a folder, "
            "or try again with a connection"
        ) from error
    except (*refused, OSError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else "unknown"
        raise ZooError(
            f"{name} is no folder here, and the Hugging Face hub refuses it"
            f"{f' in revision {revision}' if revision else ''}: {reason}"
        ) from error
