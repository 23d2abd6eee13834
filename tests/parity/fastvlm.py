"""FastViTHD, folded and with its branches, against the official code."""

import flax.linen as nn
import jax
import numpy as np

from tests.parity.case import Case
from zoo.models.parts.assemblies.classifier import ClassifierConfig
from zoo.models.parts.towers.fastvit import FastViTConfig
from zoo.models.vlm.fastvlm import table


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our module and the recorded weights."""
    sizes, pixels = case.kwargs, case.inputs["x"].transpose(0, 2, 3, 1)
    tower = FastViTConfig(
        image_size=pixels.shape[1],
        depths=tuple(sizes["layers"]),
        widths=tuple(sizes["embed_dims"]),
        mlp_ratios=tuple(int(ratio) for ratio in sizes["mlp_ratios"]),
        attention_from=sizes["token_mixers"].index("attention"),
        head_width=case.params["head.proj"].shape[1],
        form="released" if sizes["inference_mode"] else "branches",
        channels=pixels.shape[-1],
    )
    config = ClassifierConfig(tower, "cls")
    model = config.build()
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), {"pixels": pixels}))
    variables = table(config).load(case.params, shapes)
    inner = {name: tree["tower"] for name, tree in variables.items()}

    @jax.jit
    def every():
        stem = tower.build().apply(inner, pixels, method="stem_grid")
        return stem, model.apply(variables, {"pixels": pixels}).features

    stem, features = every()
    batch, grid = len(pixels), features.grid
    maps = {"stem": stem, "image_embeddings": features.tokens.reshape(batch, *grid, -1)}
    maps |= {f"stage{i}": level for i, level in enumerate(features.pyramid)}
    maps |= {f"stage{i}_attention": level for i, level in enumerate(features.pyramid)}
    found = {name: np.asarray(x).transpose(0, 3, 1, 2) for name, x in maps.items()}
    found["pooled_projection"] = np.asarray(features.cls)
    return {name: found[name] for name in case.outputs}
