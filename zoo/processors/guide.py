"""The question by which some methods choose vision tokens: what it is, and where it stands."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.images import listed
from zoo.models.core.errors import UsageError

if TYPE_CHECKING:
    from zoo.models.core.types import Batch

Span = tuple[int, int]
"""A part of a text: where it begins, and where what follows it begins."""

_OPEN, _CLOSE = "\ufdd2", "\ufdd3"  # never characters of a text: Unicode has set them aside


def question_of(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """The question of a prompt: all of a text; of a conversation what its last turn of the user
    says, "" where that shows pictures alone.
    """
    if isinstance(prompt, str):
        return prompt.strip()
    turn = _last_turn(prompt)
    texts = [] if turn is None else [text for _, text in _texts(prompt[turn]["content"])]
    return " ".join(text.strip() for text in texts if text.strip())


def by_first_question(
    encode: "Callable[[Any, Any], Batch]", images: Any, prompts: Any
) -> dict[str, Any]:
    """A batch of conversations whose vision tokens are those that were chosen when the first
    question was the only one.

    Args:
      encode: makes the batch of pictures and prompts, as `Loaded.encode`.
      images: of one prompt, or of each.
      prompts: one, or several.

    Returns:
      the batch with `guide`, the text that was there to choose by; and `guide_vector` where the
      method wants it.
    """
    single = isinstance(prompts, str) or isinstance(prompts[0], Mapping)
    shown = [images] if single else [None] * len(prompts) if images is None else images
    batch = dict(encode(images, prompts))
    guide, vectors = np.zeros(batch["ids"].shape, bool), []
    for row, prompt, seen in zip(guide, [prompts] if single else prompts, shown, strict=True):
        first, number = _opening(prompt)
        if number is not None:
            seen = list(seen if isinstance(seen, list) else listed(seen))[:number] or None
        alone = encode([seen], [first])
        chosen = alone.get("guide", alone["text_mask"])[0]
        length = min(len(row), len(chosen))
        ids = batch["ids"][len(vectors), :length]
        row[:length] = chosen[:length] & np.cumprod(ids == alone["ids"][0, :length]).astype(bool)
        vectors.append(alone.get("guide_vector"))
    if "guide_vector" in batch:
        batch["guide_vector"] = np.concatenate(vectors)
    return batch | {"guide": guide}


def _opening(prompt: str | Sequence[Mapping[str, Any]]) -> tuple[Any, int | None]:
    """A prompt up to its first question, and how many pictures that shows; None for all."""
    if isinstance(prompt, str):
        return prompt, None
    turns = [i for i, each in enumerate(prompt) if _asks(each)]
    first = prompt[: turns[0] + 1] if turns else prompt
    contents = [each["content"] for each in first if not isinstance(each["content"], str)]
    items = [item for content in contents for item in content if isinstance(item, Mapping)]
    return first, sum(item.get("type") == "image" for item in items)


def marked(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The conversation with invisible marks around its question, which `unmarked` finds."""
    turn, out = _last_turn(messages), list(messages)
    if turn is None:
        return out
    content = messages[turn]["content"]
    if isinstance(content, str):
        new: Any = _mark(content)
    else:
        new = list(content)
        for place, text in _texts(content):
            new[place] = {**new[place], "text": _mark(text)}
    out[turn] = {**messages[turn], "content": new}
    return out


def unmarked(text: str) -> tuple[str, list[Span]]:
    """A text without such marks, and what stood between them."""
    clean, spans, begin = "", [], 0
    for piece in text.replace(_CLOSE, _CLOSE + _OPEN).split(_OPEN):
        asked = piece.endswith(_CLOSE)
        begin, clean = len(clean), clean + piece.replace(_CLOSE, "")
        if asked and len(clean) > begin:
            spans.append((begin, len(clean)))
    return clean, spans


def inside(place: Span, spans: Sequence[Span]) -> bool:
    """Whether a token that spells this part of a text has a part in one of the spans."""
    return any(place[0] < end and begin < place[1] for begin, end in spans)


def check(guide: Sequence[bool], reducer: object) -> None:
    """Raise UsageError if no token is marked."""
    if not any(guide):
        raise UsageError(
            f"{type(reducer).__name__} chooses vision tokens by the question, and the prompt asks "
            "none: say what you want to know, or take a method that does not read the text"
        )


def _mark(text: str) -> str:
    """Marks around a text, within the spaces around it, which templates may cut off."""
    bare = text.strip().replace(_OPEN, "").replace(_CLOSE, "")
    if not bare:
        return text
    at = len(text) - len(text.lstrip())
    return f"{text[:at]}{_OPEN}{bare}{_CLOSE}{text[len(text.rstrip()) :]}"


def _last_turn(messages: Sequence[Mapping[str, Any]]) -> int | None:
    """The last turn of the user that has a content."""
    asked = [i for i, each in enumerate(messages) if _asks(each)]
    return asked[-1] if asked else None


def _asks(message: Mapping[str, Any]) -> bool:
    """Whether it is a turn of the user that has a content."""
    return message.get("role") == "user" and bool(message.get("content"))


def _texts(content: Any) -> list[tuple[int, str]]:
    """The texts of a content, with their places."""
    if isinstance(content, str):
        return [(0, content)]
    return [
        (i, item["text"])
        for i, item in enumerate(content)
        if isinstance(item, Mapping) and isinstance(item.get("text"), str)
    ]
