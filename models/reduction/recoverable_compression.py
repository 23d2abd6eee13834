"""Recoverable Compression: patches that stand out by sight or by the text; the rest in clusters.

Patches to which the class token attends most are kept, then those that are most like the text; how
many of each is the share of outliers among the scores. What is left over becomes a few sums around
the patches that stand out among it, and one sum of all else. Nothing is trained.

Follows: Recoverable Compression (AAAI 2025).
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from zoo.models.base import llava
from zoo.models.core.card import Card
from zoo.models.core.keytable import Row, Table, linear
from zoo.models.core.registry import register
from zoo.models.core.types import Array, Batch, TokenSet
from zoo.models.parts.assemblies.llava import LlavaConfig
from zoo.models.parts.assemblies.llava_hub import hub_table
from zoo.models.parts.layers.linear import Proj
from zoo.models.parts.reduce.base import (
    Arrange,
    Keep,
    Reducer,
    Seen,
    Text,
    Wants,
    class_token_of,
)
from zoo.models.parts.reduce.merge import unit
from zoo.models.parts.reduce.outliers import count_outliers
from zoo.models.parts.reduce.scores import class_attention

CARD = Card(
    slug="recoverable_compression",
    code="https://github.com/banjiuyufen/Recoverable-Compression",
    differs=(
        "`keep` bounds how many tokens there are; where there would be more, those that the text "
        "recovers give way first, of the rest the clusters.",
        "One patch at least is kept, where no score is an outlier.",
        "The text comes as a vector of CLIP's text tower in the batch (`guide_vector`), and is not "
        "encoded here; without `embedding_dim` there is no text, and no patch is recovered by it.",
        "`fixed=True` takes the keys of the patches that are clustered, and the share of these for "
        "the number of clusters; by default both are as in the official code, which takes other "
        "rows of the keys, and the share of the number of channels.",
    ),
)

SIGHT, LEFTOVER = 20, 10
"""Neighbours of a score in the search for outliers: among all patches, among those left over."""

MEMBERS = 32
"""Patches that a cluster is made of, besides its centre."""


@struct.dataclass
class Recovered:
    """What remains of a picture of N patches, K rows of which the first ones count.

    Attributes:
      tokens: [K, D], kept patches in their order, then clusters, then the sum of the rest.
      mask: bool [K].
      index: int32 [K], the place of each: of a cluster its centre, of the rest its most noticed
        patch.
      groups: int32 [N], which token each patch became a part of; -1 for none.
      sight: int32 [N], all patches by the attention of the class token, and `num_sight`, how many
        of these are kept.
      words: int32 [N], by likeness to the text, and `num_words`, how many of these are kept.
      leftover: int32 [N], what is left over, in its order, and behind it the rest.
      centres: int32 [K], centres in `leftover`, and `num_centres`, how many of these count.
      members: int32 [K, 32], what each centre is joined by, places in `leftover`.
      num_sight: see `sight`.
      num_words: see `words`.
      num_centres: see `centres`.
    """

    tokens: Array
    mask: Array
    index: Array
    groups: Array
    sight: Array
    words: Array
    leftover: Array
    centres: Array
    members: Array
    num_sight: Array
    num_words: Array
    num_centres: Array


def recover(
    patches: Array,
    attention: Array,
    keys: Array,
    relevance: Array | None = None,
    *,
    keep: int,
    fixed: bool = False,
) -> Recovered:
    """Choose, recover and cluster the patches of one picture. Batches by `jax.vmap`.

    Args:
      patches: [N, D].
      attention: float32 [N], that of the class token.
      keys: [N, C], of the layer whose attention it is, its heads side by side.
      relevance: float32 [N], likeness to the text; None where there is none.
      keep: K, the most that may remain, below N.
      fixed: see `RecoverableCompression`.
    """
    size, place = len(attention), jnp.arange(len(attention))
    number = count_outliers(attention, neighbours=SIGHT)
    num_sight = jnp.clip(jnp.asarray(_shares(size))[number], 1, keep)
    sight = jnp.argsort(-attention, stable=True)
    chosen = jnp.argsort(sight) < num_sight
    words, num_words, score = sight, jnp.int32(0), jnp.zeros(size)
    if relevance is not None:
        score = jnp.where(chosen, relevance.min(), relevance)
        number = count_outliers(score, neighbours=SIGHT)
        num_words = jnp.asarray(_shares_of_rest(size))[num_sight, number]
        num_words = jnp.minimum(num_words, keep - num_sight)
        words = jnp.argsort(-score, stable=True)
        chosen |= jnp.argsort(words) < num_words
    kept = jnp.sum(chosen)

    left = jnp.argsort(chosen, stable=True)
    real = place < size - kept
    x, weight = patches[left].astype(jnp.float32), jnp.where(real, attention[left], 0)
    number = count_outliers(weight, neighbours=LEFTOVER, real=real)
    table = _clusters(size, None if fixed else patches.shape[-1])
    room = jnp.minimum(keep - kept, size - kept) - 1
    num_centres = jnp.clip(jnp.asarray(table)[size - kept, number], 0, jnp.maximum(room, 0))
    centres = jax.lax.top_k(jnp.where(real, weight, -1), keep)[1]
    directions = unit(keys[left] if fixed else keys)
    alike = directions[centres] @ directions.T + 50 * score[left]  # [K, N]
    alike = jnp.where(real & (place != centres[:, None]), alike, -jnp.inf)
    best, members = jax.lax.top_k(alike, min(MEMBERS, size - 1))
    share = jnp.where(jnp.isfinite(best), weight[members], 0)
    rows = jnp.arange(keep)
    joined = jnp.zeros((keep, size)).at[rows[:, None], members].set(share)
    clusters = x[centres] + joined @ x

    own = jnp.full(size, -1).at[centres].set(jnp.where(rows < num_centres, rows, -1))
    rest = jnp.where(real & (own < 0), weight, -1)
    every = jnp.maximum(rest, 0) @ x
    behind = num_centres > 0  # without clusters the rest is dropped
    first = jnp.argsort(~chosen, stable=True)[:keep]
    cluster = jnp.clip(rows - kept, 0, keep - 1)
    is_kept, is_cluster = rows < kept, rows < kept + num_centres
    tokens = jnp.where(is_cluster[:, None], clusters[cluster], every)
    tokens = jnp.where(is_kept[:, None], patches[first], tokens.astype(patches.dtype))
    index = jnp.where(is_cluster, left[centres[cluster]], left[jnp.argmax(rest)])
    index = jnp.where(is_kept, first, index)
    mask = rows < kept + jnp.where(behind, num_centres + 1, 0)
    part = jnp.where(own >= 0, kept + own, jnp.where(behind, kept + num_centres, -1))
    groups = jnp.zeros(size, jnp.int32).at[left].set(part.astype(jnp.int32))
    groups = jnp.where(chosen, jnp.cumsum(chosen) - 1, groups)
    return Recovered(
        tokens=tokens,
        mask=mask,
        index=jnp.where(mask, index, -1).astype(jnp.int32),
        groups=groups.astype(jnp.int32),
        sight=sight,
        words=words,
        leftover=left,
        centres=centres,
        members=members,
        num_sight=num_sight,
        num_words=num_words,
        num_centres=num_centres,
    )


# What shares of outliers mean in tokens, cut off in float64 as the official code does.


@functools.cache
def _shares(size: int) -> np.ndarray:
    """Of so many scores, by the number of outliers: int32 [size + 1]."""
    return np.trunc(size * (np.arange(size + 1) / size)).astype(np.int32)


@functools.cache
def _shares_of_rest(size: int) -> np.ndarray:
    """Of those not chosen already, by these and the number of outliers: int32 [size + 1] * 2."""
    numbers = np.arange(size + 1)
    return np.trunc((size - numbers)[:, None] * (numbers / size)).astype(np.int32)


@functools.cache
def _clusters(size: int, channels: int | None) -> np.ndarray:
    """Of the channels or, where None, of those left over; by these and the number of outliers."""
    numbers = np.arange(size + 1)
    share = numbers / np.maximum(numbers, 1)[:, None]
    whole = numbers[:, None] if channels is None else channels
    return np.trunc(whole * np.minimum(share, 1)).astype(np.int32)


@dataclass(frozen=True)
class RecoverableCompression(Reducer):
    """The method.

    Attributes:
      keep: tokens of a tile at most, as a number or a share; how many there are depends on the
        picture.
      embedding_dim: width of the space in which CLIP compares pictures and texts. With it the
        method has CLIP's projection of pictures, and wants `guide_vector` in the batch; None: no
        patch is recovered by the text.
      fixed: clusters patches by their own keys, and makes as many clusters as the share of outliers
        says of the patches left over.
    """

    keep: Keep = 0.5
    embedding_dim: int | None = None
    fixed: bool = False

    merges: ClassVar[bool] = True
    arrange: ClassVar[Arrange] = "tiles"  # clusters and the rest follow what is kept

    def wants(self, tower: Any, layer: int) -> Wants:
        """Queries and keys of the last layer, and for the text its output.

        Raises:
          ValueError: a tower without a class token.
        """
        class_token_of(tower, layer, "Recoverable Compression")
        taps = () if self.embedding_dim is None else (tower.depth,)
        return Wants(taps=taps, qk=(tower.depth,))

    def inputs(self, batch_size: int) -> Batch:
        """What it reads of a batch besides pictures and text."""
        if self.embedding_dim is None:
            return {}
        shape = (batch_size, self.embedding_dim)
        return {"guide_vector": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def reduce(
        self,
        seen: Seen,
        text: Text | None = None,
        *,
        keep: int,
        relevance: Array | None = None,
    ) -> TokenSet:
        """What remains of every tile: kept patches, clusters, the sum of the rest.

        Args:
          seen: the patches.
          text: not read.
          keep: rows of a tile.
          relevance: float32 [B, M, N], likeness of the patches to the text, if there is one.
        """
        del text
        # One head as wide as the layer, and the square root of its width.
        q, k = (x.reshape(*x.shape[:-2], 1, -1) for x in seen.features.qk[max(seen.features.qk)])
        facts = class_attention(q, k, prefix=seen.prefix), k[..., seen.prefix :, 0, :]
        run = functools.partial(recover, keep=keep, fixed=self.fixed)
        given = (*facts, *(() if relevance is None else (relevance,)))
        made = jax.vmap(jax.vmap(run))(seen.tokens, *map(jax.lax.stop_gradient, given))
        return TokenSet(made.tokens, made.mask, made.index, made.groups)

    def build(self, vision_width: int, width: int) -> nn.Module:
        """The module, with CLIP's projection where there is a text."""
        if self.embedding_dim is None:
            return super().build(vision_width, width)
        return Guided(self, vision_width)


class Guided(nn.Module):
    """The method with the text."""

    config: RecoverableCompression
    vision_width: int

    def setup(self) -> None:
        shape = (self.vision_width, self.config.embedding_dim)
        self.image_projection = Proj("...d,dp->...p", shape, ("embed", "mlp"))

    def __call__(self, seen: Seen, text: Text | None = None, *, keep: int) -> TokenSet:
        """See `RecoverableCompression.reduce`.

        Raises:
          ValueError: no vector of the text, or one of another width.
        """
        dim, vector = self.config.embedding_dim, None if text is None else text.vector
        if vector is None or vector.shape[-1] != dim:
            raise ValueError(
                f"guide_vector: got {None if vector is None else vector.shape}, want [B, {dim}], "
                "the question as CLIP's text tower has it; or embedding_dim = None to do without"
            )
        last = seen.features.taps[max(seen.features.taps)][..., seen.prefix :, :]
        patches = unit(self.image_projection(last))  # [B, M, N, P]
        relevance = jnp.einsum("bmnp,bp->bmn", patches, unit(vector)) * dim**-0.5
        return self.config.reduce(seen, keep=keep, relevance=relevance)


def table(config: LlavaConfig) -> Table:
    """Keys of the hub's LLaVA and, with a text, of CLIP's projection of pictures."""
    found = hub_table(config)
    if getattr(config.reducer, "embedding_dim", None) is not None:
        own = Row("reducer/image_projection/kernel", "visual_projection.weight", linear())
        found = found + Table((own,))
    return found


_LLAVA, _TINY = llava.VARIANTS["llava_1_5_7b"], llava.VARIANTS["llava_tiny"]

VARIANTS = {
    "recoverable_compression_llava_1_5_7b": replace(
        _LLAVA, reducer=RecoverableCompression(embedding_dim=768)
    ),
    "recoverable_compression_llava_1_5_7b.sight": replace(_LLAVA, reducer=RecoverableCompression()),
    "recoverable_compression_tiny": replace(_TINY, reducer=RecoverableCompression()),
}

register(
    CARD,
    VARIANTS,
    table=table,
    reducers={"recoverable_compression": RecoverableCompression},
)
