"""ViR: a vision transformer with retention in the place of attention.

Every token reads those before it, with weights that decay with distance and differ from head to
head; the class token stands at the end. The same numbers come out of three forms: in parallel,
token by token with a state of fixed size, or chunk by chunk (`zoo.models.parts.layers.retention`).

Follows: arXiv:2310.19731.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from zoo.models.core.card import Card
from zoo.models.core.keytable import Row, Table, conv, norm_rows, weight_rows
from zoo.models.core.registry import register
from zoo.models.core.types import Array, Features, Memory, Stream, Tokens
from zoo.models.parts.assemblies.classifier import ClassifierConfig, head_table
from zoo.models.parts.layers.embed import PatchEmbed, check_pixels
from zoo.models.parts.layers.gates import DROP_KEY, stochastic_depth
from zoo.models.parts.layers.norms import LayerNorm, NormKind
from zoo.models.parts.layers.plan import Step
from zoo.models.parts.layers.resize import resize_bicubic
from zoo.models.parts.layers.retention import log_decays, retain, retain_chunks, retain_tokens
from zoo.models.parts.layers.stack import Remat, Stack
from zoo.models.parts.towers.vit import Names, ViTBlock, layer_rows, ones

CARD = Card(
    slug="vir",
    paper="arXiv:2310.19731",
    code="https://github.com/NVlabs/ViR",
    differs=(
        "The parallel form is the paper's, equal to the others; the released training path, with a "
        "softmax over decayed scores, is `softmax=True`.",
        "Images of other sizes resize the position table; the released code takes one size.",
    ),
)

Form = Literal["parallel", "recurrent", "chunks"]
"""How retention is computed; the results are equal."""


@dataclass(frozen=True)
class VirConfig:
    """Sizes of the tower. The defaults are ViR-S/16.

    Attributes:
      image_size: side in pixels of the images that the positions were made for, a multiple of
        `patch_size`; others are taken too.
      patch_size: side of a patch in pixels.
      width: D.
      depth: number of layers.
      num_heads: heads of retention.
      mlp_dim: hidden width of the MLP.
      layer_scale: first value of a learned gain on each branch of a layer; None for no gains.
      both_ways: the sequence is followed by itself in reverse order; the last token then is the
        first patch.
      form: of retention.
      chunk: tokens of a chunk, for the form "chunks".
      softmax: with the form "parallel", the weights of the released code, see `retain`.
      norm_eps: epsilon of the norms.
      drop_path: in training, the share of examples for which a half of the last layer is left out;
        it rises evenly from 0 in the first.
      channels: of the images.
      dtype: in which activations are computed.
      remat: what layers keep for the gradient, as in `Stack`.
    """

    image_size: int = 224
    patch_size: int = 16
    width: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_dim: int = 1536
    layer_scale: float | None = 1e-5
    both_ways: bool = False
    form: Form = "parallel"
    chunk: int = 64
    softmax: bool = False
    norm_eps: float = 1e-6
    drop_path: float = 0.0
    channels: int = 3
    dtype: str = "float32"
    remat: Remat = "none"

    class_token: ClassVar[bool] = True
    norm: ClassVar[NormKind] = "layer"
    qkv_bias: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.image_size < self.patch_size or self.image_size % self.patch_size:
            raise ValueError(
                f"image_size = {self.image_size}: want a multiple of patch_size = {self.patch_size}"
            )
        if self.form not in get_args(Form):
            raise ValueError(f"form = {self.form!r}: want one of {', '.join(get_args(Form))}")
        if self.softmax and self.form != "parallel":
            raise ValueError(f"softmax with form = {self.form!r}: want the form 'parallel'")
        if self.chunk < 1:
            raise ValueError(f"chunk = {self.chunk}: want 1 or more")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and row of an image of `image_size`."""
        return (self.image_size // self.patch_size,) * 2

    def plan(self) -> tuple[Step, ...]:
        """The layers, all alike."""
        block = RetentionBlock(
            width=self.width,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            norm="layer",
            norm_eps=self.norm_eps,
            activation="gelu",
            gated=False,
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            rope=None,
            layer_scale=self.layer_scale,
            form=self.form,
            chunk=self.chunk,
            softmax=self.softmax,
            parent=None,
        )
        return tuple(Step(block, each) for each in stochastic_depth(self.depth, self.drop_path))

    def build(self) -> "Vir":
        """The module."""
        return Vir(self)


class RetentionBlock(ViTBlock):
    """The layer of a ViT with retention instead of attention.

    Attributes:
      form, chunk, softmax: as in `VirConfig`.
    """

    form: Form = "parallel"
    chunk: int = 64
    softmax: bool = False

    def mix(
        self, stream: Stream, q: Array, k: Array, v: Array, key: Tokens, memory: Memory
    ) -> Array:
        """Retention [B, L, H, E] of a whole sequence."""
        del stream, key, memory
        return self.retain(q, k, v)[0]

    def retain(
        self, q: Array, k: Array, v: Array, state: Array | None = None
    ) -> tuple[Array, Array | None]:
        """Retention [B, L, H, E] of queries that are not scaled yet, after what `state` holds; and
        the state after it, which the parallel form neither takes nor makes.
        """
        q, gammas = q * q.shape[-1] ** -0.5, log_decays(self.num_heads)
        if self.form == "recurrent":
            return retain_tokens(q, k, v, gammas, state)
        if self.form == "chunks":
            return retain_chunks(q, k, v, gammas, self.chunk, state)
        return retain(q, k, v, gammas, softmax=self.softmax), None


class Vir(nn.Module):
    """Patches with positions, the class token, layers, a norm.

    `features.tokens` are the patches, `features.cls` is the last token, and `features.taps[k]` the
    residual stream after k layers, in the order of the sequence.
    """

    config: VirConfig

    def setup(self) -> None:
        c = self.config
        self.patch = PatchEmbed(c.patch_size, c.width, c.channels)
        init = nn.initializers.truncated_normal(0.02)
        self.cls = self.param("cls", nn.with_logical_partitioning(init, ("norm",)), (c.width,))
        rows = nn.with_logical_partitioning(init, ("positions", "embed"))
        self.position = self.param("position", rows, (math.prod(c.grid), c.width))
        self.stack = Stack(c.plan(), remat=c.remat)
        self.final_norm = LayerNorm(c.norm_eps)

    def __call__(
        self, pixels: Array, *, train: bool = False, taps: tuple[int, ...] = ()
    ) -> Features:
        """Encode images.

        Args:
          pixels: [..., H, W, C], normalised; H and W are multiples of `patch_size`.
          train: whether paths are dropped, by the random stream "dropout".
          taps: depths at which to return the residual stream, 0 to `depth`.

        Raises:
          ValueError: an image that does not fit, or a layer that the tower does not have.
        """
        c, lead = self.config, pixels.shape[:-3]
        check_pixels(pixels, channels=c.channels, multiple=c.patch_size)
        if bad := [tap for tap in taps if not 0 <= tap <= c.depth]:
            raise ValueError(f"taps {bad}: want 0 to {c.depth}, the layers of the tower")
        hidden, grid = self._embed(pixels.reshape(-1, *pixels.shape[-3:]).astype(c.dtype))
        stream = Stream(hidden, Tokens.sequence(jnp.ones(hidden.shape[:2], bool)))
        memory = {DROP_KEY: self.make_rng("dropout")} if train and c.drop_path else None
        found, done = {}, 0
        for mark in sorted({*taps, c.depth}):
            stream, _, _ = self.stack(stream, memory=memory, start=done, stop=mark)
            done = mark
            if mark in taps:
                found[mark] = stream.hidden.reshape(*lead, *stream.hidden.shape[1:])
        y = self.final_norm(stream.hidden)
        y = y.reshape(*lead, *y.shape[1:])
        return Features(y[..., : math.prod(grid), :], grid, cls=y[..., -1, :], taps=found)

    def _embed(self, pixels: Array) -> tuple[Array, tuple[int, int]]:
        """The input of the first layer [B, L, D], and the grid of the patches."""
        c = self.config
        x = self.patch(pixels)
        grid = (pixels.shape[1] // c.patch_size, pixels.shape[2] // c.patch_size)
        table = self.position.astype(jnp.float32).reshape(*c.grid, -1)
        x = x + resize_bicubic(table, *grid).reshape(-1, c.width).astype(x.dtype)
        cls = jnp.broadcast_to(self.cls.astype(x.dtype), (x.shape[0], 1, c.width))
        x = jnp.concatenate([x, cls], 1)
        return jnp.concatenate([x, x[:, ::-1]], 1) if c.both_ways else x, grid


_LAYER: Names = {
    "attn_norm": "norm1",
    ("q", "k", "v"): "retention.qkv",
    "out": "retention.out_proj",
    "attn_gain": "ls1.gamma",
    "mlp_norm": "norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
    "mlp_gain": "ls2.gamma",
}


def table(config: ClassifierConfig) -> Table:
    """Keys of the released code."""
    rows = (
        *weight_rows("patch", "patch_embed.proj", conv),
        Row("position", "pos_embed", ones(1)),
        Row("cls", "cls_token", ones(2)),
        *norm_rows("final_norm", "norm"),
        *layer_rows(config.tower, "blocks.{}.", _LAYER),
    )
    return Table(rows).under("tower") + head_table(config, head="head")


def state_size(config: VirConfig) -> int:
    """Numbers that the recurrent form remembers of an image, over all layers; it does not depend on
    the number of tokens.
    """
    head_dim = config.width // config.num_heads
    return int(np.prod((config.depth, config.num_heads, head_dim, head_dim)))


def _size(width: int, depth: int, num_heads: int, patch_size: int = 16) -> ClassifierConfig:
    tower = VirConfig(
        patch_size=patch_size, width=width, depth=depth, num_heads=num_heads, mlp_dim=4 * width
    )
    return ClassifierConfig(tower, num_classes=1000)


VARIANTS = {
    "vir_s16": _size(384, 12, 6),
    "vir_b16": _size(768, 12, 12),
    "vir_l16": _size(1024, 24, 16),
    "vir_l14": _size(1024, 24, 16, 14),
    "vir_tiny": ClassifierConfig(
        VirConfig(
            image_size=16,
            patch_size=4,
            width=16,
            depth=2,
            num_heads=2,
            mlp_dim=32,
            layer_scale=0.5,
        ),
        num_classes=5,
    ),
}


register(CARD, VARIANTS, table=table)
