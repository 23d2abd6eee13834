"""From what is stored to records: turns of a conversation, and rows of tables."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from zoo.models.core.errors import UsageError, ZooError
from zoo.processors.chat import MARK

Turns = tuple[tuple[str, str], ...]


def turns(said: Any, pictures: int, name: str) -> Turns:
    """Questions and answers of a conversation in LLaVA's form.

    Args:
      said: list of {"from": "human" or "gpt", "value": text}, in alternation.
      pictures: how many it is about. The mark of a single one is taken out of the text, since the
        picture comes first anyway; several keep theirs.
      name: what errors call the record.

    Raises:
      ZooError: says what is wrong with it.
    """
    if not isinstance(said, list) or not said or len(said) % 2:
        raise ZooError(f"{name}: `conversations` is no list of turns, human and gpt in alternation")
    texts = []
    for turn, speaker in zip(said, ("human", "gpt") * (len(said) // 2), strict=True):
        good = isinstance(turn, dict) and isinstance(turn.get("value"), str)
        if not good or turn.get("from") != speaker:
            raise ZooError(
                f"{name}: a turn is {turn!r}, want one with `from` {speaker!r} and a `value`"
            )
        texts.append(turn["value"])
    return marked(texts[::2], texts[1::2], pictures, name)


def marked(questions: list[str], answers: list[str], pictures: int, name: str) -> Turns:
    """Pairs of question and answer, whose marks are checked; arguments as in `turns`."""
    marks = sum(text.count(MARK) for text in questions)
    if marks not in (0, pictures):
        raise ZooError(
            f"{name}: {marks} <image> marks for {pictures} pictures: want one for each, or none"
        )
    asked = [text if pictures > 1 else text.replace(MARK, "") for text in questions]
    return tuple(zip(map(str.strip, asked), answers, strict=True))


@dataclass(frozen=True)
class Columns:
    """Which columns of a table a record is made of.

    Attributes:
      image: of the picture: bytes of a file, {"bytes": ...}, a file name, an array, or a list of
        these. None: text only.
      conversations: of turns in LLaVA's form, see `LlavaJson`, or of the JSON text of them. Not
        read where `answer` is given.
      question, answer: of a text, or of a list of texts for several turns.
      ask: the question about every picture, where there is no column of questions.
    """

    image: str | None = "image"
    conversations: str = "conversations"
    question: str | None = None
    answer: str | None = None
    ask: str = ""

    def __post_init__(self) -> None:
        if self.answer is not None and not (self.question or self.ask.strip()):
            raise UsageError(
                f"columns has answer = {self.answer!r} and no question: name a column with "
                "`question`, or say with `ask` what is asked about every picture"
            )
        if self.answer is None and (self.question or self.ask):
            raise UsageError("columns has a question and no `answer`: name the column of answers")

    @property
    def names(self) -> tuple[str, ...]:
        """All columns that are read."""
        texts = (self.question, self.answer) if self.answer else (self.conversations,)
        return tuple(name for name in (self.image, *texts) if name)

    def record(self, row: Mapping[str, Any], name: str, images: str | None) -> dict[str, Any]:
        """The record of a row; see `zoo.train.data.sources.Source`.

        Args:
          row: column -> value.
          name: what the record is called.
          images: the folder that file names of pictures start from.

        Raises:
          ZooError: a column is missing or holds what is no picture or text.
        """
        pictures = [] if self.image is None else _pictures(row.get(self.image), name, images)
        if self.answer is None:
            said = _plain(_cell(row, self.conversations, name))
            if isinstance(said, str):
                try:
                    said = json.loads(said)
                except ValueError as error:
                    raise ZooError(f"{name}: `conversations` is not valid JSON: {error}") from None
            pairs = turns(_turn_list(said), len(pictures), name)
        else:
            answers = _texts(_cell(row, self.answer, name), name)
            questions = [self.ask] * len(answers)
            if self.question is not None:
                questions = _texts(_cell(row, self.question, name), name)
            if len(questions) != len(answers):
                raise ZooError(f"{name}: {len(questions)} questions for {len(answers)} answers")
            pairs = marked(questions, answers, len(pictures), name)
        return {
            "id": name,
            "image": tuple(pictures) if len(pictures) > 1 else pictures[0] if pictures else None,
            "conversations": pairs,
            "kinds": ("",) * len(pairs),
            "independent": False,
        }


def _cell(row: Mapping[str, Any], column: str, name: str) -> Any:
    if row.get(column) is None:
        raise ZooError(f"{name} has no {column!r}: it has {', '.join(sorted(row)) or 'nothing'}")
    return row[column]


def _pictures(value: Any, name: str, images: str | None) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, list | tuple):
        return [picture for one in value for picture in _pictures(one, name, images)]
    if isinstance(value, dict):
        inner = value.get("bytes") or value.get("path")
        return _pictures(inner, name, images)
    if isinstance(value, str):
        if images is None:
            raise ZooError(f"{name} names the picture {value!r}: `images` says in which folder")
        return [os.path.join(images, value)]
    if isinstance(value, bytes | np.ndarray):
        return [value]
    raise ZooError(f"{name}: a picture is a {type(value).__name__}, want bytes or a file name")


def _plain(value: Any) -> Any:
    """Arrays as lists and bytes as text, all the way down."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _turn_list(said: Any) -> Any:
    """A table of turns, which some formats make of a list of them, as a list again."""
    if isinstance(said, dict) and all(isinstance(column, list) for column in said.values()):
        return [dict(zip(said, turn, strict=False)) for turn in zip(*said.values(), strict=False)]
    return said


def _texts(value: Any, name: str) -> list[str]:
    value = _plain(value)
    listed = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str | int | float) for text in listed):
        raise ZooError(f"{name}: {value!r} is no text")
    return [str(text) for text in listed]
