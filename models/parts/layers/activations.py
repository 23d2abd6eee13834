"""Activations by the names that configurations use."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax

from zoo.models.core.types import Array


def quick_gelu(x: Array) -> Array:
    """`x * sigmoid(1.702 x)`, the GELU of CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {
        "gelu": functools.partial(jax.nn.gelu, approximate=False),
        "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
        "quick_gelu": quick_gelu,
        "relu": jax.nn.relu,
        "silu": jax.nn.silu,
    }
)
