"""Several data sets at once, each with a weight."""

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.models.core.errors import UsageError
from zoo.train.data.order import BLOCK
from zoo.train.data.sources import DataConfig, NoRecordsError, Progress, Source


@dataclass(frozen=True, init=False)
class Mixture(DataConfig):
    """Data sets that are mixed record by record.

        data=Mixture((LlavaJson("a.json", "a"), 3), (DigitsVQA(), 1))

    Three records of four are from the first. Each data set is gone through in epochs of its own:
    none of its records comes a second time before all have come once. Out of every 1,000 records
    of training each data set gives a fixed number, its weight in thousandths; their order is drawn.

    The validation split mixes the validation splits of those data sets that have one; where
    questions are asked once and in order, one data set follows the other.

    Attributes:
      parts: (data set, weight) each; a data set may be a mixture itself. Weights count relative to
        their sum.
    """

    parts: tuple[tuple[DataConfig, float], ...]

    def __init__(
        self,
        *given: tuple[DataConfig, float],
        parts: Iterable[tuple[DataConfig, float]] = (),
    ) -> None:
        pairs = tuple((data, float(weight)) for data, weight in (*given, *parts))
        object.__setattr__(self, "parts", pairs)
        if not pairs:
            raise UsageError("Mixture has no data sets: want Mixture((data, weight), ...)")
        for data, weight in pairs:
            if not isinstance(data, DataConfig):
                raise UsageError(f"Mixture got {data!r}: want a data set, such as LlavaJson(...)")
            if not (math.isfinite(weight) and weight > 0):
                raise UsageError(f"the weight of {data} is {weight}: want a number above 0")
        shares = self.weighted()
        total = sum(weight for _, weight in shares)
        for data, weight in shares:
            if weight * 2 * BLOCK < total:
                raise UsageError(
                    f"the weight of {data} is {weight / total:.2g} of all: want 1/{2 * BLOCK} or "
                    "more"
                )

    def prepare(self, data_dir: str | Path, progress: Progress | None = None) -> None:
        """Prepare one after another."""
        for data, _ in self.parts:
            data.prepare(data_dir, progress)

    def source(self, split: str, data_dir: str | Path) -> Source:
        """The records of all data sets, one data set after the other."""
        found = [source for source, _ in sources(self, split, data_dir)]
        return _Joined(found)

    def texts(self) -> Iterable[str]:
        """The texts of all data sets."""
        for data, _ in self.parts:
            yield from data.texts()

    def weighted(self) -> tuple[tuple[DataConfig, float], ...]:
        """The data sets, mixtures dissolved, with weights that are relative to the sum of all."""
        flat = []
        for data, weight in self.parts:
            inner = data.weighted()
            total = sum(share for _, share in inner)
            flat += [(part, weight * share / total) for part, share in inner]
        return tuple(flat)


def sources(data: DataConfig, split: str, data_dir: str | Path) -> list[tuple[Source, float]]:
    """The sources of a data set or of the parts of a mixture, with their weights.

    Parts of a mixture that have no records for validation are left out; there must be one that has.
    """
    pairs = data.weighted()
    found: list[tuple[Source, float]] = []
    for index, (part, weight) in enumerate(pairs):
        last = index == len(pairs) - 1
        optional = split == "validation" and (found or not last)
        with contextlib.suppress(NoRecordsError) if optional else contextlib.nullcontext():
            found.append((part.source(split, data_dir), weight))
    return found


class _Joined:
    """Sources one after another."""

    def __init__(self, parts: Sequence[Source]):
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        index = range(len(self))[index]
        for part in self._parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)
