"""SparseVLM: words of the question that the picture speaks to choose the vision tokens."""

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from zoo.models.core.types import IMAGE, Array, Aux, Memory, Stream, take
from zoo.models.parts.decoders.dropping import (
    DropAfter,
    NumberOf,
    attention_logits,
    drop,
    dropping,
    guiding,
    with_total,
)
from zoo.models.parts.decoders.gqa import Plan
from zoo.models.parts.decoders.policies import wrap
from zoo.models.parts.layers.plan import LayerPolicy, Run
from zoo.models.parts.reduce.base import Keep, Kept, check_keep, schedule
from zoo.models.parts.reduce.cluster import density_peaks
from zoo.models.parts.reduce.merge import mean_by_group
from zoo.models.reduction.llmc_plus.decoder import NEVER, check_layers

RATER = "rater"
"""The tag of the words whose attention counts."""


@dataclass(frozen=True)
class SparseVLM:
    """Drops vision tokens before three layers by the attention of those words of the question that
    the picture speaks to; a few of the dropped ones become means.
    Follows: arXiv:2410.04417.

    Attributes:
      keep: vision tokens that remain after each stage, means among them, as numbers or shares.
      layers: before which they are dropped; None for 3, 7 and 16, or for the quarters of a decoder
        of 16 layers or fewer.
    """

    keep: Keep = (303 / 576, 110 / 576, 36 / 576)
    layers: tuple[int, int, int] | None = None

    reduces: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep(self.keep, stages=3)
        check_layers(*(self.layers or ()))

    def apply(self, plan: Plan, *, slots: int) -> Plan:
        """The plan with three stages.

        Raises:
          ValueError: more tokens than there are, numbers that grow, or too few layers.
        """
        if not slots:
            return plan
        numbers = schedule(self.keep, 3, slots)
        keeps = self.keep if isinstance(self.keep, tuple) else (self.keep,) * 3
        depth = len(plan)
        layers = self.layers or ((3, 7, 16) if depth > 16 else _quarters(depth))
        former = (slots, *numbers[:-1])
        stages = {
            layer - 1: WithMeans(Kept(keep))
            for layer, keep, number, before in zip(layers, keeps, numbers, former, strict=True)
            if number < before
        }
        return wrap(dropping(plan, stages), {0: Raters()}) if stages else plan


def _quarters(depth: int) -> tuple[int, int, int]:
    if depth < 4:
        raise ValueError(f"SparseVLM has three stages: want 4 layers or more, not {depth}")
    return depth // 4, depth // 2, 3 * depth // 4


@struct.dataclass
class Raters(LayerPolicy):
    """Marks the words of the question that the picture speaks to, and runs the layer."""

    name: ClassVar[str] = "raters"

    def __call__(
        self,
        layer: nn.Module,
        own: nn.Module | None,
        run: Run,
        stream: Stream,
        state: Any,
        memory: Memory,
    ) -> tuple[Stream, Any, Aux]:
        del layer, own, memory
        if not stream.slots:
            return run(stream, state)
        tokens = stream.tokens
        image = tokens.valid & (tokens.modality == IMAGE)
        found = raters(stream.hidden, image, guiding(tokens))
        tokens = tokens.replace(tags={**tokens.tags, RATER: found})
        return run(stream.replace(tokens=tokens), state)


def raters(hidden: Array, image: Array, text: Array) -> Array:
    """The words with no less than their share of what vision tokens are like, bool [B, L].

    Args:
      hidden: [B, L, D], embeddings, compared by the softmax of their products over the words.
      image: bool [B, L], vision tokens.
      text: bool [B, L], the words.
    """
    x = jax.lax.stop_gradient(hidden).astype(jnp.float32)
    logits = jnp.einsum("bvd,btd->bvt", x, x)
    weight = jax.nn.softmax(jnp.where(text[:, None], logits, jnp.finfo(jnp.float32).min), -1)
    heard = jnp.where(image[..., None], weight, 0).sum(1) / jnp.maximum(image.sum(-1), 1)[:, None]
    mean = jnp.where(text, heard, 0).sum(-1) / jnp.maximum(text.sum(-1), 1)
    # Words that are all alike, or a single one, are not to be lost to rounding.
    return text & (heard >= mean[:, None] * (1 - 1e-6))


@struct.dataclass
class WithMeans(DropAfter):
    """Runs the layer and drops vision tokens by the attention of the raters. Of the dropped ones
    30 % by score are clustered, and the centre of each cluster stays as its mean, in its place.
    """

    def measure(self, layer: Any, stream: Stream, memory: Memory) -> Array:
        """The attention of the raters."""
        return _of_raters(layer, stream, memory)

    def after(self, stream: Stream, measured: Array, number: NumberOf) -> Stream:
        """What is kept of its output, and the means."""
        stream, total = with_total(stream)
        counts = np.array([number(n) for n in range(stream.whole + 1)], np.int32)
        keep = min(int(counts[-1]), stream.slots)
        means, pool = clusters(stream.slots, keep)
        if means:
            count = jnp.minimum(jnp.asarray(counts)[total], keep)
            kept = jnp.maximum(1, count - means)[:, None]
            stream, measured = with_means(stream, measured, kept, keep - means, (means, pool))
        return drop(stream, measured, number)


def _of_raters(layer: Any, stream: Stream, memory: Memory) -> Array:
    """The attention that the raters pay to all tokens, [B, L]."""
    tokens, own = stream.tokens, layer.qkv(stream, memory)
    image = tokens.modality == IMAGE
    words = jnp.argsort(image, -1, stable=True)[:, : image.shape[1] - stream.slots]
    weight = jax.nn.softmax(attention_logits(layer, own, tokens, words), -1).mean(1)
    return rated(weight, take(tokens.tags[RATER], words))


def rated(weight: Array, chosen: Array) -> Array:
    """The mean [B, L] of those rows of [B, T, L] that are chosen, bool [B, T]."""
    total = jnp.einsum("bt,btl->bl", chosen.astype(jnp.float32), weight)
    return total / jnp.maximum(chosen.sum(-1), 1)[:, None]


def with_means(
    stream: Stream, score: Array, kept: Array, most: int, sizes: tuple[int, int]
) -> tuple[Stream, Array]:
    """The stream with the means in the places of the centres, and scores that let these follow what
    is kept.

    Args:
      stream: tokens.
      score: [B, L].
      kept: int [B, 1], how many vision tokens stay as they are.
      most: these are so many at most.
      sizes: how many means are made, and of how many tokens.
    """
    means, pool = sizes
    real = stream.tokens.valid & (stream.tokens.modality == IMAGE)
    score = jnp.where(real, score, -jnp.inf)
    order = jax.lax.top_k(score, most + pool)[1]
    rank = jnp.argsort(jnp.argsort(-score, -1, stable=True), -1)
    worth = jnp.where(rank < kept, 2.0, NEVER)
    among = jnp.take_along_axis(order, kept + jnp.arange(pool), -1)  # [B, P], what follows
    there, rows = take((real, stream.hidden), among)
    centres, cluster = density_peaks(rows, means, neighbours=means)
    mean = mean_by_group(rows, cluster, means, weight=there)
    at = jnp.take_along_axis(among, centres, -1)  # [B, C]
    best_first = 1.0 - jnp.arange(means) / means
    known = jnp.where(take(there, centres), best_first, NEVER)
    worth = jnp.put_along_axis(worth, at, known, -1, inplace=False)
    hidden = jax.vmap(lambda h, i, m: h.at[i].set(m.astype(h.dtype)))(stream.hidden, at, mean)
    return stream.replace(hidden=hidden), worth


def clusters(tokens: int, keep: int) -> tuple[int, int]:
    """How many means are made so that `keep` of `tokens` remain in all, and of how many tokens:
    30 % of those that are not kept, and one more; a tenth of these, and one more. None where no
    token is dropped, or but one remains.
    """
    for means in range(1, keep if keep < tokens else 0):
        pool = int(0.3 * (tokens - keep + means)) + 1
        if pool // 10 + 1 <= means:
            return means, pool
    return 0, 0
