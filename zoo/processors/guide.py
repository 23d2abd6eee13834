"""The question by which some methods choose vision tokens: what it is, and where it stands."""

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.models.core.errors import UsageError

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
    asked = [
        i for i, each in enumerate(messages) if each.get("role") == "user" and each.get("content")
    ]
    return asked[-1] if asked else None


def _texts(content: Any) -> list[tuple[int, str]]:
    """The texts of a content, with their places."""
    if isinstance(content, str):
        return [(0, content)]
    return [
        (i, item["text"])
        for i, item in enumerate(content)
        if isinstance(item, Mapping) and isinstance(item.get("text"), str)
    ]
