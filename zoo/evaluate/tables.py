"""Rows of logs: CSV files, and JSON lines such as the `metrics.jsonl` of a training run."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.models.core.card import nearest
from zoo.models.core.errors import UsageError

_SUFFIXES = (".csv", ".jsonl")


def read_rows(paths: Sequence[str | Path], columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of files that have a value in all of `columns`, with the column `file` besides.

    Args:
      paths: CSV or JSONL files; a folder stands for those that lie in it. A line of JSON that is
        cut off, as the last one of a run that was killed, is left out.
      columns: names that a row must have.

    Raises:
      UsageError: a path is nothing of this kind, or no row has these columns.
    """
    files = [file for path in paths for file in _files(Path(path))]
    rows, known = [], set()
    for file in files:
        name = file.parent.name if file.name == "metrics.jsonl" else file.stem
        for row in _read(file):
            known |= set(row)
            if all(row.get(column) not in (None, "") for column in columns):
                rows.append({"file": name, **row})
    if not rows:
        missing = next((column for column in columns if column not in known), None)
        hint = "" if missing is None else nearest(missing, known)
        raise UsageError(
            f"no row has a value for {', '.join(columns)}{hint}; the columns of "
            f"{', '.join(file.name for file in files)} are {', '.join(sorted(known)) or 'none'}"
        )
    return rows


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
        if not found:
            raise UsageError(f"{path} holds no CSV or JSONL file: name a file, or another folder")
        return found
    if not path.is_file() or path.suffix not in _SUFFIXES:
        raise UsageError(f"{path}: want a CSV or JSONL file, or a folder with some")
    return [path]


def _read(file: Path) -> list[Mapping[str, Any]]:
    text = file.read_text("utf-8", errors="replace")
    if file.suffix == ".csv":
        return list(csv.DictReader(text.splitlines()))
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
