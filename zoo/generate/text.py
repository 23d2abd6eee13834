"""From the tokens of answers to their text: whole characters, cut off where a stop string begins.

Nothing here knows how tokens are chosen: `spoken` asks for a few more of them at a time.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from zoo.generate.autoregressive import Answers
from zoo.models.core.errors import UsageError

Decode = Callable[[Sequence[int]], str]
"""From ids to their text; what a byte sequence that is no character yet becomes, is U+FFFD."""

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_MOST_BYTES = 4
"""Bytes of the longest character in UTF-8."""


def spoken(
    answers: Answers,
    decode: Decode,
    *,
    byte_id: int | None = None,
    stop: Sequence[str] = (),
    every: int | None = None,
) -> Iterator[list[str]]:
    """What every row has said so far, again and again, until all have ended.

    A text only ever grows, and the last ones are the answers: what might still turn into another
    character, into the beginning of a stop string or into spaces at the end is held back.

    Args:
      answers: the rows; those that say a stop string are ended.
      decode: from the ids of an answer to its text.
      byte_id: see `steady`.
      stop: strings that end an answer. The text is cut off where the first of them begins.
      every: how many tokens are written between two texts; by default as many as there are, or a
        few where there are stop strings, which only the text shows.

    Raises:
      UsageError: a stop string is empty, or `every` is less than 1.
    """
    if "" in stop:
        raise UsageError("a stop string is empty: every text begins with it")
    if every is not None and every < 1:
        raise UsageError(f"every is {every}: want 1 or more tokens")
    if every is None:
        every = 16 if stop else answers.most
    while True:
        last, said, stopped = answers.done, [], []
        for row, ended in zip(answers.rows(), answers.ended, strict=True):
            if ended:
                text = decode(row)
            else:
                text = whole(row, decode) if last else steady(row, decode, byte_id)
            end = first_stop(text, stop)
            stopped.append(end < len(text))
            is_final = last or ended or stopped[-1]
            said.append(text[:end].strip() if is_final else settled(text, stop))
        answers.end(np.array(stopped))
        yield said
        if last or answers.done:
            return
        answers.advance(every)


def whole(ids: Sequence[int], decode: Decode) -> str:
    """The text of `ids`, which were cut off, without the beginning of a character at its end."""
    text = decode(ids)
    if not text.endswith(_BROKEN):
        return text
    # Some decoders spell what stands before broken bytes anew: leave the tokens out, if that helps.
    shorter = (decode(ids[:-cut]) for cut in range(1, min(_MOST_BYTES, len(ids) + 1)))
    return next((text for text in shorter if not text.endswith(_BROKEN)), text[:-1])


def steady(ids: Sequence[int], decode: Decode, byte_id: int | None) -> str:
    """The beginning of the text of `ids` that it has whatever follows them.

    Args:
      ids: tokens.
      decode: their text.
      byte_id: the token of a byte that is in no character, for decoders to which a run of bytes is
        either a text or broken as a whole: what this byte would change is left out.
    """
    text = decode(ids)
    if byte_id is not None:
        broken = decode([*ids, byte_id])
        pairs = enumerate(zip(text, broken, strict=False))
        text = text[: next((at for at, (a, b) in pairs if a != b), len(text))]
    return text.rstrip(_BROKEN)


def first_stop(text: str, stop: Sequence[str]) -> int:
    """Where the first of the stop strings begins in `text`; its length if there is none."""
    found = (text.find(string) for string in stop)
    return min((place for place in found if place >= 0), default=len(text))


def settled(text: str, stop: Sequence[str]) -> str:
    """The part of an unfinished `text` that is in the answer whatever follows.

    Without spaces around it, which an answer does not begin or end with, and without what may be
    the beginning of a stop string.
    """
    most = max(map(len, stop), default=1) - 1
    for length in range(min(most, len(text)), 0, -1):
        if any(string.startswith(text[-length:]) for string in stop):
            text = text[:-length]
            break
    return text.strip()
