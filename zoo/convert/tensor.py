"""A tensor in a file: its shape and dtype are known without reading it."""

import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from zoo.models.core.errors import ZooError

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
"""Element types by their names in safetensors files, the ones that this zoo reads and writes."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass
class Span:
    """A stretch of a file.

    Attributes:
      file: the file.
      start: of the first byte.
      length: in bytes.
      crc: CRC-32 of these bytes where the file tells it; checked when they are first read.
    """

    file: Path
    start: int
    length: int
    crc: int | None = None

    def read(self) -> np.ndarray:
        """The bytes, uint8 [length], as a view of the file that ends with the array.

        Raises:
          ZooError: the file has changed or is damaged.
        """
        if not self.length:
            return np.empty(0, np.uint8)
        self.check()
        return self._map()

    def check(self) -> None:
        """Compare the bytes with the checksum, where there is one, unless that has been done."""
        if self.crc is not None and zlib.crc32(self._map()) != self.crc:
            raise ZooError(
                f"{self.file} is damaged: the bytes from {self.start} on do not have the checksum "
                "that the file gives for them; download it again"
            )
        self.crc = None

    def _map(self) -> np.ndarray:
        try:
            return np.memmap(self.file, np.uint8, "r", self.start, (self.length,))
        except (OSError, ValueError) as error:
            raise ZooError(f"{self.file} cannot be read: {error}") from error


@dataclass(frozen=True)
class Tensor:
    """An array that is read when `np.asarray` asks for it.

    Attributes:
      shape: of the array.
      dtype: of its elements.
      span: where its bytes are.
      offset: of its first element, in elements.
      strides: in elements; None for rows that follow each other.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    span: Span = field(repr=False)
    offset: int = 0
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Length in bytes, as an array of its own."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The array, memory-mapped: the file is read where the array is."""
        size = self.dtype.itemsize
        steps = None if self.strides is None else tuple(step * size for step in self.strides)
        array = np.ndarray(self.shape, self.dtype, self.span.read(), self.offset * size, steps)
        return array if dtype is None and not copy else np.array(array, dtype, copy=copy)


def fits(shape: tuple[int, ...], strides: tuple[int, ...], offset: int, count: int) -> bool:
    """Whether a strided tensor lies inside of storage with `count` elements."""
    if 0 in shape:
        return True
    last = sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    return offset >= 0 and all(step >= 0 for step in strides) and offset + last < count
