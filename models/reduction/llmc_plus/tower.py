"""Methods that read the vision tower: its attention, its keys, or how alike its tokens are."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from zoo.models.core.types import Array, TokenSet
from zoo.models.parts.reduce.base import (
    Keep,
    Reducer,
    Seen,
    Text,
    Wants,
    class_token_of,
    num_kept,
)
from zoo.models.parts.reduce.choose import choose, gather, top
from zoo.models.parts.reduce.merge import cosine, match, mean_by_group, unit
from zoo.models.parts.reduce.scores import class_attention

_ROUND = 8  # tokens that VisPruner removes at a time


@dataclass(frozen=True)
class ToMe(Reducer):
    """Tokens with similar keys become their mean, in rounds of at most half of them.
    Follows: arXiv:2210.09461.

    Attributes:
      keep: tokens of every tile that remain, as a number or a share.
    """

    keep: Keep = 0.25

    merges: ClassVar[bool] = True

    def wants(self, tower: Any, layer: int) -> Wants:
        """The keys of the layer that makes the tokens.

        Raises:
          ValueError: the model reads no layer of the tower.
        """
        del tower
        return Wants(qk=(_layer(layer, "ToMe"),))

    def reduce(self, seen: Seen, text: Text | None = None, *, keep: int) -> TokenSet:
        """Merged tokens, in the order of their first patches."""
        del text
        keys = seen.features.qk[seen.layer][1][..., seen.prefix :, :, :].mean(-2)
        groups = merged_in_rounds(keys, keep)
        first = jnp.argmax(groups[..., None, :] == jnp.arange(keep)[:, None], -1)
        order = jnp.argsort(first, -1)
        groups = jnp.take_along_axis(jnp.argsort(order, -1), groups, -1).astype(jnp.int32)
        index = jnp.take_along_axis(first, order, -1).astype(jnp.int32)
        return TokenSet(mean_by_group(seen.tokens, groups, keep), index=index, groups=groups)


def merged_in_rounds(metric: Array, keep: int) -> Array:
    """Which of `keep` groups each of the tokens with `metric` [..., N, C] is in, int32 [..., N]."""
    number = metric.shape[-2]
    groups = jnp.broadcast_to(jnp.arange(number, dtype=jnp.int32), metric.shape[:-1])
    while number > keep:
        r = min(number - keep, number // 2)
        found = match(metric, r)
        number -= r
        metric = mean_by_group(metric, found.groups, number)
        groups = jnp.take_along_axis(found.groups, groups, -1)
    return groups


@dataclass(frozen=True)
class VisionZip(Reducer):
    """The patches that the class token attends to most, and means of the others.
    Follows: arXiv:2412.04467.

    Attributes:
      keep: tokens of every tile that remain, as a number or a share.
      contextual: share of them that are means.
    """

    keep: Keep = 192 / 576
    contextual: float = 30 / 192

    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.contextual < 1:
            raise ValueError(f"contextual = {self.contextual}: want a share, from 0, below 1")

    def wants(self, tower: Any, layer: int) -> Wants:
        """The queries and keys of the layer that makes the tokens.

        Raises:
          ValueError: a tower without a class token.
        """
        return Wants(qk=(class_token_of(tower, layer, "VisionZip"),))

    def reduce(self, seen: Seen, text: Text | None = None, *, keep: int) -> TokenSet:
        """Dominant patches in their order, then contextual tokens."""
        del text
        q, k = seen.features.qk[seen.layer]
        score = class_attention(q, k, prefix=seen.prefix, heads="sum")
        keys = k[..., seen.prefix :, :, :].mean(-2)
        contextual = round(keep * self.contextual)
        return visionzip(seen.tokens, score, keys, keep - contextual, contextual)


def visionzip(tokens: Array, score: Array, keys: Array, dominant: int, contextual: int) -> TokenSet:
    """The method on patches.

    Args:
      tokens: [..., N, D].
      score: [..., N].
      keys: [..., N, C], what is compared.
      dominant: patches of greatest score that are kept as they are.
      contextual: of the others, evenly spaced ones to which the mean of those is added that are
        most like each.
    """
    best = top(score, dominant)
    chosen = jnp.zeros(score.shape, bool)
    chosen = jnp.put_along_axis(chosen, best, True, -1, inplace=False)
    if not contextual:
        rank = jnp.cumsum(chosen, -1) - 1
        return TokenSet(gather(tokens, best), None, best, jnp.where(chosen, rank, -1))
    number = score.shape[-1] - dominant
    rest = jnp.argsort(chosen, -1, stable=True)[..., :number].astype(jnp.int32)
    target = np.arange(0, number, max(1, number // contextual))[:contextual]
    others = np.setdiff1d(np.arange(number), target)
    to, away = rest[..., target], rest[..., others]
    nearest = cosine(gather(keys, away), gather(keys, to)).argmax(-1)
    mean = mean_by_group(gather(tokens, away), nearest, len(target))
    index = jnp.concatenate([best, to], -1)
    groups = jnp.zeros(score.shape, jnp.int32)
    for at, group in (
        (best, jnp.broadcast_to(jnp.arange(dominant), best.shape)),
        (to, jnp.broadcast_to(dominant + jnp.arange(len(target)), to.shape)),
        (away, dominant + nearest),
    ):
        groups = jnp.put_along_axis(groups, at, group.astype(jnp.int32), -1, inplace=False)
    kept = jnp.concatenate([gather(tokens, best), gather(tokens, to) + mean], -2)
    return TokenSet(kept, None, index, groups)


@dataclass(frozen=True)
class VisPruner(Reducer):
    """The patches that the class token attends to most, and of the others those that are least
    alike. Follows: arXiv:2412.01818, second version.

    Attributes:
      keep: tokens of every tile that remain, as a number or a share.
      important: share of them that attention chooses.
    """

    keep: Keep = 128 / 576
    important: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.important <= 1:
            raise ValueError(f"important = {self.important}: want a share, 0 to 1")

    def wants(self, tower: Any, layer: int) -> Wants:
        """The queries and keys of the layer that makes the tokens.

        Raises:
          ValueError: a tower without a class token.
        """
        return Wants(qk=(class_token_of(tower, layer, "VisPruner"),))

    def reduce(self, seen: Seen, text: Text | None = None, *, keep: int) -> TokenSet:
        """The kept tokens of every tile, in their order."""
        del text
        q, k = seen.features.qk[seen.layer]
        score = seen.at_tokens(class_attention(q, k, prefix=seen.prefix))
        if seen.mask is not None:
            score = jnp.where(seen.mask, score, -1)
        chosen = vispruner(seen.tokens, score, keep, int(keep * self.important))
        # Attention decides between those chosen where a tile keeps fewer than `keep`.
        return choose(seen, jnp.where(chosen, 1 + score, score - 1), keep)


def vispruner(tokens: Array, score: Array, keep: int, important: int) -> Array:
    """Which tokens [..., N, D] the method keeps, bool [..., N].

    What is not important stands by descending score. Again and again every second of it is compared
    with those between, and the at most eight that are most like one of these are removed.

    Args:
      tokens: what is compared, by cosine.
      score: [..., N].
      keep: how many are kept.
      important: how many of them are those of greatest score.
    """
    number = score.shape[-1]
    order = jnp.argsort(-score, -1, stable=True)
    rest, wanted = number - important, keep - important
    rounds, left = [], rest
    while left > max(wanted, 1):
        r = min(_ROUND, left - wanted, (left + 1) // 2)
        rounds.append((left, r))
        left -= r
    place = jnp.arange(rest)

    def thin(alike: Array, line: Array, step: tuple[Array, Array]) -> tuple[Array, None]:
        left, r = step
        here = place < left
        even, odd = here & (place % 2 == 0), here & (place % 2 == 1)
        most = jnp.where(odd, alike[line][:, line], -jnp.inf).max(-1)
        rank = jnp.argsort(jnp.argsort(jnp.where(even, -most, jnp.inf), stable=True))
        key = jnp.where(even & (rank >= r), rank, jnp.where(odd, rest + place, 3 * rest))
        return line[jnp.argsort(key, stable=True)], None

    def one(tokens: Array, order: Array) -> Array:
        late = order[important:]
        if rounds:
            vectors = unit(tokens[late])
            alike = vectors @ vectors.T
            steps = tuple(jnp.array(each) for each in zip(*rounds))
            line, _ = jax.lax.scan(lambda line, step: thin(alike, line, step), place, steps)
            late = late[line]
        chosen = jnp.concatenate([order[:important], late[:wanted]])
        return jnp.zeros(number, bool).at[chosen].set(True)

    flat = jax.vmap(one)(tokens.reshape(-1, *tokens.shape[-2:]), order.reshape(-1, number))
    return flat.reshape(score.shape)


@dataclass(frozen=True)
class MustDrop(Reducer):
    """Windows of the grid whose patches are most alike become one token each.
    Follows: arXiv:2411.10803, the part of it that acts on the tower's tokens.

    Attributes:
      keep: tokens of every tile that remain at most, as a number or a share.
      window: side of a window; None for 3, or 2 where 3 does not divide the side of the grid.
    """

    keep: Keep = 192 / 576
    window: int | None = None

    merges: ClassVar[bool] = True

    def num_kept(self, tokens: int) -> int:
        """Tokens of a tile that remain: all windows are merged or kept whole.

        Raises:
          ValueError: windows do not cover the grid, or there are more of them than may remain.
        """
        number = num_kept(self.keep, tokens)
        if number == tokens:
            return tokens
        area = self.side(tokens) ** 2
        merged = -(-(tokens - number) // (area - 1))
        if merged > tokens // area:
            raise ValueError(
                f"keep = {self.keep}: MustDrop makes one token of each of {tokens // area} windows "
                f"at most; want {tokens // area} to {tokens}"
            )
        return tokens - merged * (area - 1)

    def side(self, tokens: int) -> int:
        """The side of a window of a square grid of so many tokens.

        Raises:
          ValueError: windows do not cover the grid.
        """
        across = round(tokens**0.5)
        sides = (3, 2) if self.window is None else (self.window,)
        fitting = [side for side in sides if side > 1 and across % side == 0]
        if across**2 != tokens or not fitting:
            raise ValueError(
                f"window = {self.window}: want a side of 2 or more that divides that of a square "
                f"grid of {tokens} tokens"
            )
        return fitting[0]

    def reduce(self, seen: Seen, text: Text | None = None, *, keep: int) -> TokenSet:
        """The merged tokens, by how alike their patches are, then all others in their order."""
        del text
        tokens = seen.tokens.shape[-2]
        side = self.side(tokens)
        merged = (tokens - keep) // (side**2 - 1)
        return mustdrop(seen.tokens, round(tokens**0.5), (side, side), merged)


def mustdrop(tokens: Array, across: int, window: tuple[int, int], number: int) -> TokenSet:
    """The method on a square grid of patches.

    Args:
      tokens: [..., N, D].
      across: side of the grid.
      window: rows and columns of a window.
      number: windows that become one token.
    """
    (high, wide), count = window, tokens.shape[-2]
    place = np.arange(count).reshape(across // high, high, across // wide, wide)
    windows = place.transpose(0, 2, 1, 3).reshape(-1, high * wide)  # [W, P]
    of_place = np.empty(count, np.int32)
    of_place[windows] = np.arange(len(windows))[:, None]
    vectors = unit(tokens)[..., windows, :]  # [..., W, P, D]
    alike = jnp.einsum("...pd,...qd->...pq", vectors, vectors)
    alike = jnp.where(np.eye(high * wide, dtype=bool), 0, alike).sum((-2, -1))
    order = jnp.argsort(-alike, -1, stable=True)
    rank = jnp.argsort(order, -1)  # [..., W]
    merged = rank[..., of_place] < number  # [..., N]
    single = number + jnp.cumsum(~merged, -1) - 1
    groups = jnp.where(merged, rank[..., of_place], single).astype(jnp.int32)
    ends = jnp.asarray(windows[:, -1])[order[..., :number]]
    alone = jnp.argsort(merged, -1, stable=True)[..., : count - number * high * wide]
    index = jnp.concatenate([ends, alone], -1).astype(jnp.int32)
    kept = mean_by_group(tokens, groups, index.shape[-1])
    return TokenSet(kept, None, index, groups)


def _layer(layer: int, name: str) -> int:
    """`layer`, if there is one.

    Raises:
      ValueError: the model reads the input of the tower.
    """
    if layer < 1:
        raise ValueError(f"{name} reads a layer of the tower, and this model reads its input")
    return layer
