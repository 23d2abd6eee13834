"""The region focus module, and what is chosen by its scores."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.models.core.keytable import Row, Table
from zoo.models.core.types import Array, Stream
from zoo.models.parts.decoders.gqa import DecoderConfig, decoder_table
from zoo.models.parts.layers.norms import make_norm
from zoo.models.parts.layers.stack import Stack


def selected(score: Array, real: Array, newline: Array, ratio: float) -> Array:
    """The best tokens of a level, int(ratio n) of the n real ones, and all newlines.

    Args:
      score: [..., N]; ties go to the earlier token.
      real: bool [..., N], what may be chosen. Newlines are, and take places of others.
      newline: bool [..., N].
      ratio: of tokens to keep.

    Returns:
      bool [..., N].
    """
    most = score.shape[-1]
    counts = jnp.array([int(n * ratio) for n in range(most + 1)])
    order = jnp.argsort(jnp.where(real, -score.astype(jnp.float32), jnp.inf), -1, stable=True)
    rank = jnp.argsort(order, -1)
    return (real & (rank < counts[real.sum(-1)][..., None])) | newline


def above(score: Array, real: Array, threshold: float) -> Array:
    """The other rule of the official code: tokens [N] whose score, scaled from its 5 % to its 95 %
    quantile among the `real` ones, is greater than `threshold`. bool [N].
    """
    masked = jnp.where(real, score.astype(jnp.float32), jnp.nan)
    low, high = (jnp.nanquantile(masked, share, axis=-1, keepdims=True) for share in (0.05, 0.95))
    return real & (jnp.clip((score - low) / (high - low), 0, 1) > threshold)


def tile_at(row: Array, column: Array, size: Array, blocks: Array) -> tuple[Array, Array]:
    """Row and column of the finer level's tile that lies where a token does.

    Args:
      row: int, of the token.
      column: int; the one behind the last is that of the newlines.
      size: int [..., 2], rows and columns of the tokens, newlines included.
      blocks: int [..., 2], rows and columns of the tiles.
    """
    scale = blocks.astype(jnp.float32) / size.astype(jnp.float32)
    place = (jnp.floor(x * scale[..., i]) for i, x in enumerate((row, column)))
    down, across = (x.astype(jnp.int32) for x in place)
    return down, across


class RegionFocus(nn.Module):
    """The first layers of a decoder and the queries and keys of one more.

    Attributes:
      decoder: sizes of the layers.
      depth: n, layers that are run; layer n + 1 scores.
    """

    decoder: DecoderConfig
    depth: int

    def setup(self) -> None:
        c = dataclasses.replace(self.decoder, depth=self.depth + 1)
        self.stack = Stack(c.plan())
        self.final_norm = make_norm(c.norm, c.norm_eps)

    def __call__(self, stream: Stream, local: Array) -> tuple[Array, Array]:
        """How much the last valid token attends to each token that may be chosen.

        Args:
          stream: the embedded prompt.
          local: bool [B, L], the tokens that may be chosen.

        Returns:
          float32 [B, L], the mean over heads of a softmax over the valid local tokens alone, 0 on
          all others; and the hidden states [B, L, D] that are scored.
        """
        if self.is_initializing():
            whole, _, _ = self.stack(stream)
            self.final_norm(whole.hidden)
        stream, _, _ = self.stack(stream, stop=self.depth)
        q, k, _ = self.stack.layer(self.depth).qkv(stream, {})  # [B, L, H, E], [B, L, K, E]
        valid = stream.tokens.valid
        last = jnp.where(valid, jnp.arange(valid.shape[1]), 0).max(-1)
        asking = jax.vmap(lambda row, at: row[at])(q, last)  # [B, H, E]
        asking = asking.reshape(*asking.shape[:1], k.shape[2], -1, k.shape[3])
        logits = jnp.einsum("bkge,blke->bkgl", asking, k, preferred_element_type=jnp.float32)
        seen = (local & valid)[:, None, None]
        logits = jnp.where(seen, logits / math.sqrt(k.shape[3]), jnp.finfo(jnp.float32).min)
        weights = jnp.where(seen, jax.nn.softmax(logits, -1), 0)
        return weights.mean((1, 2)), stream.hidden


def focus_table(decoder: DecoderConfig, depth: int, prefix: str = "") -> Table:
    """Keys of the official `token_pruner`, whose layers are those of the language model, for a
    module that is called `focus`.
    """
    config = dataclasses.replace(decoder, depth=depth + 1, tie_embeddings=False)
    found = []
    for row in decoder_table(config, prefix).under("focus").rows:
        inside = row.paths[0] if isinstance(row, Row) else ""
        if inside.startswith(("focus/stack/", "focus/final_norm/")):
            found.append(row)
    return Table(tuple(found))
