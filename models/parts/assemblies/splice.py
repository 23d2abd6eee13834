"""Putting vision tokens into the place of image placeholders, with static shapes."""

import jax
import jax.numpy as jnp

from zoo.models.core.types import (
    IGNORE,
    IMAGE,
    TEXT,
    Array,
    Batch,
    Stream,
    Tokens,
    TokenSet,
    take,
)


def splice(
    ids: Array,
    embedded: Array,
    vision: TokenSet | None,
    *,
    image_id: int,
    text_mask: Array | None = None,
    labels: Array | None = None,
    segments: Array | None = None,
    sizes: Array | None = None,
    layout: Array | None = None,
    blend: Array | None = None,
    extra: Array | None = None,
    guide: Array | None = None,
) -> Stream:
    """Expand every image placeholder into the vision tokens of its image.

    Every row has exactly I placeholders and every row of the result exactly S image slots, so that
    policies can select among them with static shapes. Slots that no image needs are `valid=False`
    and stand at the end of the row; the order of the text never changes. Positions count the valid
    tokens. The tag `cell` says which vision token a slot holds, -1 for text and surplus slots. The
    tag `label`, present when `labels` are given, is the id that the next valid token must have.

    Args:
      ids: int [B, T], exactly I times `image_id` in every row.
      embedded: [B, T, D] token embeddings; what stands at placeholders is not used.
      vision: tokens [B, M, Q, D], numbered 0 to M Q - 1 in each row; None for text only.
      image_id: the placeholder.
      text_mask: bool [B, T], False on padding; by default all are real.
      labels: int [B, T] aligned with `ids`; the first token of a segment is never learned.
      segments: int [B, T], who sees whom; images belong to the segment of their placeholder.
      sizes: int [B, I], how many slots every placeholder becomes, at most S in all. Absent: I = M,
        and every placeholder becomes Q.
      layout: int [B, S], which vision token stands in each slot, in reading order; with `blend` int
        [B, S, 4]. Absent: S = M Q, all of them in order.
      blend: float [B, S, 4], the weights of the four tokens of every slot; `cell` is then the
        number of the slot, and a slot is valid if all four tokens are.
      extra: [E, D] vision tokens that the model adds to those of every row, numbered from M Q.
      guide: bool [B, T], text by which policies choose vision tokens; it becomes a tag.

    Returns:
      A stream of length T - I + S with S slots.

    Raises:
      ValueError: a layout without sizes.
    """
    batch, length = ids.shape
    text_mask = jnp.ones(ids.shape, bool) if text_mask is None else text_mask
    facts = {"segment": segments, "guide": guide}
    tags = {name: fact for name, fact in facts.items() if fact is not None}
    if vision is None:
        tokens = Tokens.sequence(text_mask, cell=jnp.full(ids.shape, -1, jnp.int32), **tags)
        return Stream(embedded, _with_labels(tokens, labels), 0)
    if layout is not None and sizes is None:
        raise ValueError("a batch with a layout needs sizes: how many slots each image has")

    _, images, queries, _ = vision.tokens.shape
    filled, cell, seen = fill_slots(vision, layout, blend, extra)  # [B, S, D], [B, S], [B, S]
    slots = filled.shape[1]
    if sizes is None:
        sizes = jnp.full((batch, images), queries, jnp.int32)
    is_image = ids == image_id  # [B, T]
    image = jnp.clip(jnp.cumsum(is_image, -1) - 1, 0, sizes.shape[1] - 1)  # of every placeholder
    size = jnp.where(is_image, take(sizes, image), 1)
    end = jnp.cumsum(size, -1)  # [B, T], where every item of `ids` ends in the result

    place = jnp.arange(length - sizes.shape[1] + slots)
    item = jax.vmap(lambda e: jnp.searchsorted(e, place, side="right"))(end)  # [B, L]
    surplus = item == length
    item = jnp.minimum(item, length - 1)
    slot = take(is_image, item) | surplus
    number = jnp.clip(jnp.cumsum(slot, -1) - 1, 0, slots - 1)  # of every slot

    hidden = jnp.where(
        slot[..., None], take(filled, number).astype(embedded.dtype), take(embedded, item)
    )
    valid = take(text_mask, item) & ~surplus & (~slot | take(seen, number))
    cell = jnp.where(slot & ~surplus, take(cell, number), -1)
    tokens = Tokens.sequence(valid, cell=cell, **take(tags, item))
    tokens = tokens.replace(modality=jnp.where(slot, IMAGE, TEXT).astype(jnp.int32))
    spread = None if labels is None else jnp.where(slot, IGNORE, take(labels, item))
    return Stream(hidden, _with_labels(tokens, spread), slots)


def fill_slots(
    vision: TokenSet, layout: Array | None, blend: Array | None, extra: Array | None
) -> tuple[Array, Array, Array]:
    """What the S slots of every row hold: vectors [B, S, D], their `cell` [B, S], whether they are
    seen [B, S].
    """
    batch, images, queries, width = vision.tokens.shape
    flat = vision.tokens.reshape(batch, images * queries, width)
    seen = jnp.ones(flat.shape[:2], bool)
    if vision.mask is not None:
        seen = vision.mask.reshape(flat.shape[:2])
    if layout is None:
        return flat, jnp.broadcast_to(jnp.arange(flat.shape[1], dtype=jnp.int32), seen.shape), seen
    if extra is not None:
        more = jnp.broadcast_to(extra.astype(flat.dtype), (batch, *extra.shape))
        flat = jnp.concatenate([flat, more], 1)
        seen = jnp.pad(seen, ((0, 0), (0, len(extra))), constant_values=True)
    layout = jnp.clip(layout, 0, flat.shape[1] - 1)
    if blend is None:
        return take(flat, layout), layout, take(seen, layout)
    mixed = sum(
        take(flat, layout[..., i]).astype(jnp.float32) * blend[..., i, None] for i in range(4)
    )
    cell = jnp.broadcast_to(jnp.arange(layout.shape[1], dtype=jnp.int32), layout.shape[:2])
    return mixed.astype(flat.dtype), cell, take(seen, layout).all(-1)


def number_taps(taps: Array, batch: Batch, extra: Array | None) -> Array:
    """Taps [G, B, M Q, D] in the numbers that `splice` gives the vision tokens (`cell`): those that
    the model adds come after them in every level, and where tokens are blended, so are the taps.
    """
    if "blend" in batch:

        def blended(level: Array) -> Array:
            vision = TokenSet(level[:, None])
            return fill_slots(vision, batch["layout"], batch["blend"], extra)[0]

        return jax.lax.map(blended, taps)
    if extra is None:
        return taps
    more = jnp.broadcast_to(extra.astype(taps.dtype), (*taps.shape[:2], *extra.shape))
    return jnp.concatenate([taps, more], 2)


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
