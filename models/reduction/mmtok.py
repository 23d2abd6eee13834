"""MMTok: the vision tokens that together cover best what is asked and what there is to see.

Every word of the question, and every vision token, spreads a weight of one over the vision tokens
by how alike they are. Tokens are chosen one after the other, each the one that adds the most to
what the words and tokens find of their greatest weight among the chosen ones. Nothing is learned.

Follows: arXiv:2508.18264.
"""

import re
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from zoo.models.base import llava, llava_next
from zoo.models.core.card import Card
from zoo.models.core.registry import register
from zoo.models.core.types import Array, TokenSet
from zoo.models.parts.assemblies.llava_hub import hub_table
from zoo.models.parts.reduce.base import Arrange, Keep, Point, Reducer, Seen, Text, unmasked
from zoo.models.parts.reduce.choose import in_order
from zoo.models.parts.reduce.greedy import cover
from zoo.models.parts.reduce.merge import cosine

CARD = Card(
    slug="mmtok",
    paper="arXiv:2508.18264",
    code="https://github.com/Ironieser/MMTok",
    differs=(
        "What the batch's `guide` marks is covered, with its tokens as the decoder reads them; the "
        "official code takes the words that `keywords` keeps, each tokenised by itself.",
        "Batches of any size, and several pictures in a prompt; the official code takes one.",
        "Where a connector makes tokens of several patches (InternVL), their mean stands for the "
        "token; where it makes them of all patches, its tokens stand for themselves.",
        "Where a model interpolates between tokens (large pictures and videos of LLaVA-OneVision), "
        "the tokens of all tiles are chosen from together.",
        "Of Qwen2-VL and Qwen2.5-VL a share of each prompt's tokens is kept, those of all its "
        "pictures together; the official temperature for Qwen2.5-VL is `text_temperature=0.01`.",
    ),
)

FORMATS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
"""Sentences that ask for the form of an answer, and say nothing about the picture."""

_WORDS = """
a an and answer are at be been being but by did do does for from had has have he how i if into is it
onto or question she so the then they to upon was we were what when where which who why with you
"""

NOT_SEEN = frozenset(_WORDS.split())
"""Words that stand for nothing in a picture."""


def keywords(question: str) -> str:
    """The words of a question that may stand for something in the picture; all of it if there are
    none.
    """
    for sentence in FORMATS:
        question = question.replace(sentence, "")
    words = [word for word in re.findall(r"\b\w+\b", question) if word.lower() not in NOT_SEEN]
    return " ".join(words) if words else question


def padding(size: tuple[int, int], *, side: int = 336, patch: int = 14) -> np.ndarray:
    """The patches that show nothing but the padding of a picture that was made square: int32 [P],
    those on its left or above it first, row by row or column by column as the padding lies.

    Args:
      size: width and height of the picture.
      side: of the square that the tower sees.
      patch: side of a patch.
    """
    number, long = side // patch, max(size)
    short = round(min(size) * (side / long))  # the factor first, as the official code rounds
    before = (side - short) // 2
    after = side - short - before
    lines = [*range(before // patch), *range(number - after // patch, number)]
    grid = np.arange(number * number, dtype=np.int32).reshape(number, number)
    return (grid if size[0] > size[1] else grid.T)[lines].reshape(-1)


def coverage(
    text: Array,
    tokens: Array,
    features: Array,
    *,
    read: Array,
    real: Array,
    alpha: float = 0.5,
    text_temperature: float = 0.02,
    vision_temperature: float = 0.2,
) -> Array:
    """How well each vision token stands for each word and each vision token.

    Args:
      text: [..., T, D].
      tokens: [..., N, D], in the same space.
      features: [..., N, C], the same tokens as the tower has them.
      read: bool [..., T], the words that count.
      real: bool [..., N], the tokens that there are.
      alpha: weight of the vision tokens beside the words.
      text_temperature: of the words' weights.
      vision_temperature: of the tokens' weights.

    Returns:
      float32 [..., T + N, N]; the rows of the words sum to 1, those of the tokens to `alpha`.
    """

    def spread(alike: Array, rows: Array) -> Array:
        weight = jax.nn.softmax(jnp.where(real[..., None, :], alike, _LOW), -1)
        return weight * rows[..., None] / jnp.maximum(rows.sum(-1), 1)[..., None, None]

    said = spread(cosine(text, tokens) / text_temperature, read)
    shown = spread(cosine(features, features) / vision_temperature, real)
    said = jnp.broadcast_to(said, (*shown.shape[:-2], *said.shape[-2:]))
    return jnp.concatenate([said, alpha * shown], -2)


_LOW = float(np.finfo(np.float32).min)


def pick(gain: Array, keep: int, allowed: Array) -> Array:
    """The `keep` tokens that cover the rows of `gain` [B, M, R, N] best, in the order of choice,
    int32 [B, M, K]; `allowed` are bool [B, M, N].
    """
    return jax.vmap(jax.vmap(lambda rows, mask: cover(rows, keep, mask=mask)))(gain, allowed)


@dataclass(frozen=True)
class MMTok(Reducer):
    """The method.

    Attributes:
      keep: tokens of every tile that remain, as a number or a share.
      alpha: weight of covering the vision tokens, beside covering the text.
      text_temperature: how sharply a word picks its tokens; the official code takes 0.01 for
        Qwen2.5-VL.
      vision_temperature: how sharply a vision token picks those that are like it.
    """

    keep: Keep = 0.25
    alpha: float = 0.5
    text_temperature: float = 0.02
    vision_temperature: float = 0.2

    point: ClassVar[Point] = "connector"
    reads_text: ClassVar[bool] = True
    skips_padding: ClassVar[bool] = True
    arrange: ClassVar[Arrange] = "mosaic"  # no padding is cut off, and there are no newlines

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0:
            raise ValueError(f"alpha = {self.alpha}: want a weight, 0 or more")
        for name in ("text_temperature", "vision_temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)}: want more than 0")

    def reduce(self, seen: Seen, text: Text | None = None, *, keep: int) -> TokenSet:
        """The kept tokens of every tile, in their order."""
        assert text is not None
        tower = seen.features.tokens
        own = seen.tokens if seen.grid is None else jax.vmap(seen.at_tokens, -1, -1)(tower)
        real = unmasked(seen)
        gain = coverage(
            *map(jax.lax.stop_gradient, (text.embedded[:, None], seen.tokens, own)),
            read=text.mask[:, None],
            real=real,
            alpha=self.alpha,
            text_temperature=self.text_temperature,
            vision_temperature=self.vision_temperature,
        )
        count = real.sum(-1)  # [B, M]
        if seen.in_slots:
            count = jnp.maximum(1, count * seen.per_tile // seen.tile_tokens)
        best = pick(gain, keep, real)
        return in_order(seen.tokens, best, jnp.minimum(count, keep))


_LLAVA, _NEXT = llava.VARIANTS["llava_1_5_7b"], llava_next.VARIANTS

VARIANTS = {
    "mmtok_llava_1_5_7b": replace(_LLAVA, reducer=MMTok(64)),
    "mmtok_llava_1_5_7b.4": replace(_LLAVA, reducer=MMTok(4)),
    "mmtok_llava_next_13b": replace(_NEXT["llava_next_vicuna_13b"], reducer=MMTok(32)),
    "mmtok_llava_next_13b.256": replace(_NEXT["llava_next_vicuna_13b"], reducer=MMTok(256)),
    "mmtok_tiny": replace(llava.VARIANTS["llava_tiny"], reducer=MMTok(4)),
}

register(CARD, VARIANTS, table=hub_table, reducers={"mmtok": MMTok})
