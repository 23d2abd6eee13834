"""Swin against timm."""

import re

import flax.linen as nn
import jax
import numpy as np

from tests.parity.case import Case
from zoo.models.parts.assemblies.classifier import ClassifierConfig
from zoo.models.parts.towers.swin import PatchMerging, SwinConfig
from zoo.models.vision.swin import timm_table


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our module and the recorded weights."""
    sizes = case.kwargs
    pixels = case.inputs["x"].transpose(0, 2, 3, 1)  # [B, H, W, 3]
    tower = SwinConfig(
        image_size=sizes.get("img_size", 224),
        patch_size=sizes.get("patch_size", 4),
        first_width=sizes.get("embed_dim", 96),
        depths=tuple(sizes["depths"]),
        num_heads=tuple(sizes["num_heads"]),
        window=sizes.get("window_size", 7),
        mlp_ratio=sizes.get("mlp_ratio", 4.0),
        channels=pixels.shape[-1],
    )
    config = ClassifierConfig(tower, "mean", num_classes=sizes.get("num_classes", 1000))
    model = config.build()
    shapes = jax.eval_shape(model.init, jax.random.key(0), {"pixels": pixels})["params"]
    params = timm_table(config).load(case.params, nn.unbox(shapes))
    own, bound = params["tower"], tower.build()

    def grids(tower: nn.Module) -> dict[str, np.ndarray]:
        """Feature maps before and after every layer."""
        first = tower.apply({"params": own}, pixels, method=lambda m, x: m.patch_norm(m.patch(x)))
        x = first.reshape(len(pixels), *(tower.config.sides[0],) * 2, -1)
        found = {"patch_embed": x}
        for stage, depth in enumerate(tower.config.depths):
            rows = own[f"stages_{stage}"]["layers"]
            if stage:
                merge = PatchMerging(tower.config.widths[stage - 1], tower.config.norm_eps)
                x = found["merged"] = merge.apply({"params": own[f"merges_{stage - 1}"]}, x)
            blocks = tower._blocks(stage)
            for number in range(depth):
                block = blocks[number % len(blocks)].clone(parent=None, name=None)
                row = jax.tree.map(lambda leaf, n=number: leaf[n], rows)
                x = found[f"block{stage}_{number}"] = block.apply({"params": row}, x)
            found[f"stage{stage}"] = x
        return found

    @jax.jit
    def every():
        return grids(bound), model.apply({"params": params}, {"pixels": pixels})

    found, out = every()
    found["features"] = out.features.tokens.reshape(len(pixels), *out.features.grid, -1)
    found["logits"] = out.logits
    found |= {f"stage{i}": level for i, level in enumerate(out.features.pyramid)}
    names = {name: re.sub("_shifted$", "", name) for name in case.outputs}
    return {name: np.asarray(found[plain]) for name, plain in names.items()}
