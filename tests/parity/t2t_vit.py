"""Tokens-to-Token ViT against the official class."""

import flax.linen as nn
import jax
import numpy as np

from tests.parity.case import Case
from zoo.models.parts.assemblies.classifier import ClassifierConfig
from zoo.models.parts.layers.spatial import unfold
from zoo.models.vision.t2t_vit import SQUARES, T2TConfig, TokenAttention, TokensToToken, table


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our module and the recorded weights."""
    sizes, pixels = case.kwargs, case.inputs["x"].transpose(0, 2, 3, 1)
    tower = T2TConfig(
        image_size=sizes["img_size"],
        width=sizes["embed_dim"],
        depth=sizes["depth"],
        num_heads=sizes["num_heads"],
        mlp_dim=int(sizes["embed_dim"] * sizes["mlp_ratio"]),
        token_module=sizes["tokens_type"],
        token_dim=sizes["token_dim"],
        channels=pixels.shape[-1],
    )
    config = ClassifierConfig(tower, num_classes=sizes["num_classes"])
    model, batch = config.build(), {"pixels": pixels}
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), batch)["params"])
    params = table(config).load(case.params, shapes)
    patch = params["tower"]["patch"]

    squares = jax.jit(lambda x: unfold(x, *SQUARES[0]))(pixels)
    squares = squares.reshape(len(pixels), -1, 49 * tower.channels)
    layer = TokenAttention(squares.shape[-1], tower.token_dim, tower.token_module)
    final = jax.jit(model.apply)({"params": params}, batch)
    out = {
        "soft_split0": squares,
        "attention1": jax.jit(layer.apply)({"params": patch["layers_0"]}, squares),
        "tokens": jax.jit(TokensToToken(tower).apply)({"params": patch}, pixels),
        "cls_feature": final.pooled,
        "logits": final.logits,
    }
    return {name: np.asarray(out[name]) for name in case.outputs}
