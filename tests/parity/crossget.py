"""CrossGET: the official matchings of CLIP and LLaVA, and a whole vision tower of CLIP.

Tokens that are nearest to each other tie, so that their ranking is arbitrary: the recorded one is
followed where it is a ranking of our likeness, which is checked, and else ours.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tests.parity.case import Case
from zoo.models.core.types import take
from zoo.models.parts.reduce.merge import importances_of, likeness, match_all, merge_pairs
from zoo.models.parts.towers.vit import ViT, ViTConfig
from zoo.models.reduction.crossget.dual import vision_rows
from zoo.models.reduction.crossget.encoder import (
    CrossLayer,
    CrossTokens,
    attention_importance,
    cosine_importance,
    merged_at,
)


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our functions and the recorded weights."""
    found = _tower(case) if case.params else _matching(case)
    return {name: np.asarray(found[name]) for name in case.outputs}


def ranking(alike, recorded):
    """The recorded ranking if it is one, or else ours."""
    ours = jnp.argsort(-alike.max(-1), -1, stable=True)
    best = jnp.take_along_axis(alike.max(-1), jnp.asarray(recorded), -1)
    falls = ((best[:, 1:] <= best[:, :-1] + 1e-5) | jnp.isneginf(best[:, 1:])).all(-1)
    return jnp.where(falls[:, None], recorded, ours).astype(jnp.int32)


def _matching(case: Case) -> dict[str, np.ndarray]:
    return jax.jit(_matched, static_argnums=2)(
        case.inputs, case.outputs["rank_order"], case.kwargs["r"]
    )


def _matched(inputs, recorded, r):
    x, number = inputs["x"], inputs["x"].shape[1]
    there, at = jnp.arange(number), jnp.full((len(x), 1), number - 1)
    if "token_id" in inputs:
        at = inputs["token_id"].argmax(-1)[:, None]
    protected = (there == 0) | (there == number - 1) | (there == at)
    if "attn_head_mean" in inputs:
        metric = inputs["key_head_mean"]
        importance = attention_importance(inputs["attn_head_mean"])
    else:
        metric = inputs["key"]
        importance = cosine_importance(metric, take(inputs["query"], at))
    alike = likeness(metric, protected)
    order = ranking(alike, recorded)
    r = merged_at(r, number, 2 + ("token_id" in inputs))
    found = match_all(alike, importance, r, order=order)
    size = inputs["token_size"][..., 0]
    merged, total = merge_pairs(x, size, found, importance)
    out = {
        "rank_order": order,
        "x": merged,
        "token_size": total[..., None],
        "src_idx": found.source,
        "dst_all_idx_sorted": found.index,
        "dst_target_token": found.target,
        "weights_src_dst": jax.nn.softmax(importances_of(found, importance), -1),
    }
    if "token_id" in inputs:
        # Ids are no part of ours, which follows the protected token: they add up by size.
        parts = jax.nn.one_hot(found.groups, number - r, axis=-2)
        out["token_id"] = jnp.einsum("bgn,bn->bg", parts, inputs["token_id"] * size) / total
    return out


def _tower(case: Case) -> dict[str, np.ndarray]:
    sizes, depth = case.kwargs, case.kwargs["layers"]
    orders = [jnp.asarray(case.outputs[f"rank_order_layer{n}"]) for n in range(depth)]
    used = []

    @struct.dataclass
    class Recorded(CrossLayer):
        number: int = struct.field(pytree_node=False)

        def order(self, alike):
            used.append(ranking(alike, orders[self.number]))
            return used[-1]

    class Recording(CrossTokens):
        def layer(self, number, r):
            return Recorded(r, self.protect, self.importance, number == 0, number)

    config = ViTConfig(
        image_size=sizes["input_resolution"],
        patch_size=sizes["patch_size"],
        width=sizes["width"],
        depth=depth,
        num_heads=sizes["heads"],
        mlp_dim=4 * sizes["width"],
        policies=(Recording(sizes["r"]),),
    )
    params = {name: x for name, x in case.params.items() if name != "proj"}
    pixels = jnp.asarray(case.inputs["pixel_values"]).transpose(0, 2, 3, 1)
    shapes = jax.eval_shape(ViT(config).init, jax.random.key(0), pixels)["params"]
    weights = vision_rows(config).load(params, nn.unbox(shapes))
    used.clear()

    @jax.jit
    def see(weights, pixels):
        features = ViT(config).apply({"params": weights}, pixels)
        return features.cls, features.aux[-1]["size"], list(used)

    cls, size, ranked = see(weights, pixels)
    out = {"image_embed": np.asarray(cls) @ case.params["proj"], "final_token_size": size}
    return out | {f"rank_order_layer{n}": order for n, order in enumerate(ranked)}
