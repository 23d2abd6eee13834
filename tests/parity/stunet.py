"""STU-Net against the official class."""

import flax.linen as nn
import jax
import numpy as np

from tests.parity.case import Case
from zoo.models.dense.stunet import STUNetConfig, padded, table


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our module and the recorded weights."""
    sizes, pixels = case.kwargs, np.moveaxis(case.inputs["x"], 1, -1)
    widths = tuple(sizes["dims"])
    strides = tuple(tuple(stride) for stride in sizes["pool_op_kernel_sizes"])
    config = STUNetConfig(
        widths=widths,
        depth=tuple(sizes["depth"]),
        strides=padded(strides, len(widths)),
        channels=sizes["input_channels"],
        num_classes=sizes["num_classes"],
        sides=pixels.shape[1:4],
    )
    model, batch = config.build(), {"pixels": pixels}
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), batch)["params"])
    params = table(config).load(case.params, shapes)

    @jax.jit
    def every(params):
        out = model.apply({"params": params}, batch)
        raised = model.apply(
            {"params": params},
            out.pyramid[-1],
            method=lambda module, x: module.enlarge(module.mix[0], x, config.strides[-1]),
        )
        return out, raised

    out, raised = every(params)
    found = {"enc0": out.pyramid[0], "bottleneck": out.pyramid[-1], "up0": raised}
    found |= {f"seg{i}": logits for i, logits in enumerate((out.logits, *out.coarse))}
    return {name: np.moveaxis(np.asarray(found[name]), -1, 1) for name in case.outputs}
