"""ATP-LLaVA: between some layers of the decoder a small module finds two thresholds for every
prompt, and vision tokens that pass neither go.

A token is scored by what the layer just run pays it (*redundancy*) and by its place in the picture
(*space*). The thresholds are predicted of all scores of redundancy, so that every prompt, at every
such layer, keeps as many tokens as it needs. In training nothing goes: a soft mask in [0, 1] fades
the keys of vision tokens for all later layers, so that thresholds are learned.

With A the attention of the layer, the mean of its heads, V the vision tokens that are left and T
the text of the instruction, N vision tokens at first:

    S_self[j] = N mean over V of A[:, j]     S_cross[j] = N mean over T of A[:, j]
    S_red = (S_self + S_cross) / 2           S_space[j] = 1 - sample / s² on every s-th row, column
    z = mix([S_self; S_cross])               θ_red, θ_space = σ(heads(z))

    kept[j] = S_red[j] > θ_red or S_space[j] > θ_space
    M[j] = max(σ(t (S_red[j] - θ_red)), σ(t (S_space[j] - θ_space)))

A batch with labels is one of training; anything else, a prompt or a whole text, drops for good.

Follows: arXiv:2412.00447, of which no code is published.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from zoo.models.base import llava
from zoo.models.core.card import Card
from zoo.models.core.registry import register
from zoo.models.core.types import IMAGE, Array, Aux, Memory, Stream, Tokens
from zoo.models.parts.decoders.dropping import (
    attention_logits,
    drop,
    dropping,
    instruction,
    left_cells,
    with_total,
)
from zoo.models.parts.decoders.gqa import Plan
from zoo.models.parts.layers.attention import Rule
from zoo.models.parts.layers.block import QKV, Block
from zoo.models.parts.layers.linear import Proj, uniform
from zoo.models.parts.layers.plan import LayerPolicy, Run
from zoo.models.parts.reduce.base import Keep, Kept, check_keep, schedule

CARD = Card(
    slug="atp_llava",
    paper="arXiv:2412.00447",
    differs=(
        "A re-creation from the paper's equations as two independent projects report them, which "
        "disagree in places; the paper's accuracies are not claimed.",
        "Scores are weights of attention after the softmax, times the number of vision tokens, so "
        "that thresholds between 0 and 1 are shares of an even attention.",
        "Thresholds begin at 0.0025, below nearly all scores: an untrained module keeps what "
        "`keep` allows, those with the greatest scores, and training begins there.",
        "Masks of several layers are multiplied, and what they leave of tokens weighs their votes.",
        "Off the grid, place speaks for no token, at whatever threshold.",
        "The budget loss compares the mean of the batch, not every prompt, with the target.",
        "The abstract's two-dimensional rotary embedding is left out: tokens keep their positions.",
        "Only with a bound (`keep`) do tokens leave the sequence; without one they are masked.",
    ),
)

START = math.log(0.0025 / (1 - 0.0025))
"""The bias of the thresholds at first."""

FADE, SLOT, SUM = "atp_fade", "atp_slot", "atp_sum"
"""Tags of tokens: the logarithm of their mask; the number of a vision token among those of its row,
-1 for others; how many tokens the layers before have kept, summed over these.
"""


@dataclass(frozen=True)
class ATP:
    """The policy.

    Attributes:
      keep: vision tokens that can remain after each of its layers, at most, as numbers or as shares
        of those that a sequence had at first; a single one is that of all. With 1.0 nothing bounds
        them, and what goes is masked.
      layers: after which tokens go, from 1; by default those that are to any depth as 4, 14 and 24
        are to 32.
      dim: width of z.
      strides: s of the grids whose tokens have a score of their place; the best one counts.
      sample: what the rate 1 / s² of a grid is multiplied with in its score.
      temperature: t of the soft masks.
      target: the mean number of vision tokens, or share, that training aims at.
      prune_weight: in the loss, of each layer's share of kept tokens times the layer's number.
      target_weight: of the distance from the target, in tokens.
      grid: rows and columns of a picture or tile; by default all vision tokens of a sequence make
        one square, or else, in their order, the grid has every s²-th.
    """

    keep: Keep = 1.0
    layers: tuple[int, ...] | None = None
    dim: int = 64
    strides: tuple[int, ...] = (2,)
    sample: float = 3.0
    temperature: float = 10.0
    target: int | float = 0.25
    prune_weight: float = 0.05
    target_weight: float = 0.2
    grid: tuple[int, int] | None = None

    reduces: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.layers is not None and list(self.layers) != sorted({*self.layers} - {0}):
            raise ValueError(
                f"layers = {self.layers}: want different numbers of layers from 1 on, ascending"
            )
        check_keep(self.keep, stages=len(self.layers or _each(self.keep, 1)))
        check_keep(self.target)
        for name in ("dim", "temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)}: want a number above 0")
        for name in ("prune_weight", "target_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: want 0 or more")
        if not self.strides or min(self.strides) < 1:
            raise ValueError(f"strides = {self.strides}: want steps of a grid, 1 or more")
        if self.grid is not None and min(self.grid) < 1:
            raise ValueError(f"grid = {self.grid}: want rows and columns, 1 or more of each")

    def chosen(self, depth: int) -> tuple[int, ...]:
        """The layers, from 1, after which tokens go, in a decoder of `depth` layers."""
        if self.layers is not None:
            return self.layers
        return tuple(sorted({max(1, layer * depth // 32) for layer in (4, 14, 24)}))

    def apply(self, plan: Plan, *, slots: int) -> Plan:
        """The plan that drops vision tokens after its layers; none for a model of text alone.

        Raises:
          ValueError: layers that the plan does not have, or of a form whose attention no mask
            reaches; numbers that grow, or are more than there are.
        """
        if not slots:
            return plan
        layers = self.chosen(len(plan))
        if layers[-1] >= len(plan):
            raise ValueError(
                f"ATP: tokens go after layers {layers} of {len(plan)}: want others behind them"
            )
        schedule(self.keep, len(layers), slots)
        side = math.isqrt(slots)
        grid = self.grid or ((side, side) if side**2 == slots else None)
        stages = {
            layer - 1: Prune(self, layer, Kept(keep), slots, grid, layers)
            for layer, keep in zip(layers, _each(self.keep, len(layers)), strict=True)
        }
        faded = [step if at < layers[0] else _fading(step) for at, step in enumerate(plan)]
        return dropping(tuple(faded), stages)


def _each(keep: Keep, stages: int) -> tuple[int | float, ...]:
    return keep if isinstance(keep, tuple) else (keep,) * stages


def _fading(step: Any) -> Any:
    """The step whose attention heeds soft masks."""
    if not isinstance(step.block, Block):
        raise ValueError(f"ATP: a layer is {type(step.block).__name__}; want one with attention")
    return replace(step, block=step.block.clone(rule=Fading(step.block.rule), parent=None))


@dataclass(frozen=True)
class Fading:
    """A rule of attention that also weakens faded keys, where there are any.

    Attributes:
      rule: who sees whom.
    """

    rule: Rule

    def __call__(self, query: Tokens, key: Tokens) -> Array | None:
        seen = self.rule(query, key)
        if FADE not in key.tags:
            return seen
        fade = key.tags[FADE][:, None, :]
        if seen is None:
            return jnp.broadcast_to(fade, (*query.valid.shape, fade.shape[-1]))
        if seen.dtype == jnp.bool_:
            return jnp.where(seen, fade, jnp.finfo(jnp.float32).min)
        return jnp.maximum(seen + fade, jnp.finfo(jnp.float32).min)


class Thresholds(nn.Module):
    """θ_red and θ_space, float32 [B, 2], of scores [B, 2 places] of vision tokens in their places.

    Attributes:
      places: how many vision tokens there can be.
      dim: width of z.
    """

    places: int
    dim: int

    def setup(self) -> None:
        shape, small = (2 * self.places, self.dim), uniform(0.01)
        self.mix = Proj("...s,sd->...d", shape, ("positions", "mlp"), bias=True)
        self.heads = Proj("...d,dc->...c", (self.dim, 2), ("mlp", "classes"), init=small)
        start = nn.with_logical_partitioning(nn.initializers.constant(START), ("classes",))
        self.start = self.param("start", start, (2,))

    def __call__(self, scores: Array) -> Array:
        if self.is_initializing():
            scores = jnp.zeros((1, 2 * self.places))
        logits = self.heads(self.mix(scores)) + self.start
        return jax.nn.sigmoid(logits.astype(jnp.float32))


@struct.dataclass
class Prune(LayerPolicy):
    """Runs the layer; what its attention and the thresholds say goes, or in training fades.

    The aux is `kept` [B], how many vision tokens are left behind it, in training the sum of their
    masks, int32 else; `left_cells`; and in training `prune_loss`, and in the last such layer
    `target_loss`, which are weighted.

    Attributes:
      config: the policy's settings.
      layer: the number of this layer, from 1; the last of all such `layers` knows the mean.
      number: how many can remain.
      places: vision tokens that the thresholds tell apart; longer sequences are pooled.
      grid: as in `spatial`.
      layers: see `layer`.
    """

    name: ClassVar[str] = "atp"
    drops: ClassVar[bool] = True

    config: ATP = struct.field(pytree_node=False)
    layer: int = struct.field(pytree_node=False)
    number: Kept = struct.field(pytree_node=False)
    places: int = struct.field(pytree_node=False)
    grid: tuple[int, int] | None = struct.field(pytree_node=False)
    layers: tuple[int, ...] = struct.field(pytree_node=False)

    def module(self, block: nn.Module) -> nn.Module:
        """The thresholds of this layer."""
        del block
        return Thresholds(self.places, self.config.dim, parent=None)

    def __call__(
        self,
        layer: nn.Module,
        own: nn.Module | None,
        run: Run,
        stream: Stream,
        state: Any,
        memory: Memory,
    ) -> tuple[Stream, Any, Aux]:
        assert own is not None
        if stream.slots == 0:
            return run(stream, state)
        stream = _numbered(stream)
        cells = left_cells(stream.tokens)
        # As in the layer; the compiler merges both.
        found = scores(layer, layer.qkv(stream, memory), stream.tokens)
        margin = self.margin(own, found, stream)
        stream, state, _ = run(stream, state)
        if state is None and "label" in stream.tokens.tags:
            stream, aux = self.fade(stream, margin)
        else:
            rank = jax.lax.stop_gradient(found.mean(0))
            stream = drop(stream, rank, self.number, among=margin > 0)
            aux = {"kept": vision(stream.tokens).sum(-1)}
        return stream, state, {**aux, "left_cells": cells}

    def margin(self, own: Any, found: Array, stream: Stream) -> Array:
        """By how much vision tokens pass the threshold that they pass best, float32 [B, L]."""
        pooled = [in_places(score, stream, self.places) for score in found]
        thresholds = own(jnp.concatenate(pooled, -1))[:, :, None]
        c, tokens = self.config, stream.tokens
        place = spatial(tokens.tags.get("cell", tokens.tags[SLOT]), self.grid, c.strides, c.sample)
        return jnp.maximum(found.mean(0) - thresholds[:, 0], place - thresholds[:, 1])

    def fade(self, stream: Stream, margin: Array) -> tuple[Stream, Aux]:
        """The stream with weaker vision tokens, and what training is told of it."""
        c, tokens = self.config, stream.tokens
        image = vision(tokens)
        total = tokens.tags["vision_total"][:, 0]
        mask = jnp.where(image, jax.nn.log_sigmoid(c.temperature * margin), 0)
        fade = tokens.tags.get(FADE, 0) + mask
        kept = jnp.where(image, jnp.exp(fade), 0).sum(-1)  # [B]
        so_far = tokens.tags.get(SUM, 0) + jnp.broadcast_to(kept[:, None], fade.shape)
        tokens = tokens.replace(tags={**tokens.tags, FADE: fade, SUM: so_far})
        share = _mean(kept / jnp.maximum(total, 1), total > 0)
        aux = {"kept": kept, "prune_loss": c.prune_weight * self.layer * share}
        if self.layer == self.layers[-1]:
            mean = so_far[:, 0] / len(self.layers)
            distance = target_distance(mean, total, c.target, stream.whole)
            aux["target_loss"] = c.target_weight * distance
        return stream.replace(tokens=tokens), aux


def vision(tokens: Tokens) -> Array:
    """The vision tokens that are left, bool [B, L]."""
    return tokens.valid & (tokens.modality == IMAGE)


def scores(layer: Any, own: QKV, tokens: Tokens) -> Array:
    """What vision tokens get of the attention of a layer, from each other and from the instruction,
    in units of an even share among as many as there were at first.

    Args:
      layer: the bound block.
      own: its projections of the tokens.
      tokens: these; of faded ones their mask counts.

    Returns:
      S_self and S_cross, float32 [2, B, L], 0 for text.
    """
    weights = jax.nn.softmax(attention_logits(layer, own, tokens), -1).mean(1)  # [B, L, L]
    image = vision(tokens)
    left = jnp.where(image, jnp.exp(tokens.tags.get(FADE, jnp.float32(0))), 0)
    asking = jnp.stack([left, instruction(tokens).astype(jnp.float32)], 1)  # [B, 2, L]
    asking /= jnp.maximum(asking.sum(-1, keepdims=True), 1e-9)
    got = jnp.einsum("bal,bls->abs", asking, weights) * tokens.tags["vision_total"]
    return jnp.where(image, got, 0)


def in_places(score: Array, stream: Stream, places: int) -> Array:
    """Scores [B, L] of vision tokens in their order at first, [B, places], 0 for those that are
    gone; where there were more, the means of such as follow one another.
    """
    most = max(stream.whole, places)
    at = jnp.where(vision(stream.tokens), stream.tokens.tags[SLOT] * places // most, places)
    put = jax.vmap(lambda i, x: jnp.zeros(places, x.dtype).at[i].add(x, mode="drop"))
    shared = np.bincount(np.arange(stream.whole) * places // most, minlength=places)
    return put(at, score) / np.maximum(shared, 1)


def spatial(
    cell: Array, grid: tuple[int, int] | None, strides: tuple[int, ...], sample: float
) -> Array:
    """S_space of vision tokens by their number `cell` in the picture, or in several tiles: float32
    of its shape, -inf off all grids. The rest is as in `ATP`, but that without a `grid` tokens are
    counted in their order.
    """
    best = jnp.full(cell.shape, -jnp.inf, jnp.float32)
    for stride in strides:
        if grid is None:
            on = cell % stride**2 == 0
        else:
            on = (cell // grid[1] % grid[0] % stride == 0) & (cell % grid[1] % stride == 0)
        best = jnp.where(on, jnp.maximum(best, 1 - sample / stride**2), best)
    return best


def target_distance(kept: Array, total: Array, target: int | float, most: int) -> Array:
    """How far the mean of a batch is from the target, in tokens, float32 [].

    Args:
      kept: [B], tokens that rows keep, the mean of their layers.
      total: int [B], tokens that they had, at most `most`.
      target: a number of tokens, or a share of these.
      most: see `total`.
    """
    wanted = np.array([Kept(target)(n) for n in range(most + 1)], np.float32)
    return jnp.abs(_mean(kept - jnp.asarray(wanted)[total], total > 0))


def _mean(x: Array, where: Array) -> Array:
    return jnp.where(where, x, 0).sum() / jnp.maximum(where.sum(), 1)


def _numbered(stream: Stream) -> Stream:
    """The stream whose vision tokens know how many they were and their number among these."""
    stream, _ = with_total(stream)
    tokens = stream.tokens
    if SLOT in tokens.tags:
        return stream
    image = tokens.modality == IMAGE
    slot = jnp.where(image, jnp.cumsum(image, -1) - 1, -1).astype(jnp.int32)
    return stream.replace(tokens=tokens.replace(tags={**tokens.tags, SLOT: slot}))


_TINY = llava.VARIANTS["llava_tiny"]

VARIANTS = {
    # After layers 4, 14 and 24 of 32, for 144 of 576 tokens on the mean.
    "atp_llava_7b": replace(llava.VARIANTS["llava_1_5_7b"], policies=(ATP(),)),
    "atp_llava_tiny": replace(_TINY, decoder=replace(_TINY.decoder, depth=4), policies=(ATP(),)),
}

register(CARD, VARIANTS, reducers={"atp_llava": ATP})
