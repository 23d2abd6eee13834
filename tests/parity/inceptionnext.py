"""InceptionNeXt against timm."""

import re

import flax.linen as nn
import jax
import numpy as np

from tests.parity.case import Case
from zoo.models.vision.inceptionnext import (
    InceptionConv,
    InceptionNeXtClassifierConfig,
    InceptionNeXtConfig,
    table,
)


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our module and the recorded weights."""
    sizes, pixels = case.kwargs, case.inputs["x"].transpose(0, 2, 3, 1)
    told = dict(re.findall(r"(\w+)=([\d.]+)", sizes.get("token_mixers", "")))
    depths = tuple(sizes["depths"])
    tower = InceptionNeXtConfig(
        image_size=4 * 2 ** (len(depths) - 1),
        depths=depths,
        widths=tuple(sizes["dims"]),
        mlp_ratios=_each(sizes.get("mlp_ratios", (4, 4, 4, 3)), len(depths)),
        branch=float(told.get("branch_ratio", 1 / 8)),
        band=int(told.get("band_kernel_size", 11)),
        channels=pixels.shape[-1],
    )
    classes = sizes.get("num_classes", 1000)
    config = InceptionNeXtClassifierConfig(tower, "mean", num_classes=classes)
    model = config.build()
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), {"pixels": pixels}))
    variables = table(config).load(case.params, shapes)
    first = jax.tree.map(lambda leaf: leaf[0], variables["params"]["tower"]["stages_0"]["layers"])
    mixer = InceptionConv(int(tower.widths[0] * tower.branch), tower.band)

    @jax.jit
    def every():
        stem = tower.build().apply(
            {name: tree["tower"] for name, tree in variables.items()},
            pixels,
            method=lambda m, x: m.norms[0](m.patches[0](x)),
        )
        stem = stem.reshape(len(pixels), *(side // 4 for side in pixels.shape[1:3]), -1)
        mixed = mixer.apply({"params": first["mixer"]}, stem)
        return stem, mixed, model.apply(variables, {"pixels": pixels})

    stem, mixed, out = every()
    found = {
        "stem": stem,
        "mixer": mixed,
        "logits": out.logits,
        **{f"stage{i}": level for i, level in enumerate(out.features.pyramid)},
    }
    grids = {name: grid for name, grid in found.items() if name != "logits"}
    found |= {name: np.asarray(grid).transpose(0, 3, 1, 2) for name, grid in grids.items()}
    return {name: np.asarray(found[name]) for name in case.outputs}


def _each(value: int | list[int], number: int) -> tuple[int, ...]:
    return (value,) * number if isinstance(value, int) else tuple(value)[:number]
