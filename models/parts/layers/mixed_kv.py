"""A key-value cache of two precisions: few bits for most tokens, some more for those that matter.

Numbers are the nearest of 2^bits levels between the least and the greatest of their kind. Keys have
these for every channel, over the tokens of each precision; values for every token, over its heads
and channels, after each channel is divided by the root of its greatest. Codes are packed into
bytes. What is appended later keeps full precision.

Follows: arXiv:2405.14256.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from zoo.models.core.types import KV, Array, Tokens, take

FULL = 16
"""This many bits mean numbers as they are."""

BITS = (2, 4, 8, FULL)
"""What a number may take."""


def key_levels(k: Array, chosen: Array, bits: tuple[int, int]) -> tuple[Array, Array]:
    """The least level and the distance of levels of the keys, float32 [B, K, 2, E]: of the chosen
    tokens, and of the others.

    Args:
      k: [B, K, S, E].
      chosen: bool [B, S].
      bits: of the chosen, and of the others.
    """
    k, least, step = k.astype(jnp.float32), [], []
    for each, number in zip((chosen, ~chosen), bits, strict=True):
        there = each[:, None, :, None]
        low = jnp.where(there, k, jnp.inf).min(2)
        high = jnp.where(there, k, -jnp.inf).max(2)
        some = each.any(-1)[:, None, None]
        least.append(jnp.where(some, low, 0))
        step.append(jnp.where(some, (high - low) / (2**number - 1), 0))
    return jnp.stack(least, 2), jnp.stack(step, 2)


def channel_scale(v: Array, there: Array) -> Array:
    """The root of the greatest value of every channel, float32 [B, K, 1, E].

    Args:
      v: [B, K, S, E].
      there: bool [B, S], tokens that count.
    """
    size = jnp.where(there[:, None, :, None], jnp.abs(v.astype(jnp.float32)), 0)
    root = jnp.sqrt(size.max(2, keepdims=True))
    return jnp.where(root == 0, 1, root)


def value_levels(v: Array, chosen: Array, bits: tuple[int, int]) -> tuple[Array, Array]:
    """The least level and the distance of levels of every token, float32 [B, 1, S, 1].

    Args:
      v: [B, K, S, E], divided by the scale of its channels.
      chosen: bool [B, S].
      bits: of the chosen, and of the others.
    """
    number = jnp.where(chosen, 2.0 ** bits[0], 2.0 ** bits[1])[:, None, :, None]
    low, high = (f(v, axis=(1, 3), keepdims=True) for f in (jnp.min, jnp.max))
    return low, (high - low) / jnp.maximum(number - 1, 1)


def encode(x: Array, least: Array, step: Array) -> Array:
    """The number of the level nearest to each of `x`, uint8."""
    code = jnp.round((x.astype(jnp.float32) - least) / jnp.where(step == 0, 1, step))
    return jnp.clip(code, 0, 255).astype(jnp.uint8)


def decode(code: Array, least: Array, step: Array) -> Array:
    """The levels of these numbers, float32."""
    return code.astype(jnp.float32) * step + least


def pack(code: Array, bits: int) -> Array:
    """Numbers [..., E] of so many bits in bytes [..., ⌈E bits / 8⌉]."""
    per, width = 8 // bits, code.shape[-1]
    code = jnp.pad(code, [(0, 0)] * (code.ndim - 1) + [(0, -width % per)])
    code = code.reshape(*code.shape[:-1], -(-width // per), per)
    shift = bits * jnp.arange(per, dtype=jnp.uint8)
    return (code << shift).sum(-1).astype(jnp.uint8)


def unpack(packed: Array, bits: int, width: int) -> Array:
    """The inverse of `pack`, uint8 [..., width]."""
    shift = bits * jnp.arange(8 // bits, dtype=jnp.uint8)
    code = (packed[..., None] >> shift) & jnp.uint8(2**bits - 1)
    return code.reshape(*packed.shape[:-1], packed.shape[-1] * len(shift))[..., :width]


@struct.dataclass
class MixedKV:
    """The cache of one layer. The chosen tokens come first; where fewer are chosen than have a
    place among them, others follow there, with their own few levels.

    Attributes:
      k: packed codes of keys, [B, K, C, …] of the first C tokens and [B, K, S - C, …] of the rest;
        numbers as they are where bits are `FULL`.
      v: likewise of values.
      key: least levels and distances of the keys, see `key_levels`.
      value: see `value_levels`.
      channel: see `channel_scale`.
      chosen: bool [B, S].
      prompt: facts of the S tokens.
      new: what has been appended.
      bits: of the chosen, and of the others; 0 for others that are not kept.
    """

    k: tuple[Array, Array]
    v: tuple[Array, Array]
    key: tuple[Array, Array]
    value: tuple[Array, Array]
    channel: Array
    chosen: Array
    prompt: Tokens
    new: KV
    bits: tuple[int, int] = struct.field(pytree_node=False)

    @classmethod
    def start(
        cls,
        k: Array,
        v: Array,
        tokens: Tokens,
        chosen: Array,
        *,
        capacity: int,
        bits: tuple[int, int],
        room: int,
    ) -> "MixedKV":
        """Of a prompt.

        Args:
          k: [B, L, K, E], rotated.
          v: likewise.
          tokens: of these.
          chosen: bool [B, L], at most `capacity` in every row.
          capacity: C.
          bits: of the chosen, and of the others; 0 to drop these.
          room: how many tokens may be appended.
        """
        order = jnp.argsort(~chosen, -1, stable=True)
        if not bits[1]:
            order = order[:, :capacity]
        k, v, tokens, chosen = take((k, v, tokens, chosen), order)
        if not bits[1]:
            tokens = tokens.replace(valid=tokens.valid & chosen)
        there, dtype = tokens.valid, k.dtype
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, S, E]
        levels = bits[0], bits[1] or bits[0]
        # Padding stretches nothing: it has what the first token has.
        real = there[:, None, :, None]
        k, v = (jnp.where(real, x, x[:, :, :1]) for x in (k, v))
        key = key_levels(k, chosen, levels)
        channel = channel_scale(v, there)
        scaled = v.astype(jnp.float32) / channel
        value = value_levels(scaled, chosen, levels)

        def stored(x: Array, least: Array, step: Array, factor: Array | float) -> Any:
            code = encode(x / factor, least, step)
            full = jnp.where(chosen, levels[0] == FULL, levels[1] == FULL)[:, None, :, None]
            whole = jnp.where(full, x, (decode(code, least, step) * factor).astype(x.dtype))
            parts = (slice(None, capacity), levels[0]), (slice(capacity, None), levels[1])
            return tuple(
                whole[:, :, at] if number == FULL else pack(code[:, :, at], number)
                for at, number in parts
            )

        empty = jax.tree.map(lambda x: jnp.zeros((x.shape[0], room, *x.shape[2:]), x.dtype), tokens)
        blank = jnp.zeros((*k.shape[:2], room, k.shape[-1]), dtype)
        return cls(
            stored(k, *_by_group(key, chosen), 1.0),
            stored(v, *value, channel),
            jax.tree.map(lambda x: x.astype(dtype), key),
            jax.tree.map(lambda x: x.astype(dtype), value),
            channel.astype(dtype),
            chosen,
            tokens,
            KV(blank, blank, empty, jnp.int32(0)),
            bits,
        )

    @property
    def tokens(self) -> Tokens:
        """Facts of all that is cached."""
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), self.prompt, self.new.tokens)

    def append(self, k: Array, v: Array, tokens: Tokens) -> "MixedKV":
        """See `KV.append`."""
        return self.replace(new=self.new.append(k, v, tokens))

    def read(self) -> tuple[Array, Array]:
        """Keys and values of all places, [B, S + room, K, E] each."""
        k = self._read(self.k, *_by_group(self.key, self.chosen), 1.0)
        v = self._read(self.v, *self.value, self.channel)
        joined = (jnp.concatenate(pair, 2) for pair in ((k, self.new.k), (v, self.new.v)))
        k, v = (x.swapaxes(1, 2) for x in joined)
        return k, v

    def _read(self, parts: Any, least: Array, step: Array, factor: Array | float) -> Array:
        found, start, width = [], 0, self.new.k.shape[-1]
        for part, bits in zip(parts, (self.bits[0], self.bits[1] or self.bits[0]), strict=True):
            at = slice(start, start + part.shape[2])
            start = at.stop
            if bits == FULL:
                found.append(part)
                continue
            code = unpack(part, bits, width)
            numbers = decode(code, *(jnp.asarray(x[:, :, at], jnp.float32) for x in (least, step)))
            found.append((numbers * factor).astype(self.new.k.dtype))
        return jnp.concatenate(found, 2)


def _by_group(pair: tuple[Array, Array], chosen: Array) -> tuple[Array, Array]:
    """Of every token what its group has: [B, K, 2, E] to [B, K, S, E]."""
    first = chosen[:, None, :, None]
    least, step = (jnp.where(first, x[:, :, :1], x[:, :, 1:]) for x in pair)
    return least, step
