"""CrossViT: two vision transformers, of small and of large patches, whose class tokens read each
other's patches.

Each of K stages runs some layers in both branches; then the class token of one branch, brought to
the width of the other, attends to that one's patches, and goes back in place of the old one. Both
branches do so at the same time. The logits are the mean of those of both class tokens.

Follows: arXiv:2103.14899.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from zoo.models.core.card import Card
from zoo.models.core.keytable import AnyRow, Row, Table, conv, linear, norm_rows, weight_rows
from zoo.models.core.registry import register
from zoo.models.core.types import Array, Features, Stream, Tokens
from zoo.models.parts.assemblies.classifier import Classifier, ClassifierConfig
from zoo.models.parts.layers.activations import ACTIVATIONS
from zoo.models.parts.layers.attention import attend, everything
from zoo.models.parts.layers.conv import Conv
from zoo.models.parts.layers.embed import PatchEmbed, check_pixels
from zoo.models.parts.layers.gates import (
    DROP_KEY,
    DropPath,
    Rate,
    StochasticDepth,
    drop_path_stages,
)
from zoo.models.parts.layers.linear import Proj, dense
from zoo.models.parts.layers.norms import LayerNorm
from zoo.models.parts.layers.plan import Step
from zoo.models.parts.layers.resize import resize_bicubic
from zoo.models.parts.layers.stack import Remat, Stack
from zoo.models.parts.towers.vit import TIMM_LAYER, ViTConfig, layer_rows, ones

CARD = Card(
    slug="crossvit",
    paper="arXiv:2103.14899",
    code="https://github.com/IBM/CrossViT",
    differs=(
        "Without `crop_scale`, which no released model uses: a branch always sees the whole image, "
        "resized.",
        "One cross-attention per branch and stage, as in all released models; the official classes "
        "can chain several, of which all but the first see a single token.",
    ),
)

STEMS = {12: ((7, 4, 3), (3, 3, 0), (3, 1, 1)), 16: ((7, 4, 3), (3, 2, 1), (3, 2, 1))}
"""{patch size: (side, stride, padding) of the filters that stand for one large one}."""

Pair = tuple[int, int]
"""A number for each branch: that of the small patches first."""


@dataclass(frozen=True)
class CrossViTConfig:
    """Sizes of both branches.

    Attributes:
      image_sizes: side of the square image that each branch sees; images of another size are
        resized to it.
      patch_sizes: side of a patch in pixels.
      widths: D of each branch.
      depths: for each stage, the layers of each branch.
      num_heads: attention heads.
      mlp_ratios: hidden width of the MLPs, in widths.
      stem: three filters instead of one cut patches out (the models with a dagger).
      norm_eps: epsilon of the norms.
      drop_path: in training, the share of examples for which a half of the last layers is left out;
        it rises evenly from 0 in the first.
      channels: of the images.
      dtype: in which activations are computed.
      remat: what layers keep for the gradient, as in `Stack`.
    """

    image_sizes: Pair = (240, 224)
    patch_sizes: Pair = (12, 16)
    widths: Pair = (96, 192)
    depths: tuple[Pair, ...] = ((1, 4),) * 3
    num_heads: Pair = (3, 3)
    mlp_ratios: tuple[float, float] = (4, 4)
    stem: bool = False
    norm_eps: float = 1e-6
    drop_path: float = 0.0
    channels: int = 3
    dtype: str = "float32"
    remat: Remat = "none"

    class_token: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for image, patch in zip(self.image_sizes, self.patch_sizes, strict=True):
            if image < patch or image % patch:
                raise ValueError(f"image_sizes: {image} is no multiple of its patch size {patch}")
        if self.stem and any(size not in STEMS for size in self.patch_sizes):
            raise ValueError(f"patch_sizes = {self.patch_sizes}: a stem wants each of 12 or 16")

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that it is made for, those of the first branch."""
        return self.image_sizes[0]

    @property
    def width(self) -> int:
        """Width of both class tokens, side by side."""
        return sum(self.widths)

    def grid(self, branch: int) -> Pair:
        """Patches per column and row of a branch."""
        return (self.image_sizes[branch] // self.patch_sizes[branch],) * 2

    @property
    def rates(self) -> tuple[np.ndarray | None, ...]:
        """Of dropped paths, for each stage: those of the longer branch's layers; the other branch
        has the first of them, and the cross-attention the last. None for none.
        """
        return drop_path_stages([max(pair) for pair in self.depths], self.drop_path)

    def branch(self, number: int) -> ViTConfig:
        """Sizes of the layers of a branch, those of all stages one after another."""
        width = self.widths[number]
        return ViTConfig(
            width=width,
            depth=sum(pair[number] for pair in self.depths),
            num_heads=self.num_heads[number],
            mlp_dim=int(width * self.mlp_ratios[number]),
            norm_eps=self.norm_eps,
            activation="gelu",
        )

    def plan(self, number: int) -> tuple[Step, ...]:
        """The layers of a branch, each drawing for itself whether its paths are dropped."""
        steps = self.branch(number).plan()
        if not self.drop_path:
            return steps
        pairs = zip(self.depths, self.rates, strict=True)
        rates = [float(r) for pair, own in pairs for r in own[: pair[number]]]
        drops = [StochasticDepth(rate, 2 * i + number) for i, rate in enumerate(rates)]
        return tuple(Step(s.block, (drop,)) for s, drop in zip(steps, drops, strict=True))

    def build(self) -> "CrossViT":
        """The module."""
        return CrossViT(self)


class Stem(nn.Module):
    """Three convolutions, with a ReLU between them, that cut patches out: [B, H, W, C] to
    [B, N, D].
    """

    patch_size: int
    width: int

    def setup(self) -> None:
        widths = (self.width // 4, self.width // 2, self.width)
        filters = zip(widths, STEMS[self.patch_size], strict=True)
        self.convs = [Conv(w, side, step, padding=edge) for w, (side, step, edge) in filters]

    def __call__(self, pixels: Array) -> Array:
        x = pixels
        for i, each in enumerate(self.convs):
            x = each(nn.relu(x) if i else x)
        return x.reshape(x.shape[0], -1, self.width)


class Crossing(nn.Module):
    """The class token of one branch reads the other branch and comes back.

    `z = [through(cls); patches of the other]`, `z_0 + attention(z_0 over z)`, and back; `through`
    and `back` are a norm, a GELU and a linear map.

    Attributes:
      width: D of this branch.
      other: D of the other one.
      num_heads: of the other one.
      norm_eps: epsilon of the norms.
    """

    width: int
    other: int
    num_heads: int
    norm_eps: float

    def setup(self) -> None:
        d, h, e = self.other, self.num_heads, self.other // self.num_heads
        norms = (LayerNorm(self.norm_eps) for _ in range(3))
        self.through_norm, self.attn_norm, self.back_norm = norms
        self.through = dense(self.width, d, bias=True)
        heads = ("embed", "heads", "head_dim")
        self.q, self.k, self.v = (
            Proj("...d,dhe->...he", (d, h, e), heads, bias=True) for _ in range(3)
        )
        self.out = Proj("...he,hed->...d", (h, e, d), heads[1:] + heads[:1], num_in=2, bias=True)
        self.back = dense(d, self.width, bias=True)
        self.drop_path = DropPath()

    def read(self, cls: Array, patches: Array, rate: Rate = None, *, train: bool = False) -> Array:
        """What the class token [B, 1, D] has read of the other branch's patches [B, N, D']:
        [B, 1, D'].
        """
        cls = self.through(ACTIVATIONS["gelu"](self.through_norm(cls)))
        x = self.attn_norm(jnp.concatenate([cls, patches], 1))  # [B, 1 + N, D']
        key = Tokens.sequence(jnp.ones(x.shape[:2], bool))
        query = Tokens.sequence(jnp.ones((x.shape[0], 1), bool))
        y = attend(self.q(x[:, :1]), self.k(x), self.v(x), everything, query, key)
        return cls + self.drop_path(self.out(y), rate, train=train)

    def __call__(self, cls: Array, patches: Array, rate: Rate, *, train: bool) -> Array:
        """The new class token [B, 1, D]."""
        y = self.read(cls, patches, rate, train=train)
        return self.back(ACTIVATIONS["gelu"](self.back_norm(y)))


class CrossViT(nn.Module):
    """Both branches.

    `features.pyramid` are the patches of both after their norms, the small ones first, which are
    also `features.tokens`; `features.cls` are both class tokens side by side; `features.taps[k]`
    are the class token and the small patches after k stages.
    """

    config: CrossViTConfig

    def setup(self) -> None:
        c = self.config
        both = range(2)
        table = nn.initializers.truncated_normal(0.02)
        rows = nn.with_logical_partitioning(table, ("positions", "embed"))
        vector = nn.with_logical_partitioning(table, ("norm",))
        shapes = [(1 + c.grid(b)[0] ** 2, c.widths[b]) for b in both]
        self.positions = [self.param(f"positions_{b}", rows, shapes[b]) for b in both]
        self.cls = [self.param(f"cls_{b}", vector, (c.widths[b],)) for b in both]
        self.patches = [
            Stem(patch, width) if c.stem else PatchEmbed(patch, width, c.channels)
            for patch, width in zip(c.patch_sizes, c.widths, strict=True)
        ]
        self.stacks = [Stack(c.plan(b), remat=c.remat) for b in both]
        self.crossings = [
            Crossing(c.widths[b], c.widths[1 - b], c.num_heads[1 - b], c.norm_eps)
            for _ in c.depths
            for b in both
        ]
        self.norms = [LayerNorm(c.norm_eps) for _ in both]

    def __call__(
        self, pixels: Array, *, train: bool = False, taps: tuple[int, ...] = ()
    ) -> Features:
        """Encode images.

        Args:
          pixels: [..., H, W, C], normalised, of any size.
          train: whether paths are dropped, by the random stream "dropout".
          taps: stages after which to return the first branch, 0 to K.

        Raises:
          ValueError: another image, or a stage that the tower does not have.
        """
        c, lead = self.config, pixels.shape[:-3]
        check_pixels(pixels, channels=c.channels)
        if bad := [tap for tap in taps if not 0 <= tap <= len(c.depths)]:
            raise ValueError(f"taps {bad}: want 0 to {len(c.depths)}, the stages of the tower")
        images = pixels.reshape(-1, *pixels.shape[-3:]).astype(c.dtype)
        x = [self._embed(images, b) for b in range(2)]  # [B, 1 + N_b, D_b]
        drops = train and bool(c.drop_path)
        memory = {DROP_KEY: self.make_rng("dropout")} if drops else {}
        found, done = {0: x[0]}, [0, 0]
        for stage, (depths, rates) in enumerate(zip(c.depths, c.rates, strict=True)):
            for b in range(2):
                stream = Stream(x[b], Tokens.sequence(jnp.ones(x[b].shape[:2], bool)))
                start, done[b] = done[b], done[b] + depths[b]
                stream, _, _ = self.stacks[b](stream, memory=memory, start=start, stop=done[b])
                x[b] = stream.hidden
            crossings = self.crossings[2 * stage : 2 * stage + 2]
            rate = rates[-1] if drops and rates is not None else None
            new = [crossings[b](x[b][:, :1], x[1 - b][:, 1:], rate, train=train) for b in range(2)]
            x = [jnp.concatenate([cls, old[:, 1:]], 1) for cls, old in zip(new, x, strict=True)]
            found[stage + 1] = x[0]
        x = [norm(each) for norm, each in zip(self.norms, x, strict=True)]
        x = [each.reshape(*lead, *each.shape[1:]) for each in x]
        maps = tuple(x[b][..., 1:, :].reshape(*lead, *c.grid(b), -1) for b in range(2))
        cls = jnp.concatenate([each[..., 0, :] for each in x], -1)
        kept = {tap: found[tap].reshape(*lead, *found[tap].shape[1:]) for tap in taps}
        return Features(x[0][..., 1:, :], c.grid(0), cls=cls, taps=kept, pyramid=maps)

    def _embed(self, pixels: Array, branch: int) -> Array:
        """The class token and the patches [B, 1 + N, D] of a branch, with their positions."""
        side = self.config.image_sizes[branch]
        x = self.patches[branch](resize_bicubic(pixels, side, side))
        cls = self.cls[branch].astype(x.dtype)
        cls = jnp.broadcast_to(cls, (x.shape[0], 1, cls.size))
        return jnp.concatenate([cls, x], 1) + self.positions[branch].astype(x.dtype)


@dataclass(frozen=True)
class CrossViTClassifierConfig(ClassifierConfig):
    """A `ClassifierConfig` with a head for each branch."""

    tower: CrossViTConfig = field(default_factory=CrossViTConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool != "cls":
            raise ValueError(f"pool = {self.pool!r}: want 'cls', the class tokens of both branches")

    def build(self) -> "CrossViTClassifier":
        """The module."""
        return CrossViTClassifier(self)


class CrossViTClassifier(Classifier):
    """Both branches judge by their class tokens; the logits are the mean."""

    def setup_head(self) -> None:
        """A linear head for each branch."""
        k, axes = self.config.num_classes, ("embed", "classes")
        widths = self.config.tower.widths
        self.heads = [Proj("...d,dk->...k", (d, k), axes, bias=True) for d in widths]

    def judge(self, pooled: Array, *, train: bool) -> Array:
        """Logits [..., K] of both class tokens [..., D + D']."""
        del train
        parts = jnp.split(pooled, (self.config.tower.widths[0],), -1)
        first, second = (head(part) for head, part in zip(self.heads, parts, strict=True))
        return (first + second) / 2


def _size(
    width: int, depth: int, num_heads: int, ratio: int, *, stem: bool = False, large: bool = False
) -> CrossViTClassifierConfig:
    tower = CrossViTConfig(
        image_sizes=(408, 384) if large else (240, 224),
        widths=(width, 2 * width),
        depths=((1, depth),) * 3,
        num_heads=(num_heads,) * 2,
        mlp_ratios=(ratio,) * 2,
        stem=stem,
    )
    return CrossViTClassifierConfig(tower, num_classes=1000)


# Sizes and names: models/crossvit.py of the official code, and timm's.
_SIZES = {
    "15": (192, 5, 6, 3),
    "tiny": (96, 4, 3, 4),
    "small": (192, 4, 6, 4),
    "base": (384, 4, 12, 4),
    "9": (128, 3, 4, 3),
    "18": (224, 6, 7, 3),
}
VARIANTS = {
    **{f"crossvit_{name}_240": _size(*sizes) for name, sizes in _SIZES.items()},
    **{f"crossvit_{n}_dagger_240": _size(*_SIZES[n], stem=True) for n in ("9", "15", "18")},
    **{f"crossvit_{n}_dagger_408": _size(*_SIZES[n], stem=True, large=True) for n in ("15", "18")},
    "crossvit_tiny": CrossViTClassifierConfig(
        CrossViTConfig((24, 32), (12, 16), (8, 16), ((1, 2), (1, 1)), (2, 2), (2, 2), stem=True),
        num_classes=5,
    ),
}


def _crossing_rows(stage: int, branch: int) -> list[AnyRow]:
    """Rows of the crossing from `branch` after a stage."""
    ours, theirs = f"crossings_{2 * stage + branch}/", f"blocks.{stage}."
    fusion = f"{theirs}fusion.{branch}."
    rows: list[AnyRow] = norm_rows(f"{ours}attn_norm", f"{fusion}norm1")
    for name in "qkv":
        rows += weight_rows(f"{ours}{name}", f"{fusion}attn.w{name}")
    rows += weight_rows(f"{ours}out", f"{fusion}attn.proj", linear(2))
    for name, key in (("through", "projs"), ("back", "revert_projs")):
        rows += norm_rows(f"{ours}{name}_norm", f"{theirs}{key}.{branch}.0")
        rows += weight_rows(f"{ours}{name}", f"{theirs}{key}.{branch}.2")
    return rows


def timm_table(config: CrossViTClassifierConfig) -> Table:
    """Keys of timm's checkpoints."""
    return _table(config, "{}_{}")


def table(config: CrossViTClassifierConfig) -> Table:
    """Keys of the official checkpoints."""
    return _table(config, "{}.{}")


def _table(config: CrossViTClassifierConfig, numbered: str) -> Table:
    tower, rows, heads = config.tower, [], []
    for b in range(2):
        rows.append(Row(f"positions_{b}", numbered.format("pos_embed", b), ones(1)))
        rows.append(Row(f"cls_{b}", numbered.format("cls_token", b), ones(2)))
        if tower.stem:
            for i in range(3):
                key = f"patch_embed.{b}.proj.{2 * i}"
                rows += weight_rows(f"patches_{b}/convs_{i}", key, conv)
        else:
            rows += weight_rows(f"patches_{b}", f"patch_embed.{b}.proj", conv)
        stages = range(len(tower.depths))
        steps = tuple(f"{s}.blocks.{b}.{i}" for s in stages for i in range(tower.depths[s][b]))
        options = {"stack": f"stacks_{b}/layers", "steps": steps}
        rows += layer_rows(tower.branch(b), "blocks.{}.", TIMM_LAYER, **options)
        for stage in stages:
            rows += _crossing_rows(stage, b)
        rows += norm_rows(f"norms_{b}", f"norm.{b}")
        if config.num_classes:
            heads += weight_rows(f"heads_{b}", f"head.{b}")
    return Table(tuple(rows)).under("tower") + Table(tuple(heads))


register(CARD, VARIANTS, table=table)
