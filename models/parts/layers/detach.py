"""Modules whose parameters get no gradient."""

from typing import Any

import flax.linen as nn
import jax


def detached(module: nn.Module, *args: Any) -> Any:
    """What a bound module computes, with no gradient to its parameters."""
    bare, variables = module.unbind()
    return bare.apply(jax.lax.stop_gradient(variables), *args)
