"""S²: one frozen tower at several resolutions of the same picture, its channels side by side.

Each resolution is cut into tiles of about the size that the tower was made for; the maps of the
tiles are put together again, pooled to the grid of one of the resolutions and concatenated. There
are as many tokens as before, that many times as wide. Nothing is learned here: the parameters are
those of the tower, under the same names, so that its checkpoints load.

Follows: arXiv:2403.13043.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from zoo.models.core.card import Card
from zoo.models.core.keytable import Table
from zoo.models.core.registry import register
from zoo.models.core.types import Array, Features
from zoo.models.parts.assemblies.classifier import ClassifierConfig
from zoo.models.parts.assemblies.llava import LlavaConfig, llava_table
from zoo.models.parts.assemblies.llava_hub import projector_rows
from zoo.models.parts.decoders.gqa import DecoderConfig
from zoo.models.parts.layers.embed import check_pixels
from zoo.models.parts.layers.resize import resize_area, resize_bicubic
from zoo.models.parts.layers.spatial import merge_tiles, split_tiles
from zoo.models.parts.towers.vit import ViTConfig, clip_table

CARD = Card(
    slug="s2",
    paper="arXiv:2403.13043",
    code="https://github.com/bfshi/scaling_on_scales",
    differs=(
        "Resolutions are given in pixels; scales of the picture that comes in are not.",
        "Tiles keep the leading axes of the picture in front; the official code has them behind.",
        "Tokens of several layers can be read at once (`taps`), each at all resolutions.",
    ),
)


@dataclass(frozen=True)
class S2Config:
    """A tower at several resolutions, in the place of a tower. The defaults are LLaVA-1.5-S²'s.

    Attributes:
      tower: the configuration of any tower; it sees square tiles.
      sizes: sides in pixels that the picture is resized to.
      tile: largest side of a tile; a picture of side s is cut into ceil(s / tile)² of them.
      output: number, from 0, of the size whose grid the tokens lie on.
    """

    tower: Any = field(default_factory=ViTConfig)
    sizes: tuple[int, ...] = (336, 672, 1008)
    tile: int = 336
    output: int = 0

    def __post_init__(self) -> None:
        if not self.sizes or not 0 <= self.output < len(self.sizes):
            raise ValueError(
                f"sizes = {self.sizes}: want one or more, of which {self.output} is one"
            )
        for size in self.sizes:
            tiles_of(size, self.tile)

    @property
    def image_size(self) -> int:
        """Side of the pictures that come in: the largest size, so that none is made up."""
        return max(self.sizes)

    @property
    def width(self) -> int:
        """Channels of a token: the tower's, once for each size."""
        return len(self.sizes) * int(self.tower.width)

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens per column and row."""
        size, made_for = self.sizes[self.output], self.tower.image_size
        return tuple(side * size // made_for for side in self.tower.grid)

    @property
    def depth(self) -> int:
        """Layers of the tower."""
        return int(self.tower.depth)

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return int(self.tower.prefix)

    @property
    def channels(self) -> int:
        """Of the pictures."""
        return int(getattr(self.tower, "channels", 3))

    @property
    def class_token(self) -> bool:
        """Whether the tower has a class token."""
        return bool(getattr(self.tower, "class_token", False))

    @property
    def final_norm(self) -> bool:
        """Whether there is a norm after its last layer."""
        return bool(getattr(self.tower, "final_norm", False))

    @property
    def attention_pool(self) -> bool:
        """Whether it has a pooling head."""
        return bool(getattr(self.tower, "attention_pool", False))

    @property
    def unread(self) -> tuple[str, ...]:
        """Parameters that no gradient reaches."""
        return tuple(getattr(self.tower, "unread", ()))

    def build(self) -> "S2":
        """The module."""
        return S2(self)


class S2(nn.Module):
    """`multiscale` of a tower."""

    config: S2Config

    def setup(self) -> None:
        self.tower = self.config.tower.build()
        nn.share_scope(self, self.tower)

    def __call__(
        self,
        pixels: Array,
        *,
        train: bool = False,
        taps: tuple[int, ...] = (),
        stop_after: int | None = None,
    ) -> Features:
        """Encode square pictures of any size.

        Args:
          pixels: [..., H, H, C], normalised. Leading axes are free.
          train: as of the tower.
          taps: as of the tower; the tokens before the patches come first, the mean of all tiles.
          stop_after: as of the tower.

        Raises:
          ValueError: pictures that are not square.
        """
        c = self.config
        check_pixels(pixels, channels=c.channels)
        options: dict[str, Any] = {"taps": taps} if taps else {}
        options |= {"train": True} if train else {}
        options |= {} if stop_after is None else {"stop_after": stop_after}

        def encode(tiles: Array) -> Features:
            return self.tower(tiles, **options)

        return multiscale(encode, pixels, c.sizes, c.tile, c.output)


def tiles_of(size: int, tile: int) -> int:
    """How many tiles of at most `tile` lie along a side of `size`.

    Raises:
      ValueError: so many do not divide it.
    """
    count = -(-size // tile)
    if size < 1 or size % count:
        raise ValueError(
            f"size = {size} does not divide into {count} tiles of at most {tile}: want a multiple"
        )
    return count


def tiles(pixels: Array, size: int, tile: int) -> Array:
    """Pictures [..., H, H, C] at one size, in tiles [..., n, n, h, h, C]."""
    count = tiles_of(size, tile)
    return split_tiles(resize_bicubic(pixels, size, size), count, count)


def multiscale(
    encode: Callable[[Array], Features],
    pixels: Array,
    sizes: tuple[int, ...],
    tile: int,
    output: int = 0,
) -> Features:
    """Features of a picture at several sizes, concatenated on the channels.

    Args:
      encode: a tower, from [..., h, h, C] to features.
      pixels: [..., H, H, C].
      sizes: as in `S2Config`.
      tile: likewise.
      output: likewise.

    Returns:
      `tokens`, `taps` and `cls` of the tower with as many times the channels; what it returns
      beside them is left out.

    Raises:
      ValueError: pictures that are not square.
    """
    if pixels.shape[-3] != pixels.shape[-2]:
        raise ValueError(f"pixels: got {pixels.shape}, want square pictures [..., H, H, C]")
    seen = [encode(tiles(pixels, size, tile)) for size in sizes]
    counts = [tiles_of(size, tile) for size in sizes]
    grid = tuple(side * counts[output] for side in seen[output].grid)

    def joined(parts: list[Array]) -> Array:
        """[..., n, n, P + N, D] of every size to [..., P + N', S D]."""
        prefixes, maps = [], []
        for part, features in zip(parts, seen, strict=True):
            number = features.grid[0] * features.grid[1]
            before, patches = jnp.split(part, [part.shape[-2] - number], -2)
            patches = patches.reshape(*patches.shape[:-2], *features.grid, patches.shape[-1])
            maps.append(resize_area(merge_tiles(patches), *grid))  # [..., h, w, D]
            prefixes.append(before.mean((-4, -3)))  # [..., P, D]
        flat = [each.reshape(*each.shape[:-3], -1, each.shape[-1]) for each in maps]
        return jnp.concatenate([jnp.concatenate(prefixes, -1), jnp.concatenate(flat, -1)], -2)

    tokens = joined([features.tokens for features in seen])
    taps = {tap: joined([features.taps[tap] for features in seen]) for tap in seen[0].taps}
    cls = [features.cls.mean((-3, -2)) for features in seen if features.cls is not None]
    return Features(tokens, grid, cls=jnp.concatenate(cls, -1) if cls else None, taps=taps)


_TINY = S2Config(
    ViTConfig(image_size=8, patch_size=4, width=16, depth=3, num_heads=2, mlp_dim=32),
    sizes=(8, 16, 24),
    tile=8,
)


def _llava(**decoder: Any) -> LlavaConfig:
    return LlavaConfig(tower=S2Config(), decoder=DecoderConfig(**decoder))


VARIANTS = {
    # bfshi/llava-v1.5-{7b,13b}-s2-lora: CLIP ViT-L/14-336 at 336, 672 and 1008 pixels.
    "s2_llava_1_5_7b": _llava(),
    "s2_llava_1_5_13b": _llava(width=5120, depth=40, num_heads=40, num_kv_heads=40, mlp_dim=13_824),
    # The encoder alone.
    "s2_clip_l14_336": ClassifierConfig(S2Config(), pool="mean"),
    "s2_tiny": LlavaConfig(
        tower=_TINY,
        decoder=DecoderConfig(
            vocab_size=320, width=24, depth=2, num_heads=4, num_kv_heads=2, mlp_dim=32
        ),
        image_id=3,
        text_tokens=12,
    ),
}


def table(config: LlavaConfig | ClassifierConfig) -> Table:
    """Keys of LLaVA-1.5, whose projector alone is wider; of the encoder alone those of CLIP."""
    if isinstance(config, ClassifierConfig):
        return clip_table(config.tower.tower).under("tower", "vision_model.")
    projector = projector_rows(bias=config.connector.bias, keys=("0", "2"))
    single = replace(config, tower=config.tower.tower)
    return llava_table(single) + projector.under("connector", "model.mm_projector.")


register(CARD, VARIANTS, table=table)
