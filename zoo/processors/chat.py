"""The form of a conversation: which token stands where, and which are to be learned.

    <bos> <image> <user> which digit is leftmost? <assistant> 7 <eos> <user> ... <assistant> ...
    <eos>

Answers and the `<eos>` after them are learned; all else is given. A picture comes first; several
stand where the questions have their marks, if there is a mark for each.
"""

from collections.abc import Sequence

import numpy as np

from zoo.models.core.errors import ZooError
from zoo.processors.text import Tokenizer

IGNORE = -100
"""The label of a token that teaches nothing."""

MARK = "<image>"
"""Stands in a question for one of several pictures."""


def conversation(
    tokenizer: Tokenizer, turns: Sequence[tuple[str, str]], images: int = 1
) -> tuple[list[int], list[int], list[int]]:
    """Ids, labels and turn numbers of a conversation about pictures.

    Args:
      tokenizer: encodes the texts.
      turns: (question, answer) pairs in their order.
      images: number of pictures, 1 or more.

    Returns:
      ids [n], with a placeholder for each picture; labels [n], the id where it is learned, else
      `IGNORE`; turns [n], 0 for what comes before the first turn and then 1, 2, ...

    Raises:
      ZooError if there is no turn, or a question or an answer is empty.
    """
    if not turns:
        raise ZooError("the conversation has no turns: want at least one question and answer")
    placed = stand_at_marks([question for question, _ in turns], images)
    ids = [tokenizer.bos, *([] if placed else [tokenizer.image] * images)]
    labels = [IGNORE] * len(ids)
    numbers = [0] * len(ids)
    for number, (question, answer) in enumerate(turns, 1):
        asked = _asked(tokenizer, question, placed)
        if not answer.strip():
            raise ZooError(f"the answer to {question!r} is empty")
        answered = [*tokenizer.encode(" " + answer.strip()), tokenizer.eos]
        ids += asked + answered
        labels += [IGNORE] * len(asked) + answered
        numbers += [number] * (len(asked) + len(answered))
    return ids, labels, numbers


def prompt(tokenizer: Tokenizer, question: str, images: int = 1) -> list[int]:
    """Ids of a first question about pictures, up to where the answer begins.

    Raises ZooError if it is empty.
    """
    placed = stand_at_marks([question], images)
    first = [] if placed else [tokenizer.image] * images
    return [tokenizer.bos, *first, *_asked(tokenizer, question, placed)]


def pad(row: Sequence[int], length: int, value: int) -> np.ndarray:
    """`row` as int32, filled up with `value` on the right."""
    padded = np.full(length, value, np.int32)
    padded[: len(row)] = row
    return padded


def stand_at_marks(questions: Sequence[str], images: int) -> bool:
    """Whether the pictures stand at the marks of the questions."""
    return images > 1 and sum(question.count(MARK) for question in questions) == images


def _asked(tokenizer: Tokenizer, question: str, placed: bool) -> list[int]:
    if not question.strip():
        raise ZooError("the question is empty: say what you want to know about the picture")
    asked = [tokenizer.user]
    for number, text in enumerate(question.split(MARK) if placed else [question]):
        asked += [tokenizer.image] if number else []
        asked += tokenizer.encode(" " + text.strip()) if text.strip() else []
    return [*asked, tokenizer.assistant]
