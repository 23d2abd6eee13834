"""Training low-rank adapters in place of a model's kernels. Follows: arXiv:2106.09685."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from zoo.models.core.errors import UsageError
from zoo.models.parts.layers import low_rank
from zoo.train.parts import Part

LINEAR = r"decoder/stack/[^/]+/(q|k|v|out|gate|up|down)/kernel"
"""All linear maps in the layers of a language model, but not its head."""


@dataclass(frozen=True)
class LoRA:
    """Which linear maps have adapters, and how these train.

    Attributes:
      targets: regular expressions for the whole paths of kernels of linear maps, which then stay as
        they are.
      rank: R of the adapters.
      alpha: what an adapter adds is scaled by alpha / rank.
      rslora: it is scaled by alpha / sqrt(rank) instead. Follows: arXiv:2312.03732.
      lr: the adapters' peak learning rate; None for that of the optimizer.
      weight_decay: theirs; None for that of the optimizer.
    """

    targets: tuple[str, ...] = (LINEAR,)
    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    lr: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        if not self.targets:
            raise UsageError("lora.targets is empty: want at least one pattern")
        if self.rank < 1:
            raise UsageError(f"lora.rank is {self.rank}: want 1 or more")
        if self.alpha <= 0:
            raise UsageError(f"lora.alpha is {self.alpha}: want more than 0")
        self.parts  # noqa: B018 (checks the rest)

    @property
    def scale(self) -> float:
        """The factor of what an adapter adds."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def parts(self) -> tuple[Part, Part]:
        """How the adapters train, and that their scales do not."""
        moving = f".*/({low_rank.A}|{low_rank.B})"
        return (
            Part(moving, lr=self.lr, weight_decay=self.weight_decay),
            Part(f".*/{low_rank.SCALE}", frozen=True),
        )

    def adapters(self, boxed: Mapping[str, Any], frozen: Mapping[str, Any]) -> Any:
        """Boxed shapes of the adapters of a model.

        Args:
          boxed: all of its parameters.
          frozen: those that do not train.

        Raises:
          UsageError: a pattern matches no linear map, the rank is too large for one, or one trains
            itself.
        """
        kernels = low_rank.targets(boxed, self.targets)
        still = low_rank.linear_kernels(frozen)
        if moving := sorted(kernels.keys() - still.keys()):
            raise UsageError(
                f"lora: {moving[0]} has an adapter and belongs to a part that trains: want it in a "
                "frozen part"
            )
        return low_rank.adapters(kernels, self.rank)

    def draw(self, shapes: Any, key: jax.Array) -> Any:
        """Adapters that change nothing yet."""
        return low_rank.draw(shapes, key, self.scale)
