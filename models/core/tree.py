"""Trees of parameters as flat mappings of path tuples, and shape checks at module boundaries."""

from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

Path = tuple[str, ...]
__all__ = [
    "Path",
    "check_shape",
    "flat_paths",
    "flatten_dict",
    "nested",
    "size_by_part",
    "unflatten_dict",
]


def flat_paths(params: Mapping[str, Any]) -> dict[str, Any]:
    """{"decoder/stack/layers/q/kernel": leaf} of a nested tree."""
    return {"/".join(path): leaf for path, leaf in flatten_dict(dict(params)).items()}


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flat_paths`."""
    tree: dict[str, Any] = unflatten_dict(
        {tuple(path.split("/")): leaf for path, leaf in flat.items()}
    )
    return tree


def check_shape(name: str, array: Any, want: str, *sizes: int | None) -> None:
    """Raise `ValueError("name: got (…), want [B, N, D]")` unless `array` has `sizes`."""
    shape = tuple(array.shape)
    ok = len(shape) == len(sizes) and all(
        w is None or s == w for s, w in zip(shape, sizes, strict=True)
    )
    if not ok:
        exact = ", ".join("·" if s is None else str(s) for s in sizes)
        raise ValueError(f"{name}: got {shape}, want {want} = ({exact})")


def size_by_part(params: Mapping[str, Any]) -> dict[str, int]:
    """Number of parameters under each top-level name, and `total`.

    Works on arrays and on shapes alone.
    """
    sizes: dict[str, int] = {}
    for path, leaf in flatten_dict(dict(params)).items():
        rows = leaf if isinstance(leaf, tuple) else (leaf,)
        sizes[path[0]] = sizes.get(path[0], 0) + sum(int(row.size) for row in rows)
    return {**sizes, "total": sum(sizes.values())}
