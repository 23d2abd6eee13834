"""The masked autoencoder against the official class, with recorded noise."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.parity.case import Case
from zoo.models.parts.assemblies.masked import MaskedConfig
from zoo.train.objectives.masked import patch_errors, patch_targets
from zoo.train.recipes.mae_human_scaling import table, vit


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our module and the recorded weights."""
    sizes, pixels = case.kwargs, jnp.asarray(case.inputs["x"].transpose(0, 2, 3, 1))

    def part(prefix: str) -> dict[str, int]:
        width = sizes[f"{prefix}embed_dim"]
        return {
            "image_size": sizes["img_size"],
            "patch_size": sizes["patch_size"],
            "width": width,
            "depth": sizes[f"{prefix}depth"],
            "num_heads": sizes[f"{prefix}num_heads"],
            "mlp_dim": int(width * sizes["mlp_ratio"]),
        }

    config = MaskedConfig(vit(**part("")), vit(**part("decoder_")), case.meta["mask_ratio"])
    model, batch = config.build(), {"pixels": pixels}
    draws = jnp.asarray(case.inputs["noise"])
    shapes = nn.unbox(
        jax.eval_shape(lambda k: model.init(k, batch, draws=draws), jax.random.key(0))
    )
    params = table(config).load(case.params, shapes["params"])

    @jax.jit
    def every(params):
        out = model.apply({"params": params}, batch, draws=draws)
        plain = patch_targets(pixels, config.tower.patch_size)
        wanted = patch_targets(
            pixels, config.tower.patch_size, normalise=sizes.get("norm_pix_loss", False)
        )
        each = patch_errors(out.patches, wanted)
        return {
            "latent": jnp.concatenate([out.features.cls[:, None], out.features.tokens], 1),
            "mask": out.hidden.astype(jnp.float32),
            "ids_restore": jnp.argsort(jnp.argsort(draws, -1), -1),
            "pred": out.patches,
            "loss": (each * out.hidden).sum() / out.hidden.sum(),
            "target": plain,
        }

    found = every(params)
    return {name: np.asarray(found[name]) for name in case.outputs}
