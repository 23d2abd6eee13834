"""p-MoD: deeper layers of the language model run on fewer of the vision tokens.

Every layer chooses anew by a router of its own: the others bypass it and may be chosen again by a
later one. How many it runs decays with depth along a shifted cosine. Text always runs.

Follows: arXiv:2412.04449. As in the official code, the weight of a vision token that runs scales
its MLP branch only, and that of one that does not scales all of it.
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, overload

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from zoo.models.base import llava, llava_next
from zoo.models.core.card import Card
from zoo.models.core.keytable import AnyRow, Row, Table, linear, same
from zoo.models.core.registry import register
from zoo.models.core.types import IMAGE, Array, Aux, Memory, Stream, take
from zoo.models.parts.assemblies.llava import LlavaConfig, llava_table
from zoo.models.parts.assemblies.llava_hub import projector_rows
from zoo.models.parts.decoders.gqa import DecoderConfig, Plan
from zoo.models.parts.decoders.policies import wrap
from zoo.models.parts.layers.linear import Proj, uniform
from zoo.models.parts.layers.plan import LayerPolicy, Run
from zoo.models.parts.layers.selection import pick, put
from zoo.models.parts.towers.vit import ViTConfig

CARD = Card(
    slug="p_mod",
    paper="arXiv:2412.04449",
    code="https://github.com/MCG-NJU/p-MoD",
    differs=(
        "The schedule follows the depth of the decoder; the official one always assumes 32 layers.",
        "Prompts of different lengths generate in one batch; the official code takes them one by "
        "one.",
        "Tokens are ranked by what the router says, in float32; the official code ranks the "
        "weights that it makes of that, in the dtype of the model, where large ones tie.",
        "Tokens that tie run in reading order; the official choice among them is arbitrary.",
        "`vision_hr` leaves alone the first tile of a row, the official code that of each of its "
        "pictures.",
        "With `zero_init=False` the bias of a router starts at zero all the same.",
    ),
)

DECAYS = ("shiftedcos", "shiftedlinear")
SCHEDULES = (*DECAYS, "deep_all", "deep_all_include_last", "interleave")
WEIGHTS = ("tanh", "sigmoid", "softmax", "none")
TARGETS = ("vision_all", "vision_hr", "all")

_NUMBER = r"(\d+(?:\.\d+)?)"
_DECAY = re.compile(rf"({'|'.join(DECAYS)})_decay_{_NUMBER}_{_NUMBER}")
_WEIGHING = re.compile(rf"({'|'.join(WEIGHTS)})(?:_{_NUMBER}_(-?\d+(?:\.\d+)?))?")


@dataclass(frozen=True)
class PMoD:
    """Which layers choose among their tokens, how many they run, and how they weigh them.

    Attributes:
      schedule: how the share of tokens that layer l of L runs depends on l. "shiftedcos" is
        `cos(pi l / (L - 1)) / 2 + factor` and "shiftedlinear" `1/2 - l / (L - 1) + factor`: layers
        of more than `max_ratio` run all, the others choose, at least `min_ratio`. "deep_all" (all
        but the first two and the last), "deep_all_include_last" (all but the first two) and
        "interleave" (every second one) have the share `factor`.
      max_ratio: of the decays.
      min_ratio: of the decays.
      factor: the mean of a decay before it is bounded, or the share of the other schedules.
      layers: those that choose, in place of the ones that the schedule names.
      target: what is chosen from: all vision tokens, those after the first tile of `tile` tokens,
        or all tokens, text included. Where a sequence has no vision tokens, all run.
      tile: vision tokens of the first tile, with the target "vision_hr".
      weight: the function of a router's output; "softmax" is over the targets of a sequence.
      scale: a weight is `scale * function(router) + bias`.
      bias: see `scale`.
      router_bias: whether routers have a bias of their own.
      zero_init: routers start at zero, all weights being equal; else as a `Linear` of PyTorch.
    """

    schedule: Literal[
        "shiftedcos", "shiftedlinear", "deep_all", "deep_all_include_last", "interleave"
    ] = "shiftedcos"
    max_ratio: float = 0.85
    min_ratio: float = 0.15
    factor: float = 0.5
    layers: tuple[int, ...] | None = None
    target: Literal["vision_all", "vision_hr", "all"] = "vision_all"
    tile: int = 576
    weight: Literal["tanh", "sigmoid", "softmax", "none"] = "tanh"
    scale: float = 0.2
    bias: float = 1.0
    router_bias: bool = True
    zero_init: bool = True

    def __post_init__(self) -> None:
        choices = {"schedule": SCHEDULES, "target": TARGETS, "weight": WEIGHTS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r}: want one of {known}")
        if not 0 <= self.min_ratio <= self.max_ratio <= 1:
            raise ValueError(
                f"min_ratio = {self.min_ratio} and max_ratio = {self.max_ratio}: want shares of "
                "the tokens, 0 <= min_ratio <= max_ratio <= 1"
            )
        if not 0 <= self.factor <= 1:
            raise ValueError(f"factor = {self.factor}: want a share of the tokens, 0 to 1")
        if self.scale <= 0:
            raise ValueError(f"scale = {self.scale}: want a number above 0")

    @classmethod
    def parse(cls, target_layers: str, weight_norm: str = "tanh_0.2_1", **fields: Any) -> "PMoD":
        """The configuration that the official strings describe.

        Args:
          target_layers: `mod_target_layers`, such as "shiftedcos_decay_0.85_0.15" or "interleave".
          weight_norm: `mod_weight_norm`, such as "tanh_0.2_1"; without numbers they are 1 and 1.
          **fields: further fields, such as `factor` (`mod_router_factor`), `target`
            (`mod_target_token_type`), `router_bias` (`mod_bias_enabled`) and `zero_init`
            (`mod_special_init`).

        Raises:
          ValueError: a string of another form.
        """
        decay, weighing = _DECAY.fullmatch(target_layers), _WEIGHING.fullmatch(weight_norm)
        if not decay and (target_layers not in SCHEDULES or target_layers in DECAYS):
            raise ValueError(
                f"target_layers = {target_layers!r}: want one of {SCHEDULES[len(DECAYS) :]}, or "
                "such as shiftedcos_decay_0.85_0.15 or shiftedlinear_decay_0.85_0.15"
            )
        if not weighing:
            raise ValueError(
                f"weight_norm = {weight_norm!r}: want one of {WEIGHTS}, alone or such as tanh_0.2_1"
            )
        if decay:
            fields |= {"max_ratio": float(decay[2]), "min_ratio": float(decay[3])}
        kind, scale, bias = weighing.groups(default="1")
        return cls(
            schedule=decay[1] if decay else target_layers,  # type: ignore[arg-type]
            weight=kind,  # type: ignore[arg-type]
            scale=float(scale),
            bias=float(bias),
            **fields,
        )

    def ratios(self, depth: int) -> dict[int, float]:
        """{layer that chooses: share of its tokens that it runs}, of a decoder of `depth` layers.

        Raises:
          ValueError: `layers` that the decoder does not have.
        """
        every = range(depth)
        if self.layers is not None and (bad := sorted(set(self.layers) - set(every))):
            raise ValueError(f"layers {bad}: the decoder has layers 0 to {depth - 1}")
        if self.schedule in DECAYS:
            raw = [self._decay(layer / max(depth - 1, 1)) for layer in every]
            chosen = [layer for layer in every if raw[layer] <= self.max_ratio]
            share = [min(max(ratio, self.min_ratio), 1.0) for ratio in raw]
        else:
            spans = {
                "deep_all": range(2, depth - 1),
                "deep_all_include_last": range(2, depth),
                "interleave": range(1, depth, 2),
            }
            chosen, share = list(spans[self.schedule]), [self.factor] * depth
        return {layer: share[layer] for layer in (chosen if self.layers is None else self.layers)}

    def _decay(self, place: float) -> float:
        """The share at a relative depth of 0 to 1, before it is bounded."""
        curve = math.cos(math.pi * place) / 2 if self.schedule == "shiftedcos" else 0.5 - place
        return curve + self.factor

    def weights(self, router: Array, target: Array) -> Array:
        """The weights of tokens, in float32.

        Args:
          router: [B, L], the outputs of a router.
          target: bool [B, L]; what the others get has no meaning.
        """
        # Not minus infinity, of which a row without targets would make NaN gradients.
        router = jnp.where(target, router.astype(jnp.float32), jnp.finfo(jnp.float32).min)
        functions = {
            "tanh": jnp.tanh,
            "sigmoid": jax.nn.sigmoid,
            "softmax": jax.nn.softmax,
            "none": lambda x: x,
        }
        return functions[self.weight](router) * self.scale + self.bias

    def apply(self, plan: Plan, *, slots: int) -> Plan:
        """The plan whose scheduled layers choose among their tokens.

        Raises:
          ValueError: layers with their norms after the residual, which have no MLP branch to scale;
            or another policy inside that wraps whole layers.
        """
        del slots  # every layer counts its own
        ratios = self.ratios(len(plan))
        if any(getattr(plan[layer].block, "norm_place", "pre") == "post" for layer in ratios):
            raise ValueError("PMoD: want a decoder whose norms come before its layers or branches")
        return wrap(plan, {layer: MoD(self, ratio) for layer, ratio in ratios.items()})


@overload
def num_kept(tokens: int, ratio: float) -> int: ...
@overload
def num_kept(tokens: Array, ratio: float) -> Array: ...
def num_kept(tokens: int | Array, ratio: float) -> int | Array:
    """How many of so many tokens a layer of this ratio runs: their product in float32, cut off."""
    if isinstance(tokens, int):
        return int(np.float32(tokens) * np.float32(ratio))
    return jnp.trunc(tokens.astype(jnp.float32) * np.float32(ratio)).astype(jnp.int32)


class Router(nn.Module):
    """One number per token: [B, L, D] to [B, L]."""

    bias: bool
    zero_init: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        init = nn.initializers.zeros if self.zero_init else uniform(width**-0.5)
        options = {"bias": self.bias, "init": init, "name": "out"}
        scores: Array = Proj("...d,do->...o", (width, 1), ("embed", None), **options)(x)
        return scores[..., 0]


@struct.dataclass
class MoD(LayerPolicy):
    """Runs the layer on the targets of greatest weight and on all other tokens.

    x is what comes in, w the weight of a target, m what attention makes of a token that runs, with
    its residual, and f the MLP branch on m. Targets that run become m + w f, those that do not
    w x; other tokens m + f. The tokens keep their positions, and the layer caches only those that
    it runs. In decoding, and for text alone, it is the plain layer.

    The aux is `kept`, int32 [B]: how many vision tokens run; and `kept_cells`, int32 [B, C]: which,
    by their tag `cell`, with -1 for everything else.

    Attributes:
      config: what is chosen from, and how it is weighed.
      ratio: share of the targets that run.
    """

    name: ClassVar[str] = "router"
    splits: ClassVar[bool] = True

    config: PMoD = struct.field(pytree_node=False)
    ratio: float = struct.field(pytree_node=False)

    def module(self, block: nn.Module) -> nn.Module:
        """The router of this layer."""
        del block
        return Router(self.config.router_bias, self.config.zero_init, parent=None)

    def __call__(
        self,
        layer: nn.Module,
        own: nn.Module | None,
        run: Run,
        stream: Stream,
        state: Any,
        memory: Memory,
    ) -> tuple[Stream, Any, Aux]:
        if stream.slots == 0:
            return run(stream, state)
        assert own is not None
        tokens = stream.tokens
        candidate, always, slots, spared = self._candidates(stream)
        target = candidate & tokens.valid & ~always
        router = own(stream.hidden.astype(jnp.float32))
        weight = self.config.weights(router, target)  # [B, L]

        # Weights grow with what the router says, which tells those of large ones apart.
        last = jnp.finfo(jnp.float32).min  # ahead of what is no candidate
        score = jnp.where(target, router, jnp.where(always, jnp.inf, last))
        count = always.sum(-1) + num_kept(target.sum(-1), self.ratio)
        capacity = spared + num_kept(slots - spared, self.ratio)
        index, keep = pick(score, candidate, count, slots=slots, capacity=capacity)
        chosen = take(tokens, index)
        chosen = chosen.replace(valid=chosen.valid & keep)

        inside = stream.slots if self.config.target == "all" else capacity
        part = Stream(take(stream.hidden, index), chosen, inside)
        part, state, _ = layer.attention(part, state, memory)
        weight = jnp.where(target, weight, 1).astype(stream.hidden.dtype)[..., None]
        rows = part.hidden + take(weight, index) * layer.feed_forward(part, memory)
        hidden = put(weight * stream.hidden, index, rows, chosen.valid)

        vision = chosen.valid & (chosen.modality == IMAGE)
        cells = jnp.where(vision, chosen.tags["cell"], -1)
        kept = vision.sum(-1).astype(jnp.int32)
        return stream.replace(hidden=hidden), state, {"kept": kept, "kept_cells": cells}

    def _candidates(self, stream: Stream) -> tuple[Array, Array, int, int]:
        """Who stands for election.

        Returns:
          bool [B, L], exactly so many in every row: tokens that may be left out, and surplus slots;
          bool [B, L], those of them that run in any case; the number of the former; and the
          greatest number of the latter.
        """
        tokens = stream.tokens
        image = tokens.modality == IMAGE
        nobody = jnp.zeros_like(image)
        if self.config.target == "all":
            return jnp.ones_like(image), nobody, image.shape[1], 0
        if self.config.target == "vision_all":
            return image, nobody, stream.slots, 0
        first = image & tokens.valid & (tokens.tags["cell"] < self.config.tile)
        return image, first, stream.slots, min(self.config.tile, stream.slots)


def _released(config: LlavaConfig) -> LlavaConfig:
    """With this policy and the vocabulary of Vicuna v1.5, which is what the checkpoints have."""
    decoder = dataclasses.replace(config.decoder, vocab_size=32_000)
    return dataclasses.replace(config, decoder=decoder, policies=(PMoD(),))


VARIANTS = {
    # Sizes of MCG-NJU/p-MoD-LLaVA-v1.5-7B and MCG-NJU/p-MoD-LLaVA-NeXT-7B.
    "p_mod_llava_1_5_7b": _released(llava.VARIANTS["llava_1_5_7b"]),
    "p_mod_llava_next_7b": _released(llava_next.VARIANTS["llava_next_vicuna_7b"]),
    "p_mod_tiny": LlavaConfig(
        tower=ViTConfig(image_size=16, patch_size=4, width=16, depth=3, num_heads=2, mlp_dim=32),
        decoder=DecoderConfig(
            vocab_size=320, width=24, depth=6, num_heads=4, num_kv_heads=2, mlp_dim=32
        ),
        policies=(PMoD(),),
        image_id=3,
        text_tokens=12,
    ),
}


def with_routers(table: Table, policy: PMoD, depth: int) -> Table:
    """The key table of a plain decoder of `depth` layers, turned into that of one with this policy:
    the official code puts layers that choose into another module, beside their routers.
    """
    ratios = policy.ratios(depth)
    names = tuple(f"{n}.decoder_layer" if n in ratios else f"{n}" for n in range(depth))

    def rename(row: AnyRow) -> AnyRow:
        layers = isinstance(row, Row) and row.paths[0].startswith("decoder/stack/")
        return dataclasses.replace(row, steps=names) if layers else row

    leaves = {"kernel": ("weight", linear()), "bias": ("bias", same)}
    if not policy.router_bias:
        del leaves["bias"]
    routers = tuple(
        Row(
            f"decoder/stack/layers/router/out/{ours}",
            f"model.layers.{{}}.router.router.{theirs}",
            transform,
            tuple(sorted(ratios)),
        )
        for ours, (theirs, transform) in leaves.items()
    )
    return Table(tuple(rename(row) for row in table.rows) + routers)


def table(config: LlavaConfig) -> Table:
    """Keys of the released checkpoints."""
    own = projector_rows(bias=config.connector.bias, keys=("0", "2"))
    found = llava_table(config) + own.under("connector", "model.mm_projector.")
    if config.newline:
        found += Table((Row("newline", "model.image_newline"),))
    for policy in config.policies:
        if isinstance(policy, PMoD):
            found = with_routers(found, policy, config.decoder.depth)
    return found


register(CARD, VARIANTS, table=table)
