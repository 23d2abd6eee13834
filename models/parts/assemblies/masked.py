"""The masked autoencoder: encode some patches, reconstruct all. Follows: arXiv:2111.06377."""

from dataclasses import dataclass, field

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from zoo.models.core.config import ModelConfig
from zoo.models.core.types import Array, Batch, Features, Stream, Tokens, take
from zoo.models.parts.layers.linear import Proj, dense, table_init
from zoo.models.parts.layers.norms import LayerNorm
from zoo.models.parts.layers.positions import sincos_2d
from zoo.models.parts.layers.stack import Stack
from zoo.models.parts.towers.vit import ViTConfig


@dataclass(frozen=True)
class MaskedConfig(ModelConfig):
    """A masked autoencoder.

    Attributes:
      tower: the encoder, with a class token and fixed positions.
      decoder: sizes of the decoder's layers, which stand on the same grid.
      mask_ratio: the part of the patches that the encoder does not see.
    """

    tower: ViTConfig = field(default_factory=ViTConfig)
    decoder: ViTConfig = field(default_factory=ViTConfig)
    mask_ratio: float = 0.75

    def __post_init__(self) -> None:
        if self.tower.grid != self.decoder.grid or self.tower.prefix != 1:
            raise ValueError(
                f"tower grid {self.tower.grid}, decoder grid {self.decoder.grid}, tokens before "
                f"the patches {self.tower.prefix}: want equal grids and a class token alone"
            )
        if not 0 <= self.mask_ratio < 1:
            raise ValueError(f"mask_ratio = {self.mask_ratio}: want 0 <= mask_ratio < 1")

    @property
    def unread(self) -> tuple[str, ...]:
        """Parameters that no gradient reaches: the fixed positions."""
        return (*(f"tower/{name}" for name in self.tower.unread), "decoder/position")

    @property
    def num_kept(self) -> int:
        """Patches that the encoder sees."""
        return int(self.tower.grid[0] * self.tower.grid[1] * (1 - self.mask_ratio))

    def build(self) -> "MaskedAutoencoder":
        """The module."""
        return MaskedAutoencoder(self)

    def inputs(self, batch_size: int) -> Batch:
        """Shapes of a batch of images."""
        side = self.tower.image_size
        return {"pixels": jax.ShapeDtypeStruct((batch_size, side, side, 3), jnp.float32)}


@struct.dataclass
class Reconstruction:
    """What a masked autoencoder returns.

    Attributes:
      features: of the patches that the encoder saw.
      patches: float32 [B, N, P P 3], every patch as reconstructed: rows, columns, channels.
      hidden: bool [B, N], the patches that the encoder did not see.
    """

    features: Features
    patches: Array
    hidden: Array


class MaskedAutoencoder(nn.Module):
    """An encoder of some patches and a decoder of all."""

    config: MaskedConfig

    def setup(self) -> None:
        self.tower = self.config.tower.build()
        self.decoder = MaskedDecoder(self.config.tower.width, self.config.decoder)

    def __call__(self, batch: Batch, *, draws: Array | None = None) -> Reconstruction:
        """Reconstruct images.

        Args:
          batch: `pixels` [B, H, W, 3].
          draws: [B, N] numbers, one per patch: the encoder sees the patches with the smallest, in
            rising order. All patches in their order by default.
        """
        pixels, n = batch["pixels"], self.config.tower.grid[0] * self.config.tower.grid[1]
        order = jnp.broadcast_to(jnp.arange(n), (pixels.shape[0], n))
        count = n
        if draws is not None:
            order, count = jnp.argsort(draws, -1), self.config.num_kept
        place = jnp.argsort(order, -1)  # [B, N], where each patch stands in that order
        features = self.tower(pixels, keep=order[:, :count])
        return Reconstruction(features, self.decoder(features, place), place >= count)


class MaskedDecoder(nn.Module):
    """From the patches that were seen to the pixels of all.

    Attributes:
      vision_width: D of the encoder.
      config: sizes of the layers.
    """

    vision_width: int
    config: ViTConfig

    def setup(self) -> None:
        c = self.config
        self.embed = dense(self.vision_width, c.width, bias=True, axes=("mlp", "embed"))
        vector = nn.with_logical_partitioning(table_init(c.width), ("norm",))
        self.mask_token = self.param("mask_token", vector, (c.width,))
        table = nn.with_logical_partitioning(self._positions, ("positions", "embed"))
        self.position = self.param("position", table)
        self.stack = Stack(c.plan())
        self.final_norm = LayerNorm(c.norm_eps)
        shape = (c.width, c.patch_size**2 * 3)
        self.head = Proj("...d,dp->...p", shape, ("embed", "mlp"), bias=True)

    def _positions(self, key: Array) -> Array:
        del key
        return jnp.asarray(sincos_2d(*self.config.grid, self.config.width, before=1))

    def __call__(self, features: Features, place: Array) -> Array:
        """Reconstruct patches.

        Args:
          features: of the K patches that were seen.
          place: int [B, N], where each patch stands among those, K and more for the others.

        Returns:
          Float32 [B, N, P P 3].
        """
        x = self.embed(features.tokens)  # [B, K, D]
        rest = (x.shape[0], place.shape[1] - x.shape[1], x.shape[2])
        mask = jnp.broadcast_to(self.mask_token.astype(x.dtype), rest)
        x = take(jnp.concatenate([x, mask], 1), place)  # [B, N, D]
        x = jnp.concatenate([self.embed(features.cls)[:, None], x], 1)
        x = x + jax.lax.stop_gradient(self.position).astype(x.dtype)
        stream = Stream(x, Tokens.sequence(jnp.ones(x.shape[:2], bool)))
        stream, _, _ = self.stack(stream)
        return self.head(self.final_norm(stream.hidden)[:, 1:]).astype(jnp.float32)
