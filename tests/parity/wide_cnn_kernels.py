"""Kernels and the finite network against the official functions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.parity.case import Case
from zoo.benchmarks.wide_cnn_kernels import (
    FiniteNetwork,
    KernelConfig,
    fully_connected_ntk,
    table,
)


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output."""
    sizes, x, y = case.kwargs, case.inputs["x"], case.inputs["y"]
    config = KernelConfig(sizes["d"], tuple(sizes["filtersizes"]), sizes["normalize"])
    gram = config.build()(x, y)
    model = FiniteNetwork(config, sizes["locnet"]["h"])
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(x))["params"]
    params = table(config).load(case.params, nn.unbox(shapes))
    return {
        "dcntk": gram.ntk,
        "dcrfk": gram.rfk,
        "dntk_fcn_on_normalised_inputs": fully_connected_ntk(x, y, sizes["depth_fcn"]),
        "locnet": np.asarray(model.apply({"params": params}, jnp.asarray(x))),
    }
