"""AIM: vision tokens that are alike are merged before the decoder, and the rest go layer by layer.

*Merging*, in every frame or tile for itself: tokens at even places are matched to those at odd
ones, by cosine, and the best pairs become their mean; once more until few enough remain. The first
step leaves half of the tokens, the next half of these.

*Pruning*: from a layer in the middle on, each leaves an eighth of the vision tokens less to the
next, until none is left. What remains is what is important to the attention just computed, as a
page is to the links between pages. Nothing is learned, and text always stays.

Follows: arXiv:2412.03248.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from zoo.models.base import llava, llava_onevision
from zoo.models.core.card import Card
from zoo.models.core.registry import register
from zoo.models.core.types import Array, Tokens, TokenSet, take
from zoo.models.parts.assemblies.llava_hub import hub_table
from zoo.models.parts.decoders.dropping import DropAfter, attention_logits, guiding
from zoo.models.parts.decoders.gqa import Plan
from zoo.models.parts.decoders.policies import wrap
from zoo.models.parts.layers.block import QKV
from zoo.models.parts.reduce.base import Keep, Reducer, Seen, Text, check_keep, unmasked
from zoo.models.parts.reduce.choose import rank_in_group
from zoo.models.parts.reduce.merge import cosine

CARD = Card(
    slug="aim",
    paper="arXiv:2412.03248",
    code="https://github.com/LaVi-Lab/AIM",
    differs=(
        "Pruned tokens leave the sequence, and so the first of the five iterations that weigh "
        "importance lacks them; the official code masks them, which `form='mask'` does exactly.",
        "Every row of a batch keeps its own text; the official code counts that of the first row.",
        "The last layer, behind which nothing reads them, prunes nothing but with `form='mask'`.",
        "In the sequence a frame's tokens stand in the order of their places; of a frame with an "
        "odd number the official code puts the one that is left over first. Newlines are left out.",
        "Without `start` pruning begins in the middle of any depth, as published for 28 layers.",
    ),
)


@dataclass(frozen=True)
class AIMMerge(Reducer):
    """The merging before the decoder.

    Attributes:
      keep: tokens of every tile or frame that remain, as a number or a share. Every step halves
        what is left, the last as far as it takes.
    """

    keep: Keep = 0.25

    point: ClassVar[Any] = "slots"
    merges: ClassVar[bool] = True

    def num_slots(self, tiles: int, tokens: int, slots: int | None = None) -> int:
        """The most that remain of so many tiles together."""
        if slots is None or not isinstance(self.keep, float):
            return super().num_slots(tiles, tokens, slots)
        return max(1, int(slots * self.keep))

    def reduce(self, seen: Seen, text: Text | None = None, *, keep: int) -> TokenSet:
        """The merged tokens, whose index are the slots of the odd ones of each pair."""
        del text
        assert seen.layout is not None
        tiles, most = seen.features.tokens.shape[1], seen.tile_tokens
        tile = jnp.minimum(seen.layout[..., 0] // most, tiles)
        left = np.array([self._left(n, seen.per_tile, most) for n in range(most + 1)], np.int32)
        tile = jnp.where(unmasked(seen)[:, 0], tile, tiles)
        steps = max(len(merge_steps(n, int(left[n]))) for n in range(1, most + 1))
        merging = Merging.start(seen.tokens[:, 0], tile, tiles)
        for step in range(steps):
            goal = jnp.asarray(left)[jnp.minimum(merging.first, most)]
            merging = merging.step(jnp.maximum(merging.first >> (step + 1), 1), goal)
        return merging.result(keep)

    def _left(self, tokens: int, per_tile: int, most: int) -> int:
        """Of a tile with so many of its `most` tokens in the sequence."""
        if isinstance(self.keep, float):
            return min(tokens, max(1, int(tokens * self.keep)))
        return min(tokens, max(1, tokens * per_tile // most))


def merge_steps(tokens: int, keep: int) -> tuple[int, ...]:
    """How many tokens every step takes away from so many, until `keep` remain."""
    found, left = [], tokens
    while left > max(keep, 1):
        r = min(max(tokens >> (len(found) + 1), 1), left - keep, left // 2)
        found.append(r)
        left -= r
    return tuple(found)


@struct.dataclass
class Merging:
    """Tokens of several groups between two steps, one group after the other.

    Attributes:
      tokens: [B, S, D].
      group: int [B, S], ascending; `groups` for what is gone.
      place: int [B, S], where each stood at first.
      owner: int [B, S], for every first place the present one.
      first: int [B, S], how many tokens the group of each had at first.
      groups: how many groups.
    """

    tokens: Array
    group: Array
    place: Array
    owner: Array
    first: Array
    groups: int = struct.field(pytree_node=False)

    @classmethod
    def start(cls, tokens: Array, group: Array, groups: int) -> "Merging":
        """Before any step; `group` may be in any order, `groups` for no token."""
        order = jnp.argsort(group, -1, stable=True)
        group = take(group, order)
        owner = jnp.argsort(order, -1)
        made = cls(take(tokens, order), group, order, owner, group, groups)
        return made.replace(first=made.size)

    @property
    def size(self) -> Array:
        """How many tokens the group of each has, int [B, S]."""
        number = jax.vmap(lambda g: jnp.zeros(self.groups + 1, jnp.int32).at[g].add(1))(self.group)
        return take(number, self.group)

    def step(self, r: Array, goal: Array) -> "Merging":
        """Merge the r even tokens of each group that are most like an odd one, no more than the
        goal wants.

        Args:
          r: int [B, S], of the group of every token.
          goal: int [B, S], likewise: how many are to remain.
        """
        there = self.group < self.groups
        rank = rank_in_group(jnp.zeros(self.group.shape), self.group)
        even, size = there & (rank % 2 == 0), self.size
        odd = there & ~even
        same = self.group[:, :, None] == self.group[:, None, :]
        similar = cosine(self.tokens, self.tokens)
        similar = jnp.where(even[:, :, None] & odd[:, None, :] & same, similar, -jnp.inf)
        best, into = similar.max(-1), similar.argmax(-1)
        least = jnp.where(even, jnp.maximum(best, -2), -4)  # behind no partner, what is not even
        worth = rank_in_group(least, self.group)
        r = jnp.minimum(jnp.minimum(r, size // 2), jnp.maximum(size - goal, 0))
        merged = even & (worth < r)

        place = jnp.arange(self.group.shape[1])
        into = jnp.where(merged, into, place)
        total = jax.vmap(lambda x, i: jnp.zeros(x.shape, jnp.float32).at[i].add(x))(
            self.tokens.astype(jnp.float32), into
        )
        number = jax.vmap(lambda i: jnp.zeros(i.shape, jnp.float32).at[i].add(1))(into)
        tokens = (total / jnp.maximum(number, 1)[..., None]).astype(self.tokens.dtype)

        group = jnp.where(merged, self.groups, self.group)
        key = jnp.where(even, worth, len(place) + rank)  # even ones first, the most alike ahead
        order = jnp.argsort(key, -1, stable=True)
        order = take(order, jnp.argsort(take(group, order), -1, stable=True))
        owner = take(take(jnp.argsort(order, -1), into), self.owner)
        tokens, group, old, first = take((tokens, group, self.place, self.first), order)
        return Merging(tokens, group, old, owner, first, self.groups)

    def result(self, keep: int) -> TokenSet:
        """What remains, at most `keep`, as the tokens of one tile."""
        there = (self.group < self.groups)[:, :keep]
        owner = jnp.where((self.owner < keep) & take(there, self.owner % keep), self.owner, -1)
        return TokenSet(
            self.tokens[:, None, :keep],
            there[:, None],
            self.place[:, None, :keep].astype(jnp.int32),
            owner[:, None].astype(jnp.int32),
        )


@dataclass(frozen=True)
class AIMPrune:
    """The pruning within the decoder.

    Attributes:
      keep: 1.0 to prune nothing. Of anything else, which says what merging leaves, the schedule
        does not depend.
      start: the layer, from 0, after which pruning begins; the middle of the decoder by default.
      step: the share of the vision tokens that goes after it and after every later one.
      temperature: divides the logits of attention before importance is weighed.
      iterations: of the weighing.
      form: "gather": pruned tokens leave the sequence; "mask": they stay, and nobody sees them.
    """

    keep: Keep = 0.25
    start: int | None = None
    step: float = 0.125
    temperature: float = 0.1
    iterations: int = 5
    form: Literal["gather", "mask"] = "gather"

    reduces: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.form not in ("gather", "mask"):
            raise ValueError(f"form = {self.form!r}: want 'gather' or 'mask'")
        if self.start is not None and self.start < 0:
            raise ValueError(f"start = {self.start}: want a layer, from 0")
        if not 0 < self.step <= 1:
            raise ValueError(f"step = {self.step}: want a share, above 0 and at most 1")
        if self.temperature <= 0 or self.iterations < 1:
            raise ValueError(
                f"temperature = {self.temperature}, iterations = {self.iterations}: want a number "
                "above 0, and 1 or more"
            )

    def retained(self, depth: int) -> tuple[float, ...]:
        """The share of the vision tokens that remains after every layer."""
        start = depth // 2 if self.start is None else self.start
        if self.keep == 1.0 and isinstance(self.keep, float):
            start = depth
        return tuple(
            1.0 if layer < start else max(0.0, 1 - (layer - start + 1) * self.step)
            for layer in range(depth)
        )

    def apply(self, plan: Plan, *, slots: int) -> Plan:
        """The plan whose later layers leave vision tokens out for those behind them."""
        del slots  # shares of what there is
        depth, hide = len(plan), self.form == "mask"
        policies, former = {}, 1.0
        for layer, share in enumerate(self.retained(depth)):
            if share < 1:
                goes = share < former and (hide or layer < depth - 1)
                number = Share(share) if goes else None
                policies[layer] = ByImportance(number, hide, self.temperature, self.iterations)
            former = share
        return wrap(plan, policies)


@dataclass(frozen=True)
class Share:
    """A share of so many tokens, cut off; none of them may remain."""

    share: float

    def __call__(self, tokens: int) -> int:
        return int(tokens * self.share)


@struct.dataclass
class ByImportance(DropAfter):
    """Leaves out what is least important to the attention of the layer that has run."""

    temperature: float = struct.field(pytree_node=False, default=0.1)
    iterations: int = struct.field(pytree_node=False, default=5)

    def score(self, layer: Any, own: QKV, tokens: Tokens) -> Array:
        """The importance of all tokens, to vision tokens and the text that guides."""
        # Where tokens are masked they still give their first vote, as in the official code.
        image = (tokens.tags["cell"] >= 0) & (self.hide | tokens.valid)
        votes = (image | guiding(tokens)).astype(jnp.float32)
        votes /= jnp.maximum(votes.sum(-1, keepdims=True), 1)
        logits = attention_logits(layer, own, tokens)
        return importance(logits, votes, self.temperature, self.iterations)


def importance(logits: Array, votes: Array, temperature: float, iterations: int) -> Array:
    """How much each token weighs when all pass their votes on by attention again and again: the
    root of the mean square over heads, float32 [B, N].

    Args:
      logits: [B, H, N, N], before the softmax, the smallest numbers where a token is not seen.
      votes: [B, N], what each token has at first.
      temperature: divides the logits.
      iterations: how often votes are passed on.
    """
    logits = jnp.maximum(logits / temperature, jnp.finfo(jnp.float32).min)
    passed = jax.nn.softmax(logits, -1)
    row = jnp.broadcast_to(votes[:, None], passed.shape[:3])
    for _ in range(iterations):
        row = jnp.einsum("bhi,bhij->bhj", row, passed)
    return jnp.sqrt(jnp.mean(row**2, 1))


def aim(keep: Keep = 0.25, start: int | None = None) -> tuple[AIMMerge, AIMPrune]:
    """Both stages; see their `keep` and `start`."""
    return AIMMerge(keep), AIMPrune(keep, start)


def _with(config: Any, keep: Keep, start: int | None, **facts: Any) -> Any:
    merge, prune = aim(keep, start)
    return replace(config, reducer=merge, policies=(prune,), **facts)


def published_flops(
    tokens: tuple[float, ...], *, width: int, mlp_dim: int, kv_width: int, text: int
) -> float:
    """FLOPs of a prompt as the paper counts them: two for each multiply and add, grouped queries.

    Args:
      tokens: vision tokens of every layer.
      width: D.
      mlp_dim: F of a gated MLP.
      kv_width: K E, of all keys of a token.
      text: tokens of text.
    """
    weights = 4 * width**2 + 4 * width * kv_width + 6 * width * mlp_dim
    return sum((n + text) * weights + 4 * (n + text) ** 2 * width for n in tokens)


_VIDEO = llava_onevision.VARIANTS["llava_onevision_qwen2_7b"]

VARIANTS = {
    # The released settings: 32 frames of 196 tokens each and a newline; and LLaVA-1.5.
    "aim_llava_onevision_7b": _with(_VIDEO, 0.25, 14, num_images=32, num_slots=32 * 196 + 1),
    "aim_llava_1_5_7b": _with(llava.VARIANTS["llava_1_5_7b"], 72, 13),
    "aim_tiny": replace(
        _with(llava.VARIANTS["llava_tiny"], 0.25, 1),
        decoder=replace(llava.VARIANTS["llava_tiny"].decoder, depth=3),
    ),
}

register(CARD, VARIANTS, table=hub_table, reducers={"aim": aim})
