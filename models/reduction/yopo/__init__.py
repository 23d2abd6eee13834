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

import numpy as np

from zoo.models.base import llava
from zoo.models.core.card import Card
from zoo.models.core.keytable import Table
from zoo.models.core.registry import register
from zoo.models.parts.assemblies.llava import LlavaConfig, llava_table
from zoo.models.parts.assemblies.llava_hub import projector_rows
from zoo.models.parts.decoders.gqa import DecoderConfig, Plan
from zoo.models.parts.decoders.policies import wrap
from zoo.models.parts.layers.block import Block
from zoo.models.parts.layers.plan import LayerPolicy
from zoo.models.parts.reduce.base import Keep, check_keep, num_kept
from zoo.models.reduction.yopo.heads import Calibrate, HeadMask, active_heads, head_mask
from zoo.models.reduction.yopo.layers import CutVision, WithoutVision

__all__ = ["Calibrate", "Yopo", "active_heads", "head_mask", "linear_share"]

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
      keep: a budget in place of `layers` and `drop`: vision tokens that a layer runs on the mean,
        as a number or a share. So many layers read all of them, and then they leave the sequence;
        where all are kept, nothing is cut at all.
    """

    window: int | None = None
    heads: HeadMask | None = None
    mlp_ratio: float = 1.0
    layers: int | None = None
    drop: bool = False
    grid: tuple[int, int] | None = None
    keep: Keep | None = None

    reduces: ClassVar[bool] = True
    ranks: ClassVar[bool] = False  # no token is chosen before another

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window = {self.window}: want 1 or more tokens, or None")
        if self.mlp_ratio < 1:
            raise ValueError(f"mlp_ratio = {self.mlp_ratio}: want 1 or more")
        if self.layers is not None and self.layers < 1:
            raise ValueError(f"layers = {self.layers}: want 1 or more layers, or None for all")
        if self.grid is not None and min(self.grid) < 1:
            raise ValueError(f"grid = {self.grid}: want rows and columns, 1 or more of each")
        if self.keep is not None:
            check_keep(self.keep)
            if self.layers is not None or self.drop:
                raise ValueError(
                    f"keep = {self.keep}: says in how many layers vision tokens are read; want "
                    "either this or `layers` with `drop`"
                )
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
          ValueError: masks of other layers or heads than the decoder has, more layers or tokens
            than there are, vision tokens that are no square where `grid` is None, or layers of
            another form.
        """
        if not slots:
            return plan
        depth = len(plan)
        if self.keep is not None:
            number = num_kept(self.keep, slots)
            share = self.keep if isinstance(self.keep, float) else number / slots
            read = max(1, round(share * depth))
            if number == slots:
                return plan
            rest = {} if read == depth else {"layers": read, "drop": True}
            return replace(self, keep=None, **rest).apply(plan, slots=slots)
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


def yopo(keep: Keep = 0.5) -> Yopo:
    """What of it needs neither calibration nor a grid: half of the neurons, as in the official
    training script, and layers within a budget; see `Yopo.keep`.
    """
    return Yopo(mlp_ratio=2, keep=keep)


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


register(CARD, VARIANTS, table=table, reducers={"yopo": yopo})
