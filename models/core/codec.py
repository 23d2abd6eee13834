"""Frozen configurations to JSON and back, and how two of them differ."""

import dataclasses
import importlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from zoo.models.core.errors import UsageError, ZooError

CLASS = "class"
"""The key that names the dataclass of a JSON object."""

_ABSENT = "(absent)"


def encode(config: Any) -> Any:
    """Plain JSON values of a dataclass that is nested as deep as you like.

    Every object carries its class as a dotted name, so that `decode` needs the JSON alone. Tuples
    become lists.

    Raises:
      UsageError: a field holds what JSON cannot, such as an array, a function, a mapping or an
        infinite number.
    """
    return _encode(config, "")


def decode(tree: Any, classes: Iterable[type] = ()) -> Any:
    """What `encode` was given.

    Args:
      tree: plain JSON values.
      classes: dataclasses outside of the package that may occur. Of the package itself all
        dataclasses are found by name; no other module is ever imported.

    Raises:
      ZooError: an unknown class, an unknown or missing field, or a value that its class refuses.
    """
    return _decode(tree, {_name(cls): cls for cls in classes})


def diff(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted path -> (old, new) of every leaf that differs between two encoded configurations."""
    before, after = _flatten(old), _flatten(new)
    return {
        path: (before.get(path, _ABSENT), after.get(path, _ABSENT))
        for path in before | after
        if before.get(path, _ABSENT) != after.get(path, _ABSENT)
    }


def show_diff(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """One line `path: old → new` for each change."""
    return "\n".join(f"  {path}: {old} → {new}" for path, (old, new) in changes.items())


def of_another_version(changes: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """The paths of those changes that no values explain: a field is there in one of two objects of
    the same class only.
    """

    def explained(path: str) -> bool:
        parent = path.rpartition(".")[0]
        other_class = f"{parent}.{CLASS}".lstrip(".") in changes
        return other_class or any(other.startswith(f"{path}.") for other in changes)

    return [path for path, pair in changes.items() if _ABSENT in pair and not explained(path)]


def _encode(value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value) if f.init]
        inner = {name: _encode(getattr(value, name), f"{path}.{name}") for name in fields}
        return {CLASS: _name(type(value)), **inner}
    if isinstance(value, tuple | list):
        return [_encode(item, f"{path}.{i}") for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise UsageError(
        f"{path.lstrip('.') or 'the configuration'} is {value!r}: want None, a bool, a finite "
        "number, a text, a tuple or a dataclass of these"
    )


def _decode(tree: Any, known: Mapping[str, type]) -> Any:
    if isinstance(tree, list):
        return tuple(_decode(item, known) for item in tree)
    if not isinstance(tree, dict):
        return tree
    name = tree.get(CLASS)
    cls = known.get(str(name)) or _find(name)
    names = {f.name for f in dataclasses.fields(cls) if f.init}
    if unknown := sorted(set(tree) - names - {CLASS}):
        raise ZooError(f"{name} has no field {', '.join(unknown)}: written by another version?")
    values = {key: _decode(value, known) for key, value in tree.items() if key != CLASS}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ZooError(f"{name} cannot be made from what was written: {error}") from error


def _find(name: Any) -> Any:
    """The dataclass of the package that is called `name`."""
    module, _, attribute = str(name).rpartition(".")
    if module.split(".")[0] != "zoo":
        raise ZooError(f"configuration class {name!r} is unknown: want one of the package `zoo`")
    try:
        cls = getattr(importlib.import_module(module), attribute, None)
    except ImportError:
        cls = None
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls) and _name(cls) == name):
        raise ZooError(f"configuration class {name!r} does not exist in this version")
    return cls


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _flatten(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        items: Iterable[tuple[Any, Any]] = tree.items()
    elif isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        items = enumerate(tree)
    else:
        return {path: tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= _flatten(value, f"{path}.{key}" if path else str(key))
    return flat
