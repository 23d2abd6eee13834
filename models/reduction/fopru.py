"""FoPru: patches, or whole rows of them, that matter most to the tower's own attention.

Nothing is learned. The *rank* strategy keeps the patches of greatest significance wherever they
are; the *row* strategy the rows of the grid with the greatest sum, so that what is near stays
together. Either way the order is kept.

Follows: arXiv:2411.14164, of which no code is published. What exactly a patch's significance is we
could not check against it: see `FoPru.score`.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import jax.numpy as jnp

from zoo.models.base import llava
from zoo.models.core.card import Card
from zoo.models.core.registry import register
from zoo.models.core.types import Array, TokenSet
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
from zoo.models.parts.reduce.choose import choose
from zoo.models.parts.reduce.scores import class_attention, received_attention

CARD = Card(
    slug="fopru",
    paper="arXiv:2411.14164",
    differs=(
        "A re-creation from the abstract: the score of a patch, the mean attention that it gets or "
        "that of the class token, is our reading; the paper's figures are not claimed.",
        "Pictures that are cut into tiles are pruned tile by tile.",
    ),
)

Strategy = Literal["rank", "row"]
Score = Literal["received", "cls"]


@dataclass(frozen=True)
class FoPru(Reducer):
    """The method.

    Attributes:
      keep: patches of every tile that remain, as a number or a share; with rows, as many whole rows
        as that allows, one at least.
      strategy: single patches, or rows of them.
      score: the mean attention that a patch receives from all, or the class token's alone.
    """

    keep: Keep = 0.5
    strategy: Strategy = "rank"
    score: Score = "received"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("strategy", get_args(Strategy)), ("score", get_args(Score))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r}: want one of {known}")

    def num_kept(self, tokens: int) -> int:
        """Tokens of a tile that remain; with rows of a square grid, a multiple of its side.

        Raises:
          ValueError: more than there are, or rows where the tokens are no square.
        """
        number = num_kept(self.keep, tokens)
        if self.strategy == "rank" or number == tokens:
            return number
        side = round(tokens**0.5)
        if side * side != tokens:
            raise ValueError(f"strategy = 'row': {tokens} tokens of a tile are no square grid")
        if isinstance(self.keep, float):
            return max(1, int(side * self.keep)) * side
        return max(1, number // side) * side

    def wants(self, tower: Any, layer: int) -> Wants:
        """The queries and keys of the layer that makes the tokens.

        Raises:
          ValueError: the class token's attention of a tower without one.
        """
        if self.score == "cls":
            class_token_of(tower, layer, "FoPru with score='cls'")
        if layer < 1:
            raise ValueError("FoPru reads a layer of the tower, and this model reads its input")
        return Wants(qk=(layer,))

    def reduce(self, seen: Seen, text: Text | None = None, *, keep: int) -> TokenSet:
        """The kept patches of every tile, in their order."""
        del text
        q, k = seen.features.qk[seen.layer]
        scored = class_attention if self.score == "cls" else received_attention
        score = seen.at_tokens(scored(q, k, prefix=seen.prefix))
        if self.strategy == "row" and not seen.in_slots:
            assert seen.grid is not None
            score = row_scores(score, seen.grid)
        return choose(seen, score, keep)


def row_scores(score: Array, grid: tuple[int, int]) -> Array:
    """Scores [..., N] of patches, each replaced by the sum of its row. Rows of equal sum do not mix
    where the first is taken of equal ones.
    """
    rows = score.reshape(*score.shape[:-1], *grid).sum(-1, keepdims=True)
    return jnp.broadcast_to(rows, (*score.shape[:-1], *grid)).reshape(score.shape)


_LLAVA, _TINY = llava.VARIANTS["llava_1_5_7b"], llava.VARIANTS["llava_tiny"]

VARIANTS = {
    "fopru_llava_1_5_7b": replace(_LLAVA, reducer=FoPru()),
    "fopru_llava_1_5_7b.row": replace(_LLAVA, reducer=FoPru(strategy="row")),
    "fopru_tiny": replace(_TINY, reducer=FoPru()),
    "fopru_tiny.row": replace(_TINY, reducer=FoPru(strategy="row")),
}


def fopru_row(keep: Keep = 0.5) -> FoPru:
    """The row strategy."""
    return FoPru(keep, strategy="row")


register(CARD, VARIANTS, table=hub_table, reducers={"fopru": FoPru, "fopru_row": fopru_row})
