"""Prompts with two answers, of which one is preferred."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.models.core.errors import ZooError
from zoo.train.data.sources import DataConfig, LlavaJson, Progress, Source

REJECTED = "rejected_"
"""Before the name of an array of a batch: the same of the answer that is not preferred."""

_OF_TEXT = ("ids", "labels", "text_mask", "segments", "positions", "token_types")
"""Arrays of an example that depend on the answer; all others are the same for both."""


@dataclass(frozen=True)
class PreferenceJson(LlavaJson):
    """Prompts about pictures, or about none, each with an answer that is preferred to another.

    The file holds a list of records such as

        {"id": "7", "image": "a.jpg", "prompt": "<image> What is this?",
         "chosen": "A boat.", "rejected": "A house."}

    Pictures, marks and the validation split are as in `LlavaJson`.
    """

    def record(self, entry: Any, name: str) -> dict[str, Any]:
        """The record of an entry of the file, which errors call `name`.

        Raises:
          ZooError: it has no prompt, or not two answers.
        """
        known = entry if isinstance(entry, dict) else {}
        said = [known.get(part) for part in ("prompt", "chosen", "rejected")]
        if not all(isinstance(text, str) and text.strip() for text in said):
            raise ZooError(f"{name}: want texts `prompt`, `chosen` and `rejected`")
        prompt, chosen, rejected = map(str, said)
        turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": chosen}]
        return {**super().record({**known, "conversations": turns}, name), "rejected": rejected}

    def texts(self) -> Iterable[str]:
        """The prompts and both answers of all records that are well-formed."""
        yield from super().texts()
        for entry in self._entries():
            if isinstance(entry, dict) and isinstance(text := entry.get("rejected"), str):
                yield text


@dataclass(frozen=True)
class WrongAnswers(DataConfig):
    """The questions of another data set, one of each record, with its answer preferred to another
    answer to a question of the same kind.

    Attributes:
      data: the other data set.
    """

    data: DataConfig

    def prepare(self, data_dir: str | Path, progress: Progress | None = None) -> None:
        """Prepare the other data set."""
        self.data.prepare(data_dir, progress)

    def source(self, split: str, data_dir: str | Path) -> Source:
        """As that of the other data set."""
        return _WrongAnswers(self.data.source(split, data_dir))

    def texts(self) -> Iterable[str]:
        """Those of the other data set."""
        return self.data.texts()


@dataclass(frozen=True)
class _WrongAnswers:
    right: Source

    def __len__(self) -> int:
        return len(self.right)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        record = self.right[index]
        turn = index % len(record["conversations"])
        question, answer = record["conversations"][turn]
        kind = record["kinds"][turn]
        for step in range(1, len(self)):
            other = self.right[(index + step) % len(self)]
            said = zip(other["conversations"], other["kinds"], strict=True)
            wrong = [text for (_, text), its in said if its == kind and text != answer]
            if wrong:
                one = {"conversations": ((question, answer),), "kinds": (kind,)}
                return {**record, **one, "rejected": wrong[0]}
        raise ZooError(f"{record['id']}: no record has another answer to a question of its kind")


def encoded(processor: Any, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """One training example.

    Args:
      processor: turns a record into arrays.
      record: see `zoo.train.data.sources.Source`. One that has a `rejected` answer becomes an
        example with this answer's arrays too, under names that begin with `REJECTED`; both answers
        share the arrays of the pictures.

    Raises:
      ZooError: as the processor.
    """
    example: dict[str, np.ndarray] = processor.encode(record)
    if "rejected" not in record:
        return example
    *before, (question, _) = record["conversations"]
    turns = (*before, (question, record["rejected"]))
    other = processor.encode({**record, "conversations": turns})
    return example | {f"{REJECTED}{name}": other[name] for name in _OF_TEXT if name in other}
