"""A `Subject` that follows a script, for tests of benchmarks and agents."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from zoo.evaluate.subject import Query, given
from zoo.images import Source
from zoo.models.core.errors import UsageError

T = TypeVar("T")


class Scripted:
    """A subject that follows a script, for tests.

    Attributes:
      log: what it was asked: (method, queries, pictures or texts of the call), call by call.
    """

    def __init__(
        self,
        *,
        answer: Callable[[Query], str] | None = None,
        loss: Callable[[Query, str], float] | None = None,
        chance: Callable[[Query, str], float] | None = None,
        vector: Callable[[Any], np.ndarray] | None = None,
    ):
        """Make one of functions.

        Args:
          answer: what is said to a query.
          loss: of a query and an option.
          chance: the log-probability of a word as the beginning of the answer.
          vector: of a picture or a text.
        """
        self.log: list[tuple[str, list[Any]]] = []
        self._answer, self._loss, self._chance, self._vector = answer, loss, chance, vector

    def generate(self, queries: Sequence[Query], **settings: Any) -> list[str]:
        """See `Subject`."""
        del settings
        return [self._play("generate", self._answer)(q) for q in self._asked("generate", queries)]

    def option_loss(
        self, queries: Sequence[Query], options: Sequence[Sequence[str]]
    ) -> list[np.ndarray]:
        """See `Subject`."""
        loss = self._play("option_loss", self._loss)
        asked = zip(self._asked("option_loss", queries), options, strict=True)
        return [np.array([loss(query, o) for o in row], np.float32) for query, row in asked]

    def next_token(self, queries: Sequence[Query], words: Sequence[str]) -> np.ndarray:
        """See `Subject`."""
        chance = self._play("next_token", self._chance)
        asked = self._asked("next_token", queries)
        return np.array([[chance(query, word) for word in words] for query in asked], np.float32)

    def embed(
        self, *, images: Sequence[Source] | None = None, texts: Sequence[str] | None = None
    ) -> np.ndarray:
        """See `Subject`."""
        vector = self._play("embed", self._vector)
        _, items = given(images, texts)
        return np.stack([vector(item) for item in self._asked("embed", items)])

    def _asked(self, method: str, items: Sequence[T]) -> Sequence[T]:
        self.log.append((method, list(items)))
        return items

    def _play(self, method: str, part: Callable[..., Any] | None) -> Callable[..., Any]:
        if part is None:
            raise UsageError(f"the script says nothing for {method}")
        return part
