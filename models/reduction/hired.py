"""HiRED: a fixed budget of tokens for a picture in tiles, which the tower's attention deals out.

The class token's attention in the tower's *first* layer, on the picture seen whole, says how much
of the budget each tile gets; its attention in the layer that makes the tokens says which patches of
a tile remain. Nothing is learned, and the text plays no part.

Follows: arXiv:2408.10945.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np

from zoo.models.base import llava, llava_next
from zoo.models.core.card import Card
from zoo.models.core.registry import register
from zoo.models.core.types import Array, TokenSet, take
from zoo.models.parts.assemblies.llava_hub import hub_table
from zoo.models.parts.reduce.base import (
    Keep,
    Reducer,
    Seen,
    Text,
    Wants,
    class_token_of,
    num_kept,
)
from zoo.models.parts.reduce.choose import choose, top
from zoo.models.parts.reduce.scores import class_attention

CARD = Card(
    slug="hired",
    paper="arXiv:2408.10945",
    code="https://github.com/hasanar1f/HiRED",
    differs=(
        "The budget can be allotted by regions of the picture, as the paper draws it "
        "(`allocation='regions'`); the default is what the code does, bands of the thumbnail.",
        "Tiles lie as the picture was cut, and the code swaps rows and columns of the grid.",
        "Keeping all tokens is the plain model, with its newlines; the code leaves these out there "
        "too.",
        "Several pictures in a prompt, and pictures whose tiles make no grid with a thumbnail "
        "(InternVL), keep the rate of each.",
    ),
)

Allocation = Literal["bands", "regions"]


@dataclass(frozen=True)
class HiRED(Reducer):
    """The method.

    Attributes:
      keep: the budget: tokens per tile on the mean, as a number or a share.
      alpha: share of the budget that the picture seen whole gets; what it leaves is the share of
        its patches that say which tiles matter.
      allocation: whose patches speak for a tile: those of a band of as many patches in reading
        order, or those that show the same part of the picture.
    """

    keep: Keep = 0.2
    alpha: float = 0.5
    allocation: Allocation = "bands"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha = {self.alpha}: want a share of the budget, above 0, below 1")
        if self.allocation not in get_args(Allocation):
            raise ValueError(
                f"allocation = {self.allocation!r}: want one of {get_args(Allocation)}"
            )

    def budget(self, tiles: int, tokens: int) -> int:
        """Tokens of a picture of so many tiles."""
        if isinstance(self.keep, float):
            return int(tiles * tokens * self.keep)
        return tiles * num_kept(self.keep, tokens)

    def num_slots(self, tiles: int, tokens: int, slots: int | None = None) -> int:
        """The most that remain of so many tiles together."""
        most = max(1, self.budget(tiles, tokens))
        return most if slots is None else min(most, slots)

    def wants(self, tower: Any, layer: int) -> Wants:
        """The queries and keys of the first layer, and of the one that makes the tokens.

        Raises:
          ValueError: a tower without a class token.
        """
        return Wants(qk=(1, class_token_of(tower, layer, "HiRED")))

    def reduce(self, seen: Seen, text: Text | None = None, *, keep: int) -> TokenSet:
        """The kept patches of every tile, in their order."""
        del text
        first, last = (
            class_attention(*seen.features.qk[layer], prefix=seen.prefix, heads="sum")
            for layer in (1, seen.layer)
        )
        score = seen.at_tokens(last)
        if seen.tiles is None:
            return choose(seen, score, keep)
        whole = seen if not seen.in_slots else seen.replace(layout=None)
        count = self.budgets(whole.at_tokens(first), seen.tiles, seen.grid)
        if not seen.in_slots:
            keep = self.capacity(*score.shape[1:])
        return choose(seen, score, keep, count=count)

    def capacity(self, tiles: int, tokens: int) -> int:
        """The most that one of so many tiles can keep."""
        return min(tokens, max(max(self.split(n, tokens)) for n in range(1, tiles + 1)))

    def budgets(self, score: Array, tiles: Array, grid: tuple[int, int] | None) -> Array:
        """How many tokens every tile keeps, int32 [B, M].

        Args:
          score: [B, M, N], the class token's attention in the first layer.
          tiles: int [B, I, 3], as in a batch.
          grid: of the N tokens.
        """
        (_, number, tokens), voters = score.shape, self.voters(score.shape[-1])
        end = jnp.cumsum(tiles[..., 0], -1)
        every = jnp.arange(number)
        picture = jnp.sum(every[:, None] >= end[:, None], -1)  # of every tile, [B, M]
        picture = jnp.minimum(picture, end.shape[1] - 1)
        first = take(end - tiles[..., 0], picture)
        rows, columns = (take(tiles[..., i], picture) for i in (1, 2))
        own = every - first  # number within its picture

        votes = jnp.zeros(score.shape, bool)
        votes = jnp.put_along_axis(votes, top(score, voters), True, -1, inplace=False)
        votes = take(votes, jnp.clip(first, 0, number - 1))  # of the picture seen whole
        patch = jnp.arange(tokens)
        if self.allocation == "bands" or grid is None:
            tile = patch * (rows * columns)[..., None] // tokens
        else:
            (height, width), (y, x) = grid, (patch // grid[1], patch % grid[1])
            row, column = y * rows[..., None] // height, x * columns[..., None] // width
            tile = row * columns[..., None] + column
        count = jnp.sum(votes & (tile == (own - 1)[..., None]), -1)  # [B, M]

        joined = rows * columns > 0
        size = jnp.where(joined, take(tiles[..., 0], picture), 1)
        wholes, shares = self._tables(number, tokens)
        size = jnp.clip(size, 0, number)
        share = jnp.asarray(shares)[size, count]
        return jnp.where(joined & (own > 0), share, jnp.asarray(wholes)[size])

    def voters(self, tokens: int) -> int:
        """How many patches of the picture seen whole say which tiles matter."""
        return int(tokens * (1 - self.alpha))

    def split(self, tiles: int, tokens: int) -> tuple[int, int]:
        """What the picture seen whole gets, and what all other tiles together."""
        budget = self.budget(tiles, tokens)
        if tiles == 1:
            return budget, 0
        whole = min(int(budget * self.alpha), tokens)
        return whole, min(budget - whole, (tiles - 1) * tokens)

    def _tables(self, tiles: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """What the picture seen whole keeps, by the number of tiles; and what another tile keeps,
        by that and the number of voters for it, rounded in float32 as the official code does.
        """
        voters = self.voters(tokens)
        wholes = np.zeros(tiles + 1, np.int32)
        shares = np.zeros((tiles + 1, tokens + 1), np.int32)
        part = np.arange(tokens + 1, dtype=np.float32) / np.float32(max(voters, 1))
        for number in range(1, tiles + 1):
            wholes[number], rest = self.split(number, tokens)
            shares[number] = np.minimum(np.trunc(part * np.float32(rest)), tokens)
        return wholes, shares


_NEXT = llava_next.VARIANTS

VARIANTS = {
    "hired_llava_next_7b": replace(_NEXT["llava_next_vicuna_7b"], reducer=HiRED()),
    "hired_llava_next_7b.10": replace(_NEXT["llava_next_vicuna_7b"], reducer=HiRED(0.1)),
    "hired_llava_next_7b.40": replace(_NEXT["llava_next_vicuna_7b"], reducer=HiRED(0.4)),
    "hired_llava_next_13b": replace(_NEXT["llava_next_vicuna_13b"], reducer=HiRED()),
    "hired_llava_1_5_7b": replace(llava.VARIANTS["llava_1_5_7b"], reducer=HiRED()),
    "hired_tiny": replace(llava.VARIANTS["llava_tiny"], reducer=HiRED(0.4)),
}

register(CARD, VARIANTS, table=hub_table, reducers={"hired": HiRED})
