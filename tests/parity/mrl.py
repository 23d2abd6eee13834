"""Nested heads and their loss against the official layer and criterion."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.parity.case import Case
from zoo.train.objectives.nested import nested_cross_entropy
from zoo.train.recipes.mrl import Matryoshka, head_table


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output."""
    sizes = case.kwargs
    x, target = jnp.asarray(case.inputs["x"]), jnp.asarray(case.inputs["target"])
    config = Matryoshka(tuple(sizes["nesting_list"]), sizes["efficient"], sizes["bias"])
    head = config.build(x.shape[-1], sizes["num_classes"])
    shapes = jax.eval_shape(head.init, jax.random.key(0), x)["params"]
    params = head_table(config).load(case.params, nn.unbox(shapes))

    def logits(x):
        return head.apply({"params": params}, x)

    weights = tuple(sizes["relative_importance"] or ())

    def loss(x):
        each = nested_cross_entropy(
            logits(x), target, weights=weights, smoothing=sizes["label_smoothing"]
        )
        return each.mean()

    value, gradient = jax.value_and_grad(loss)(x)
    found = {"loss": value, "grad_x": gradient}
    for size, each in zip(sizes["nesting_list"], jnp.moveaxis(logits(x), -2, 0), strict=True):
        found[f"logits_{size}"] = each
    return {name: np.asarray(array) for name, array in found.items()}
