"""FastViT: stages of convolutions, then of attention, whose branches fold into single convolutions.

In training a convolution is the sum of several, each with a norm, and perhaps of the normed input.
As all of them are linear once the statistics stand still, they fold into one (`fuse`); the numbers
stay the same.

Follows: arXiv:2303.14189 and, with five stages and a stride of 64, arXiv:2412.13303.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from zoo.models.core.types import Array, Features, Tokens
from zoo.models.parts.layers.activations import ACTIVATIONS
from zoo.models.parts.layers.attention import attend, everything
from zoo.models.parts.layers.branched import (
    NORM_EPS,
    BranchedConv,
    folded,
    identity_kernel,
    joined,
    scaled,
)
from zoo.models.parts.layers.conv import ConvNormAct, depthwise
from zoo.models.parts.layers.embed import check_pixels
from zoo.models.parts.layers.gates import (
    DropPath,
    LayerScale,
    Rate,
    SqueezeExcite,
    drop_path_stages,
)
from zoo.models.parts.layers.linear import Proj, dense
from zoo.models.parts.layers.norms import BatchNorm, LayerNorm
from zoo.models.parts.layers.repeat import Repeat
from zoo.models.parts.towers.pyramid import as_tokens, pyramid_features

Form = Literal["branches", "released", "folded"]
"""How convolutions are kept: as sums of branches, for training; each as one, but for those within
the MLPs, whose norms stay, as checkpoints are released; all as one, without statistics."""


@dataclass(frozen=True)
class FastViTConfig:
    """Sizes of the tower. The defaults are FastViTHD.

    Every stage has half the resolution of the one before; the first has a quarter of the image's.

    Attributes:
      image_size: side in pixels of the images that it is made for; it takes others.
      depths: layers of each stage.
      widths: channels of each stage.
      mlp_ratios: hidden width of the MLPs of each stage, in widths.
      attention_from: the first stage, from 0, whose layers attend.
      head_dim: width of the attention heads.
      head_width: width of a linear map of the mean of all places, which becomes `Features.cls`; 0
        for none.
      form: how convolutions are kept.
      layer_scale: first value of the learned gains.
      drop_path: in training, the share of examples for which a branch of the last layer is left
        out; it rises evenly from 0 in the first.
      channels: of the images.
      dtype: in which activations are computed.
    """

    image_size: int = 1024
    depths: tuple[int, ...] = (2, 12, 24, 4, 2)
    widths: tuple[int, ...] = (96, 192, 384, 768, 1536)
    mlp_ratios: tuple[int, ...] = (4, 4, 4, 4, 4)
    attention_from: int = 3
    head_dim: int = 32
    head_width: int = 0
    form: Form = "released"
    layer_scale: float = 1e-5
    drop_path: float = 0.0
    channels: int = 3
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if len({len(self.depths), len(self.widths), len(self.mlp_ratios)}) > 1 or not self.depths:
            raise ValueError(
                f"depths = {self.depths}, widths = {self.widths} and mlp_ratios = "
                f"{self.mlp_ratios}: want one of each per stage"
            )
        if self.form not in Form.__args__:
            raise ValueError(f"form = {self.form!r}: want one of {', '.join(Form.__args__)}")
        if bad := [w for w in self.widths[self.attention_from :] if w % self.head_dim]:
            raise ValueError(f"widths {bad}: want multiples of head_dim = {self.head_dim}")
        pairs = zip(self.widths[:-1], self.widths[1:], strict=True)
        if bad := [pair for pair in pairs if pair[1] % pair[0]]:
            raise ValueError(f"widths {bad}: want each a multiple of the one before")

    @property
    def depth(self) -> int:
        """The number of stages, by which `taps` count."""
        return len(self.depths)

    @property
    def stride(self) -> int:
        """Pixels per side of what one token stands for."""
        return 4 * 2 ** (len(self.depths) - 1)

    @property
    def width(self) -> int:
        """D of the tokens, twice that of the last stage."""
        return 2 * self.widths[-1]

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens per column and row of an image of `image_size`."""
        return (-(-self.image_size // self.stride),) * 2

    @property
    def prefix(self) -> int:
        """Tokens before those of the image: none."""
        return 0

    @property
    def class_token(self) -> bool:
        """Whether there is a class token: there is none."""
        return False

    @property
    def attention_pool(self) -> bool:
        """Whether there is a `Features.cls`."""
        return self.head_width > 0

    @property
    def unread(self) -> tuple[str, ...]:
        """Parameters that no gradient reaches: none."""
        return ()

    def build(self) -> "FastViT":
        """The module."""
        return FastViT(self)


class RepMixer(nn.Module):
    """`x + gain * (branched(x) - norm(x))`, depthwise; or one convolution that is all of it."""

    width: int
    layer_scale: float
    one: bool

    def setup(self) -> None:
        if self.one:
            self.conv = depthwise(self.width, 3)
            return
        self.branched = BranchedConv(self.width, self.width, 3, groups=self.width, small=1)
        self.norm = BatchNorm(NORM_EPS)
        self.gain = LayerScale(self.layer_scale)

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """[B, h, w, C] to the same shape."""
        if self.one:
            return self.conv(x)
        return x + self.gain(self.branched(x, train=train) - self.norm(x, train=train))


class ConvMLP(nn.Module):
    """`down(gelu(up(norm(filtered x))))` with depthwise filters of side 7."""

    width: int
    hidden: int
    form: Form

    def setup(self) -> None:
        w = self.width
        if self.form == "folded":
            self.local = depthwise(w, 7)
        else:
            self.local = ConvNormAct(w, 7, groups=w, activation=None, norm_eps=NORM_EPS)
        self.up = dense(w, self.hidden, bias=True)
        self.down = dense(self.hidden, w, bias=True, axes=("mlp", "embed"))

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """[B, h, w, C] to the same shape."""
        x = self.local(x) if self.form == "folded" else self.local(x, train=train)
        return self.down(ACTIVATIONS["gelu"](self.up(x)))


class FastViTBlock(nn.Module):
    """`mixer(x)`, or `x + gain * attention(norm(x))`; then `x + gain * mlp(x)`.

    Attributes:
      config: of the tower.
      stage: from 0.
    """

    config: FastViTConfig
    stage: int

    @property
    def attends(self) -> bool:
        """Whether places see each other, or their neighbours only."""
        return self.stage >= self.config.attention_from

    def setup(self) -> None:
        c, width = self.config, self.config.widths[self.stage]
        if self.attends:
            h, e = width // c.head_dim, c.head_dim
            heads = ("embed", "heads", "head_dim")
            self.attn_norm = LayerNorm(NORM_EPS)
            self.q, self.k, self.v = (Proj("...d,dhe->...he", (width, h, e), heads) for _ in "qkv")
            self.out = dense(width, width, bias=True)
            self.attn_gain = LayerScale(c.layer_scale)
        else:
            self.mixer = RepMixer(width, c.layer_scale, c.form != "branches")
        self.mlp = ConvMLP(width, c.mlp_ratios[self.stage] * width, c.form)
        self.mlp_gain = LayerScale(c.layer_scale)
        self.drop_path = DropPath()

    def attention(self, x: Array) -> Array:
        """Of all places over all, without what follows: [B, h, w, C] to the same shape."""
        h = as_tokens(self.attn_norm(x))
        tokens = Tokens.sequence(jnp.ones(h.shape[:2], bool))
        y = attend(self.q(h), self.k(h), self.v(h), everything, tokens, tokens)
        return self.out(y.reshape(x.shape))

    def __call__(self, x: Array, *, rate: Rate = None, train: bool = False) -> Array:
        """[B, h, w, C] to the same shape."""
        if self.attends:
            x = x + self.drop_path(self.attn_gain(self.attention(x)), rate, train=train)
        else:
            x = self.mixer(x, train=train)
        return x + self.drop_path(self.mlp_gain(self.mlp(x, train=train)), rate, train=train)


class Position(nn.Module):
    """`x + filtered x` with depthwise filters of side 7, or one convolution that is both."""

    width: int
    one: bool

    def setup(self) -> None:
        if self.one:
            self.conv = depthwise(self.width, 7)
        else:
            self.around = depthwise(self.width, 7)

    def __call__(self, x: Array) -> Array:
        """[B, h, w, C] to the same shape."""
        return self.conv(x) if self.one else x + self.around(x)


class FastViT(nn.Module):
    """A stem, stages, and a last convolution that doubles the channels.

    `features.tokens` is what the last convolution makes, rows first; `features.pyramid` are the
    outputs of the stages, `features.taps[k]` those of stage k as tokens.
    """

    config: FastViTConfig

    def setup(self) -> None:
        c, one = self.config, self.config.form != "branches"
        first, last = c.widths[0], c.widths[-1]
        self.stem = [
            BranchedConv(c.channels, first, 3, 2, one=one),
            BranchedConv(first, first, 3, 2, groups=first, one=one),
            BranchedConv(first, first, one=one),
        ]
        pairs = list(zip(c.widths[:-1], c.widths[1:], strict=True))
        self.halve = [BranchedConv(a, b, 7, 2, groups=a, small=3, one=one) for a, b in pairs]
        self.mix = [BranchedConv(b, b, one=one) for _, b in pairs]
        self.positions = [Position(width, one) for width in c.widths[c.attention_from :]]
        self.stages = [
            Repeat(FastViTBlock(c, stage, parent=None), depth)
            for stage, depth in enumerate(c.depths)
        ]
        self.expand = BranchedConv(last, c.width, 3, groups=last, small=1, one=one)
        self.excite = SqueezeExcite(c.width, c.width // 16)
        if c.head_width:
            self.head = dense(c.width, c.head_width)

    def __call__(
        self,
        pixels: Array,
        *,
        train: bool = False,
        taps: tuple[int, ...] = (),
        stop_after: int | None = None,
    ) -> Features:
        """Encode images.

        Args:
          pixels: [..., H, W, C], between 0 and 1, of any size.
          train: whether batch statistics are those of the batch, and paths are dropped, by the
            random stream "dropout".
          taps: stages whose output to return as tokens, from 1.
          stop_after: None; this tower runs whole.

        Raises:
          ValueError: another image, a stage that the tower does not have, or a `stop_after`.
        """
        c, lead = self.config, pixels.shape[:-3]
        check_pixels(pixels, channels=c.channels)
        if stop_after is not None:
            raise ValueError(f"stop_after = {stop_after}: this tower runs whole; want None")
        x = self.stem_grid(pixels.reshape(-1, *pixels.shape[-3:]).astype(c.dtype), train=train)
        rates, pyramid = drop_path_stages(c.depths, c.drop_path), []
        for number, (stage, rate) in enumerate(zip(self.stages, rates, strict=True)):
            x = stage(self.enter(number, x, train=train), train=train, each={"rate": rate})
            pyramid.append(x.reshape(*lead, *x.shape[1:]))
        x = ACTIVATIONS["gelu"](self.excite(self.expand(x, train=train)))
        x = x.reshape(*lead, *x.shape[1:])
        features = pyramid_features(tuple(pyramid), taps, last=x)
        if c.head_width:
            features = features.replace(cls=self.head(x.mean((-3, -2))))
        return features

    def stem_grid(self, x: Array, *, train: bool = False) -> Array:
        """[B, H, W, C] to a grid of a quarter of the sides."""
        for part in self.stem:
            x = ACTIVATIONS["gelu"](part(x, train=train))
        return x

    def enter(self, stage: int, x: Array, *, train: bool = False) -> Array:
        """What the layers of a stage get of the output of the one before."""
        if stage:
            gelu = ACTIVATIONS["gelu"]
            x = gelu(self.halve[stage - 1](x, train=train))
            x = gelu(self.mix[stage - 1](x, train=train))
        first = self.config.attention_from
        return self.positions[stage - first](x) if stage >= first else x


Variables = Mapping[str, Any]


def fuse(variables: Variables, form: Form = "released") -> dict[str, Any]:
    """The variables of a tower of a simpler form that computes the same in evaluation.

    Differentiable, and equal in exact arithmetic. The configuration of the result is the one of the
    tower, or of what it is a part of, with this `form`.

    Args:
      variables: `params` and `stats`, unboxed, of a tower or of anything that has one.
      form: of the result, "released" or "folded".

    Returns:
      {"params": ...} and, where any are left, "stats".
    """
    if form not in ("released", "folded"):
        raise ValueError(f"form = {form!r}: want 'released' or 'folded'")
    params, stats = _fused(variables["params"], variables.get("stats", {}), form)
    return {"params": params} | ({"stats": stats} if stats else {})


def _fused(params: Any, stats: Any, form: Form) -> tuple[Any, Any]:
    """Parameters and statistics of a module and all below it."""
    if not isinstance(params, Mapping):
        return params, {}
    if "wide" in params:
        return {"conv": joined(params, stats)}, {}
    if "around" in params:
        around = params["around"]
        kernel = around["kernel"] + identity_kernel(around["kernel"])
        return {"conv": {"kernel": kernel, "bias": around["bias"]}}, {}
    if {"branched", "norm", "gain"} <= set(params):
        return {"conv": _mixed(params, stats)}, {}
    if form == "folded" and set(params) == {"conv", "norm"}:
        return folded(params, stats), {}
    if set(params) == {"scale", "bias"}:
        return dict(params), dict(stats)  # a norm
    kept = {name: _fused(child, stats.get(name, {}), form) for name, child in params.items()}
    left = {name: below for name, (_, below) in kept.items() if below}
    return {name: above for name, (above, _) in kept.items()}, left


def _mixed(params: Variables, stats: Variables) -> dict[str, Array]:
    """A `RepMixer` as one convolution."""
    branched, gain = joined(params["branched"], stats["branched"]), params["gain"]["scale"]
    one = identity_kernel(branched["kernel"])
    norm = scaled(one, params["norm"], stats["norm"])
    kernel = one + gain[..., None, None, None, :] * (branched["kernel"] - norm["kernel"])
    return {"kernel": kernel, "bias": gain * (branched["bias"] - norm["bias"])}
