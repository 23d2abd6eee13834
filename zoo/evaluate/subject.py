"""Whoever answers questions about pictures: a model, an agent around one, or a script for tests.

Benchmarks and agents know nothing of a model but `Subject`, and an agent is a `Subject` again:
every benchmark judges it unchanged, and agents may stand around agents.

    subject = zoo.create("zoomeye").wrap(ModelSubject(zoo.load(source)))  # zoo.evaluate.model
    subject.generate([Query("What colour is the car?", ("street.jpg",))])
"""

import functools
import hashlib
import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from zoo.images import Source
from zoo.models.core.config import SystemConfig
from zoo.models.core.errors import UsageError

if TYPE_CHECKING:
    from zoo.generate.sampling import Sampling
    from zoo.loaded import Prompt


@dataclass(frozen=True, eq=False)
class Query:
    """One thing that is asked.

    Attributes:
      prompt: a question, or a conversation whose last turn is one.
      images: the pictures that it shows, in their order.
      about: what an agent is to look for, where that is not all of the prompt: the question without
        its options, say.

    Raises:
      UsageError: the pictures are no tuple.
    """

    prompt: "Prompt"
    images: tuple[Source, ...] = ()
    about: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.images, tuple):
            kind = type(self.images).__name__
            raise UsageError(f"images are a {kind}: want a tuple, such as (picture,) for one")

    @property
    def question(self) -> str:
        """What is asked, as one text."""
        if self.about is not None:
            return self.about
        if isinstance(self.prompt, str):
            return self.prompt
        content = self.prompt[-1].get("content", "")
        if isinstance(content, str):
            return content
        return " ".join(str(part["text"]) for part in content if "text" in part)


class Subject(Protocol):
    """Answers batches of queries. Row i of what a method returns belongs to query i."""

    def generate(
        self,
        queries: Sequence[Query],
        *,
        max_new_tokens: int = 256,
        sampling: "Sampling | None" = None,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """The answers, in words. Settings as those of `Loaded.generate`."""
        ...

    def option_loss(
        self, queries: Sequence[Query], options: Sequence[Sequence[str]]
    ) -> list[np.ndarray]:
        """How unlikely each option is as the answer: for every query, float32 [its options], the
        mean over the tokens of an option and of its end of minus the log-probability.
        """
        ...

    def next_token(self, queries: Sequence[Query], words: Sequence[str]) -> np.ndarray:
        """Log-probabilities [B, W] with which an answer begins with the first token of each word.

        Raises:
          UsageError: two of the words begin with the same token.
        """
        ...

    def embed(
        self, *, images: Sequence[Source] | None = None, texts: Sequence[str] | None = None
    ) -> np.ndarray:
        """Vectors [B, D] of pictures or of texts; which of them are near is for the subject to say.

        Raises:
          UsageError: both or neither are given, or this subject has no vectors for them.
        """
        ...


@dataclass(frozen=True)
class Agent(SystemConfig):
    """Base of the configurations of agents. An agent is nothing but its settings."""

    def build(self) -> "Agent":
        """The agent: it needs no more than this."""
        return self

    def wrap(self, subject: Subject) -> Subject:
        """The subject with this agent around it."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it does")


class Prepared:
    """A subject that asks another one, after it has made other queries of those that it gets.

    What an agent does before the answer is in `prepare`; the answer itself, in whatever form it is
    wanted, is then that of the subject inside.
    """

    def __init__(self, subject: Subject):
        """Around `subject`."""
        self.subject = subject

    def prepare(self, query: Query) -> Query:
        """The query that is passed on in its place."""
        raise NotImplementedError

    def generate(self, queries: Sequence[Query], **settings: Any) -> list[str]:
        """See `Subject`."""
        return self.subject.generate([self.prepare(query) for query in queries], **settings)

    def option_loss(
        self, queries: Sequence[Query], options: Sequence[Sequence[str]]
    ) -> list[np.ndarray]:
        """See `Subject`."""
        return self.subject.option_loss([self.prepare(query) for query in queries], options)

    def next_token(self, queries: Sequence[Query], words: Sequence[str]) -> np.ndarray:
        """See `Subject`."""
        return self.subject.next_token([self.prepare(query) for query in queries], words)

    def embed(
        self, *, images: Sequence[Source] | None = None, texts: Sequence[str] | None = None
    ) -> np.ndarray:
        """See `Subject`."""
        return self.subject.embed(images=images, texts=texts)


class Remembered:
    """A subject that asks another one nothing twice: what is new goes on, in one batch.

    Attributes:
      asked: how many queries, pictures and texts went on so far.
    """

    def __init__(self, subject: Subject):
        """Around `subject`."""
        self.subject, self.asked = subject, 0
        self._known: dict[Hashable, Any] = {}

    def generate(self, queries: Sequence[Query], **settings: Any) -> list[str]:
        """See `Subject`."""
        ask = functools.partial(self.subject.generate, **settings)
        setting = ("generate", repr(sorted(settings.items())))
        return self._ask(queries, [(*setting, _print(query)) for query in queries], ask)

    def option_loss(
        self, queries: Sequence[Query], options: Sequence[Sequence[str]]
    ) -> list[np.ndarray]:
        """See `Subject`."""
        keys = [
            ("option_loss", tuple(row), _print(query))
            for query, row in zip(queries, options, strict=True)
        ]

        def ask(pairs: list[tuple[Query, Sequence[str]]]) -> list[np.ndarray]:
            return self.subject.option_loss([q for q, _ in pairs], [row for _, row in pairs])

        return self._ask(list(zip(queries, options, strict=True)), keys, ask)

    def next_token(self, queries: Sequence[Query], words: Sequence[str]) -> np.ndarray:
        """See `Subject`."""
        keys = [("next_token", tuple(words), _print(query)) for query in queries]
        ask = functools.partial(self.subject.next_token, words=words)
        rows = self._ask(queries, keys, ask)
        return np.stack(rows) if rows else np.zeros((0, len(words)), np.float32)

    def embed(
        self, *, images: Sequence[Source] | None = None, texts: Sequence[str] | None = None
    ) -> np.ndarray:
        """See `Subject`."""
        what, items = given(images, texts)
        keys = [("embed", what, _print_source(item, what)) for item in items]
        return np.stack(self._ask(items, keys, lambda new: self.subject.embed(**{what: new})))

    def _ask(
        self, items: Sequence[Any], keys: Sequence[Hashable], ask: Callable[[list[Any]], Any]
    ) -> list[Any]:
        """What is known of `keys`, after `ask` was asked for those of `items` that are new."""
        new = {key: item for key, item in zip(keys, items, strict=True) if key not in self._known}
        if new:
            self.asked += len(new)
            self._known |= zip(new, ask(list(new.values())), strict=True)
        return [self._known[key] for key in keys]


def _print(query: Query) -> Hashable:
    """Equal for queries that ask the same."""
    prompt = query.prompt if isinstance(query.prompt, str) else json.dumps(query.prompt)
    return prompt, query.about, tuple(_print_source(image, "images") for image in query.images)


def _print_source(item: Any, what: str) -> Hashable:
    if what == "texts" or isinstance(item, (str, Path)):
        return str(item)
    if isinstance(item, Image.Image):
        item = np.asarray(item)
    shape = getattr(item, "shape", ())
    content = np.ascontiguousarray(item).data if isinstance(item, np.ndarray) else item
    return shape, hashlib.sha1(content, usedforsecurity=False).digest()


def given(
    images: Sequence[Source] | None, texts: Sequence[str] | None
) -> tuple[str, Sequence[Any]]:
    """Which of the arguments of `embed` is given, and what.

    Raises:
      UsageError: both or neither, or nothing in it.
    """
    given = {"images": images, "texts": texts}
    found = [(what, items) for what, items in given.items() if items is not None]
    if len(found) != 1 or isinstance(found[0][1], (str, bytes)) or not len(found[0][1]):
        raise UsageError("embed: want a list of images, or one of texts, with at least one in it")
    return found[0]
