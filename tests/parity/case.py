"""Golden cases: what the original PyTorch code computed, at tiny sizes and with random weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Case:
    """One recorded run of an original.

    Attributes:
      slug: the system.
      name: of the case.
      meta: which class ran, and what every key means.
      kwargs: its constructor arguments.
      params: {PyTorch state-dict name: array}.
      inputs: {name: array}.
      outputs: {name: array}.
    """

    slug: str
    name: str
    meta: dict[str, Any]
    kwargs: dict[str, Any]
    params: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


def load_case(path: str | Path) -> Case:
    """Read `<slug>/<name>.npz` and the JSON beside it."""
    path = Path(path)
    meta = json.loads(path.with_suffix(".json").read_text("utf-8"))
    groups: dict[str, dict[str, np.ndarray]] = {"param": {}, "in": {}, "out": {}}
    with np.load(path, allow_pickle=False) as arrays:
        for key in arrays:
            group, _, name = key.partition("/")
            groups[group][name] = arrays[key]
    return Case(
        path.parent.name,
        path.stem,
        meta,
        meta.get("kwargs", {}),
        groups["param"],
        groups["in"],
        groups["out"],
    )
