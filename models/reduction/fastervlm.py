"""FasterVLM: the patches that the tower's class token attends to most.

Nothing is learned, and the text plays no part. The attention is that of the layer that makes the
vision tokens, the mean of its heads; only the row of the class token is computed.

Follows: arXiv:2412.01818, first version.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from zoo.models.base import llava, llava_next
from zoo.models.core.card import Card
from zoo.models.core.registry import register
from zoo.models.core.types import TokenSet
from zoo.models.parts.assemblies.llava_hub import hub_table
from zoo.models.parts.reduce.base import (
    Arrange,
    Keep,
    Reducer,
    Seen,
    Text,
    Wants,
    class_token_of,
)
from zoo.models.parts.reduce.choose import choose
from zoo.models.parts.reduce.scores import class_attention

CARD = Card(
    slug="fastervlm",
    paper="arXiv:2412.01818",
    code="https://github.com/Theia-4869/FasterVLM",
    differs=(
        "The connector runs on the kept tokens alone; the official code drops them behind it (same "
        "numbers).",
        "Of patches with equal attention the first is kept; the official code leaves it to torch.",
        "Keeping all tokens is the plain model, with its newlines, also for pictures in tiles.",
        "Where a model interpolates between tokens (large pictures and videos of LLaVA-OneVision), "
        "every tile keeps its share of the interpolated tokens by interpolated attention.",
    ),
)


@dataclass(frozen=True)
class FasterVLM(Reducer):
    """The method.

    Attributes:
      keep: patches of every tile that remain, as a number or a share.
    """

    keep: Keep = 0.25

    arrange: ClassVar[Arrange] = "mosaic"  # no padding is cut off, and there are no newlines

    def wants(self, tower: Any, layer: int) -> Wants:
        """The queries and keys of the layer that makes the tokens.

        Raises:
          ValueError: a tower without a class token.
        """
        return Wants(qk=(class_token_of(tower, layer, "FasterVLM"),))

    def reduce(self, seen: Seen, text: Text | None = None, *, keep: int) -> TokenSet:
        """The kept patches of every tile, in their order."""
        del text
        q, k = seen.features.qk[seen.layer]
        score = class_attention(q, k, prefix=seen.prefix)  # [B, M, patches]
        return choose(seen, seen.at_tokens(score), keep)


_LLAVA, _NEXT = llava.VARIANTS["llava_1_5_7b"], llava_next.VARIANTS["llava_next_vicuna_7b"]

VARIANTS = {
    # The paper's 75, 50, 90 and 95 % of LLaVA-1.5, and 95 % of LLaVA-NeXT.
    "fastervlm_llava_1_5_7b": replace(_LLAVA, reducer=FasterVLM()),
    "fastervlm_llava_1_5_7b.288": replace(_LLAVA, reducer=FasterVLM(288)),
    "fastervlm_llava_1_5_7b.58": replace(_LLAVA, reducer=FasterVLM(58)),
    "fastervlm_llava_1_5_7b.29": replace(_LLAVA, reducer=FasterVLM(29)),
    "fastervlm_llava_next_7b": replace(_NEXT, reducer=FasterVLM(29)),
    "fastervlm_tiny": replace(llava.VARIANTS["llava_tiny"], reducer=FasterVLM(4)),
}

register(CARD, VARIANTS, table=hub_table, reducers={"fastervlm": FasterVLM})
