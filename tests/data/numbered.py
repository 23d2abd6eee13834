"""A data set whose records are told apart by their pictures: the i-th is all of brightness i."""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from zoo.models.core.errors import ZooError
from zoo.processors import ImageProcessor, Processor, Tokenizer
from zoo.train.data.sources import DataConfig, NoRecordsError

SIZE = 4


@dataclass(frozen=True)
class Numbers(DataConfig):
    """Record i asks for i, with as many turns as i % 3 + 1. Those in `bad` cannot be read.

    With `first`, that is added to all numbers, so that several sets can be told apart.
    """

    records: int = 20
    bad: tuple[int, ...] = ()
    error: type[Exception] = ZooError
    first: int = 0
    validation: bool = True

    def source(self, split: str, data_dir: Any) -> "Numbers":
        if split == "validation" and not self.validation:
            raise NoRecordsError("no validation")
        return self

    def texts(self):
        return map(str, range(self.records))

    def __len__(self) -> int:
        return self.records

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.bad:
            raise self.error(f"record {index} is bad")
        index += self.first
        turns = index % 3 + 1
        return {
            "id": f"n{index}",
            "image": np.full((SIZE, SIZE, 3), index, np.uint8),
            "conversations": ((f"what {index}?", str(index)),) * turns,
            "kinds": ("number",) * turns,
        }


def number_processor(**changes: Any) -> Processor:
    """Makes examples of them."""
    tokenizer = Tokenizer.train(Numbers(200).texts())
    image = ImageProcessor(SIZE, (0, 0, 0), (1 / 255,) * 3)
    return Processor(image, tokenizer, **{"max_length": 64, **changes})


def numbers(batch) -> list[int]:
    """Which records a batch is made of."""
    return [round(float(row.mean())) for row in batch["pixels"]]


def records(batches, count: int) -> list[int]:
    """Which records the next batches are made of."""
    return [number for batch in take(batches, count) for number in numbers(batch)]


def take(batches, count: int) -> list:
    return list(itertools.islice(batches, count))


def same(one, other) -> bool:
    return len(one) == len(other) and all(
        set(a) == set(b) and all(np.array_equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )
