"""DAMRO on a tiny LLaVA against the official fork of transformers."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.parity.case import Case
from zoo.agents.damro import Damro, outliers
from zoo.generate.autoregressive import Reader
from zoo.generate.branches import Combined
from zoo.models.base.llava import read
from zoo.models.core.hf import Fields
from zoo.models.parts.assemblies.llava_hub import RENAMES, hub_table

FLOOR = -1e30
"""What the records have in the place of minus infinity."""


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our model, the recorded weights and the recorded prompt."""
    settings = case.kwargs
    config = read(
        Fields(
            "case",
            {
                "model_type": "llava",
                "vision_config": settings["vision"],
                "text_config": settings["text"],
                "image_token_index": settings["image_token_index"],
                "vision_feature_layer": settings["vision_feature_layer"],
            },
        )
    )
    model, params = config.build(), _params(config, case.params)
    ids = case.inputs["input_ids"].astype(np.int32)
    pixels = case.inputs["pixel_values"].transpose(0, 2, 3, 1)[:, None]
    batch = {"ids": ids, "pixels": pixels, "text_mask": np.ones(ids.shape, bool)}
    damro = Damro(settings["damro_alpha"], settings["damro_beta"], settings["damro_topk"])
    plain = Reader(model)
    reader, steps = damro(plain), settings["max_new_tokens"]
    apart = Combined(model, branches=reader.branches, combine=_same)
    both, _ = jax.jit(apart.prefill, static_argnums=3)(params, batch, None, 0)

    scores, said = [], []
    logits, cache = jax.jit(reader.prefill, static_argnums=3)(params, batch, None, steps)
    decode = jax.jit(reader.decode)
    while True:
        scores.append(np.maximum(np.asarray(logits), FLOOR))
        said.append(np.asarray(logits).argmax(-1)[:, None])
        ended = (said[-1] == settings["text"]["eos_token_id"]).all()
        if len(said) == steps or ended:
            break
        logits, cache = decode(params, jnp.asarray(said[-1]), cache)

    [layer] = config.layers

    def look(model):
        return model.tower(jnp.asarray(pixels[:, 0]), qk=(layer,), stop_after=layer)

    @jax.jit
    def chosen(params):
        features = model.apply({"params": params}, method=look)
        return outliers(*features.qk[layer], damro.top_k)

    index, attention = chosen(params)
    return {
        "logits_original_last": np.asarray(both[0]),
        "logits_negative_last": np.asarray(both[1]),
        "outlier_index": np.asarray(index),
        "outlier_cls_attention": np.asarray(attention),
        "generated_ids": np.concatenate([ids, *said], -1),
        "contrast_scores_per_step": np.stack(scores, 1),
    }


def _same(logits):
    return logits


def _params(config, state):
    """Ours from the official names, which are those of transformers 4."""
    renamed = {}
    for key, leaf in state.items():
        for pattern, replacement in RENAMES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = leaf
    shapes = jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))["params"]
    return hub_table(config).load(renamed, nn.unbox(shapes))
