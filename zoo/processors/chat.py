"""The form of a conversation: which token stands where, and which are to be learned.

    <bos> <image> <user> which digit is leftmost? <assistant> 7 <eos> <user> ... <assistant> ...
    <eos>

Answers and the `<eos>` after them are learned; all else is given.
"""

from collections.abc import Sequence

import numpy as np

from zoo.models.core.errors import ZooError
from zoo.processors.text import Tokenizer

IGNORE = -100
"""The label of a token that teaches nothing."""


def conversation(
    tokenizer: Tokenizer, turns: Sequence[tuple[str, str]]
) -> tuple[list[int], list[int], list[int]]:
    """Ids, labels and turn numbers of a conversation about one picture.

    Args:
      tokenizer: encodes the texts.
      turns: (question, answer) pairs in their order.

    Returns:
      ids [n], with one image placeholder; labels [n], the id where it is learned, else `IGNORE`;
      turns [n], 0 for what comes before the first turn and then 1, 2, ...

    Raises:
      ZooError if there is no turn, or a question or an answer is empty.
    """
    if not turns:
        raise ZooError("the conversation has no turns: want at least one question and answer")
    ids = [tokenizer.bos, tokenizer.image]
    labels = [IGNORE, IGNORE]
    numbers = [0, 0]
    for number, (question, answer) in enumerate(turns, 1):
        asked = _asked(tokenizer, question)
        if not answer.strip():
            raise ZooError(f"the answer to {question!r} is empty")
        answered = [*tokenizer.encode(" " + answer.strip()), tokenizer.eos]
        ids += asked + answered
        labels += [IGNORE] * len(asked) + answered
        numbers += [number] * (len(asked) + len(answered))
    return ids, labels, numbers


def prompt(tokenizer: Tokenizer, question: str) -> list[int]:
    """Ids of a first question, up to where the answer begins. Raises ZooError if it is empty."""
    return [tokenizer.bos, tokenizer.image, *_asked(tokenizer, question)]


def pad(row: Sequence[int], length: int, value: int) -> np.ndarray:
    """`row` as int32, filled up with `value` on the right."""
    padded = np.full(length, value, np.int32)
    padded[: len(row)] = row
    return padded


def _asked(tokenizer: Tokenizer, question: str) -> list[int]:
    if not question.strip():
        raise ZooError("the question is empty: say what you want to know about the picture")
    return [tokenizer.user, *tokenizer.encode(" " + question.strip()), tokenizer.assistant]
