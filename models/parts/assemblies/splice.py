"""Putting vision tokens into the place of image placeholders, with static shapes."""

import jax
import jax.numpy as jnp

from zoo.models.core.types import IGNORE, IMAGE, TEXT, Array, Stream, Tokens, TokenSet, take


def splice(
    ids: Array,
    embedded: Array,
    vision: TokenSet | None,
    *,
    image_id: int,
    text_mask: Array | None = None,
    labels: Array | None = None,
    segments: Array | None = None,
) -> Stream:
    """Expand every image placeholder into the Q vision tokens of its image.

    Every row has exactly M placeholders, so that every row of the result has exactly M * Q image
    slots and policies can select among them with static shapes; unused slots are `valid=False`.
    Positions count the valid tokens. The tag `cell` says which vision token (0 to M * Q - 1) a slot
    holds, -1 for text. The tag `label`, present when `labels` are given, is the id that the next
    valid token must have.

    Args:
      ids: int [B, T], exactly M times `image_id` in every row.
      embedded: [B, T, D] token embeddings; what stands at placeholders is not used.
      vision: tokens [B, M, Q, D]; None for text only.
      image_id: the placeholder.
      text_mask: bool [B, T], False on padding; by default all are real.
      labels: int [B, T] aligned with `ids`; the first token of a segment is never learned.
      segments: int [B, T], who sees whom; images belong to the segment of their placeholder.

    Returns:
      A stream of length T + M (Q - 1) with M * Q slots.
    """
    batch, length = ids.shape
    text_mask = jnp.ones(ids.shape, bool) if text_mask is None else text_mask
    tags = {} if segments is None else {"segment": segments}
    if vision is None:
        tokens = Tokens.sequence(text_mask, cell=jnp.full(ids.shape, -1, jnp.int32), **tags)
        return Stream(embedded, _with_labels(tokens, labels), 0)

    _, images, queries, width = vision.tokens.shape
    slots = images * queries
    is_image = ids == image_id  # [B, T]
    size = jnp.where(is_image, queries, 1)
    start = jnp.cumsum(size, -1) - size  # [B, T], the place of every item in the result
    place = jnp.arange(length + slots - images)
    item = jax.vmap(lambda s: jnp.searchsorted(s, place, side="right") - 1)(start)  # [B, L]
    image = jnp.cumsum(is_image, -1) - 1  # [B, T], which image a placeholder stands for
    slot, which, offset = take((is_image, image, start), item)
    cell = jnp.where(slot, which * queries + (place - offset), -1).astype(jnp.int32)

    flat = vision.tokens.reshape(batch, slots, width).astype(embedded.dtype)
    hidden = jnp.where(slot[..., None], take(flat, jnp.maximum(cell, 0)), take(embedded, item))
    valid = take(text_mask, item)
    if vision.mask is not None:
        seen = take(vision.mask.reshape(batch, slots), jnp.maximum(cell, 0))
        valid = jnp.where(slot, valid & seen, valid)
    tokens = Tokens.sequence(valid, cell=cell, **take(tags, item))
    tokens = tokens.replace(modality=jnp.where(slot, IMAGE, TEXT).astype(jnp.int32))
    spread = None if labels is None else jnp.where(slot, IGNORE, take(labels, item))
    return Stream(hidden, _with_labels(tokens, spread), slots)


def _with_labels(tokens: Tokens, labels: Array | None) -> Tokens:
    """Give every valid token the label of the next valid token of its segment."""
    if labels is None:
        return tokens
    if "segment" in tokens.tags:
        first = jnp.diff(tokens.tags["segment"], axis=-1, prepend=0) != 0
        labels = jnp.where(first, IGNORE, labels)
    length = labels.shape[1]
    place = jnp.where(tokens.valid, jnp.arange(length), length)
    after = jnp.concatenate([place[:, 1:], jnp.full_like(place[:, :1], length)], 1)
    following = jax.lax.cummin(after, axis=1, reverse=True)  # [B, L], `length` where there is none
    label = take(jnp.pad(labels, ((0, 0), (0, 1)), constant_values=IGNORE), following)
    label = jnp.where(tokens.valid, label, IGNORE)
    return tokens.replace(tags={**tokens.tags, "label": label})
