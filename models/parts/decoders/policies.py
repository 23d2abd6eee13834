"""Decoder policies that several systems share, and the tool that puts policies into a plan."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from flax import struct

from zoo.models.core.types import Array, Aux, Memory, Stream, take
from zoo.models.parts.decoders.gqa import Plan
from zoo.models.parts.layers.plan import LayerPolicy, Run


def wrap(plan: Plan, policies: Mapping[int, LayerPolicy]) -> Plan:
    """The plan with one more policy around each of the given layers, outside of those it has.

    Args:
      plan: of a decoder or a tower.
      policies: {layer, from 0: policy}.

    Raises:
      ValueError: a layer that the plan does not have.
    """
    if bad := sorted(layer for layer in policies if not 0 <= layer < len(plan)):
        names = sorted({policies[layer].name for layer in bad})
        raise ValueError(
            f"{', '.join(names)}: no layers {bad}; the plan has layers 0 to {len(plan) - 1}"
        )
    return tuple(
        replace(step, policies=(policies[layer], *step.policies)) if layer in policies else step
        for layer, step in enumerate(plan)
    )


@struct.dataclass
class AddTap(LayerPolicy):
    """Adds `memory["taps"][level]` to the hidden states of vision tokens before the layer.

    The taps are [G, B, N, D]. A token finds its row by its tag `cell`, wherever it stands and
    whatever was dropped before it; text, surplus slots and cells from N on are left as they are.
    Without taps, and in decoding, the layer is the plain one.

    Attributes:
      level: which of the G levels.
    """

    name: ClassVar[str] = "add_tap"
    reads: ClassVar[tuple[str, ...]] = ("taps",)

    level: int | Array

    def __call__(
        self,
        layer: nn.Module,
        own: nn.Module | None,
        run: Run,
        stream: Stream,
        state: Any,
        memory: Memory,
    ) -> tuple[Stream, Any, Aux]:
        del layer, own
        taps = memory.get("taps")
        if stream.slots and taps is not None:
            cell = stream.tokens.tags["cell"]
            known = (cell >= 0) & (cell < taps.shape[2])
            rows = take(taps[self.level], jnp.where(known, cell, 0))  # [B, L, D]
            rows = jnp.where(known[..., None], rows, 0).astype(stream.hidden.dtype)
            stream = stream.replace(hidden=stream.hidden + rows)
        return run(stream, state)
