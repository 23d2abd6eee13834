"""The ViT with a frozen LLaMA layer against the official class."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.parity.case import Case
from zoo.models.parts.assemblies.classifier import ClassifierConfig
from zoo.models.vision.lm4visual import BorrowedConfig, LM4VisualConfig, table, vit


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our module and the recorded weights."""
    sizes, llm = case.kwargs, case.kwargs["llama_configs"]
    pixels = case.inputs["x"].transpose(0, 2, 3, 1)
    width, depth = sizes["embed_dim"], sizes["depth"]
    tower = LM4VisualConfig(
        vit(
            image_size=sizes["img_size"],
            patch_size=sizes["patch_size"],
            width=width,
            depth=depth,
            num_heads=sizes["num_heads"],
            mlp_dim=int(width * sizes["mlp_ratio"]),
            channels=pixels.shape[-1],
        ),
        BorrowedConfig(
            width=llm["dim"],
            num_heads=llm["n_heads"],
            mlp_dim=case.params["llama.layers.0.feed_forward.w1.weight"].shape[0],
            first_layer=llm["first_layer"],
            num_layers=llm["n_layers"],
            norm_eps=llm["norm_eps"],
        ),
    )
    config = ClassifierConfig(tower, num_classes=sizes["num_classes"])
    model, batch = config.build(), {"pixels": pixels}
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), batch)["params"])
    params = table(config).load(case.params, shapes)

    def inside(module: nn.Module, x: jax.Array) -> dict[str, jax.Array]:
        insert = module.insert
        mapped = insert.into(x)
        out = insert.norm(insert.through(mapped))
        first = insert.through(mapped, stop=1)
        names = {"mapped_in": mapped, "llama_layer0": first, "llama_out": out}
        return names | {"mapped_out": insert.back(out)}

    @jax.jit
    def every(params):
        out = model.apply({"params": params}, batch, taps=(depth,))
        tokens = jnp.asarray(out.features.taps[depth])
        found = tower.build().apply({"params": params["tower"]}, tokens, method=inside)
        return found | {"vit_tokens": tokens, "logits": out.logits}

    found = every(params)
    return {name: np.asarray(found[name]) for name in case.outputs}
