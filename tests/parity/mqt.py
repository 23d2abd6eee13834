"""The Matryoshka query transformer against the official `Resampler`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.parity.case import Case
from zoo.models.connectors.mqt import MQT, connector_table, query_positions
from zoo.models.core.types import Features
from zoo.models.parts.layers.resize import resize_bicubic


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our module and the recorded weights."""
    if "rows_256" in case.inputs:
        return _tables(case)
    sizes, grid = case.kwargs, tuple(int(n) for n in case.inputs["tgt_size"])
    width, queries = sizes["kv_dim"], sizes["grid_size"] ** 2
    config = MQT(queries, sizes["num_heads"], sizes["norm_eps"])
    module = config.build(width, sizes["embed_dim"], grid)
    vision = Features(jnp.asarray(case.inputs["features"])[:, None], grid)
    shapes = jax.eval_shape(module.init, jax.random.key(0), vision)["params"]
    table = connector_table(queries, width)
    variables = {"params": table.load(case.params, nn.unbox(shapes))}

    out = {}
    for name in case.outputs:
        if name.startswith("tokens_m"):
            visual = module.apply(variables, vision, budget=int(name.removeprefix("tokens_m")))
            out[name] = np.asarray(visual.tokens.tokens[:, 0])
        elif name == "key_pos_embed":
            out[name] = _resized(queries, width, grid)
        elif name == "attention_mean_over_heads":
            images, budget = case.outputs[name].shape[:2]
            weights = module.apply(variables, budget, grid, method="attention").mean(0)
            out[name] = np.broadcast_to(np.asarray(weights), (images, *weights.shape))
    return out


def _tables(case: Case) -> dict[str, np.ndarray]:
    """Rows of the full-size position tables."""
    table, resized = query_positions(256, 1024), _resized(256, 1024, (24, 24))
    return {
        "pos_embed_rows": table[case.inputs["rows_256"]],
        "interp_rows": resized[case.inputs["rows_576"]],
    }


def _resized(queries: int, width: int, grid: tuple[int, int]) -> np.ndarray:
    side = int(queries**0.5)
    table = jnp.asarray(query_positions(queries, width)).reshape(side, side, width)
    return np.asarray(resize_bicubic(table, *grid)).reshape(-1, width)
