"""What the stations of a model hand to each other.

Axis legend: B batch, M images or tiles per example, Z frames or slices, N vision tokens, Q kept or
query tokens, T text, L whole sequence, S keys, D width, F mlp_dim, H heads, K key-value heads, E
head_dim, V vocabulary.

A *batch* is a flat mapping of reserved names to arrays; a model reads those that it knows:

    pixels     [B, M, H, W, C] float32, normalised: M images or tiles of images, in the order of
               their placeholders, zeros where a row has fewer; absent for text only. Classifiers
               and dual encoders take [B, H, W, C]
    crops      [B, M, V, H, W, 3] float32, V crops of each image, row by row, for models that see
               more of a picture than the whole; zeros where there are fewer
    view_grid  [B, M, 2] int32, rows and columns of these crops. Absent: a square
    ids        [B, T] int32, one placeholder id per image, the same number I of them in every row:
               unused ones stand in the padding, `text_mask` False
    shown      [B, M, 4] int32, where each image lies in its pixels, which are padding around it:
               top, left, bottom, right; for methods that leave padding out. Absent: everywhere
    sizes      [B, I] int32, how many vision tokens take the place of each placeholder; absent where
               every image has the same number (I = M)
    layout     [B, S] int32, which of a row's vision tokens (M Q of them in the order of `pixels`,
               then those that the model adds, such as a newline) stands in each of its S slots, in
               reading order; [B, S, 4] with `blend` [B, S, 4] float32: a weighted sum of four.
               Absent: 0, 1, 2, ...
    tiles      [B, I, 3] int32, of every placeholder: how many tiles its image has; and the rows and
               columns of the grid that those behind the first make together, 0 where they make none
    positions  [B, L, 3] float32, the rotary positions (time, row, column) of the expanded sequence,
               for models that have them
    patches    [B, P, C'] float32, flattened patches of images in their native resolution, for
               towers that take these instead of `pixels`; with them come `patch_grid` [B, P, 2],
               `patch_segment` [B, P], `patch_frame` [B, G, K] and `patch_window` [B, W, K'], all
               int32, which `parts/towers/qwen_vit.py` explains
    classes    [B] int32, the class of each image, for training classifiers; [B, *grid], the class
               of each pixel or voxel, for segmentation
    kept       which sub-network each example goes through, for models that are many in one
    token_types [B, T] int32, the segment embedding of BERT
    object_ids [B, T] int32 and `object_mask` [B, T] bool, the text that names an object of each
               image, and `patch_labels` [B, N] float32, which patches it covers: 1, 0, or negative
               where that is not known
    context    [B, S, D'] and `context_mask` [B, S] bool, what cross-attention reads
    labels     [B, T] int32, aligned with `ids`; `IGNORE` where nothing is learned
    text_mask  [B, T] bool, False on padding
    guide      [B, T] bool, the text by which methods choose vision tokens. Absent: all of it
    guide_vector [B, P] float32, this text as the text tower of a dual encoder has it, for methods
               that compare it with patches in the space of that
    segments   [B, T] int32: 0 is seen by all that comes after it, every other number only by its
               own kind, so that several questions about one picture stand side by side without
               seeing each other. A row of several examples has `EXAMPLE` numbers for each of them:
               the n-th, counted from 0, adds n `EXAMPLE`, and sees nothing of the others.
               Absent: all 0
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array
Batch = Mapping[str, Array]
Memory = Mapping[str, Any]
"""Read-only arrays per example (taps, vision keys, low-rank weights), addressed by tags."""

OF_SLOTS = frozenset({"taps"})
"""What only vision tokens read of the memory, and decoding, which has none, does not keep."""

Aux = dict[str, Array]
"""What one decoder step reports: losses, kept counts."""

EXAMPLE = 1024
"""How many numbers of `segments` each example of a row has; the first is what all of it sees."""

IGNORE = -100
"""The label of a token that teaches nothing."""

TEXT, IMAGE = 0, 1
"""Values of `Tokens.modality`."""


def take(tree: Any, index: Array) -> Any:
    """Gather rows `index` [B, C] of every leaf [B, L, ...]; returns leaves [B, C, ...]."""
    return jax.tree.map(lambda leaf: jax.vmap(lambda row, i: row[i])(leaf, index), tree)


@struct.dataclass
class Tokens:
    """Facts about the tokens of a sequence. Every leaf is [B, L, ...], so that `take` gathers all
    of them.

    Attributes:
      position: float32 [B, L] or [B, L, 3], what rotary embeddings read.
      order: int32 [B, L], place in the full sequence; causality is decided by it.
      modality: int32 [B, L], `TEXT` or `IMAGE`.
      valid: bool [B, L], False on padding, dropped and skipped tokens.
      tags: named [B, L] facts of a system, such as `cell` (which vision token, -1 for text) and
        `label` (the id that the *next* valid token must have, `IGNORE` where nothing is learned)
        and `segment` (who sees whom, as in a batch's `segments`).
    """

    position: Array
    order: Array
    modality: Array
    valid: Array
    tags: dict[str, Array] = struct.field(default_factory=dict)

    @classmethod
    def sequence(cls, valid: Array, **tags: Array) -> "Tokens":
        """Text tokens in reading order, valid where `valid` [B, L].

        Positions count the valid tokens; with a tag `segment`, those of its own segment and of the
        first one of its example.
        """
        order = jnp.broadcast_to(jnp.arange(valid.shape[1], dtype=jnp.int32), valid.shape)
        count = jnp.cumsum(valid, -1)
        if "segment" in tags:
            segment = tags["segment"]
            common = segment == shared(segment)
            seen = jnp.cumsum(valid & common, -1)  # of what all of an example see
            seen -= _before(seen - (valid & common), segment // EXAMPLE)
            own = count - _before(count - valid, segment)
            count = jnp.where(common, seen, seen + own)
        position = jnp.maximum(count - 1, 0).astype(jnp.float32)
        return cls(position, order, jnp.zeros_like(order), valid, dict(tags))


def shared(segment: Array) -> Array:
    """The segment that all of an example see, for the `segment` of any of its tokens."""
    return segment - segment % EXAMPLE


def _before(count: Array, group: Array) -> Array:
    """Running counts [B, L] as they were where the present run of equal `group` [B, L] began."""
    first = jnp.diff(group, axis=-1, prepend=group[:, :1]) != 0
    return jax.lax.cummax(jnp.where(first, count, 0), axis=1)


@struct.dataclass
class Stream:
    """What flows through a stack of layers.

    `slots` is static: the number of image slots in every row, which is 0 in decoding and for text
    only, where every vision policy is the identity.
    `whole` is how many there were before policies dropped some for good, 0 where none did.
    """

    hidden: Array  # [B, L, D]
    tokens: Tokens
    slots: int = struct.field(pytree_node=False, default=0)
    whole: int = struct.field(pytree_node=False, default=0)


@struct.dataclass
class Reserve:
    """In place of a layer state: cache what this layer sees, with room for `n` more tokens."""

    n: int = struct.field(pytree_node=False, default=0)


@struct.dataclass
class KV:
    """Key-value cache of one attention layer. Empty and skipped places have `tokens.valid` False.

    Attributes:
      k: [B, K, S, E] keys after rotation; the places of a head lie together, as they are read.
      v: [B, K, S, E] values.
      tokens: `Tokens` of the S places.
      cursor: int32 [], where the next token is written; the same for every row, so the cache stays
        rectangular.
    """

    k: Array
    v: Array
    tokens: Tokens
    cursor: Array

    @classmethod
    def start(cls, k: Array, v: Array, tokens: Tokens, room: int) -> "KV":
        """A cache that holds L tokens, k and v [B, L, K, E], and has room for `room` more."""

        def pad(leaf: Array, axis: int) -> Array:
            return jnp.pad(leaf, [(0, room * (i == axis)) for i in range(leaf.ndim)])

        cursor = jnp.int32(k.shape[1])
        k, v = (pad(x.swapaxes(1, 2), 2) for x in (k, v))
        return cls(k, v, jax.tree.map(lambda x: pad(x, 1), tokens), cursor)

    def append(self, k: Array, v: Array, tokens: Tokens) -> "KV":
        """Write L more tokens at the cursor. The caller sees to it that there is room.

        Tags that they lack are zeros: facts of a prompt alone.
        """
        zeros = {
            name: jnp.zeros(tokens.valid.shape, x.dtype) for name, x in self.tokens.tags.items()
        }
        tokens = tokens.replace(tags={name: tokens.tags.get(name, zeros[name]) for name in zeros})

        def write(cache: Array, new: Array, axis: int) -> Array:
            new = new.astype(cache.dtype)
            return jax.lax.dynamic_update_slice_in_dim(cache, new, self.cursor, axis)

        return KV(
            write(self.k, k.swapaxes(1, 2), 2),
            write(self.v, v.swapaxes(1, 2), 2),
            jax.tree.map(lambda cache, new: write(cache, new, 1), self.tokens, tokens),
            self.cursor + k.shape[1],
        )

    def read(self) -> tuple[Array, Array]:
        """Keys and values of all places, [B, S, K, E] each."""
        return self.k.swapaxes(1, 2), self.v.swapaxes(1, 2)


@struct.dataclass
class Features:
    """What a vision tower returns. What was not asked for is absent, and was not computed.

    Attributes:
      tokens: [..., N, D] patch tokens.
      grid: (h, w) or (z, h, w), static; its product is N.
      mask: bool [..., N], False on padding; None when all are real.
      cls: [..., D] class token, or what the tower's pooling head returns, where it has one.
      taps: {layer: [..., N (+ prefix tokens), D]} the output of that layer (0 is the input of the
        first).
      qk: {layer: (q, k)} each [..., N (+ prefix tokens), H, E], after the projection biases.
      aux: what the layers that were run report, in their order; () of towers without policies.
      pyramid: of a hierarchical tower, the output [..., h_i, w_i, C_i] of each stage, the finest
        first, before any norm at the end of the tower; () of others.
    """

    tokens: Array
    grid: tuple[int, ...] = struct.field(pytree_node=False)
    mask: Array | None = None
    cls: Array | None = None
    taps: dict[int, Array] = struct.field(default_factory=dict)
    qk: dict[int, tuple[Array, Array]] = struct.field(default_factory=dict)
    aux: tuple[Aux, ...] = ()
    pyramid: tuple[Array, ...] = ()


@struct.dataclass
class TokenSet:
    """Vision tokens on their way into the language model.

    Attributes:
      tokens: [B, M, Q, D], M images of Q tokens each.
      mask: bool [B, M, Q], False on surplus tokens; None when all are real.
      index: int32 [B, M, Q], which of the N tokens before a reduction each came from, -1 for one
        that has no place among them; None when there are all of them, in order.
      groups: int32 [B, M, N], which token each of those became a part of, -1 for what was dropped;
        None when each came from one.
    """

    tokens: Array
    mask: Array | None = None
    index: Array | None = None
    groups: Array | None = None


@struct.dataclass
class Visual:
    """What a connector hands on: tokens to splice in, memory for the decoder, or both."""

    tokens: TokenSet | None
    memory: dict[str, Any] = struct.field(default_factory=dict)


@struct.dataclass
class Cache:
    """Everything that decoding carries from one token to the next.

    Attributes:
      states: layer states, laid out as `Stack` keeps them.
      memory: what policies and cross-attention read.
      next_position: float32 [B], the position of the next token; [B, A] where it has A axes.
      next_order: int32 [], its place in the full sequence.
    """

    states: Any
    memory: dict[str, Any]
    next_position: Array
    next_order: Array


@struct.dataclass
class Output:
    """What a language model's forward pass returns: `hidden` [B, L, D] after the final norm, the
    `tokens` that it belongs to (policies may have shortened the sequence) and each step's `aux`.
    """

    hidden: Array
    tokens: Tokens
    aux: tuple[Aux, ...] = ()
