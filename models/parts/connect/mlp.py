"""The MLP connector of LLaVA. Follows: arXiv:2310.03744 (`mlp2x_gelu`)."""

from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn

from zoo.models.core.types import Array, Features, TokenSet, Visual
from zoo.models.parts.layers.activations import ACTIVATIONS
from zoo.models.parts.layers.linear import dense


@dataclass(frozen=True)
class MLPConnector:
    """Two linear layers with an activation between them, applied to every vision token.

    Attributes:
      activation: a name of `ACTIVATIONS`.
      bias: biases in both layers.
    """

    stride: ClassVar[int] = 1  # side of the squares of patches that tokens are made of

    activation: str = "gelu"
    bias: bool = True

    def num_tokens(self, grid: tuple[int, int]) -> int:
        """Vision tokens per image that the decoder sees."""
        return grid[0] * grid[1]

    def build(self, vision_width: int, width: int, grid: tuple[int, int]) -> nn.Module:
        """The module from tower width to decoder width; it keeps every token of any grid."""
        del grid
        return MLP(self, vision_width, width)


class MLP(nn.Module):
    """`down(activation(up(x)))`."""

    config: MLPConnector
    vision_width: int
    width: int

    def setup(self) -> None:
        bias = self.config.bias
        self.up = dense(self.vision_width, self.width, bias=bias)
        self.down = dense(self.width, self.width, bias=bias, axes=("mlp", "embed"))

    def __call__(self, vision: Features, *, budget: int | Array | None = None) -> Visual:
        """Features [B, M, N, C] to N tokens of `width`.

        Raises:
          ValueError: if a budget is asked for; this connector keeps all tokens.
        """
        n = vision.tokens.shape[-2]
        if budget not in (None, n):
            raise ValueError(f"budget = {budget}: this connector keeps all {n} vision tokens")
        tokens: Array = self.down(ACTIVATIONS[self.config.activation](self.up(vision.tokens)))
        return Visual(TokenSet(tokens))
