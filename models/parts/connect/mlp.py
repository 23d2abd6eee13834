"""The MLP connector of LLaVA. Follows: arXiv:2310.03744 (`mlp2x_gelu`)."""

from dataclasses import dataclass

import flax.linen as nn

from zoo.models.core.types import Array, Features, TokenSet, Visual
from zoo.models.parts.layers.activations import ACTIVATIONS
from zoo.models.parts.layers.linear import dense


@dataclass(frozen=True)
class MLPConnector:
    """Two linear layers with a GELU between them, applied to every vision token."""

    def num_tokens(self, grid: tuple[int, int]) -> int:
        """Vision tokens per image that the decoder sees."""
        return grid[0] * grid[1]

    def build(self, vision_width: int, width: int, grid: tuple[int, int]) -> nn.Module:
        """The module from tower width to decoder width; it keeps every token of any grid."""
        del grid
        return MLP(vision_width, width)


class MLP(nn.Module):
    """`up`, exact GELU, `down`, with biases."""

    vision_width: int
    width: int

    def setup(self) -> None:
        self.up = dense(self.vision_width, self.width, bias=True, axes=("embed", "mlp"))
        self.down = dense(self.width, self.width, bias=True, axes=("mlp", "embed"))

    def __call__(self, vision: Features, *, budget: int | None = None) -> Visual:
        """Features [B, M, N, C] to N tokens of `width`.

        Raises:
          ValueError: if a budget is asked for; this connector keeps all tokens.
        """
        n = vision.tokens.shape[-2]
        if budget not in (None, n):
            raise ValueError(f"budget = {budget}: this connector keeps all {n} vision tokens")
        tokens: Array = self.down(ACTIVATIONS["gelu"](self.up(vision.tokens)))
        return Visual(TokenSet(tokens))
