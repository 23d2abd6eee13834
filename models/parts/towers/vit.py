"""The plain vision transformer, as CLIP uses it. Follows: arXiv:2010.11929, arXiv:2103.00020."""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from zoo.models.core.keytable import Row, Table, conv, flat, linear
from zoo.models.core.tree import check_shape
from zoo.models.core.types import Array, Features, Stream, Tokens
from zoo.models.parts.layers.attention import everything
from zoo.models.parts.layers.block import Block
from zoo.models.parts.layers.embed import PatchEmbed
from zoo.models.parts.layers.linear import table_init
from zoo.models.parts.layers.norms import LayerNorm
from zoo.models.parts.layers.positions import sincos_2d
from zoo.models.parts.layers.stack import Stack, layers


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a vision transformer. The defaults are CLIP ViT-L/14 at 336 pixels.

    Attributes:
      image_size: side of the square input in pixels, a multiple of `patch_size`.
      patch_size: side of a patch in pixels.
      width: D.
      depth: number of layers.
      num_heads: attention heads.
      mlp_dim: hidden width of the MLP.
      activation: of the MLP.
      norm_eps: epsilon of the LayerNorms.
      class_token: whether a learned token precedes the patches.
      input_norm: a LayerNorm before the first layer; the patch embedding then has no bias (CLIP).
    """

    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_dim: int = 4096
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    class_token: bool = True
    input_norm: bool = True

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size = {self.image_size}: want a multiple of patch_size = {self.patch_size}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and row."""
        return (self.image_size // self.patch_size,) * 2

    def build(self) -> "ViT":
        """The module."""
        return ViT(self)


class ViT(nn.Module):
    """Patches, positions, pre-norm layers.

    `features.tokens` are the patch tokens after the final norm; `features.taps[k]` is the residual
    stream after k layers with the class token first, where there is one (0 is the input of the
    first layer).
    """

    config: ViTConfig

    def setup(self) -> None:
        c = self.config
        self.patch = PatchEmbed(c.patch_size, c.width, bias=not c.input_norm)
        table = nn.with_logical_partitioning(self._first_positions, ("positions", "embed"))
        self.position = self.param("position", table)
        if c.class_token:
            vector = nn.with_logical_partitioning(table_init(c.width), ("norm",))
            self.cls = self.param("cls", vector, (c.width,))
        if c.input_norm:
            self.input_norm = LayerNorm(c.norm_eps)
        block = Block(
            width=c.width,
            num_heads=c.num_heads,
            mlp_dim=c.mlp_dim,
            norm="layer",
            norm_eps=c.norm_eps,
            activation=c.activation,
            gated=False,
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            rope_theta=None,
            rule=everything,
            parent=None,
        )
        self.stack = Stack(layers(block, c.depth))
        self.final_norm = LayerNorm(c.norm_eps)

    def _first_positions(self, key: Array) -> Array:
        """Learned positions start from sines and cosines (as in MAE), so that near is alike."""
        del key
        c = self.config
        table = 0.3 * sincos_2d(*c.grid, c.width)
        return jnp.asarray(np.pad(table, ((int(c.class_token), 0), (0, 0))))

    def __call__(self, pixels: Array, *, taps: tuple[int, ...] = ()) -> Features:
        """Encode images.

        Args:
          pixels: [..., image_size, image_size, 3], normalised. Leading axes are free.
          taps: depths at which to return the residual stream, 0 to `depth`.

        Raises:
          ValueError: another image size, or a tap beyond the depth.
        """
        c, lead = self.config, pixels.shape[:-3]
        check_shape(
            "pixels", pixels[(0,) * len(lead)], "[height, width, 3]", c.image_size, c.image_size, 3
        )
        if bad := [tap for tap in taps if not 0 <= tap <= c.depth]:
            raise ValueError(f"taps {bad}: the tower has layers 0 to {c.depth}")
        x = self.patch(pixels.reshape(-1, *pixels.shape[-3:]))  # [B, N, D]
        if c.class_token:
            cls = jnp.broadcast_to(self.cls.astype(x.dtype), (x.shape[0], 1, c.width))
            x = jnp.concatenate([cls, x], 1)  # [B, 1 + N, D]
        x = x + self.position.astype(x.dtype)
        if c.input_norm:
            x = self.input_norm(x)

        stream = Stream(x, Tokens.sequence(jnp.ones(x.shape[:2], bool)))
        found, done = {}, 0
        for tap in sorted({*taps, c.depth}):
            if tap > done:
                stream, _, _ = self.stack(stream, start=done, stop=tap)
                done = tap
            if tap in taps:
                found[tap] = stream.hidden.reshape(*lead, *stream.hidden.shape[1:])
        y = self.final_norm(stream.hidden)
        y = y.reshape(*lead, *y.shape[1:])  # [..., (1 +) N, D]
        prefix = int(c.class_token)
        cls = y[..., 0, :] if c.class_token else None
        return Features(y[..., prefix:, :], c.grid, cls=cls, taps=found)


def clip_table(config: ViTConfig) -> Table:
    """Keys of `vision_model` in Hugging Face CLIP checkpoints (which spell `pre_layrnorm` so)."""
    steps, layer, at = tuple(range(config.depth)), "encoder.layers.{}.", "stack/layers/"
    rows = [
        Row("patch/kernel", "embeddings.patch_embedding.weight", conv),
        Row("position", "embeddings.position_embedding.weight"),
        Row("final_norm/scale", "post_layernorm.weight"),
        Row("final_norm/bias", "post_layernorm.bias"),
    ]
    if config.class_token:
        rows.append(Row("cls", "embeddings.class_embedding"))
    if config.input_norm:
        rows += [
            Row("input_norm/scale", "pre_layrnorm.weight"),
            Row("input_norm/bias", "pre_layrnorm.bias"),
        ]
    else:
        rows.append(Row("patch/bias", "embeddings.patch_embedding.bias"))
    for name, key in {"attn_norm": "layer_norm1", "mlp_norm": "layer_norm2"}.items():
        rows.append(Row(f"{at}{name}/scale", f"{layer}{key}.weight", steps=steps))
        rows.append(Row(f"{at}{name}/bias", f"{layer}{key}.bias", steps=steps))
    maps = {f"self_attn.{n}_proj": (n, 1) for n in "qkv"}
    maps |= {"self_attn.out_proj": ("out", 2), "mlp.fc1": ("up", 1), "mlp.fc2": ("down", 1)}
    for key, (name, num_in) in maps.items():
        rows.append(Row(f"{at}{name}/kernel", f"{layer}{key}.weight", linear(num_in), steps))
        rows.append(Row(f"{at}{name}/bias", f"{layer}{key}.bias", flat, steps))
    return Table(tuple(rows))
