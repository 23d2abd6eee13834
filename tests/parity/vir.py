"""ViR against the released class: the three linear forms, and its softmax."""

from dataclasses import replace

import flax.linen as nn
import jax
import numpy as np

from tests.parity.case import Case
from zoo.models.parts.assemblies.classifier import ClassifierConfig
from zoo.models.parts.layers.retention import decay_mask, log_decays
from zoo.models.vision.vir import VirConfig, table


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our module and the recorded weights."""
    sizes, pixels = case.kwargs, case.inputs["x"].transpose(0, 2, 3, 1)
    width, heads = sizes["embed_dim"], sizes["num_heads"]
    tower = VirConfig(
        image_size=sizes["img_size"][0],
        patch_size=sizes.get("patch_size", 16),
        width=width,
        depth=sizes["depth"],
        num_heads=heads,
        mlp_dim=int(width * sizes.get("mlp_ratio", 4.0)),
        layer_scale=sizes.get("init_values", 1e-5),
        both_ways=sizes.get("encode_mode") == "bidirectional",
        chunk=case.meta["chunk_size"],
        channels=pixels.shape[-1],
    )
    config = ClassifierConfig(tower, num_classes=sizes["num_classes"])
    batch = {"pixels": pixels}
    shapes = nn.unbox(jax.eval_shape(config.build().init, jax.random.key(0), batch)["params"])
    params = table(config).load(case.params, shapes)
    first = jax.tree.map(lambda leaf: leaf[0], params["tower"]["stack"]["layers"])

    def whole(**changes):
        """Features of the whole model in another form, and its logits."""
        model = replace(config, tower=replace(tower, **changes)).build()
        taps = (0, tower.depth)
        return model.apply({"params": params}, batch, taps=taps)

    def normed(out):
        final = tower.build()
        return final.apply(
            {"params": params["tower"]},
            out.features.taps[tower.depth],
            method=lambda module, x: module.final_norm(x),
        )

    def alone(tokens, **changes):
        """Retention of the first layer on tokens as they are, and its last state."""
        block = replace(tower, **changes).plan()[0].block.clone(parent=None, name=None)
        bound = block.bind({"params": first})
        y, state = bound.retain(bound.q(tokens), bound.k(tokens), bound.v(tokens))
        return block.clone(layer_scale=None).apply(
            {"params": first}, y, method=lambda module, y: module.out(y)
        ), state

    @jax.jit
    def every():
        released = whole(softmax=True)
        tokens = released.features.taps[0]
        recurrent, state = alone(tokens, form="recurrent")
        return {
            "tokens": tokens,
            "parallel_logits": released.logits,
            "retention0_parallel_softmax": alone(tokens, softmax=True)[0],
            "retention0_linear_full": alone(tokens)[0],
            "retention0_recurrent": recurrent,
            "retention0_final_state": state,
            "recurrent_tokens": normed(whole(form="recurrent")),
            "chunkwise_tokens": normed(whole(form="chunks")),
        }

    found = every()
    gammas = log_decays(heads)
    found["gamma"] = np.exp(gammas).astype(np.float32)
    found["decay_mask"] = decay_mask(gammas, found["tokens"].shape[1])
    return {name: np.asarray(found[name]) for name in case.outputs}
