"""A loaded model as a `Subject`: whatever is asked becomes batches of few shapes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo.evaluate.subject import Query, given
from zoo.generate.autoregressive import Reader, check_context, padded
from zoo.generate.sampling import Sampling
from zoo.images import Source
from zoo.loaded import Loaded
from zoo.models.core.compiled import jit
from zoo.models.core.errors import UsageError
from zoo.models.core.types import Array, Batch, Features
from zoo.models.parts.assemblies.dual import DualConfig
from zoo.models.parts.assemblies.language import LanguageModel
from zoo.models.parts.text.bert import BertConfig
from zoo.processors.lengths import bucket
from zoo.processors.vlm import Processor


@dataclass(frozen=True)
class ModelSubject:
    """A loaded model as a subject.

    Attributes:
      loaded: a model that answers; for `embed` alone, any with vectors of pictures or texts.
      batch_size: queries that are read at once, at most. A batch is filled up to a power of two or
        to this number, so that few programs are compiled.
      budget: vision tokens of a picture, as in `Loaded.generate`.

    Raises:
      UsageError: the batch size is less than 1.
    """

    loaded: Loaded
    batch_size: int = 8
    budget: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"batch_size is {self.batch_size}: want 1 or more")

    def generate(
        self,
        queries: Sequence[Query],
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """See `Subject`. Where tokens are drawn, every query has a seed of its own, counted from
        that of `sampling` batch by batch.
        """
        found: dict[int, str] = {}
        for rows, filled in self._chunks(queries):
            part = sampling
            if sampling is not None and sampling.temperature:
                part = replace(sampling, seed=(sampling.seed + rows[0]) % (1 << 32))
            answers = self.loaded.answers(
                self._batch([queries[row] for row in filled]),
                budget=self.budget,
                max_new_tokens=max_new_tokens,
                sampling=part,
                stop=stop,
            )
            found |= zip(rows, answers, strict=False)  # the rest is filling
        return [found[row] for row in range(len(queries))]

    def option_loss(
        self, queries: Sequence[Query], options: Sequence[Sequence[str]]
    ) -> list[np.ndarray]:
        """See `Subject`. A prompt is read once for all of its options.

        Raises:
          UsageError: not as many lists of options as queries, an option without a token, or a
            prompt that is too long with an option.
        """
        if len(options) != len(queries):
            raise UsageError(f"{len(options)} lists of options for {len(queries)} queries")
        spelled = [[self._spelled(option, whole=True) for option in row] for row in options]
        found = [np.zeros(len(row), np.float32) for row in options]
        reader, budget = self.loaded.reader(self.budget)
        for rows, filled in self._chunks(queries):
            longest = max((len(ids) for row in rows for ids in spelled[row]), default=0)
            if not longest:
                continue
            batch, room = padded(self._batch([queries[row] for row in filled])), bucket(longest)
            check_context(reader, self.loaded.variables, batch, budget, longest)
            logits, cache = _read(reader, self.loaded.variables, batch, budget, room)
            for number in range(max(len(spelled[row]) for row in rows)):
                ids, counted = np.zeros((2, len(filled), room), np.int32)
                for place, row in enumerate(rows):
                    if number < len(spelled[row]):
                        tokens = spelled[row][number]
                        ids[place, : len(tokens)], counted[place, : len(tokens)] = tokens, 1
                losses = _losses(reader, self.loaded.variables, logits, cache, ids, counted)
                for row, loss in zip(rows, np.asarray(losses), strict=False):
                    if number < len(spelled[row]):
                        found[row][number] = loss
        return found

    def next_token(self, queries: Sequence[Query], words: Sequence[str]) -> np.ndarray:
        """See `Subject`."""
        first = [self._spelled(word)[0] for word in words]
        if len(set(first)) < len(first):
            raise UsageError(
                f"the words {', '.join(map(repr, words))} begin with the tokens {first}: want "
                "words that this model's tokenizer tells apart by the first of them"
            )
        found = np.zeros((len(queries), len(words)), np.float32)
        reader, budget = self.loaded.reader(self.budget)
        for rows, filled in self._chunks(queries):
            batch = padded(self._batch([queries[row] for row in filled]))
            logits = _next(reader, self.loaded.variables, batch, budget)
            found[rows] = np.asarray(logits)[: len(rows), first]
        return found

    def embed(
        self, *, images: Sequence[Source] | None = None, texts: Sequence[str] | None = None
    ) -> np.ndarray:
        """See `Subject`.

        A dual encoder has vectors of both; BERT has the mean of its last hidden states. The vector
        of a picture is else what the vision tower returns for its class token, or the mean of its
        patches where it has none, and that of a text the mean of the decoder's hidden states, which
        tells texts apart less well.
        """
        what, items = given(images, texts)
        parts = []
        for start in range(0, len(items), self.batch_size):
            part = list(items[start : start + self.batch_size])
            filled = part + part[-1:] * (self._size(len(items)) - len(part))
            parts.append(np.asarray(self._vectors(what, filled), np.float32)[: len(part)])
        return np.concatenate(parts)

    def _vectors(self, what: str, items: list[Any]) -> Array:
        loaded, config = self.loaded, self.loaded.config
        pairs = isinstance(config, (DualConfig, BertConfig))
        if pairs and not (what == "images" and isinstance(config, BertConfig)):
            batch = loaded.processor.encode(**{what: items})
        elif isinstance(loaded.model, LanguageModel) and what == "texts":
            batch = self._batch([Query(text) for text in items])
        elif isinstance(loaded.model, LanguageModel):
            batch = self._batch([Query("?", (image,)) for image in items])
            if "pixels" not in batch:
                raise UsageError(f"{loaded.folder}: its tower has no vectors of whole pictures")
            batch = {"pixels": batch["pixels"][:, 0]}
        else:
            raise UsageError(f"{loaded.folder} holds a model that has no vectors of {what}")
        return _vectors(loaded.model, loaded.variables, batch)

    def _batch(self, queries: Sequence[Query]) -> Batch:
        shown: list[Any] = [query.images or None for query in queries]
        return self.loaded.encode(shown, [query.prompt for query in queries])

    def _size(self, total: int) -> int:
        """Rows of a batch, where there are `total` in all."""
        return min(self.batch_size, 1 << (total - 1).bit_length())

    def _chunks(self, queries: Sequence[Query]) -> Iterator[tuple[list[int], list[int]]]:
        """The rows of every batch, and the same filled up; those with pictures apart from those
        without, which are other programs.
        """
        for shows in (True, False):
            rows = [row for row, query in enumerate(queries) if bool(query.images) == shows]
            for start in range(0, len(rows), self.batch_size):
                part = rows[start : start + self.batch_size]
                yield part, part + part[-1:] * (self._size(len(rows)) - len(part))

    def _spelled(self, text: str, *, whole: bool = False) -> list[int]:
        """The ids with which an answer says `text`; with its end if it is the `whole` answer."""
        speaker = self.loaded.speaker
        if isinstance(speaker, Processor):
            ids = list(speaker.tokenizer.encode(" " + text.strip()))
        else:
            ids = list(speaker.tokenizer.encode(text.strip(), around=False))
        if not text.strip() or not ids:
            raise UsageError(f"{text!r} has no token: want a word or an option")
        return [*ids, *speaker.stop_ids[:1]] if whole else ids


@jit(static_argnames=("reader", "room"))
def _read(
    reader: Reader, params: Any, batch: Batch, budget: Array | None, room: int
) -> tuple[Array, Any]:
    return reader.prefill(params, batch, budget, room)


@jit(static_argnames="reader")
def _next(reader: Reader, params: Any, batch: Batch, budget: Array | None) -> Array:
    """Log-probabilities [B, V] of the first token."""
    return jax.nn.log_softmax(reader.prefill(params, batch, budget, 0)[0], -1)


@jit(static_argnames="reader")
def _losses(
    reader: Reader, params: Any, logits: Array, cache: Any, ids: Array, counted: Array
) -> Array:
    """Mean losses [B] of the tokens `ids` [B, n] that are `counted` [B, n], after a prompt."""

    def loss(logits: Array, token: Array) -> Array:
        return -jnp.take_along_axis(jax.nn.log_softmax(logits, -1), token[:, None], -1)[:, 0]

    def step(cache: Any, tokens: tuple[Array, Array]) -> tuple[Any, Array]:
        said, token = tokens
        logits, cache = reader.decode(params, said[:, None], cache)
        return cache, loss(logits, token)

    _, later = jax.lax.scan(step, cache, (ids[:, :-1].T, ids[:, 1:].T))
    each = jnp.concatenate([loss(logits, ids[:, 0])[None], later]).T  # [B, n]
    return jnp.where(counted > 0, each, 0).sum(-1) / jnp.maximum(counted.sum(-1), 1)


@jit(static_argnames="model")
def _vectors(model: Any, variables: Any, batch: Mapping[str, Array]) -> Array:
    """One vector for each picture or text of a batch, float32 [B, D]."""
    if isinstance(model.config, DualConfig) and "pixels" in batch:
        return model.apply(variables, batch["pixels"], method="encode_image")
    if isinstance(model.config, DualConfig):
        return model.apply(variables, batch["ids"], batch.get("text_mask"), method="encode_text")
    if "ids" not in batch:

        def look(model: Any, pixels: Array) -> Features:
            return model.tower(pixels)

        seen = model.apply(variables, batch["pixels"], method=look)
        return (seen.tokens.mean(-2) if seen.cls is None else seen.cls).astype(jnp.float32)
    out = model.apply(variables, batch)
    if isinstance(out, Features):
        hidden, valid = out.tokens, batch.get("text_mask", jnp.ones(batch["ids"].shape, bool))
    else:
        hidden, valid = out.hidden, out.tokens.valid
    weight = valid.astype(jnp.float32)[..., None]
    return (hidden * weight).sum(1) / jnp.maximum(weight.sum(1), 1)
