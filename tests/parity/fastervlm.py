"""FasterVLM against the official vision tower and projector."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.parity.case import Case
from zoo.models.core.types import Array
from zoo.models.parts.assemblies.llava import LlavaConfig
from zoo.models.parts.assemblies.llava_hub import projector_rows
from zoo.models.parts.decoders.gqa import DecoderConfig
from zoo.models.parts.reduce.report import kept_of
from zoo.models.parts.reduce.scores import class_attention
from zoo.models.parts.towers.vit import ViTConfig, clip_table
from zoo.models.reduction.fastervlm import FasterVLM


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our modules and the recorded weights."""
    sizes, width = case.kwargs["clip"], len(case.params["mm_projector.2.bias"])
    tower = ViTConfig(
        image_size=sizes["image_size"],
        patch_size=sizes["patch_size"],
        width=sizes["hidden_size"],
        depth=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        mlp_dim=sizes["intermediate_size"],
        activation=sizes["hidden_act"],
        norm_eps=sizes["layer_norm_eps"],
    )
    decoder = DecoderConfig(
        vocab_size=8, width=width, depth=1, num_heads=1, num_kv_heads=1, mlp_dim=8
    )
    layer, keep = case.kwargs["select_layer"], case.kwargs["visual_token_num"]
    plain = LlavaConfig(tower, decoder=decoder, vision_layer=layer, image_id=3)
    pruned = LlavaConfig(
        tower, decoder=decoder, vision_layer=layer, image_id=3, reducer=FasterVLM(keep)
    )
    pixels = jnp.asarray(case.inputs["pixel_values"]).transpose(0, 2, 3, 1)[:, None]
    variables = {"params": _load(case, plain)}

    @jax.jit
    def outputs(variables: dict, pixels: Array) -> tuple:
        def encode(config: LlavaConfig) -> Array:
            return config.build().apply(variables, pixels, method="encode_image").tokens

        own = {"params": variables["params"]["tower"]}
        features = tower.build().apply(
            own, pixels, taps=(plain.read_layer,), qk=(plain.read_layer,)
        )
        patches = features.taps[plain.read_layer][..., tower.prefix :, :]
        q, k = features.qk[plain.read_layer]
        heads = class_attention(q, k, prefix=tower.prefix, heads="none")
        score = class_attention(q, k, prefix=tower.prefix)
        return patches, heads, score, encode(plain), encode(pruned)

    patches, heads, score, every, kept = outputs(variables, pixels)
    return {
        "tower_features": np.asarray(patches[:, 0]),
        "cls_attention_per_head": np.asarray(heads[:, 0]),
        "score": np.asarray(score[:, 0]),
        "keep_mask": kept_of(kept, score.shape[-1])[:, 0],
        "projected_all": np.asarray(every.tokens[:, 0]),
        "projected_kept": np.asarray(kept.tokens[:, 0]),
    }


def _load(case: Case, config: LlavaConfig) -> dict:
    """The recorded weights of tower and connector."""
    table = clip_table(config.tower).under("tower", "vision_model.")
    own = projector_rows(bias=True, keys=("0", "2"))
    table += own.under("connector", "mm_projector.")
    shapes = jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))
    shapes = nn.unbox(shapes["params"])
    return table.load(case.params, {part: shapes[part] for part in ("tower", "connector")})
