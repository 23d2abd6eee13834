"""Warm start: the parameters that training begins with, from models that are there already."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from jax.sharding import Mesh

from zoo.convert.place import flat_paths, nested, shardings_of
from zoo.convert.transfer import Transfer
from zoo.loading import load
from zoo.models.core.config import ModelConfig
from zoo.models.core.errors import UsageError
from zoo.processors.text import Tokenizer
from zoo.processors.vlm import Processor
from zoo.saving import MODEL, PARAMS
from zoo.train.config import Start

_LISTED = 12
"""The most parameters that a message lists."""


def starting_variables(
    starts: Sequence[Start],
    fresh: Sequence[str],
    config: ModelConfig,
    boxed: Any,
    stats: Any,
    mesh: Mesh,
    seed: int,
    say: Callable[[str], None],
) -> tuple[Any, Any]:
    """All parameters of a model, float32, on the mesh, and its running statistics.

    Args:
      starts: where they are from; what several have, the last one gives.
      fresh: patterns of the parameters that are drawn.
      config: of the model.
      boxed: shapes and logical names of its parameters.
      stats: shapes of its running statistics.
      mesh: where all lie.
      seed: of what is drawn.
      say: is told in a line for each source how much of it was taken.

    Returns:
      The parameters, and the statistics; None for these if some are in no source, or have another
      shape there: those of a new model are taken.

    Raises:
      UsageError: a parameter is in no source and matches no pattern, or has another shape there; or
        a pattern matches nothing.
    """
    wanted = flat_paths(nn.unbox(boxed))
    new = _matched(fresh, wanted)
    found: dict[str, Any] = {}
    known: dict[str, Any] = {}
    for start in starts:
        theirs = load(start.source, mesh=mesh, dtype="float32")
        taken = {start.place(path): leaf for path, leaf in flat_paths(theirs.params).items()}
        taken = {path: leaf for path, leaf in taken.items() if path in wanted and path not in new}
        say(f"{len(taken)} of {len(wanted)} parameters are taken from {start.source}")
        found |= taken
        known |= {start.place(path): leaf for path, leaf in flat_paths(theirs.stats).items()}
    problems = [f"{path} is not there" for path in wanted if path not in new and path not in found]
    problems += [
        f"{path} is {leaf.shape} there, want {wanted[path].shape}"
        for path, leaf in found.items()
        if leaf.shape != wanted[path].shape
    ]
    if problems:
        listed = "".join(f"\n  {problem}" for problem in sorted(problems)[:_LISTED])
        more = f"\n  ... and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise UsageError(
            f"start: {', '.join(start.source for start in starts)} does not give all parameters:"
            f"{listed}{more}\nname those that shall be drawn in `fresh`, or change the model"
        )
    plan = Transfer(config, boxed, new, frozenset())
    params = nested(found | plan.fresh(seed, shardings_of(boxed, mesh), np.dtype("float32")))
    shapes = {path: leaf.shape for path, leaf in flat_paths(nn.unbox(stats)).items()}
    kept = {path: np.asarray(leaf) for path, leaf in known.items() if path in shapes}
    complete = {path: leaf.shape for path, leaf in kept.items()} == shapes
    return params, nested(kept) if complete else None


def starting_tokenizer(starts: Iterable[Start]) -> Tokenizer | None:
    """The tokenizer of the first model among them that was trained here; None if there is none."""
    for start in starts:
        for folder in (Path(start.source) / MODEL, Path(start.source)):
            if (folder / PARAMS).is_file():
                return Processor.load(folder).tokenizer
    return None


def _matched(patterns: Sequence[str], wanted: Mapping[str, Any]) -> frozenset[str]:
    """The paths that some pattern matches as a whole."""
    found: set[str] = set()
    for pattern in patterns:
        try:
            matched = {path for path in wanted if re.fullmatch(pattern, path)}
        except re.error as error:
            raise UsageError(f"fresh: {pattern!r} is no regular expression: {error}") from None
        if not matched:
            tops = sorted({"/".join(path.split("/")[:2]) for path in wanted})
            raise UsageError(
                f"fresh: {pattern!r} matches no parameter; there are {', '.join(tops)}, ..."
            )
        found |= matched
    return frozenset(found)
