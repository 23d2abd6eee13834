"""What trains, and how: rules over the paths of parameters."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zoo.models.core.errors import UsageError
from zoo.models.core.tree import Path, flatten_dict, unflatten_dict

_LISTED = 8
"""The most parameters that a message lists."""


@dataclass(frozen=True)
class Part:
    """How the parameters train whose whole path a pattern matches.

    Attributes:
      pattern: a regular expression for all of a path such as `decoder/stack/layers/q/kernel`.
      frozen: they stay as they are: no gradient, no optimizer state, one copy on the disk.
      lr: their peak learning rate; None for that of the optimizer.
      weight_decay: theirs; None for that of the optimizer.
    """

    pattern: str
    frozen: bool = False
    lr: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UsageError(f"part {self.pattern!r} is no regular expression: {error}") from None
        if self.lr is not None and self.lr <= 0:
            raise UsageError(f"part {self.pattern!r}: lr is {self.lr}: want more than 0, or frozen")
        if self.weight_decay is not None and self.weight_decay < 0:
            raise UsageError(
                f"part {self.pattern!r}: weight_decay is {self.weight_decay}: want 0 or more"
            )
        if self.frozen and (self.lr is not None or self.weight_decay is not None):
            raise UsageError(f"part {self.pattern!r} is frozen: want no lr and no weight_decay")


def assigned(parts: Sequence[Part], params: Mapping[str, Any]) -> dict[str, int]:
    """{path of every parameter: the part that it belongs to}.

    Raises:
      UsageError: a parameter is matched by no pattern or by several, a pattern matches none, or
        nothing trains.
    """
    paths = sorted(_flat(params))
    matches = {
        path: [i for i, part in enumerate(parts) if re.fullmatch(part.pattern, path)]
        for path in paths
    }
    patterns = [part.pattern for part in parts]
    problems = _listed(
        f"{path} is matched by no pattern; nearest: {_nearest(path, patterns)}"
        for path, found in matches.items()
        if not found
    )
    problems += _listed(
        f"{path} is matched by {' and '.join(repr(patterns[i]) for i in found)}"
        for path, found in matches.items()
        if len(found) > 1
    )
    used = {i for found in matches.values() for i in found}
    problems += _listed(
        f"{pattern!r} matches no parameter; nearest: {_nearest(pattern, paths)}"
        for i, pattern in enumerate(patterns)
        if i not in used
    )
    if problems:
        raise UsageError(
            "parts: want exactly one pattern for every parameter\n" + "\n".join(problems)
        )
    if all(part.frozen for part in parts):
        raise UsageError("parts: all of them are frozen, so that nothing trains")
    return {path: found[0] for path, found in matches.items()}


def divide(parts: Sequence[Part], params: Mapping[str, Any]) -> tuple[Any, Any]:
    """The trees of the parameters that train and of those that are frozen; no parts: all train."""
    if not parts:
        return params, {}
    owner = assigned(parts, params)
    flat = flatten_dict(dict(params))
    trained = {p: leaf for p, leaf in flat.items() if not parts[owner["/".join(p)]].frozen}
    return divided_like(params, unflatten_dict(trained))


def joined(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> Any:
    """The tree that `divide` has divided."""
    if not frozen:
        return trained
    return unflatten_dict({**flatten_dict(dict(trained)), **flatten_dict(dict(frozen))})


def divided_like(params: Mapping[str, Any], trained: Mapping[str, Any]) -> tuple[Any, Any]:
    """The trees of the parameters that `trained` has too, and of the others."""
    flat, chosen = flatten_dict(dict(params)), flatten_dict(dict(trained))
    return (
        unflatten_dict({path: leaf for path, leaf in flat.items() if path in chosen}),
        unflatten_dict({path: leaf for path, leaf in flat.items() if path not in chosen}),
    )


def _flat(params: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[Path, Any] = flatten_dict(dict(params))
    return {"/".join(path): leaf for path, leaf in flat.items()}


def _nearest(name: str, known: Sequence[str]) -> str:
    return ", ".join(map(repr, difflib.get_close_matches(name, known, 2, 0.0)))


def _listed(problems: Iterable[str]) -> list[str]:
    every = [f"  {problem}" for problem in problems]
    more = len(every) - _LISTED
    return every[:_LISTED] + ([f"  ... and {more} more"] if more > 0 else [])
