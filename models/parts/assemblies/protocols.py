"""What parts of the LLaVA assembly must have: connectors, and policies with vision features of
their own.
"""

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import flax.linen as nn

from zoo.models.parts.connect.crops import Crops

if TYPE_CHECKING:
    from zoo.models.parts.assemblies.llava import LlavaConfig


@runtime_checkable
class Connector(Protocol):
    """Configuration of a connector. Its module maps (`Features`, budget=) to a `Visual`."""

    def num_tokens(self, grid: tuple[int, int]) -> int:
        """Vision tokens per image at most."""
        ...

    def build(self, vision_width: int, width: int, grid: tuple[int, int]) -> nn.Module:
        """The module from tower width to decoder width, for a tower of this patch grid."""
        ...


@runtime_checkable
class TapSource(Protocol):
    """Configuration of a policy whose layers read vision features of their own, the taps."""

    @property
    def crops(self) -> Crops | None:
        """The crops that it wants to see of every image."""
        ...

    def hidden_states(self, depth: int) -> tuple[int, ...]:
        """The hidden states that it reads, 0 to `depth`, of a tower with so many layers.

        Raises:
          ValueError: one that this tower does not have.
        """
        ...

    def taps(self, config: "LlavaConfig") -> nn.Module:
        """The module that makes them, which stands around the connector.

        It maps (`Features`, the module of the connector, view_grid=, budget=) to a `Visual` with
        `memory["taps"]` [G, B, M Q, D]. The tokens of the features are [B, M, N, C], with crops
        [B, M, 1 + V, N, C], the whole first.

        Raises:
          ValueError: the model has no place for it, with the reason.
        """
        ...
