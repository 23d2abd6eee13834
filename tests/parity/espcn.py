"""ESPCN against the community's PyTorch class."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.parity.case import Case
from zoo.models.generators.espcn import ESPCNConfig, layout_of, table


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, channels first as there."""
    sizes, keys = case.kwargs, layout_of(case.params)
    kernels = [k for k in case.params if k.endswith("weight")]
    shapes = [case.params[k].shape for k in sorted(kernels)]
    config = ESPCNConfig(
        factor=sizes["upscale_factor"],
        channels=sizes["in_channels"],
        widths=tuple(shape[0] for shape in shapes[:2]),
        kernels=tuple(shape[-1] for shape in shapes),
    )
    model = config.build()
    pixels = jnp.asarray(case.inputs["x"].transpose(0, 2, 3, 1))
    tree = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), {"pixels": pixels}))["params"]
    variables = {"params": table(config, keys).load(case.params, tree)}
    out = model.apply(variables, {"pixels": pixels})
    found = {
        "features": out.features,
        "before_shuffle": out.cells,
        "y": model.apply(variables, pixels, method="upscale"),
    }
    return {name: np.asarray(value).transpose(0, 3, 1, 2) for name, value in found.items()}
