"""ViTamin against timm."""

import flax.linen as nn
import jax
import numpy as np

from tests.parity.case import Case
from zoo.models.parts.assemblies.classifier import ClassifierConfig
from zoo.models.vision.vitamin import ViTaminConfig, table


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our module and the recorded weights."""
    sizes, pixels = case.kwargs, case.inputs["x"].transpose(0, 2, 3, 1)
    width = sizes["embed_dim"]
    tower = ViTaminConfig(
        image_size=sizes["img_size"],
        stem_width=sizes["stem_width"],
        stage_widths=tuple(sizes["conv_dims"][:2]),
        stage_depths=tuple(sizes["conv_depths"][:2]),
        width=width,
        depth=sizes["depth"],
        num_heads=sizes["num_heads"],
        mlp_dim=int(sizes["mlp_ratio"] * width),
        positions=sizes["pos_embed"] == "learn",
        channels=pixels.shape[-1],
    )
    classes = sizes["num_classes"]
    config = ClassifierConfig(tower, "mean", num_classes=classes, head_norm="layer")
    model = config.build()
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), {"pixels": pixels}))
    params = table(config).load(case.params, shapes["params"])
    foot = tower.build()

    @jax.jit
    def every():
        def grids(m, x):
            return m.patch.grids(x), m.patch(x)

        inner = foot.apply({"params": params["tower"]}, pixels, method=grids)
        return inner, model.apply({"params": params}, {"pixels": pixels}, taps=(1,))

    (grids, tokens), out = every()
    found = {"tokens": tokens, "block0": out.features.taps[1], "logits": out.logits}
    maps = dict(zip(("stem", "mbconv_stage0", "mbconv_stage1"), grids, strict=True))
    found |= {name: np.asarray(x).transpose(0, 3, 1, 2) for name, x in maps.items()}
    return {name: np.asarray(found[name]) for name in case.outputs}
