"""The tower of BUS: a vision transformer that leaves out patches that a text does not speak of."""

from collections.abc import Sequence
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from zoo.models.core.tree import check_shape
from zoo.models.core.types import Array, Stream, Tokens
from zoo.models.parts.layers.linear import Proj, dense
from zoo.models.parts.reduce.base import num_kept
from zoo.models.parts.reduce.choose import gather, top
from zoo.models.parts.reduce.scores import class_attention
from zoo.models.parts.towers.vit import ViT, ViTConfig


@dataclass(frozen=True)
class SelectiveConfig(ViTConfig):
    """A vision transformer that leaves patches out. The defaults are ViT-B/16 at 256 pixels.

    Attributes:
      select_after: t, the number of layers before the selection.
      ratio: α, the share of the patches that goes on.
      text_width: of the vector that guides it.
    """

    image_size: int = 256
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    select_after: int = 6
    ratio: float = 0.5
    text_width: int = 768

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.select_after < self.depth:
            raise ValueError(
                f"select_after = {self.select_after}: want 1 to {self.depth - 1}, a layer of the "
                "tower with others behind it"
            )
        if not isinstance(self.ratio, float) or not 0 < self.ratio <= 1:
            raise ValueError(f"ratio = {self.ratio}: want a share of the patches, above 0 to 1.0")
        if not self.class_token or self.registers:
            raise ValueError("want a class token alone before the patches, whose attention is read")

    @property
    def num_kept(self) -> int:
        """Patches that go on."""
        return num_kept(self.ratio, self.grid[0] * self.grid[1])

    def build(self) -> "SelectiveViT":
        """The module."""
        return SelectiveViT(self)


@struct.dataclass
class Selected:
    """What the tower makes of images and their texts.

    Attributes:
      tokens: [B, n', D], of the selected patches.
      cls: [B, D].
      index: int32 [B, n'], which patches these are, ascending.
      relevance: float32 [B, n], the logits of a, of all patches.
      attention: float32 [B, n'], what the class token pays them in the last layer.
    """

    tokens: Array
    cls: Array
    index: Array
    relevance: Array
    attention: Array


class PatchSelector(nn.Module):
    """Logits of a, float32 [B, N], for patches [B, N, D] and the text's class token [B, D']."""

    width: int
    text_width: int

    def setup(self) -> None:
        d = self.text_width
        self.project = dense(self.width, d, bias=True)
        self.up = dense(2 * d, d, bias=True)
        self.middle = dense(d, d, bias=True)
        self.score = Proj("...d,dc->...c", (d, 1), ("mlp", "classes"), bias=True)

    def __call__(self, patches: Array, text: Array) -> Array:
        check_shape("text", text, "[B, D]", len(patches), self.text_width)
        x = self.project(patches)
        beside = jnp.broadcast_to(text[:, None].astype(x.dtype), x.shape)
        x = nn.gelu(self.up(jnp.concatenate([x, beside], -1)), approximate=False)
        x = nn.gelu(self.middle(x), approximate=False)
        return self.score(x)[..., 0].astype(jnp.float32)


class SelectiveViT(ViT):
    """The tower."""

    config: SelectiveConfig  # type: ignore[assignment]

    def setup(self) -> None:
        super().setup()
        self.selector = PatchSelector(self.config.width, self.config.text_width)

    def __call__(self, pixels: Array, text: Array) -> Selected:  # type: ignore[override]
        """Encode images.

        Args:
          pixels: [B, H, W, 3], normalised.
          text: [B, D'], what stands for the text of each.
        """
        c = self.config
        hidden, relevance = self._half(pixels, text)
        index = top(jax.lax.stop_gradient(relevance), c.num_kept)
        hidden = jnp.concatenate([hidden[:, :1], gather(hidden[:, 1:], index)], 1)
        hidden = self._layers(hidden, c.select_after, c.depth - 1)
        q, k = self._queries_and_keys(c.depth - 1, stream_of(hidden))
        hidden = self._layers(hidden, c.depth - 1, c.depth)
        y = self.final_norm(hidden) if c.final_norm else hidden
        return Selected(y[:, 1:], y[:, 0], index, relevance, class_attention(q, k))

    def relevance(self, pixels: Array, text: Array) -> Array:
        """The logits of a alone, float32 [B, N]; arguments as of a call."""
        return self._half(pixels, text)[1]

    def _half(self, pixels: Array, text: Array) -> tuple[Array, Array]:
        """All tokens behind layer t, and how relevant the patches are."""
        self._check(pixels, (), (), self.config.depth)
        hidden = self._layers(self._embed(pixels, None, None)[0], 0, self.config.select_after)
        return hidden, self.selector(hidden[:, 1:], text)

    def _layers(self, hidden: Array, start: int, stop: int) -> Array:
        return self.stack(stream_of(hidden), start=start, stop=stop)[0].hidden


def stream_of(hidden: Array) -> Stream:
    """Tokens [B, N, D] that are all there."""
    return Stream(hidden, Tokens.sequence(jnp.ones(hidden.shape[:2], bool)))


def patch_labels(
    boxes: Sequence[Sequence[float]] | np.ndarray,
    grid: tuple[int, int],
    size: tuple[float, float],
) -> np.ndarray:
    """Which patches overlap the box of each picture, float32 [B, N] of 0 and 1.

    Args:
      boxes: [B, 4], left, top, right and bottom in pixels.
      grid: rows and columns of patches.
      size: height and width of the pictures.

    Raises:
      ValueError: a box without area.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    left, top_, right, bottom = boxes.T[:, :, None]
    if not ((left < right) & (top_ < bottom)).all():
        raise ValueError(f"boxes = {boxes.tolist()}: want left < right and top < bottom")
    edges = [np.arange(n + 1) * side / n for n, side in zip(grid, size, strict=True)]
    rows = (edges[0][:-1] < bottom) & (edges[0][1:] > top_)  # [B, rows]
    columns = (edges[1][:-1] < right) & (edges[1][1:] > left)
    return (rows[:, :, None] & columns[:, None]).reshape(len(boxes), -1).astype(np.float32)
