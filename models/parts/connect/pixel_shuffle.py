"""The connector of InternVL: neighbouring tokens become one. Follows: arXiv:2404.16821."""

from dataclasses import dataclass

import flax.linen as nn

from zoo.models.core.types import Array, Features, TokenSet, Visual
from zoo.models.parts.layers.activations import ACTIVATIONS
from zoo.models.parts.layers.linear import dense
from zoo.models.parts.layers.norms import LayerNorm
from zoo.models.parts.layers.spatial import space_to_depth


@dataclass(frozen=True)
class PixelShuffle:
    """Squares of `factor` x `factor` tokens are concatenated; a LayerNorm and two linear layers
    follow.

    Attributes:
      factor: side of a square.
      activation: between the linear layers, a name of `ACTIVATIONS`.
      norm_eps: epsilon of the LayerNorm.
    """

    factor: int = 2
    activation: str = "gelu"
    norm_eps: float = 1e-5

    @property
    def stride(self) -> int:
        """Side of the squares of patches that tokens are made of."""
        return self.factor

    def num_tokens(self, grid: tuple[int, int]) -> int:
        """Vision tokens per image that the decoder sees."""
        return (grid[0] // self.factor) * (grid[1] // self.factor)

    def build(self, vision_width: int, width: int, grid: tuple[int, int]) -> "ShuffleMLP":
        """The module from tower width to decoder width.

        Raises:
          ValueError: squares do not cover the grid.
        """
        if grid[0] % self.factor or grid[1] % self.factor:
            raise ValueError(f"factor = {self.factor} does not divide the grid {grid}")
        return ShuffleMLP(self, vision_width, width)


class ShuffleMLP(nn.Module):
    """`down(activation(up(norm(squares))))`, with biases."""

    config: PixelShuffle
    vision_width: int
    width: int

    def setup(self) -> None:
        shuffled = self.vision_width * self.config.factor**2
        self.norm = LayerNorm(self.config.norm_eps)
        self.up = dense(shuffled, self.width, bias=True)
        self.down = dense(self.width, self.width, bias=True, axes=("mlp", "embed"))

    def __call__(self, vision: Features, *, budget: int | Array | None = None) -> Visual:
        """Features [B, M, N, C] on a grid to N / factor^2 tokens of `width`.

        Raises:
          ValueError: if a budget is asked for; this connector keeps all its tokens.
        """
        squares = pixel_shuffle(vision.tokens, vision.grid, self.config.factor)
        if budget not in (None, squares.shape[-2]):
            raise ValueError(
                f"budget = {budget}: this connector keeps all {squares.shape[-2]} vision tokens"
            )
        act = ACTIVATIONS[self.config.activation]
        return Visual(TokenSet(self.down(act(self.up(self.norm(squares))))))


def pixel_shuffle(tokens: Array, grid: tuple[int, int], factor: int) -> Array:
    """[..., h w, C] to [..., h w / factor^2, factor^2 C]: every square of tokens becomes one, its
    rows one after the other.
    """
    x = tokens.reshape(*tokens.shape[:-2], *grid, tokens.shape[-1])
    x = space_to_depth(x, (factor, factor), "cells_first")  # [..., h, w, f f C]
    return x.reshape(*tokens.shape[:-2], -1, x.shape[-1])
