"""In which order records are read: shuffled epochs of one source, or a weighted mixture of several.

Everything follows from the place in the stream, by arithmetic: any place can be looked up at once,
which is what makes resuming and sharing out among processes exact.
"""

import functools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

BLOCK = 1000
"""So many records of a mixture in a row have its weights exactly, in an order of their own."""


class Place(NamedTuple):
    """Where a record is: which source, and which record of it."""

    source: int
    index: int


def stream(lengths: Sequence[int], counts: Sequence[int], seed: int) -> grain.MapDataset:
    """The endless order of the records of several sources.

    Args:
      lengths: number of records of each source. Every source goes through epochs of its own, each
        of which has all of its records in another order.
      counts: records of each source in a `BLOCK`, as `shares` gives them.
      seed: decides the order.

    Returns:
      `Place`s, one for each place of the stream.
    """
    seeds = [seed, *(int(_drawn(seed, k).integers(1 << 32)) for k in range(1, len(lengths)))]
    orders = [
        grain.MapDataset.range(length).seed(own).shuffle().repeat()
        for length, own in zip(lengths, seeds, strict=True)
    ]
    if len(orders) == 1:
        return orders[0].map(functools.partial(Place, 0))
    return grain.MapDataset.range(sys.maxsize).map(_Mixed(orders, counts, seed))


def shares(weights: Sequence[float]) -> list[int]:
    """How many records of a `BLOCK` each source gives: the nearest to its weight, 1 at least."""
    exact = np.asarray(weights, float) / sum(weights) * BLOCK
    counts = np.maximum(np.floor(exact), 1).astype(int)
    while (surplus := counts.sum() - BLOCK) != 0:
        # Those furthest from their weight give way, as long as something is left of them.
        error = np.where((counts > 1) | (surplus < 0), (counts - exact) * np.sign(surplus), -np.inf)
        counts[error.argmax()] -= np.sign(surplus)
    return counts.tolist()


def rows_of(records: grain.MapDataset, rows: Sequence[int], batch_size: int) -> grain.MapDataset:
    """The records of a stream that stand in certain rows of its batches, batch after batch."""
    if len(rows) == batch_size:
        return records
    return grain.MapDataset.range(sys.maxsize).map(_Rows(records, rows, batch_size))


class _Rows:
    """The record at each place of what is left of a stream."""

    def __init__(self, records: grain.MapDataset, rows: Sequence[int], batch_size: int):
        self._records = records
        self._rows = tuple(rows)
        self._batch_size = batch_size

    def __call__(self, place: int) -> Place:
        batch, row = divmod(place, len(self._rows))
        found: Place = self._records[batch * self._batch_size + self._rows[row]]
        return found


def others(place: Place, length: int) -> Iterator[Place]:
    """All other records of a source, in an order that only depends on the place.

    They stand in for a record that cannot be used.
    """
    step = 1 + int(_drawn(*place).integers(max(length - 1, 1)))
    while math.gcd(step, length) > 1:
        step += 1
    for k in range(1, length):
        yield Place(place.source, (place.index + k * step) % length)


class _Mixed:
    """The `Place` at each place of a mixture of endless orders."""

    def __init__(self, orders: Sequence[grain.MapDataset], counts: Sequence[int], seed: int):
        self._orders = orders
        self._counts = np.asarray(counts)
        self._seed = seed

    def __call__(self, place: int) -> Place:
        block, within = divmod(place, BLOCK)
        source, earlier = _block(tuple(self._counts), self._seed, block)
        k = int(source[within])
        nth = block * int(self._counts[k]) + int(earlier[within])
        return Place(k, int(self._orders[k][nth]))


@functools.lru_cache(maxsize=16)
def _block(counts: tuple[int, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Of every place in a block: its source, and how many of the same source come before it."""
    source = np.repeat(np.arange(len(counts)), counts)
    _drawn(seed, -1, block).shuffle(source)
    earlier = np.empty_like(source)
    for k, count in enumerate(counts):
        earlier[source == k] = np.arange(count)
    return source, earlier


def _drawn(seed: int, *numbers: int) -> np.random.Generator:
    """A generator for one purpose, independent of all others."""
    return np.random.default_rng((seed, *(number + 1 for number in numbers)))
