"""Scale-Aware Modulation Transformer: a pyramid whose early stages multiply tokens by what filters
of four sizes see around them, and whose late stages attend.

Stages 1 and 2 modulate, stage 3 modulates and attends in turn, stage 4 attends. Every MLP has a
small filter inside.

Follows: "Scale-Aware Modulation Meet Transformer" (ICCV 2023).
"""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from zoo.models.core.card import Card
from zoo.models.core.keytable import (
    AnyRow,
    Row,
    Table,
    Transform,
    conv,
    flat,
    linear,
    norm_rows,
    pointwise,
    split,
    weight_rows,
)
from zoo.models.core.registry import register
from zoo.models.core.types import Array, Features, Tokens
from zoo.models.parts.assemblies.classifier import ClassifierConfig, head_table
from zoo.models.parts.layers.activations import ACTIVATIONS
from zoo.models.parts.layers.attention import attend, everything
from zoo.models.parts.layers.conv import Conv, ConvNormAct, depthwise
from zoo.models.parts.layers.embed import check_pixels
from zoo.models.parts.layers.gates import DropPath, LayerScale, Rate, drop_path_stages
from zoo.models.parts.layers.linear import Proj, dense, fan_in_init
from zoo.models.parts.layers.norms import BatchNorm, LayerNorm
from zoo.models.parts.layers.repeat import Repeat
from zoo.models.parts.towers.pyramid import as_tokens, pyramid_features

CARD = Card(
    slug="smt",
    code="https://github.com/AFeng-x/SMT",
    differs=(
        "Channels of the four filters are never interleaved: the map that mixes them contracts the "
        "axis of the filters instead.",
        "The large size has the gains on its branches that the official configuration file gives "
        "it; the official factory leaves them off.",
    ),
)


@dataclass(frozen=True)
class SMTConfig:
    """Sizes of the tower.

    Attributes:
      image_size: side in pixels of the images that it is made for; it takes others.
      widths: channels of the four stages.
      depths: layers of each stage.
      num_heads: attention heads in stages 3 and 4.
      mlp_ratios: hidden width of the MLPs of each stage, in widths.
      stem_size: side of the first filters.
      filters: how many groups of channels the modulation has; their filters have the sides 3, 5, 7
        and so on.
      expansion: width of the mixed filters, in widths.
      layer_scale: first value of a learned gain on each branch; None for no gains.
      drop_path: in training, the share of examples for which a half of the last layer is left out;
        it rises evenly from 0 in the first.
      channels: of the images.
      dtype: in which activations are computed.
    """

    image_size: int = 224
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    depths: tuple[int, int, int, int] = (2, 2, 8, 1)
    num_heads: tuple[int, int] = (8, 16)
    mlp_ratios: tuple[int, int, int, int] = (4, 4, 4, 2)
    stem_size: int = 3
    filters: int = 4
    expansion: int = 2
    layer_scale: float | None = None
    drop_path: float = 0.0
    channels: int = 3
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if bad := [width for width in self.widths[:3] if width % self.filters]:
            raise ValueError(f"widths {bad}: want multiples of filters = {self.filters}")
        if bad := [w for w, h in zip(self.widths[2:], self.num_heads, strict=True) if w % h]:
            raise ValueError(f"widths {bad}: want multiples of num_heads = {self.num_heads}")

    @property
    def width(self) -> int:
        """D of the tokens, which are those of the last stage."""
        return self.widths[-1]

    def build(self) -> "SMT":
        """The module."""
        return SMT(self)


class Modulation(nn.Module):
    """`out(modulator(x) * v(x))` on grids [B, h, w, C]: the paper's scale-aware modulation.

    Attributes:
      width: C.
      filters: F groups of G = C / F channels, group i filtered with a side of 3 + 2 i.
      expansion: the mixed filters have so many times C channels.
    """

    width: int
    filters: int
    expansion: int

    def setup(self) -> None:
        c, f = self.width, self.filters
        group, mixed = c // f, self.expansion * c
        self.v = dense(c, c, bias=True)
        self.s = dense(c, c, bias=True)
        self.local = [depthwise(group, 3 + 2 * i) for i in range(f)]
        init = nn.with_logical_partitioning(fan_in_init((1,), (2,)), ("embed", None, None))
        self.mix = self.param("mix", init, (group, f, mixed // group))
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))
        self.mix_bias = self.param("mix_bias", zeros, (mixed,))
        self.norm = BatchNorm()
        self.down = dense(mixed, c, bias=True, axes=("mlp", "embed"))
        self.out = dense(c, c, bias=True)

    def modulator(self, x: Array, *, train: bool = False) -> Array:
        """The factors [B, h, w, C]."""
        groups = jnp.split(self.s(x), self.filters, -1)
        seen = [conv(group) for conv, group in zip(self.local, groups, strict=True)]
        # Channel g of all groups is mixed by itself.
        y = jnp.einsum("bhwfg,gfo->bhwgo", jnp.stack(seen, -2), self.mix.astype(x.dtype))
        y = y.reshape(*x.shape[:-1], -1) + self.mix_bias.astype(x.dtype)  # [B, h, w, G O]
        return self.down(ACTIVATIONS["gelu"](self.norm(y, train=train)))

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        return self.out(self.modulator(x, train=train) * self.v(x))


class LocalAttention(nn.Module):
    """Attention of all over all on grids [B, h, w, C], plus the values filtered with a side of 3.

    Attributes:
      width: C.
      num_heads: heads.
    """

    width: int
    num_heads: int

    def setup(self) -> None:
        c, h, e = self.width, self.num_heads, self.width // self.num_heads
        heads = ("embed", "heads", "head_dim")
        self.q, self.k, self.v = (
            Proj("...d,dhe->...he", (c, h, e), heads, bias=True) for _ in range(3)
        )
        self.local = depthwise(c, 3)
        self.out = dense(c, c, bias=True)

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        del train
        h = as_tokens(x)  # [B, N, C]
        tokens = Tokens.sequence(jnp.ones(h.shape[:2], bool))
        v = self.v(h)
        y = attend(self.q(h), self.k(h), v, everything, tokens, tokens)  # [B, N, H, E]
        return self.out(y.reshape(x.shape) + self.local(v.reshape(x.shape)))


class SMTBlock(nn.Module):
    """`x + mixer(norm(x))`, then `x + down(gelu(u + filtered u))` with `u = up(norm(x))`.

    Attributes:
      config: of the tower.
      stage: from 0.
      attends: whether the mixer is attention, or modulation.
    """

    config: SMTConfig
    stage: int
    attends: bool

    def setup(self) -> None:
        c, width = self.config, self.config.widths[self.stage]
        hidden = c.mlp_ratios[self.stage] * width
        self.attn_norm, self.mlp_norm = LayerNorm(1e-6), LayerNorm(1e-6)
        if self.attends:
            self.mixer = LocalAttention(width, c.num_heads[self.stage - 2])
        else:
            self.mixer = Modulation(width, c.filters, c.expansion)
        self.up = dense(width, hidden, bias=True)
        self.local = depthwise(hidden, 3)
        self.down = dense(hidden, width, bias=True, axes=("mlp", "embed"))
        if c.layer_scale is not None:
            self.attn_gain, self.mlp_gain = LayerScale(c.layer_scale), LayerScale(c.layer_scale)
        self.drop_path = DropPath()

    def __call__(self, x: Array, *, rate: Rate = None, train: bool = False) -> Array:
        """[B, h, w, C] to the same shape."""
        scaled = self.config.layer_scale is not None
        y = self.mixer(self.attn_norm(x), train=train)
        y = self.attn_gain(y) if scaled else y
        x = x + self.drop_path(y, rate, train=train)
        y = self.mlp(self.mlp_norm(x))
        y = self.mlp_gain(y) if scaled else y
        return x + self.drop_path(y, rate, train=train)

    def mlp(self, x: Array) -> Array:
        """The MLP branch [B, h, w, C] of what is normed already."""
        hidden = self.up(x)
        return self.down(ACTIVATIONS["gelu"](hidden + self.local(hidden)))


class SMTPair(nn.Module):
    """Two layers of stage 3: one that modulates and one that attends."""

    config: SMTConfig

    def setup(self) -> None:
        self.modulating = SMTBlock(self.config, 2, attends=False)
        self.attending = SMTBlock(self.config, 2, attends=True)

    def __call__(self, x: Array, *, rate: Array | None = None, train: bool = False) -> Array:
        """[B, h, w, C] to the same shape; `rate` [2] are those of the two."""
        first, second = (None, None) if rate is None else (rate[0], rate[1])
        x = self.modulating(x, rate=first, train=train)
        return self.attending(x, rate=second, train=train)


class SMT(nn.Module):
    """Stages of layers with a norm after each.

    `features.pyramid` are the normed outputs of all stages, the last of which are
    `features.tokens`, and `features.taps[k]` those of stage k, as tokens.
    """

    config: SMTConfig

    def setup(self) -> None:
        c = self.config
        self.stem = ConvNormAct(c.widths[0], c.stem_size, 2)
        first = Conv(c.widths[0], 2, 2, padding=0)
        self.patches = [first, *(Conv(width, 3, 2, padding=1) for width in c.widths[1:])]
        self.patch_norms = [LayerNorm(1e-5) for _ in c.widths]
        blocks = [SMTBlock(c, stage, stage == 3, parent=None) for stage in range(4)]
        pairs = c.depths[2] // 2
        self.stages = [
            Repeat(blocks[0], c.depths[0]),
            Repeat(blocks[1], c.depths[1]),
            Repeat(SMTPair(c, parent=None), pairs),
            Repeat(blocks[3], c.depths[3]),
        ]
        if c.depths[2] % 2:
            self.odd = Repeat(blocks[2], 1)
        self.norms = [LayerNorm(1e-6) for _ in c.widths]

    def __call__(
        self, pixels: Array, *, train: bool = False, taps: tuple[int, ...] = ()
    ) -> Features:
        """Encode images.

        Args:
          pixels: [..., H, W, C], normalised; H and W are 4 or more, and need be no multiples.
          train: whether batch statistics are those of the batch, and paths are dropped, by the
            random stream "dropout".
          taps: stages whose output to return as tokens, from 1.

        Raises:
          ValueError: another image, or a stage that the tower does not have.
        """
        c, lead = self.config, pixels.shape[:-3]
        check_pixels(pixels, channels=c.channels)
        if min(pixels.shape[-3:-1]) < 4:
            raise ValueError(f"pixels: got {pixels.shape}, want a height and a width of 4 or more")
        x = pixels.reshape(-1, *pixels.shape[-3:]).astype(c.dtype)
        x = self.stem(x, train=train)
        rates, pyramid = drop_path_stages(c.depths, c.drop_path), []
        parts = zip(self.patches, self.patch_norms, self.norms, rates, strict=True)
        for stage, (patch, patch_norm, norm, rate) in enumerate(parts):
            x = norm(self._run(stage, patch_norm(patch(x)), rate, train=train))
            pyramid.append(x.reshape(*lead, *x.shape[1:]))
        return pyramid_features(tuple(pyramid), taps)

    def _run(self, stage: int, x: Array, rate: np.ndarray | None, *, train: bool) -> Array:
        """The layers of a stage, on [B, h, w, C]."""
        layers = self.stages[stage]
        if stage != 2:
            return layers(x, train=train, each={"rate": rate})
        if layers.depth:
            paired = None if rate is None else rate[: 2 * layers.depth].reshape(-1, 2)
            x = layers(x, train=train, each={"rate": paired})
        if self.config.depths[2] % 2:
            x = self.odd(x, train=train, each={"rate": None if rate is None else rate[-1:]})
        return x


def _size(**sizes: object) -> ClassifierConfig:
    return ClassifierConfig(SMTConfig(**sizes), "mean", num_classes=1000)  # type: ignore[arg-type]


_LARGE = {"widths": (96, 192, 384, 768), "depths": (4, 6, 28, 4), "layer_scale": 1e-4}
_LATER = {"mlp_ratios": (8, 6, 4, 2), "stem_size": 7}
# Sizes: models/smt.py and configs/smt of the official code.
VARIANTS = {
    "smt_t": _size(),
    "smt_s": _size(depths=(3, 4, 18, 2)),
    "smt_b": _size(depths=(4, 6, 28, 2), **_LATER),
    "smt_l": _size(**_LARGE, **_LATER),
    "smt_l.384": _size(**_LARGE, **_LATER, image_size=384),
    "smt_tiny": ClassifierConfig(
        SMTConfig(
            image_size=48,
            widths=(8, 12, 16, 24),
            depths=(1, 1, 3, 1),
            num_heads=(2, 3),
            mlp_ratios=(2, 2, 2, 2),
            layer_scale=0.5,
        ),
        "mean",
        num_classes=5,
    ),
}

_grouped = Transform(
    "grouped",
    lambda theirs, shapes: [theirs[0].reshape(shapes[0][0], -1, theirs[0].shape[1]).swapaxes(1, 2)],
    lambda ours: [ours[0].swapaxes(1, 2).reshape(-1, ours[0].shape[1], 1, 1)],
)
"""Their convolution kernel [G O, F, 1, 1] in G groups, ours [G, F, O]."""


def _block_rows(
    config: SMTConfig, ours: str, theirs: str, steps: tuple[int, ...], *, attends: bool
) -> list[AnyRow]:
    """Rows of the layers `steps` of a stage."""
    rows: list[AnyRow] = [
        *norm_rows(f"{ours}attn_norm", f"{theirs}norm1", steps=steps),
        *norm_rows(f"{ours}mlp_norm", f"{theirs}norm2", steps=steps),
        *weight_rows(f"{ours}mixer/out", f"{theirs}attn.proj", steps=steps),
        *weight_rows(f"{ours}up", f"{theirs}mlp.fc1", steps=steps),
        *weight_rows(f"{ours}local", f"{theirs}mlp.dwconv.dwconv", conv, steps=steps),
        *weight_rows(f"{ours}down", f"{theirs}mlp.fc2", steps=steps),
    ]
    if config.layer_scale is not None:
        rows.append(Row(f"{ours}attn_gain/scale", f"{theirs}gamma_1", steps=steps))
        rows.append(Row(f"{ours}mlp_gain/scale", f"{theirs}gamma_2", steps=steps))
    ours, theirs = f"{ours}mixer/", f"{theirs}attn."
    if attends:
        rows += weight_rows(f"{ours}q", f"{theirs}q", steps=steps)
        for leaf, key, each in (("kernel", "weight", linear()), ("bias", "bias", flat)):
            paths = (f"{ours}k/{leaf}", f"{ours}v/{leaf}")
            rows.append(Row(paths, f"{theirs}kv.{key}", split(2, each), steps))
        return rows + weight_rows(f"{ours}local", f"{theirs}local_conv", conv, steps=steps)
    for name in "vs":
        rows += weight_rows(f"{ours}{name}", f"{theirs}{name}", steps=steps)
    for i in range(config.filters):
        rows += weight_rows(f"{ours}local_{i}", f"{theirs}local_conv_{i + 1}", conv, steps=steps)
    rows.append(Row(f"{ours}mix", f"{theirs}proj0.weight", _grouped, steps))
    rows.append(Row(f"{ours}mix_bias", f"{theirs}proj0.bias", steps=steps))
    rows += norm_rows(f"{ours}norm", f"{theirs}bn", steps=steps, stats=True)
    return rows + weight_rows(f"{ours}down", f"{theirs}proj1", pointwise, steps=steps)


def table(config: ClassifierConfig) -> Table:
    """Keys of the official checkpoints."""
    tower = config.tower
    rows: list[AnyRow] = weight_rows("stem/conv", "patch_embed1.conv.0", conv, bias=False)
    rows += norm_rows("stem/norm", "patch_embed1.conv.1", stats=True)
    for stage, depth in enumerate(tower.depths):
        key = f"patch_embed{stage + 1}.proj" if stage else "patch_embed1.conv.3"
        rows += weight_rows(f"patches_{stage}", key, conv)
        rows += norm_rows(f"patch_norms_{stage}", f"patch_embed{stage + 1}.norm")
        rows += norm_rows(f"norms_{stage}", f"norm{stage + 1}")
        ours, theirs = f"stages_{stage}/layers/", f"block{stage + 1}.{{}}."
        if stage != 2:
            steps = tuple(range(depth))
            rows += _block_rows(tower, ours, theirs, steps, attends=stage == 3)
            continue
        paired = depth // 2 * 2
        for first, name in ((0, "modulating"), (1, "attending")):
            steps = tuple(range(first, paired, 2))
            if steps:
                own = f"{ours}{name}/"
                rows += _block_rows(tower, own, theirs, steps, attends=bool(first))
        if depth % 2:
            rows += _block_rows(tower, "odd/layers/", theirs, (depth - 1,), attends=False)
    body = Table(tuple(rows)).under("tower")
    return (body + head_table(config, head="head")).with_stats()


register(CARD, VARIANTS, table=table)
