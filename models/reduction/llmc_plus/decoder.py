"""Methods that act between two layers of the decoder: FastV and DART."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from zoo.models.core.types import IMAGE, Array, Memory, Stream, Tokens
from zoo.models.parts.decoders.dropping import (
    DropAfter,
    NumberOf,
    asking,
    attention_of,
    drop,
    dropping,
    guiding,
)
from zoo.models.parts.decoders.gqa import Plan
from zoo.models.parts.layers.block import QKV
from zoo.models.parts.reduce.base import Keep, Kept, check_keep, schedule
from zoo.models.parts.reduce.choose import top
from zoo.models.parts.reduce.merge import cosine

NEVER = -1e30  # the score of real tokens that are not chosen, above that of surplus slots


@dataclass(frozen=True)
class FastV:
    """Drops before one layer the vision tokens that the last token of the question attends to least
    in the layer before. Follows: arXiv:2403.06764.

    Attributes:
      keep: vision tokens that remain, as a number or a share.
      layer: before which the others are dropped; the middle one of a decoder that is less than
        twice as deep.
    """

    keep: Keep = 128 / 576
    layer: int = 3

    reduces: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_layers(self.layer)

    def apply(self, plan: Plan, *, slots: int) -> Plan:
        """The plan with the tokens dropped.

        Raises:
          ValueError: more tokens than there are.
        """
        if not slots or schedule(self.keep, 1, slots) == (slots,):
            return plan
        return dropping(plan, {_before(self.layer, plan): ByLast(Kept(self.keep))})


@struct.dataclass
class ByLast(DropAfter):
    """Scores tokens by the attention that the last token of the question pays them."""

    def score(self, layer: Any, own: QKV, tokens: Tokens) -> Array:
        """The mean over heads, and over the answers to come."""
        return attention_of(layer, own, tokens, *asking(tokens))


# ------------------------------------------------------------------ DART


@dataclass(frozen=True)
class DART:
    """Keeps a few pivots, those with the largest keys, and the vision tokens least like a pivot.
    Follows: arXiv:2502.11494.

    Attributes:
      keep: vision tokens that remain, pivots among them, as a number or a share.
      layer: before which the others are dropped; the middle one of a decoder that is less than
        twice as deep.
      image_pivots: vision tokens that are pivots.
      text_pivots: tokens of the question that are.
    """

    keep: Keep = 128 / 576
    layer: int = 5
    image_pivots: int = 4
    text_pivots: int = 4

    reduces: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_layers(self.layer)
        if self.image_pivots < 1 or self.text_pivots < 0:
            raise ValueError(
                f"image_pivots = {self.image_pivots}, text_pivots = {self.text_pivots}: want at "
                "least one of the picture, and none or more of the text"
            )

    def apply(self, plan: Plan, *, slots: int) -> Plan:
        """The plan with the tokens dropped.

        Raises:
          ValueError: more tokens than there are.
        """
        if not slots or schedule(self.keep, 1, slots) == (slots,):
            return plan
        policy = Unlike(Kept(self.keep), pivots=(self.image_pivots, self.text_pivots))
        return dropping(plan, {_before(self.layer, plan): policy})


@struct.dataclass
class Unlike(DropAfter):
    """Runs the layer and drops what DART does not choose, by its keys and its output.

    Attributes:
      pivots: how many vision tokens are pivots, and how many of the text.
    """

    pivots: tuple[int, int] = struct.field(pytree_node=False, default=(4, 4))

    def measure(self, layer: Any, stream: Stream, memory: Memory) -> Array:
        """The L1 norms of its keys."""
        keys = layer.qkv(stream, memory).k.astype(jnp.float32)
        return jnp.abs(keys).sum((-2, -1))

    def after(self, stream: Stream, measured: Array, number: NumberOf) -> Stream:
        """What is chosen of its output."""
        most = min(number(stream.whole or stream.slots), stream.slots)
        return drop(stream, self.ranked(jax.lax.stop_gradient(stream), measured, most), number)

    def ranked(self, stream: Stream, norm: Array, keep: int) -> Array:
        """Scores [B, L] by the order in which tokens are chosen.

        Args:
          stream: the output of the layer.
          norm: [B, L], the L1 norms of its keys.
          keep: how many are chosen.
        """
        real = stream.tokens.valid & (stream.tokens.modality == IMAGE)
        text = guiding(stream.tokens)
        of_image = min(self.pivots[0], keep)
        of_text = min(self.pivots[1], text.shape[1] - stream.slots)
        image, words = (
            top(jnp.where(among, norm, NEVER), number)
            for among, number in ((real, of_image), (text, of_text))
        )
        every, more = divmod(keep - of_image, of_image + of_text)
        each = tuple(every + (i < more) for i in range(of_image + of_text))
        left = jnp.put_along_axis(real, image, False, -1, inplace=False)
        pivots = jnp.concatenate([image, words], -1)
        chosen = jax.vmap(lambda h, p, c: unlike(h, p, c, each))(stream.hidden, pivots, left)
        chosen = jnp.concatenate([image, chosen], -1)
        order = jnp.broadcast_to(-jnp.arange(keep, dtype=jnp.float32), chosen.shape)
        score = jnp.full(real.shape, NEVER, jnp.float32)
        return jnp.put_along_axis(score, chosen, order, -1, inplace=False)


def unlike(hidden: Array, pivots: Array, candidate: Array, each: tuple[int, ...]) -> Array:
    """The candidates that are least like the pivots, which take turns.

    Args:
      hidden: [L, D], compared by cosine.
      pivots: int [P], places.
      candidate: bool [L].
      each: how many of those that are left each of the P takes.

    Returns:
      int32 [sum of each], in the order of choice.
    """
    alike = cosine(hidden[pivots], hidden)  # [P, L]
    found = []
    for number, row in zip(each, alike, strict=True):
        taken = jax.lax.top_k(jnp.where(candidate, -row, -jnp.inf), number)[1]
        candidate = candidate.at[taken].set(False)
        found.append(taken)
    return jnp.concatenate(found).astype(jnp.int32)


def check_layers(*layers: int) -> None:
    """Raise ValueError unless the numbers of layers ascend from 1 on."""
    if any(layer < 1 for layer in layers) or list(layers) != sorted(set(layers)):
        raise ValueError(
            f"layers {layers}: want numbers from 1 on, ascending; the layer before is looked at"
        )


def _before(layer: int, plan: Plan) -> int:
    """The layer before `layer`, or before the middle one of a plan less than twice as deep."""
    return max(1, min(layer, len(plan) // 2)) - 1
