"""Safetensors files: an eight-byte length, a JSON header of that length, then the tensors.

A header is believed only where it agrees with itself and with the file.
"""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from zoo.convert.tensor import DTYPES, NAMES, Span, Tensor
from zoo.models.core.errors import ZooError

_LONGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, unread.

    Raises:
      ZooError: the file is not whole, is none of this format, or its header contradicts itself.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as data:
            first = data.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise _bad(
                    file,
                    f"it has {size:,} bytes and would begin with a header of {length:,}: it is "
                    "truncated or no safetensors file",
                )
            text = data.read(length)
    except OSError as error:
        raise ZooError(f"{file} cannot be read: {error.strerror}") from error
    header = _parse(file, text)
    return _tensors(file, header, start=8 + length, length=size - 8 - length)


def write_header(
    out: BinaryIO, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]
) -> dict[str, int]:
    """Write the header of a file whose tensors follow in this order; {name: place of its bytes}."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end, starts = 0, {}
    for name, (dtype, shape) in tensors.items():
        starts[name] = end
        end += math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    out.write(struct.pack("<Q", len(text)) + text)
    return {name: 8 + len(text) + start for name, start in starts.items()}


def _parse(file: Path, text: bytes) -> dict[str, Any]:
    def once(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in items:
            if name in found:
                raise _bad(file, f"its header names {name!r} twice")
            found[name] = value
        return found

    def constant(name: str) -> None:
        raise ValueError(f"{name} is no number")

    try:
        header = json.loads(text, object_pairs_hook=once, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise _bad(file, f"its header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise _bad(file, "its header is no JSON object")
    header.pop("__metadata__", None)
    return header


def _tensors(file: Path, header: dict[str, Any], start: int, length: int) -> dict[str, Tensor]:
    out, spans = {}, []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(file, name, entry)
        need = math.prod(shape) * dtype.itemsize
        if end - begin != need:
            raise _bad(
                file, f"{name}: {shape} of {dtype} takes {need:,} bytes, given {end - begin:,}"
            )
        out[name] = Tensor(shape, dtype, Span(file, start + begin, need))
        spans.append((begin, end, name))
    place = 0
    for begin, end, name in sorted(spans):
        if begin != place:
            what = "overlaps the tensor before it" if begin < place else "follows a gap"
            raise _bad(file, f"its header lies: {name} begins at {begin:,} and {what}")
        place = end
    if place != length:
        what = "is truncated or longer than it says"
        raise _bad(file, f"it {what}: its tensors take {place:,} bytes and {length:,} are there")
    return out


def _entry(file: Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        begin, end = offsets
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError):
        raise _bad(file, f"{name}: want dtype, shape and two data_offsets") from None
    if dtype not in DTYPES:
        raise _bad(file, f"{name}: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
        raise _bad(file, f"{name}: shape {shape} and offsets {offsets}: want integers of 0 or more")
    return DTYPES[dtype], tuple(shape), begin, end


def _bad(file: Path, why: str) -> ZooError:
    return ZooError(f"{file} cannot be used: {why}")
