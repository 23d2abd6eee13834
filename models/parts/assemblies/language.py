"""What every model with a decoder shares: the forward pass, prefill and decoding, which are the
same code; and the model that is nothing but a decoder.
"""

from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.models.core.config import ModelConfig
from zoo.models.core.keytable import Table
from zoo.models.core.types import (
    OF_SLOTS,
    Array,
    Batch,
    Cache,
    Memory,
    Output,
    Reserve,
    Stream,
    Tokens,
    take,
)
from zoo.models.parts.assemblies.splice import splice
from zoo.models.parts.decoders.composition import compose
from zoo.models.parts.decoders.gqa import Decoder, DecoderConfig, Plan, decoder_table


class LanguageModel(nn.Module):
    """Base of the assemblies. A subclass makes `self.decoder` in `setup` and defines `stream`."""

    def stream(self, batch: Batch, budget: int | Array | None) -> tuple[Stream, Memory]:
        """The decoder's input: embedded text with the vision tokens spliced in, and its memory."""
        raise NotImplementedError

    def __call__(self, batch: Batch, *, budget: int | Array | None = None) -> Output:
        """Run whole sequences, as in training.

        Args:
          batch: `ids`, and `pixels`, `labels`, `text_mask` as types.py describes them.
          budget: number of vision tokens per image, for connectors that can vary it; a Python
            number is static, an array masks.
        """
        stream, memory = self.stream(batch, budget)
        stream, _, aux = self.decoder.run(stream, None, memory)
        if self.is_initializing():
            self.decoder.head(stream.hidden[:, :1])
        return Output(stream.hidden, stream.tokens, aux)

    def head(self, hidden: Array) -> Array:
        """Final hidden states [..., D] -> float32 logits [..., V]."""
        return self.decoder.head(hidden)

    def prefill(
        self, batch: Batch, *, room: int, budget: int | Array | None = None
    ) -> tuple[Array, Cache]:
        """Read the prompts and fill the caches.

        Args:
          batch: prompts padded on the right; `labels` and `segments` are not read.
          room: static number of tokens that will be decoded at most.
          budget: as in `__call__`.

        Returns:
          float32 logits [B, V] of the token after each prompt, and the cache.
        """
        prompts = {k: leaf for k, leaf in batch.items() if k not in ("labels", "segments")}
        stream, memory = self.stream(prompts, budget)
        length = stream.hidden.shape[1]
        position = _next_position(stream.tokens)
        stream, states, _ = self.decoder.run(stream, Reserve(room), memory)
        # Policies may have shortened the sequence; the last valid token is always text, which
        # stays.
        place = jnp.arange(stream.hidden.shape[1])
        last = jnp.where(stream.tokens.valid, place, 0).max(-1, keepdims=True)  # [B, 1]
        logits = self.head(take(stream.hidden, last))[:, 0]
        kept = {name: leaf for name, leaf in memory.items() if name not in OF_SLOTS}
        return logits, Cache(states, kept, position, jnp.int32(length))

    def decode(self, ids: Array, cache: Cache) -> tuple[Array, Cache]:
        """One more token for every row: ids int [B, 1] -> float32 logits [B, V] and the cache.

        The caller decodes at most as many tokens as `prefill` was given `room` for.
        """
        order = jnp.full_like(ids, cache.next_order)
        tokens = Tokens(
            position=cache.next_position[:, None],
            order=order,
            modality=jnp.zeros_like(ids),
            valid=jnp.ones(ids.shape, bool),
            tags={"cell": jnp.full_like(ids, -1)},
        )
        stream = Stream(self.decoder.embed(ids), tokens)
        stream, states, _ = self.decoder.run(stream, cache.states, cache.memory)
        cache = Cache(states, cache.memory, cache.next_position + 1, cache.next_order + 1)
        return self.head(stream.hidden)[:, 0], cache


def _next_position(tokens: Tokens) -> Array:
    """The position of the token after each row: one more than the greatest of any axis, float32
    [B], or [B, A] where positions have several axes.
    """
    position = tokens.position.reshape(*tokens.valid.shape, -1)  # [B, L, A or 1]
    after = jnp.where(tokens.valid[..., None], position, -1).max((1, 2)) + 1
    if tokens.position.ndim == 2:
        return after
    return jnp.broadcast_to(after[:, None], tokens.position[:, 0].shape)


@dataclass(frozen=True)
class CausalLMConfig(ModelConfig):
    """A language model without images.

    Attributes:
      decoder: the model.
      policies: applied to the decoder's plan in this order; the first is innermost. Those that
        change vision tokens only do nothing here.
      text_tokens: text length that `inputs` describes.
    """

    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    policies: tuple[Any, ...] = ()
    text_tokens: int = 64

    def __post_init__(self) -> None:
        self.plan()

    def plan(self) -> Plan:
        """The decoder's plan with all policies applied."""
        return compose(self.decoder.plan(), self.policies, slots=0)

    def build(self) -> "CausalLM":
        """The module."""
        return CausalLM(self)

    def inputs(self, batch_size: int) -> Batch:
        """Shapes of a training batch."""
        text = (batch_size, self.text_tokens)
        ints = {
            name: jax.ShapeDtypeStruct(text, jnp.int32) for name in ("ids", "labels", "segments")
        }
        return {**ints, "text_mask": jax.ShapeDtypeStruct(text, jnp.bool_)}


class CausalLM(LanguageModel):
    """A decoder that reads text alone."""

    config: CausalLMConfig

    def setup(self) -> None:
        self.decoder = Decoder(self.config.decoder, self.config.plan())

    def stream(self, batch: Batch, budget: int | Array | None) -> tuple[Stream, Memory]:
        """Embedded text."""
        del budget
        ids, names = batch["ids"], ("text_mask", "labels", "segments")
        facts = {name: batch.get(name) for name in names}
        # No id is a placeholder.
        return splice(ids, self.decoder.embed(ids), None, image_id=-1, **facts), {}


def causal_lm_table(config: CausalLMConfig) -> Table:
    """Keys of a language model in Hugging Face checkpoints of the Llama family."""
    return decoder_table(config.decoder).under("decoder")
