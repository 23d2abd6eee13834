"""Cross tokens of the decoder, and the loss that makes those of pictures and texts alike."""

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from zoo.models.core.types import KV, Array, Aux, Memory, Stream, take
from zoo.models.parts.decoders.gqa import Plan
from zoo.models.parts.decoders.policies import wrap
from zoo.models.parts.layers.plan import LayerPolicy, Run
from zoo.models.reduction.crossget.encoder import CrossToken


def divergence(image: Array, text: Array) -> Array:
    """How far cross tokens [..., D] are apart, each as a softmax over its channels: the mean of the
    divergences of both from their mean, float32 [...].
    """
    logs = [jax.nn.log_softmax(x.astype(jnp.float32), -1) for x in (image, text)]
    mean = (jnp.exp(logs[0]) + jnp.exp(logs[1])) / 2
    entropy = mean * jnp.log(jnp.maximum(mean, jnp.finfo(jnp.float32).tiny))
    return sum((entropy - mean * log).sum(-1) for log in logs) / 2


def repeats(layers: int, depth: int) -> tuple[int, ...]:
    """Which of so many layers of the tower each of `depth` layers of the decoder is compared
    with.
    """
    ends = [(number + 1) * depth // layers for number in range(layers)]
    return tuple(next(n for n, end in enumerate(ends) if layer < end) for layer in range(depth))


@dataclass(frozen=True)
class CrossText:
    """A policy of the decoder: the first token of a prompt is its cross token.

    Attributes:
      layers: of the tower, whose cross tokens are those of the picture.
      weight: of the loss.
    """

    layers: int
    weight: float

    def apply(self, plan: Plan, *, slots: int) -> Plan:
        """The plan with cross tokens in all layers."""
        del slots
        each = self.weight / len(plan)
        rows = repeats(self.layers, len(plan))
        return wrap(plan, {layer: CrossPrompt(row, each) for layer, row in enumerate(rows)})


@struct.dataclass
class CrossPrompt(LayerPolicy):
    """Before the layer, adds a learned vector to the first token of a prompt. In training, reports
    how far this is from the cross tokens of the picture.

    Attributes:
      row: of the tower's layers, that which is compared.
      weight: of the loss.
    """

    name: ClassVar[str] = "cross"

    row: int | Array
    weight: float | Array

    def module(self, block: nn.Module) -> nn.Module:
        """The learned vector of this layer."""
        del block
        return CrossToken(parent=None)

    def __call__(
        self,
        layer: nn.Module,
        own: nn.Module | None,
        run: Run,
        stream: Stream,
        state: Any,
        memory: Memory,
    ) -> tuple[Stream, Any, Aux]:
        del layer
        assert own is not None
        if isinstance(state, KV):  # decoding: the prompt has been read
            return run(stream, state)
        first = jnp.argmax(stream.tokens.valid, -1, keepdims=True)  # [B, 1]
        cross = own(take(stream.hidden, first))  # [B, 1, D]
        place = jnp.arange(stream.hidden.shape[1]) == first
        stream = stream.replace(hidden=jnp.where(place[..., None], cross, stream.hidden))
        stream, state, _ = run(stream, state)
        if (image := memory.get("cross_image")) is None:
            return stream, state, {}
        apart = divergence(image[:, :, self.row], cross)  # [B, M]
        return stream, state, {"guidance_loss": self.weight * apart.mean()}
