"""What scales or drops branches: learned gains, stochastic depth, channel attention."""

from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from zoo.models.core.types import Array, Aux, Memory, Stream
from zoo.models.parts.layers.activations import ACTIVATIONS
from zoo.models.parts.layers.linear import dense
from zoo.models.parts.layers.plan import LayerPolicy, Run

Rate = Array | float | None
"""A share of examples; None is 0, and no random number is drawn."""

DROP_KEY = "drop_path_key"
"""The name of the random key in the memory of a `Stack` whose layers have `StochasticDepth`."""


class LayerScale(nn.Module):
    """A learned gain on every channel: [..., D] -> [..., D]. Follows: arXiv:2103.17239.

    Attributes:
      start: its first value.
    """

    start: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.constant(self.start), ("norm",))
        return x * self.param("scale", init, (x.shape[-1],)).astype(x.dtype)


class DropPath(nn.Module):
    """Stochastic depth: in training, a branch is left out for some examples, and for the others
    divided by the share of those, so that its mean stays. Follows: arXiv:1603.09382.

    The key is that of the random stream "dropout".
    """

    @nn.compact
    def __call__(self, branch: Array, rate: Rate, *, train: bool) -> Array:
        """The branch [B, ...], of which a share `rate` is left out where `train`."""
        if not train or rate is None:
            return branch
        return drop_examples(branch, rate, self.make_rng("dropout"))


def drop_examples(branch: Array, rate: Array | float, key: Array) -> Array:
    """Zeros for a share `rate`, below 1, of the examples of [B, ...]; the others divided by the
    rest.
    """
    keep = 1.0 - jnp.asarray(rate, jnp.float32)
    kept = jax.random.bernoulli(key, keep, (branch.shape[0],) + (1,) * (branch.ndim - 1))
    return jnp.where(kept, branch / keep.astype(branch.dtype), jnp.zeros((), branch.dtype))


def drop_path_rates(depth: int, last: float) -> np.ndarray | None:
    """Rates of `depth` layers, from 0 in the first to `last` in the last one, evenly; None if all
    are 0.
    """
    if not 0 <= last < 1:
        raise ValueError(f"drop_path = {last}: want 0 <= drop_path < 1")
    return np.linspace(0, last, depth, dtype=np.float32) if last else None


def drop_path_stages(depths: Sequence[int], last: float) -> tuple[np.ndarray | None, ...]:
    """The same for layers in stages, over all of which the rates rise."""
    rates = drop_path_rates(sum(depths), last)
    if rates is None:
        return (None,) * len(depths)
    return tuple(np.split(rates, np.cumsum(depths)[:-1]))


@struct.dataclass
class StochasticDepth(LayerPolicy):
    """`DropPath` on both halves of a pre-norm `Block`, where the memory has a key `DROP_KEY`.

    Attributes:
      rate: the share of examples for which a half is left out.
      number: of the layer, so that each draws for itself.
    """

    name: ClassVar[str] = "stochastic_depth"
    splits: ClassVar[bool] = True

    rate: float
    number: int

    def __call__(
        self,
        layer: nn.Module,
        own: nn.Module | None,
        run: Run,
        stream: Stream,
        state: Any,
        memory: Memory,
    ) -> tuple[Stream, Any, Aux]:
        if DROP_KEY not in memory:
            return run(stream, state)
        keys = jax.random.split(jax.random.fold_in(memory[DROP_KEY], self.number))
        x = stream.hidden
        stream, state, _ = layer.attention(stream, state, memory)
        x = x + drop_examples(stream.hidden - x, self.rate, keys[0])
        stream = stream.replace(hidden=x)
        branch = layer.feed_forward(stream, memory)
        return stream.replace(hidden=x + drop_examples(branch, self.rate, keys[1])), state, {}


def stochastic_depth(depth: int, last: float) -> tuple[tuple[StochasticDepth, ...], ...]:
    """Policies of `depth` layers, for the steps of a plan; none where `last` is 0."""
    rates = drop_path_rates(depth, last)
    if rates is None:
        return ((),) * depth
    return tuple((StochasticDepth(float(rate), number),) for number, rate in enumerate(rates))


class SqueezeExcite(nn.Module):
    """`x * gate(expand(activation(reduce(mean of x))))`, the mean over the grid of [B, *grid, C].
    Follows: arXiv:1709.01507.

    Attributes:
      width: C.
      hidden: channels between the two linear maps.
      activation: between them, a name of `ACTIVATIONS`.
    """

    width: int
    hidden: int
    activation: str = "relu"

    def setup(self) -> None:
        self.reduce = dense(self.width, self.hidden, bias=True)
        self.expand = dense(self.hidden, self.width, bias=True, axes=("mlp", "embed"))

    def __call__(self, x: Array) -> Array:
        mean = x.mean(tuple(range(1, x.ndim - 1)), keepdims=True)
        return x * jax.nn.sigmoid(self.expand(ACTIVATIONS[self.activation](self.reduce(mean))))
