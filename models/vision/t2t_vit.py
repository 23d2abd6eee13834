"""Tokens-to-Token ViT: a deep and narrow vision transformer whose tokens come from two rounds of
attention over overlapping patches.

The picture is cut into overlapping squares, which attend to each other; the result is a picture
again, of half the resolution, and is cut anew. After two rounds a token stands for 16 x 16 pixels
and has seen its surroundings. Attention within the rounds is that of a Performer, linear in the
number of tokens, or a full one.

Follows: arXiv:2101.11986; the Performer's positive features are those of arXiv:2009.14794.
"""

import math
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.models.core.card import Card
from zoo.models.core.keytable import AnyRow, Row, Table, flat, linear, norm_rows, split, weight_rows
from zoo.models.core.registry import register
from zoo.models.core.types import Array, Tokens
from zoo.models.parts.assemblies.classifier import ClassifierConfig, head_table
from zoo.models.parts.layers.activations import ACTIVATIONS
from zoo.models.parts.layers.attention import attend, everything
from zoo.models.parts.layers.embed import check_pixels
from zoo.models.parts.layers.linear import dense
from zoo.models.parts.layers.norms import LayerNorm
from zoo.models.parts.layers.positions import sincos_1d
from zoo.models.parts.layers.spatial import unfold
from zoo.models.parts.towers.vit import TIMM_LAYER, PositionResize, ViT, ViTConfig, layer_rows, ones

CARD = Card(
    slug="t2t_vit",
    paper="arXiv:2101.11986",
    code="https://github.com/yitu-opensource/T2T-ViT",
    differs=(
        "Images of other sizes resize the position table in every call; the official code does so "
        "once, when a checkpoint is loaded for another size.",
        "The attention logits of the layers are always divided by the root of the width of a head; "
        "the official factories do otherwise when told `pretrained=True`.",
    ),
)

TokenModule = Literal["performer", "transformer"]
"""The attention within the rounds: linear by random features, or full."""

DROPOUT = 0.1
"""Of the Performer, in training; the official code has it whatever the dropout of the model."""

SQUARES = ((7, 4, 2), (3, 2, 1), (3, 2, 1))
"""(side, stride, padding) of the squares: of the picture, and after each of the two rounds."""


@dataclass(frozen=True)
class T2TConfig(ViTConfig):
    """A `ViTConfig`, whose patches of 16 pixels become tokens as described above.

    Attributes:
      token_module: the attention within the rounds.
      token_dim: width of the tokens within the rounds.
    """

    image_size: int = 224
    patch_size: int = 16
    activation: str = "gelu"
    input_norm: bool = False
    qkv_bias: bool = False
    fixed_positions: bool = True
    position_resize: PositionResize | None = "bicubic"
    token_module: TokenModule = "performer"
    token_dim: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.token_module not in TokenModule.__args__:
            known = " or ".join(TokenModule.__args__)
            raise ValueError(f"token_module = {self.token_module!r}: want {known}")
        if self.patch_size != 16:
            raise ValueError(f"patch_size = {self.patch_size}: want 16, the stride of the rounds")

    @property
    def unread(self) -> tuple[str, ...]:
        """Parameters that no gradient reaches: the positions and the Performer's directions."""
        fixed = super().unread
        if self.token_module == "performer":
            fixed += ("patch/layers_0/directions", "patch/layers_1/directions")
        return fixed

    def build(self) -> "T2TViT":
        """The module."""
        return T2TViT(self)


def positive_features(x: Array, directions: Array) -> Array:
    """Random features whose products are `exp(x y)` in the mean: [B, N, D] to [B, N, M].

    Args:
      x: [B, N, D], computed in float32.
      directions: [M, D], orthogonal rows of length sqrt(M).
    """
    x = x.astype(jnp.float32)
    exponent = x @ directions.T - jnp.square(x).sum(-1, keepdims=True) / 2
    return jnp.exp(exponent) / math.sqrt(len(directions))


def linear_attention(q: Array, k: Array, v: Array) -> Array:
    """`q (k^T v)`, the weights of each query summing to 1: features [B, N, M] of queries and keys,
    values [B, N, D].
    """
    context = jnp.einsum("bnm,bnd->bmd", k, v)
    total = jnp.einsum("bnm,bm->bn", q, k.sum(1))
    return jnp.einsum("bnm,bmd->bnd", q, context) / (total[..., None] + 1e-8)


class TokenAttention(nn.Module):
    """One round: `y = v + out(attention(norm(x)))`, then `y + down(gelu(up(norm(y))))`.

    The values stand in the place of x in the residual, as the width changes.

    Attributes:
      width: of the tokens that come in, C.
      token_dim: of those that go out, D; one head.
      kind: of the attention.
    """

    width: int
    token_dim: int
    kind: TokenModule

    def setup(self) -> None:
        d, performer = self.token_dim, self.kind == "performer"
        self.attn_norm, self.mlp_norm = LayerNorm(1e-5), LayerNorm(1e-5)
        self.q, self.k, self.v = (
            dense(self.width, d, bias=performer, axes=("embed", "heads")) for _ in range(3)
        )
        self.out = dense(d, d, bias=True, axes=("heads", "embed"))
        self.up = dense(d, d, bias=True)
        self.down = dense(d, d, bias=True, axes=("mlp", "embed"))
        self.dropout = nn.Dropout(DROPOUT if performer else 0.0)
        if performer:
            orthogonal = nn.initializers.orthogonal(math.sqrt(d // 2))
            fixed = nn.with_logical_partitioning(orthogonal, (None, "embed"))
            self.directions = self.param("directions", fixed, (d // 2, d))

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """[B, N, C] to [B, N, D]."""
        h = self.attn_norm(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        y = v + self.dropout(self.out(self.attention(q, k, v)), deterministic=not train)
        branch = self.down(ACTIVATIONS["gelu"](self.up(self.mlp_norm(y))))
        return y + self.dropout(branch, deterministic=not train)

    def attention(self, q: Array, k: Array, v: Array) -> Array:
        """[B, N, D] of each."""
        if self.kind == "performer":
            directions = jax.lax.stop_gradient(self.directions.astype(jnp.float32))
            q, k = positive_features(q, directions), positive_features(k, directions)
            return linear_attention(q, k, v.astype(jnp.float32)).astype(v.dtype)
        tokens = Tokens.sequence(jnp.ones(q.shape[:2], bool))
        q, k, v = (x[:, :, None] for x in (q, k, v))  # [B, N, 1, D]
        scale = self.width**-0.5  # of what comes in, as in the official code
        return attend(q, k, v, everything, tokens, tokens, scale=scale)[:, :, 0]


class TokensToToken(nn.Module):
    """Pixels [B, 16 h, 16 w, C] to tokens [B, h w, D], by two rounds of attention."""

    config: T2TConfig

    def setup(self) -> None:
        c = self.config
        cells = [size**2 for size, _, _ in SQUARES]
        widths = (cells[0] * c.channels, cells[1] * c.token_dim)
        self.layers = [TokenAttention(width, c.token_dim, c.token_module) for width in widths]
        self.proj = dense(cells[2] * c.token_dim, c.width, bias=True)

    def __call__(self, pixels: Array, *, train: bool = False) -> Array:
        """Cut, attend, cut, attend, cut, project."""
        check_pixels(pixels, channels=self.config.channels, multiple=16)
        x = pixels  # [B, H, W, C]
        for squares, layer in zip(SQUARES, self.layers, strict=False):
            x = unfold(x, *squares)  # [B, h, w, C size^2]
            y = layer(x.reshape(x.shape[0], -1, x.shape[-1]), train=train)
            x = y.reshape(*x.shape[:3], -1)
        x = unfold(x, *SQUARES[2])
        return self.proj(x).reshape(x.shape[0], -1, self.config.width)


class T2TViT(ViT):
    """A `ViT` with other tokens, and positions [sin, cos, sin, cos, ...] that count the class token
    as the first.
    """

    config: T2TConfig

    def make_patch(self) -> nn.Module:
        """What makes tokens of pixels."""
        return TokensToToken(self.config)

    def cut(self, pixels: Array, *, train: bool) -> Array:
        """Pixels [B, H, W, C] to tokens [B, N, D]."""
        return self.patch(pixels, train=train)

    def _first_positions(self, key: Array) -> Array:
        del key
        c = self.config
        number = 1 + math.prod(c.grid)
        halves = sincos_1d(np.arange(number), c.width)
        table = halves.reshape(number, 2, -1).swapaxes(1, 2).reshape(number, c.width)
        return jnp.asarray(table, jnp.float32)


def _size(
    width: int, depth: int, num_heads: int, ratio: int, token_module: TokenModule = "performer"
) -> ClassifierConfig:
    tower = T2TConfig(
        width=width,
        depth=depth,
        num_heads=num_heads,
        mlp_dim=ratio * width,
        token_module=token_module,
    )
    return ClassifierConfig(tower, num_classes=1000)


# Sizes: models/t2t_vit.py of the official code.
VARIANTS = {
    "t2t_vit_14": _size(384, 14, 6, 3),
    "t2t_vit_7": _size(256, 7, 4, 2),
    "t2t_vit_10": _size(256, 10, 4, 2),
    "t2t_vit_12": _size(256, 12, 4, 2),
    "t2t_vit_19": _size(448, 19, 7, 3),
    "t2t_vit_24": _size(512, 24, 8, 3),
    "t2t_vit_t_14": _size(384, 14, 6, 3, "transformer"),
    "t2t_vit_t_19": _size(448, 19, 7, 3, "transformer"),
    "t2t_vit_t_24": _size(512, 24, 8, 3, "transformer"),
    "t2t_vit_14_resnext": _size(384, 14, 32, 3),
    "t2t_vit_14_wide": _size(768, 4, 12, 3),
    # Ours, for small scans: trains in minutes on a CPU.
    "t2t_vit_digits": ClassifierConfig(
        T2TConfig(image_size=48, width=64, depth=4, num_heads=4, mlp_dim=128, token_dim=32),
        num_classes=10,
    ),
    "t2t_vit_tiny": ClassifierConfig(
        T2TConfig(image_size=32, width=16, depth=2, num_heads=2, mlp_dim=32, token_dim=8),
        num_classes=5,
    ),
}


def _token_rows(ours: str, theirs: str, kind: TokenModule) -> list[AnyRow]:
    """Rows of one round."""
    rows = norm_rows(f"{ours}/attn_norm", f"{theirs}.norm1")
    rows += norm_rows(f"{ours}/mlp_norm", f"{theirs}.norm2")
    if kind == "transformer":
        kernels = tuple(f"{ours}/{name}/kernel" for name in "qkv")
        rows.append(Row(kernels, f"{theirs}.attn.qkv.weight", split(3, linear())))
        keys = {"out": "attn.proj", "up": "mlp.fc1", "down": "mlp.fc2"}
    else:
        for leaf, key, each in (("kernel", "weight", linear()), ("bias", "bias", flat)):
            paths = tuple(f"{ours}/{name}/{leaf}" for name in "kqv")
            rows.append(Row(paths, f"{theirs}.kqv.{key}", split(3, each)))
        rows.append(Row(f"{ours}/directions", f"{theirs}.w"))
        keys = {"out": "proj", "up": "mlp.0", "down": "mlp.2"}
    for name, key in keys.items():
        rows += weight_rows(f"{ours}/{name}", f"{theirs}.{key}")
    return rows


def table(config: ClassifierConfig) -> Table:
    """Keys of the official checkpoints."""
    tower = config.tower
    rows: list[AnyRow] = [
        Row("position", "pos_embed", ones(1)),
        Row("cls", "cls_token", ones(2)),
        *weight_rows("patch/proj", "tokens_to_token.project"),
        *norm_rows("final_norm", "norm"),
        *layer_rows(tower, "blocks.{}.", TIMM_LAYER),
    ]
    for i in range(2):
        theirs = f"tokens_to_token.attention{i + 1}"
        rows += _token_rows(f"patch/layers_{i}", theirs, tower.token_module)
    return Table(tuple(rows)).under("tower") + head_table(config, head="head")


register(CARD, VARIANTS, table=table)
