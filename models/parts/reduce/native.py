"""The place of a reducer in a model that reads pictures in their native resolution.

The vision tokens of all pictures of a prompt stand in one row, and every picture has as many as its
size makes. What remains is a share of each prompt's, chosen from all of its pictures together, and
every token keeps its position in time, rows and columns.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from zoo.models.core.types import Array, Features, TokenSet
from zoo.models.parts.reduce import station
from zoo.models.parts.reduce.base import Reducer, Seen, Text


def check(reducer: Any, tower: Any) -> None:
    """Raise ValueError unless a reducer can work on such pictures."""
    name = type(reducer).__name__
    if not isinstance(reducer, Reducer):
        raise ValueError(
            f"reducer = {reducer!r}: want a configuration that derives from "
            "zoo.models.parts.reduce.base.Reducer, or with zoo.create the name of a method"
        )
    if not isinstance(reducer.keep, float):
        raise ValueError(
            f"keep = {reducer.keep}: pictures of this model have different numbers of tokens; want "
            "a share of them such as 0.25, above 0 and at most 1.0"
        )
    wants = reducer.wants(tower, tower.depth)
    if reducer.merges or wants.taps or wants.qk:
        does = "merges tokens on a grid" if reducer.merges else "reads layers of the tower"
        raise ValueError(
            f"{name} {does}, and pictures of this model have grids of their own and a tower that "
            "hands out its output alone: want a method that compares tokens alone, or one "
            "within the decoder"
        )


def reduced(
    call: Callable[..., TokenSet], reducer: Reducer, vision: TokenSet, text: Text, sizes: Array
) -> station.Remaining:
    """What remains of the tokens of a batch.

    Args:
      call: the reducer's module.
      reducer: its configuration.
      vision: tokens [B, 1, S, D] with their mask.
      text: of the prompts.
      sizes: int32 [B, I], the tokens of every placeholder.
    """
    rows, _, slots, _ = vision.tokens.shape
    valid = jnp.ones((rows, slots), bool) if vision.mask is None else vision.mask[:, 0]
    features = Features(vision.tokens, (1, slots))
    seen = Seen(vision.tokens, features, per_tile=reducer.num_kept(slots))
    batch = {"sizes": sizes}
    seen = station.at_slots(reducer, seen, batch, vision.tokens[:, 0], valid, slots)
    kept = call(seen, text, keep=reducer.num_slots(1, slots, slots))
    cell = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), valid.shape)
    return station.remaining_slots(kept, batch, cell)
