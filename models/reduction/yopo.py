"""YOPO: all vision tokens stay, and the language model computes less for them.

Vision tokens see only their neighbours in the picture, before and behind them; heads that say
little about vision leave it alone; the MLP runs vision tokens through its first neurons; and from
some layer on nobody reads them any more. Text is computed as ever.

Follows: arXiv:2410.06169.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from zoo.models.base import llava
from zoo.models.core.card import Card
from zoo.models.core.keytable import Table
from zoo.models.core.names import shard
from zoo.models.core.registry import register
from zoo.models.core.types import IMAGE, Array, Aux, Memory, Stream, Tokens, take
from zoo.models.parts.assemblies.llava import LlavaConfig, llava_table
from zoo.models.parts.assemblies.llava_hub import projector_rows
from zoo.models.parts.decoders.dropping import attention_logits
from zoo.models.parts.decoders.gqa import DecoderConfig, Plan
from zoo.models.parts.decoders.policies import wrap
from zoo.models.parts.layers.attention import Rule
from zoo.models.parts.layers.block import Block, remembered
from zoo.models.parts.layers.operands import merged
from zoo.models.parts.layers.plan import LayerPolicy, Run

CARD = Card(
    slug="yopo",
    paper="arXiv:2410.06169",
    code="https://github.com/ZhangAIPI/YOPO_MLLM_Pruning",
    differs=(
        "Vision tokens are found by their places, in every row and on any grid; the official code "
        "has 576 of them, from one fixed place on.",
        "Tiles and pictures have windows of their own, and newlines see what comes before them.",
        "In decoding, every row of a batch leaves vision alone with its inactive heads; the "
        "official code masks the first row.",
        "Neurons that vision tokens do not reach are not computed for them; the official code sets "
        "them to zero (same numbers).",
        "`drop` takes vision tokens out where nobody reads them any more; in the official code, "
        "and by default here, they still count in the denominators of attention.",
        "What the official code does to Qwen2-VL, whose logits it doubles, is not reproduced: the "
        "rule of LLaVA is that of all models.",
    ),
)

HeadMask = tuple[tuple[bool, ...], ...]
"""Of every layer, which heads are active."""


@dataclass(frozen=True)
class Yopo:
    """The policy. By default nothing is cut.

    Attributes:
      window: side w of the square of neighbours, (w - 1) // 2 tokens to each side; None for the
        attention of the plain decoder.
      heads: of every layer, which heads vision tokens use and are read by; None for all of them.
        `head_mask` makes it of an array.
      mlp_ratio: vision tokens run through the first 1 / `mlp_ratio` of the MLP's neurons.
      layers: the layers, from the first, in which vision tokens are read; None for all.
      drop: behind these, vision tokens leave the sequence.
      grid: rows and columns of the tokens of a picture or tile; by default all vision tokens of a
        sequence make one square.
    """

    window: int | None = None
    heads: HeadMask | None = None
    mlp_ratio: float = 1.0
    layers: int | None = None
    drop: bool = False
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window = {self.window}: want 1 or more tokens, or None")
        if self.mlp_ratio < 1:
            raise ValueError(f"mlp_ratio = {self.mlp_ratio}: want 1 or more")
        if self.layers is not None and self.layers < 1:
            raise ValueError(f"layers = {self.layers}: want 1 or more layers, or None for all")
        if self.grid is not None and min(self.grid) < 1:
            raise ValueError(f"grid = {self.grid}: want rows and columns, 1 or more of each")
        if self.drop and self.layers is None:
            raise ValueError("drop: want `layers`, behind which vision tokens leave the sequence")

    @classmethod
    def read(cls, fields: Mapping[str, Any], mask: np.ndarray | None = None) -> "Yopo":
        """The policy that a released `config.json` describes.

        Args:
          fields: with `attncut_w`, `layercut_num` and `mlpcut_ratio`.
          mask: bool [layers, H], the released array that `headcut_num` names.

        Raises:
          ValueError: a field is missing, or heads are cut and there is no mask.
        """
        names = ("attncut_w", "layercut_num", "mlpcut_ratio")
        if missing := [name for name in names if name not in fields]:
            raise ValueError(f"no {', '.join(missing)}: want the config.json of a YOPO checkpoint")
        if mask is None and fields.get("headcut_num") is not None:
            raise ValueError(
                f"headcut_num = {fields['headcut_num']}: want the released mask of heads beside it"
            )
        window, layers, ratio = (fields[name] for name in names)
        heads = None if mask is None else head_mask(mask)
        return cls(window=int(window), heads=heads, mlp_ratio=float(ratio), layers=int(layers))

    def apply(self, plan: Plan, *, slots: int) -> Plan:
        """The plan whose layers compute less for vision tokens.

        Raises:
          ValueError: masks of other layers or heads than the decoder has, more layers than there
            are, vision tokens that are no square where `grid` is None, or layers of another form.
        """
        if not slots:
            return plan
        depth = len(plan)
        if self.layers is not None and self.layers > depth:
            raise ValueError(f"layers = {self.layers}: the decoder has {depth}")
        if self.heads is not None and len(self.heads) != depth:
            raise ValueError(f"heads of {len(self.heads)} layers: the decoder has {depth}")
        grid, read = self._grid(slots), depth if self.layers is None else self.layers
        repeats = max(self._repeats(layer, step.block) for layer, step in enumerate(plan))
        policies: dict[int, LayerPolicy] = {}
        for layer, step in enumerate(plan):
            block = step.block
            active = self._active(layer, block)
            groups = _group(block) if repeats == 1 else 1
            policies[layer] = CutVision(
                heads=active,
                read=active[::groups] if layer < read else (0.0,) * (len(active) // groups),
                window=self.window,
                grid=grid,
                mlp_dim=int(block.mlp_dim / self.mlp_ratio),
                repeats=repeats,
            )
        if self.drop and read < depth:
            policies = {layer: policies[layer] for layer in range(read)}
            plan = wrap(plan, {read: WithoutVision()})
        return wrap(plan, policies)

    def _grid(self, slots: int) -> tuple[int, int]:
        """Rows and columns of a picture or tile."""
        if self.grid is not None:
            return self.grid
        side = math.isqrt(slots)
        if self.window is not None and side**2 != slots:
            raise ValueError(
                f"window = {self.window}: {slots} vision tokens make no square; want `grid`, the "
                "rows and columns of a picture or tile"
            )
        return side, side

    def _active(self, layer: int, block: Any) -> tuple[float, ...]:
        """Of every head 1 or 0."""
        if (
            not isinstance(block, Block)
            or type(block).feed_forward is not Block.feed_forward
            or type(block).mix is not Block.mix
            or block.norm_place == "post"
        ):
            raise ValueError(
                f"Yopo: layer {layer} is {type(block).__name__} with norms "
                f"{getattr(block, 'norm_place', None)!r}; want plain layers whose norms come first"
            )
        if self.heads is None:
            return (1.0,) * block.num_heads
        if len(self.heads[layer]) != block.num_heads:
            raise ValueError(
                f"heads of layer {layer}: {len(self.heads[layer])}, and it has {block.num_heads}"
            )
        return tuple(float(head) for head in self.heads[layer])

    def _repeats(self, layer: int, block: Any) -> int:
        """How often keys are repeated: not at all where the heads that share one agree."""
        active, group = self._active(layer, block), _group(block)
        shared: np.ndarray = np.reshape(active, (-1, group))
        return 1 if (shared == shared[:, :1]).all() else group


def _group(block: Any) -> int:
    """Heads that share a key."""
    return int(block.num_heads // (block.num_kv_heads or block.num_heads))


@dataclass(frozen=True)
class Neighbours:
    """The rule that vision tokens see each other within a window of the picture, whichever comes
    first; for all else it is another rule.

    Attributes:
      rule: the other one.
      window: side of the window.
      grid: of a picture or tile.
    """

    rule: Rule
    window: int
    grid: tuple[int, int]

    def __call__(self, query: Tokens, key: Tokens) -> Array:
        near = self._near(query, key)
        given = self.rule(query, key)
        both = _numbered(query)[:, :, None] & _numbered(key)[:, None, :]
        if given is None:
            return near | ~both
        if given.dtype == jnp.bool_:
            return jnp.where(both, near, given)
        bias = jnp.where(near, 0.0, jnp.finfo(given.dtype).min)
        return jnp.where(both, bias.astype(given.dtype), given)

    def _near(self, query: Tokens, key: Tokens) -> Array:
        """Bool [B, L, S], what is no further apart than half a window, in the same picture."""
        (h, w), radius = self.grid, (self.window - 1) // 2
        a, b = query.tags["cell"][:, :, None], key.tags["cell"][:, None, :]
        near = a // (h * w) == b // (h * w)
        near &= jnp.abs(a // w % h - b // w % h) <= radius
        return near & (jnp.abs(a % w - b % w) <= radius)


@struct.dataclass
class CutVision(LayerPolicy):
    """Runs the halves of the layer with less for vision tokens.

    The values of vision tokens are zero in heads that do not read them: what text pays to them
    counts in the denominator alone, also from the cache. So decoding is that of the plain layer.

    Attributes:
      heads: of every head 1 or 0: whether vision tokens use it.
      read: of every head, or of those that share a key, whether it reads vision tokens.
      window: see `Yopo`.
      grid: of a picture or tile.
      mlp_dim: neurons that vision tokens run through.
      repeats: how often keys are repeated, so that heads that share one may differ.
    """

    name: ClassVar[str] = "cut_vision"
    splits: ClassVar[bool] = True

    heads: tuple[float, ...]
    read: tuple[float, ...]
    window: int | None = struct.field(pytree_node=False)
    grid: tuple[int, int] = struct.field(pytree_node=False)
    mlp_dim: int = struct.field(pytree_node=False)
    repeats: int = struct.field(pytree_node=False)

    def __call__(
        self,
        layer: nn.Module,
        own: nn.Module | None,
        run: Run,
        stream: Stream,
        state: Any,
        memory: Memory,
    ) -> tuple[Stream, Any, Aux]:
        del own
        if not stream.slots and self.repeats == 1:
            return run(stream, state)
        stream, state = self._attention(layer, stream, state, memory)
        hidden = stream.hidden + self._feed_forward(layer, stream, memory)
        return stream.replace(hidden=shard(hidden, "batch", "seq", "act_embed")), state, {}

    def _attention(
        self, layer: Any, stream: Stream, state: Any, memory: Memory
    ) -> tuple[Stream, Any]:
        """The attention half with its residual."""
        (q, k, v), tokens, rule = layer.qkv(stream, memory), stream.tokens, layer.rule
        image = (tokens.modality == IMAGE)[..., None, None]
        if self.repeats > 1:
            k, v = (jnp.repeat(x, self.repeats, axis=2) for x in (k, v))
        if stream.slots:
            v = jnp.where(image, v * _column(self.read, v.dtype), v)
            if self.window is not None:
                rule = Neighbours(rule, self.window, self.grid)
        state, k, v, key = remembered(state, k, v, tokens)
        y = layer.attend(q, k, v, rule, tokens, key, scale=layer.scale, softcap=layer.softcap)
        if stream.slots:
            y = jnp.where(image, y * _column(self.heads, y.dtype), y)
        y = layer.attention_out(y, tokens, memory)
        return stream.replace(hidden=shard(stream.hidden + y, "batch", "seq", "act_embed")), state

    def _feed_forward(self, layer: Any, stream: Stream, memory: Memory) -> Array:
        """The MLP branch: text with all neurons, vision with the first of them."""
        if not stream.slots or self.mlp_dim == layer.mlp_dim:
            return layer.feed_forward(stream, memory)
        text, image = _apart(stream)
        order = jnp.concatenate([text, image], 1)
        parts = [Stream(*take((stream.hidden, stream.tokens), index)) for index in (text, image)]
        narrow = narrowed(layer, self.mlp_dim)
        rows = [
            each.feed_forward(x, memory) for each, x in zip((layer, narrow), parts, strict=True)
        ]
        return take(jnp.concatenate(rows, 1), jnp.argsort(order, -1))


@struct.dataclass
class WithoutVision(LayerPolicy):
    """Takes all vision tokens out, then runs the layer. Positions stay.

    The aux is `left_cells`, see `zoo.models.parts.reduce.report`.
    """

    name: ClassVar[str] = "without_vision"
    drops: ClassVar[bool] = True

    def __call__(
        self,
        layer: nn.Module,
        own: nn.Module | None,
        run: Run,
        stream: Stream,
        state: Any,
        memory: Memory,
    ) -> tuple[Stream, Any, Aux]:
        del layer, own, memory
        if not stream.slots:
            return run(stream, state)
        hidden, tokens = take((stream.hidden, stream.tokens), _apart(stream)[0])
        stream, state, _ = run(Stream(hidden, tokens, whole=stream.whole or stream.slots), state)
        return stream, state, {"left_cells": jnp.full(tokens.order.shape, -1, jnp.int32)}


def narrowed(layer: Any, mlp_dim: int) -> Any:
    """The bound block with the first neurons of its MLP alone."""
    params = dict(layer.variables["params"])

    def first(leaf: Any, axis: int) -> Any:
        return jax.lax.slice_in_dim(merged(leaf), 0, mlp_dim, axis=axis)

    for name in ("gate", "up"):
        if name in params:
            cut = {part: first(leaf, -1) for part, leaf in params[name].items()}
            params[name] = cut
    params["down"] = {**params["down"], "kernel": first(params["down"]["kernel"], 0)}
    return layer.clone(parent=None, name=None, mlp_dim=mlp_dim).bind({"params": params})


def _apart(stream: Stream) -> tuple[Array, Array]:
    """The places of everything that is no image slot, int [B, L - slots], and of those that are."""
    order = jnp.argsort(stream.tokens.modality == IMAGE, -1, stable=True)
    number = order.shape[1] - stream.slots
    return order[:, :number], order[:, number:]


def _numbered(tokens: Tokens) -> Array:
    """Bool [B, L], the vision tokens that have a place in a picture: those with a number that no
    other has, as newlines do.
    """
    image = tokens.valid & (tokens.modality == IMAGE)
    cell = tokens.tags["cell"]
    same = (cell[:, :, None] == cell[:, None, :]) & image[:, None, :]
    return image & (same.sum(-1) == 1)


def _column(numbers: tuple[Any, ...], dtype: Any) -> Array:
    """[H, 1]."""
    return jnp.stack(numbers).astype(dtype)[:, None]


# ------------------------------------------------------------------ which heads are active


@dataclass(frozen=True)
class Calibrate:
    """The policy that changes nothing and reports `vision_ratio` [B, H] in the aux of every layer:
    the attention that its heads pay to vision, over what they pay to text.
    """

    def apply(self, plan: Plan, *, slots: int) -> Plan:
        """The plan with the report around every layer."""
        return wrap(plan, dict.fromkeys(range(len(plan)), VisionRatio())) if slots else plan


@struct.dataclass
class VisionRatio(LayerPolicy):
    """See `Calibrate`."""

    name: ClassVar[str] = "vision_ratio"

    def __call__(
        self,
        layer: nn.Module,
        own: nn.Module | None,
        run: Run,
        stream: Stream,
        state: Any,
        memory: Memory,
    ) -> tuple[Stream, Any, Aux]:
        del own
        if not stream.slots:
            return run(stream, state)
        tokens = stream.tokens
        logits = attention_logits(layer, layer.qkv(stream, memory), tokens)  # type: ignore[attr-defined]
        weights = jnp.where(tokens.valid[:, None, :, None], jax.nn.softmax(logits, -1), 0)
        paid = weights.sum(-2)  # [B, H, L]
        image = (tokens.modality == IMAGE)[:, None]
        ratio = jnp.where(image, paid, 0).sum(-1) / jnp.where(image, 0, paid).sum(-1)
        stream, state, _ = run(stream, state)
        return stream, state, {"vision_ratio": ratio}


def active_heads(
    ratios: np.ndarray, threshold: float, *, share: float = 0.4, always: int = 2
) -> np.ndarray:
    """Which heads are active, bool [layers, H].

    Args:
      ratios: [examples, layers, H], as `Calibrate` reports them.
      threshold: a head votes for itself where its ratio is greater. Published for LLaVA-1.5-13B:
        0.2, 0.077 and 0.035 for about 10, 20 and 30 of 40 heads.
      share: a head is active with the votes of more than this share of the examples.
      always: layers, from the first, whose heads are all active.

    Raises:
      ValueError: ratios of another form.
    """
    ratios = np.asarray(ratios)
    if ratios.ndim != 3 or not len(ratios):
        raise ValueError(f"ratios of shape {ratios.shape}: want [examples, layers, heads]")
    active: np.ndarray = (ratios > threshold).sum(0) > share * len(ratios)
    active[:always] = True
    return active


def head_mask(mask: Any) -> HeadMask:
    """What `Yopo.heads` wants of an array [layers, H], such as a released .npy file.

    Raises:
      ValueError: an array of another form.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2:
        raise ValueError(f"a mask of shape {mask.shape}: want [layers, heads]")
    return tuple(tuple(bool(head) for head in row) for row in mask)


def linear_share(policy: Yopo, decoder: DecoderConfig) -> float:
    """What remains of the products of vision tokens with the weights of the layers, as the paper
    counts: heads that vision does not use, neurons that it does not reach, and layers in which
    nobody reads it cost nothing.
    """
    layers = decoder.depth if policy.layers is None else policy.layers
    heads = 1.0 if policy.heads is None else float(np.mean(policy.heads))
    mlp = 3 * int(decoder.mlp_dim / policy.mlp_ratio) / decoder.width
    whole = 4 + 3 * decoder.mlp_dim / decoder.width
    return (4 * heads + mlp) / whole * layers / decoder.depth


# ------------------------------------------------------------------ sizes


def _released(config: LlavaConfig, policy: Yopo) -> LlavaConfig:
    """With this policy and the vocabulary of Vicuna v1.5, which is what the checkpoints have."""
    return replace(config, decoder=replace(config.decoder, vocab_size=32_000), policies=(policy,))


_TINY = replace(llava.VARIANTS["llava_tiny"].decoder, depth=3)

VARIANTS = {
    # The official training script. The mask of heads, 30 of 40, is a file of the repository.
    "yopo_llava_1_5_13b": _released(
        llava.VARIANTS["llava_1_5_13b"], Yopo(window=5, mlp_ratio=2, layers=20)
    ),
    "yopo_tiny": replace(
        llava.VARIANTS["llava_tiny"],
        decoder=_TINY,
        policies=(
            Yopo(
                window=3,
                heads=((True,) * 4, (True, False, True, True), (True, True, False, False)),
                mlp_ratio=2,
                layers=2,
            ),
        ),
    ),
}


def table(config: LlavaConfig) -> Table:
    """Keys of the official checkpoints, which are those of LLaVA-1.5."""
    projector = projector_rows(bias=True, keys=("0", "2"))
    return llava_table(config) + projector.under("connector", "model.mm_projector.")


register(CARD, VARIANTS, table=table)
