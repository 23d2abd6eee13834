"""The place of a reducer in a model: which tokens it is given, and what becomes of the sequence."""

from typing import Any

import jax.numpy as jnp
from flax import struct

from zoo.models.core.types import IMAGE, Array, Batch, Features, Stream, TokenSet, take
from zoo.models.parts.reduce.arrange import Places, keep_positions, mosaic, subset, tile_by_tile
from zoo.models.parts.reduce.base import Point, Reducer, Seen, Text


def point_of(reducer: Reducer, connector: Any, *, taps: bool, blended: bool = False) -> Point:
    """Which tokens the reducer is given.

    Args:
      reducer: says which it wants.
      connector: configuration of the connector, whose `stride` is the side of the squares of
        patches that it makes tokens of; 1 where it works token by token, absent where its tokens
        are of no patch.
      taps: whether a policy makes the vision tokens, with groups of its own beside them.
      blended: whether the batch interpolates between the connector's tokens.

    Raises:
      ValueError: the tokens that a method merges are not to be had here.
    """
    want, stride = reducer.point, getattr(connector, "stride", None)
    name = type(reducer).__name__
    if blended and want != "slots":
        if reducer.merges:
            raise ValueError(
                f"{name} merges tokens of tiles, and this batch interpolates between them (a large "
                "picture, or a video): want a method that selects, or one that acts on slots"
            )
        return "slots"
    if want == "tower" and stride is None:
        raise ValueError(
            f"{name} chooses among patches, and {connector!r} makes tokens of all of them: want a "
            "connector that keeps the grid, or a method that compares its tokens"
        )
    if want == "tower" and (stride != 1 or taps):
        if reducer.merges:
            raise ValueError(
                f"{name} merges the tower's tokens before a connector that works token by token: "
                f"not {connector!r}" + (" with a policy that makes taps" if taps else "")
            )
        return "connector"
    return want


def text_of(batch: Batch, embedded: Array, image_id: int) -> Text:
    """The text of a batch, and what of it guides a reducer."""
    ids = batch["ids"]
    mask = ids != image_id
    for name in ("text_mask", "guide"):
        if name in batch:
            mask &= batch[name]
    return Text(ids, embedded, mask, batch.get("guide_vector"))


def shown_tokens(shown: Array, grid: tuple[int, int], side: int) -> Array:
    """Which tokens of a grid show something of their image, bool [B, M, N].

    Args:
      shown: int32 [B, M, 4], as in a batch.
      grid: rows and columns.
      side: of a token, in pixels.
    """

    def seen(count: int, first: Array, last: Array) -> Array:
        edge = side * jnp.arange(count)
        return (edge + side > first[..., None]) & (edge < last[..., None])

    rows = seen(grid[0], shown[..., 0], shown[..., 2])
    columns = seen(grid[1], shown[..., 1], shown[..., 3])
    return (rows[..., :, None] & columns[..., None, :]).reshape(*shown.shape[:2], -1)


def seen_by(
    reducer: Reducer,
    tokens: Array,
    features: Features,
    *,
    grid: tuple[int, int] | None,
    layer: int,
    prefix: int,
    mask: Array | None = None,
    tiles: Array | None = None,
    number: int | None = None,
) -> Seen:
    """What a reducer sees of the tokens of tiles [B, M, N, D]; see `Seen` for the rest.

    `number` is how many there were of a tile, where the tower has merged some.
    """
    per_tile = reducer.num_kept(tokens.shape[-2] if number is None else number)
    facts = {"grid": grid, "layer": layer, "prefix": prefix, "per_tile": per_tile}
    return Seen(tokens, features, mask, tiles, **facts)


def at_slots(
    reducer: Reducer, seen: Seen, batch: Batch, filled: Array, valid: Array, newline: int
) -> Seen:
    """What a reducer sees of the slots of a sequence.

    Args:
      reducer: of the model.
      seen: of the tiles.
      batch: with its `sizes`, `layout` and `blend`, if any.
      filled: [B, S, D], what stands in the slots.
      valid: bool [B, S], False on surplus tokens.
      newline: the number of the newline.
    """
    count = filled.shape[1]
    layout = batch.get("layout")
    if layout is None:
        layout = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), valid.shape)
    blend = batch.get("blend")
    if blend is None:
        layout = jnp.repeat(layout[..., None], 4, -1)
        blend = jnp.broadcast_to(jnp.eye(1, 4)[0], layout.shape)
    if (sizes := batch.get("sizes")) is not None:
        valid &= jnp.arange(count) < sizes.sum(-1, keepdims=True)
    if not reducer.newlines:
        valid &= layout[..., 0] != newline
    facts = {"layout": layout, "blend": blend}
    return seen.replace(tokens=filled[:, None], mask=valid[:, None], **facts)


@struct.dataclass
class Remaining:
    """What remains of the vision tokens of a batch, ready for the splice.

    Attributes:
      vision: tokens [B, M, K, D].
      places: where they stand; None where all of a tile follow one another.
      number: int32 [B, M K + 1], the number that each token had among all, -1 for those without
        a place; at last that of the newline.
      order: int32 [B, S], the slot that the token of each slot had.
      sizes: int32 [B, I], the slots that each placeholder had.
    """

    vision: TokenSet
    places: Places | None
    number: Array
    order: Array
    sizes: Array

    def restore(self, stream: Stream, reducer: Reducer) -> Stream:
        """The spliced stream with the numbers that its vision tokens had, and with their positions
        if the reducer keeps these.
        """
        images = self.sizes.shape[1]
        if reducer.positions == "original":
            new = jnp.full((len(self.sizes), images), self.vision.tokens.shape[2])
            new = new if self.places is None else self.places.sizes
            stream = keep_positions(stream, self.order, self.sizes, new)
        cell = stream.tokens.tags["cell"]
        slot = (stream.tokens.modality == IMAGE) & (cell >= 0)
        cell = jnp.where(slot, take(self.number, jnp.maximum(cell, 0)), -1)
        tags = {**stream.tokens.tags, "cell": cell}
        return stream.replace(tokens=stream.tokens.replace(tags=tags))


def remaining(reducer: Reducer, kept: TokenSet, batch: Batch, seen: Seen, tokens: int) -> Remaining:
    """Arrange what a reducer has kept of tiles of `tokens` tokens each.

    Raises:
      ValueError: the batch has a layout and not what tells how the tiles of a picture lie.
    """
    assert kept.index is not None
    rows, number = kept.tokens.shape[:2]
    tile = tokens * jnp.arange(number)[:, None]
    numbers = jnp.where(kept.index >= 0, kept.index + tile, -1).reshape(rows, -1)
    newline = jnp.full((rows, 1), number * tokens)
    numbers = jnp.concatenate([numbers, newline], 1).astype(jnp.int32)
    if "layout" not in batch:
        sizes = jnp.full((rows, number), tokens)
        return Remaining(kept, None, numbers, numbers[:, :-1], sizes)

    bare = kept.replace(mask=None)  # what is masked has no place
    places = Places(batch["sizes"], batch["layout"])
    if reducer.arrange != "layout" and seen.tiles is None:
        raise ValueError(
            f"{type(reducer).__name__} puts the tokens of tiles in an order of its own and so "
            "needs the batch's `tiles`, as zoo.processors.tiling.pack makes them"
        )
    limit = reducer.num_slots(number, tokens)
    if reducer.arrange == "tiles":
        old = (seen.tiles[..., 0] * tokens).astype(jnp.int32)
        new = tile_by_tile(kept, seen.tiles)
        order = take(numbers, new.layout)
        return Remaining(bare, new, numbers, order, old)
    if reducer.arrange == "mosaic":
        grid = seen.grid or (1, tokens)
        places = mosaic(seen.tiles, number, grid)
    elif reducer.newlines:
        side = tokens if seen.grid is None else seen.grid[0]
        limit += number * side + places.sizes.shape[1]
    slots = min(places.layout.shape[1], limit)
    new, order = subset(kept, places, tokens, slots=slots, newlines=reducer.newlines)
    return Remaining(bare, new, numbers, order, places.sizes)


def remaining_slots(kept: TokenSet, batch: Batch, cell: Array) -> Remaining:
    """Arrange what a reducer has kept of slots, [B, 1, K, D].

    Args:
      kept: its index are slots.
      batch: with its `sizes`, if any.
      cell: int32 [B, S], the number of the token of every slot.
    """
    rows, count = cell.shape
    sizes = batch.get("sizes")
    if sizes is None:
        images = batch["pixels"].shape[1]
        sizes = jnp.full((rows, images), count // images, jnp.int32)
    every = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), cell.shape)
    assert kept.index is not None
    new, order = subset(
        kept, Places(sizes, every), count, slots=kept.index.shape[-1], newlines=False
    )
    index = kept.index[:, 0]
    number = jnp.where(index >= 0, take(cell, jnp.maximum(index, 0)), -1)
    number = jnp.pad(number, ((0, 0), (0, 1)), constant_values=-1)
    return Remaining(kept.replace(mask=None), new, number, order, sizes)
