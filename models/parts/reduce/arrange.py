"""Where kept tokens stand: the layout of a batch, made again for what remains of its tokens."""

import jax
import jax.numpy as jnp
from flax import struct

from zoo.models.core.types import IMAGE, Array, Stream, TokenSet, take


@struct.dataclass
class Places:
    """What stands in the slots of every row.

    Attributes:
      sizes: int32 [B, I], slots of every placeholder.
      layout: int32 [B, S], the number of the token in each slot, in reading order; the newline
        comes after all tokens.
    """

    sizes: Array
    layout: Array


def mosaic(tiles: Array, number: int, grid: tuple[int, int]) -> Places:
    """All tokens of all tiles: for every picture those of its first tile, then the rows of the grid
    that the others make together, nothing cut off; where they make none, tile by tile.

    Args:
      tiles: int32 [B, I, 3], see `zoo.models.core.types`.
      number: M, tiles of a row.
      grid: rows and columns of the tokens of a tile.
    """
    (h, w), q = grid, grid[0] * grid[1]
    end = jnp.cumsum(tiles[..., 0], -1)  # [B, I]
    tile = jnp.arange(number)
    picture = jax.vmap(lambda e: jnp.searchsorted(e, tile, side="right"))(end)  # [B, M]
    real = picture < end.shape[1]
    picture = jnp.minimum(picture, end.shape[1] - 1)
    own = tile - take(end - tiles[..., 0], picture)  # number within its picture, [B, M]
    columns = take(tiles[..., 2], picture)
    place = jnp.arange(q)
    y, x = place // w, place % w
    wide, behind = jnp.maximum(columns, 1), jnp.maximum(own - 1, 0)
    row, column = (behind // wide)[..., None] * h + y, (behind % wide)[..., None] * w + x
    joined = ((columns > 0) & (own > 0))[..., None]
    key = jnp.where(joined, q + row * (wide * w)[..., None] + column, own[..., None] * q + place)
    key = key + take(end - tiles[..., 0], picture)[..., None] * q  # of those before
    key = jnp.where(real[..., None], key, number * q)
    layout = jnp.argsort(key.reshape(len(tiles), -1), -1, stable=True)
    return Places((tiles[..., 0] * q).astype(jnp.int32), layout.astype(jnp.int32))


def tile_by_tile(kept: TokenSet, tiles: Array) -> Places:
    """All kept tokens of the tiles of every picture, in the order of the set."""
    _, number, rows, _ = kept.tokens.shape
    end = jnp.cumsum(tiles[..., 0], -1)
    there = (jnp.arange(number) < end[:, -1:])[..., None]
    there = jnp.broadcast_to(there, kept.tokens.shape[:3])
    if kept.mask is not None:
        there &= kept.mask
    flat = there.reshape(len(tiles), -1)
    layout = jnp.argsort(~flat, -1, stable=True).astype(jnp.int32)
    return Places(_between(flat, end * rows), layout)


def subset(
    kept: TokenSet, places: Places, tokens: int, *, slots: int, newlines: bool
) -> tuple[Places, Array]:
    """The places of what remains.

    Args:
      kept: [B, M, K] with an index.
      places: of all `tokens` of each tile.
      tokens: Q.
      slots: the most that remain in a row.
      newlines: whether the newlines of `places` stay.

    Returns:
      the new places [B, slots], whose tokens are numbered as those of `kept` one after the other,
      the newline after them; and the slot that each had, int32 [B, slots].
    """
    assert kept.index is not None
    batch, number, rows = kept.index.shape
    newline = number * tokens
    there = kept.index >= 0
    if kept.mask is not None:
        there &= kept.mask
    old = kept.index + tokens * jnp.arange(number)[:, None]
    old = jnp.where(there, old, newline + 1).reshape(batch, -1)
    new = jnp.full((batch, newline + 1), -1, jnp.int32)
    new = new.at[:, newline].set(number * rows if newlines else -1)
    ids = jnp.arange(number * rows, dtype=jnp.int32)
    new = jax.vmap(lambda line, at: line.at[at].set(ids, mode="drop"))(new, old)

    row = take(new, jnp.minimum(places.layout, newline))  # [B, S], -1 for what is gone
    end = jnp.cumsum(places.sizes, -1)
    stays = (row >= 0) & (jnp.arange(row.shape[1]) < end[:, -1:])
    order = jnp.argsort(~stays, -1, stable=True)[:, :slots].astype(jnp.int32)
    layout = jnp.where(take(stays, order), take(row, order), 0)
    return Places(_between(stays, end), layout), order


def keep_positions(stream: Stream, order: Array, old: Array, new: Array) -> Stream:
    """The stream with the positions that its tokens have when nothing is dropped.

    Args:
      stream: spliced from what remains.
      order: int [B, S], the slot that each vision token had.
      old: int [B, I], the slots that every placeholder had.
      new: int [B, I], the slots that it has.
    """
    tokens = stream.tokens
    slot = (tokens.modality == IMAGE) & (tokens.tags["cell"] >= 0)
    before = jnp.cumsum(slot, -1)  # vision tokens up to here, [B, L]
    own = take(order, jnp.clip(before - 1, 0, order.shape[1] - 1)) - (before - 1)
    past = jax.vmap(lambda e, n: jnp.searchsorted(e, n, side="right"))(jnp.cumsum(new, -1), before)
    ends = jnp.pad(jnp.cumsum(old, -1), ((0, 0), (1, 0)))
    dropped = jnp.where(slot, own, take(ends, past) - before)
    return stream.replace(tokens=tokens.replace(position=tokens.position + dropped))


def _between(chosen: Array, end: Array) -> Array:
    """How many of [B, S] are chosen in every one of the runs that end at `end` [B, I]."""
    count = jnp.pad(jnp.cumsum(chosen, -1), ((0, 0), (1, 0)))
    upto = take(count, jnp.minimum(end, chosen.shape[1]))
    return jnp.diff(upto, axis=-1, prepend=0).astype(jnp.int32)
