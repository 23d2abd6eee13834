"""The scale-aware modulation transformer against the official class."""

import jax
import numpy as np
from flax import linen as nn

from tests.parity.case import Case
from zoo.models.parts.assemblies.classifier import ClassifierConfig
from zoo.models.vision.smt import LocalAttention, Modulation, SMTBlock, SMTConfig, table


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our module and the recorded weights."""
    sizes, pixels = case.kwargs, case.inputs["x"].transpose(0, 2, 3, 1)
    tower = SMTConfig(
        image_size=pixels.shape[1],
        widths=tuple(sizes["embed_dims"]),
        depths=tuple(sizes["depths"]),
        num_heads=tuple(sizes["sa_num_heads"][2:]),
        mlp_ratios=tuple(sizes["mlp_ratios"]),
        stem_size=sizes["head_conv"],
        filters=sizes["ca_num_heads"][0],
        expansion=sizes["expand_ratio"],
        layer_scale=1.0 if sizes.get("use_layerscale") else None,
        channels=pixels.shape[-1],
    )
    config = ClassifierConfig(tower, "mean", num_classes=sizes["num_classes"])
    model, batch = config.build(), {"pixels": pixels}
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), batch))
    variables = table(config).load(case.params, dict(shapes))

    def stages(model, pixels):
        """Input of the first stage, and of the third."""
        own = model.tower
        x = own.patch_norms[0](own.patches[0](own.stem(pixels)))
        y = own.norms[0](own._run(0, x, None, train=False))
        y = own.norms[1](own._run(1, own.patch_norms[1](own.patches[1](y)), None, train=False))
        return x, own.patch_norms[2](own.patches[2](y))

    @jax.jit
    def forward(variables):
        return model.apply(variables, pixels, method=stages), model.apply(variables, batch)

    (first, third), final = forward(variables)

    def row(collection, name, *path):
        """Variables of the first of the layers called `name`."""
        tree = variables[collection]["tower"][name]["layers"]
        for part in path:
            tree = tree[part]
        return jax.tree.map(lambda leaf: leaf[0], tree)

    def block(stage, attends, name, *path):
        """A layer with its own variables."""
        found = {"params": row("params", name, *path)}
        if not attends:
            found["stats"] = row("stats", name, *path)
        return SMTBlock(tower, stage, attends).bind(found)

    layer = block(0, False, "stages_0")
    mixer: Modulation = layer.mixer
    normed = layer.attn_norm(first)
    middle = first + (layer.attn_gain(mixer(normed)) if tower.layer_scale else mixer(normed))
    modulating = block(2, False, "stages_2", "modulating")
    attending = block(2, True, "stages_2", "attending")
    second = modulating(third)
    attention: LocalAttention = attending.mixer
    out = {
        "embed1": first,
        "sam_block1_attn": mixer(normed),
        "modulator_block1": mixer.modulator(normed).transpose(0, 3, 1, 2),
        "mlp_block1": layer.mlp(layer.mlp_norm(middle)),
        "mhsa_block3_1_attn": attention(attending.attn_norm(second)),
        "norm3": final.features.pyramid[2],
        "norm4": final.features.pyramid[3],
        "logits": final.logits,
    }
    return {name: _shaped(out[name], case.outputs[name].ndim) for name in case.outputs}


def _shaped(x, axes: int) -> np.ndarray:
    """[B, h, w, C] as [B, N, C] where the record has it so."""
    x = np.asarray(x)
    return x.reshape(x.shape[0], -1, x.shape[-1]) if x.ndim == 4 and axes == 3 else x
