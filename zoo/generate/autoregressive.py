"""Token by token, from a cache: what a language model has to say to a batch of prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.generate.sampling import Knobs, Sampling, choose
from zoo.models.core.compiled import jit
from zoo.models.core.errors import UsageError
from zoo.models.core.names import on_mesh_of
from zoo.models.core.types import Array, Batch, Tokens
from zoo.processors.lengths import text_length


def variables_of(params: Any) -> Any:
    """What a module is applied to, from its unboxed parameters; all of its variables, such as
    `Loaded.variables`, stay what they are.
    """
    return params if "params" in params else {"params": params}


@dataclass(frozen=True)
class Reader:
    """Reads prompts and tokens and says what may come next: one model, one cache.

    The loop knows nothing else of a model. Whatever decodes from several readings of one answer
    (with and without the picture, say) is `zoo.generate.branches.Combined`. What its methods call
    `params` are the parameters, or all variables: see `variables_of`.

    Attributes:
      model: a `LanguageModel`.
      budget: static number of vision tokens per image, where the model can vary it.
    """

    model: nn.Module
    budget: int | None = None

    def prefill(
        self, params: Any, prompts: Batch, budget: Array | None, room: int
    ) -> tuple[Array, Any]:
        """Float32 logits [B, V] of the first new token, and a cache with room for `room` more.

        Here and below `budget` is data, for where there is no static one.
        """
        return self._call("prefill", params, prompts, budget=self._chosen(budget), room=room)

    def decode(self, params: Any, ids: Array, cache: Any) -> tuple[Array, Any]:
        """Float32 logits [B, V] of the token after `ids` [B, 1], and the cache with them."""
        return self._call("decode", params, ids, cache)

    def tokens(self, params: Any, prompts: Batch, budget: Array | None) -> Tokens:
        """Facts about the tokens that prompts become, vision tokens included."""
        stream, _ = self._call("stream", params, prompts, self._chosen(budget))
        return stream.tokens

    def logits(self, params: Any, batch: Batch, budget: Array | None) -> Array:
        """Float32 logits [B, L, V] of the token after each token of whole sequences."""
        output = self._call("__call__", params, batch, budget=self._chosen(budget))
        return self._call("head", params, output.hidden)

    @property
    def context(self) -> int:
        """The most tokens of prompt and answer together."""
        return self.model.config.decoder.context

    def _chosen(self, budget: Array | None) -> int | Array | None:
        return budget if self.budget is None else self.budget

    def _call(self, method: str, params: Any, *args: Any, **options: Any) -> Any:
        return self.model.apply(variables_of(params), *args, method=method, **options)


class Decoding(Protocol):
    """A way to decode: from the reader of a model to the one that answers are written with."""

    def __call__(self, reader: Reader) -> Reader:
        """Raises UsageError for a model that it does not suit."""
        ...


def reading(model: nn.Module, budget: int | Array | None) -> tuple[Reader, Array | None]:
    """The reader of one model, and the budget if it is data."""
    if isinstance(budget, jax.Array):
        return Reader(model), budget
    return Reader(model, budget), None


def generate(
    model: nn.Module,
    params: Any,
    batch: Batch,
    *,
    max_new_tokens: int,
    eos_id: int | Sequence[int],
    sampling: Sampling | None = None,
    budget: int | Array | None = None,
) -> np.ndarray:
    """The next token, again and again, until every row has ended.

    Parameters that lie on a mesh are used as they lie, and prompts and caches are divided along it.

    Two programs, prefill and decoding, are compiled for each model (models of equal configuration
    share them), shape of the batch and static budget, where lengths are rounded up: nearby ones
    share their programs. `sampling` and `eos_id` are data.

    Args:
      model: a `LanguageModel`.
      params: its unboxed parameters, or all of its variables.
      batch: prompts of any lengths, padded on the right with `text_mask` False.
      max_new_tokens: how long an answer may be, its `eos_id` included; 1 or more.
      eos_id: the token that ends an answer, or all that do.
      sampling: how tokens are chosen; by default the most likely ones.
      budget: vision tokens per image, where the model can vary them. A Python number is static:
        only so many are computed, by a program of their own. An array, [] or [B], masks the others:
        one program for all budgets. Both give the same answers.

    Returns:
      int32 [B, max_new_tokens], filled up with the first `eos_id` after the end of an answer.

    Raises:
      UsageError: `max_new_tokens` is less than 1, or a prompt and as many tokens are more than the
        context of the model.
      ValueError: the model cannot take this static budget.
    """
    reader, masked = reading(model, budget)
    answers = Answers(
        reader,
        params,
        batch,
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        sampling=sampling,
        budget=masked,
    )
    answers.advance(max_new_tokens)
    return answers.ids()


class Answers:
    """The answers to a batch of prompts while they are being written.

    Made with the first token of each; `advance` writes more.

    Attributes:
      most: how many tokens an answer may have.
    """

    def __init__(
        self,
        reader: Reader,
        params: Any,
        batch: Batch,
        *,
        max_new_tokens: int,
        eos_id: int | Sequence[int],
        sampling: Sampling | None = None,
        budget: Array | None = None,
    ):
        """Read the prompts. Arguments as those of `generate`; `budget` is an array."""
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}: want 1 or more")
        self.most = max_new_tokens
        self._eos = np.asarray(eos_id, np.int32).reshape(-1)
        prompts = padded({name: array for name, array in batch.items() if name != "labels"})
        self._knobs = (sampling or Sampling()).knobs(len(prompts["ids"]))
        self._reader, self._params = reader, params
        # The last token is never read back, so the cache needs no room for it.
        room = text_length(max_new_tokens) - 1
        with on_mesh_of(params):
            check_context(reader, params, prompts, budget, max_new_tokens)
            self._state = _start(reader, params, prompts, budget, self._knobs, self._eos, room)

    @property
    def done(self) -> bool:
        """Whether every answer has ended or is as long as it may be."""
        return int(self._state.done) >= self.most or bool(self.ended.all())

    @property
    def ended(self) -> np.ndarray:
        """Which answers have ended, bool [B]."""
        return np.array(self._state.ended)

    def advance(self, tokens: int) -> None:
        """Write up to so many more tokens of every answer that has not ended."""
        until = min(int(self._state.done) + tokens, self.most)
        if until > int(self._state.done) and not self.done:
            with on_mesh_of(self._params):
                self._state = _continue(
                    self._reader, self._params, self._state, self._knobs, self._eos, np.int32(until)
                )

    def end(self, rows: np.ndarray) -> None:
        """End the answers for which `rows` (bool [B]) is True."""
        if rows.any():
            self._state = self._state._replace(ended=jnp.asarray(self.ended | rows))

    def ids(self) -> np.ndarray:
        """int32 [B, max_new_tokens], filled up with the first `eos_id` after what there is."""
        # A copy: the buffer itself is written on.
        return np.array(self._state.ids)[:, : self.most]

    def rows(self) -> list[list[int]]:
        """The tokens of each answer so far, without its `eos_id`."""
        lengths, ends = np.asarray(self._state.length), set(self._eos.tolist())
        rows = [row[:n].tolist() for row, n in zip(self.ids(), lengths, strict=True)]
        return [row[:-1] if row[-1] in ends else row for row in rows]


def padded(batch: Batch) -> dict[str, Any]:
    """Prompts with the text padded on the right to a length that programs are compiled for.

    Padding is masked, and its ids are outside every vocabulary and no placeholders.
    """
    found: dict[str, Any] = dict(batch)
    ids = found["ids"]
    found.setdefault("text_mask", np.ones(ids.shape, bool))
    more = text_length(ids.shape[1]) - ids.shape[1]
    if not more:
        return found
    # `positions` has a place for each token of the expanded sequence, which grows as much.
    fills = {"ids": np.iinfo(np.int32).max, "text_mask": False, "segments": 0, "positions": 0}
    for name in fills.keys() & found.keys():
        wide = [(0, 0), (0, more)] + [(0, 0)] * (found[name].ndim - 2)
        found[name] = np.pad(np.asarray(found[name]), wide, constant_values=fills[name])
    return found


def check_context(
    reader: Reader, params: Any, prompts: Batch, budget: Array | None, more: int
) -> None:
    """Raise UsageError if a prompt and `more` tokens do not fit into the context."""
    padded_length = _lengths.eval_shape(reader, params, prompts, budget)[1].shape[1]
    if padded_length + more <= reader.context:
        return
    lengths = np.asarray(_lengths(reader, params, prompts, budget)[0])
    row = int(lengths.argmax())
    if lengths[row] + more > reader.context:
        raise UsageError(
            f"prompt {row + 1} of {len(lengths)} has {lengths[row]} tokens, images included, and "
            f"{more} may follow, but the context of the model is {reader.context} tokens: shorten "
            "the prompt or ask for fewer new tokens"
        )


class _State(NamedTuple):
    """What one turn of the decoding loop hands to the next."""

    done: Array  # [], tokens that all rows have
    ids: Array  # [B, n]
    length: Array  # [B], tokens before the filling, the one that ended the answer included
    ended: Array  # bool [B]
    seen: Array  # bool [B, V], the tokens of prompt and answer
    cache: Any


@jit(static_argnames="reader")
def _lengths(
    reader: Reader, params: Any, prompts: Batch, budget: Array | None
) -> tuple[Array, Array]:
    """The number of tokens of every prompt, int32 [B], and which tokens are real, bool [B, L].

    XLA leaves out whatever these do not depend on: the tower and the connector.
    """
    valid = reader.tokens(params, prompts, budget).valid
    return jnp.sum(valid, -1), valid


@jit(static_argnames=("reader", "room"))
def _start(
    reader: Reader,
    params: Any,
    prompts: Batch,
    budget: Array | None,
    knobs: Knobs,
    eos: Array,
    room: int,
) -> _State:
    """Read the prompts and choose the first token of each answer."""
    logits, cache = reader.prefill(params, prompts, budget, room)
    rows, vocab_size = logits.shape
    ids = prompts["ids"]
    # Placeholders and padding may lie outside the vocabulary.
    place = jnp.where(prompts["text_mask"], ids, vocab_size)
    seen = jnp.zeros(logits.shape, bool).at[jnp.arange(rows)[:, None], place].set(True, mode="drop")
    state = _State(
        done=jnp.int32(0),
        ids=jnp.full((rows, room + 1), _filling(eos)),
        length=jnp.zeros(rows, jnp.int32),
        ended=jnp.zeros(rows, bool),
        seen=seen,
        cache=cache,
    )
    return _write(state, choose(logits, seen, knobs, state.done), eos)


@jit(static_argnames="reader", donate_argnames="state")
def _continue(
    reader: Reader, params: Any, state: _State, knobs: Knobs, eos: Array, until: Array
) -> _State:
    """Write until all answers have `until` tokens or have ended."""

    def unfinished(state: _State) -> Array:
        return (state.done < until) & ~state.ended.all()

    def turn(state: _State) -> _State:
        last = jax.lax.dynamic_slice_in_dim(state.ids, state.done - 1, 1, axis=1)  # [B, 1]
        logits, cache = reader.decode(params, last, state.cache)
        token = choose(logits, state.seen, knobs, state.done)
        return _write(state._replace(cache=cache), token, eos)

    return jax.lax.while_loop(unfinished, turn, state)


def _write(state: _State, token: Array, eos: Array) -> _State:
    """The state with one more token for every row that has not ended."""
    token = jnp.where(state.ended, _filling(eos), token)
    return _State(
        done=state.done + 1,
        ids=jax.lax.dynamic_update_slice_in_dim(state.ids, token[:, None], state.done, axis=1),
        length=state.length + ~state.ended,
        ended=state.ended | jnp.isin(token, eos),
        seen=state.seen.at[jnp.arange(len(token)), token].set(True),
        cache=state.cache,
    )


def _filling(eos: Array) -> Array:
    """What stands after the end of an answer: the first token that ends one."""
    return eos[0] if len(eos) else jnp.int32(0)
