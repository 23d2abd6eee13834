"""Tokenizers of pictures and of time series with the encoder, against the official classes."""

import flax.linen as nn
import jax
import numpy as np

from tests.parity.case import Case
from zoo.models.encoders.meta_transformer import MetaTransformerConfig, table
from zoo.models.parts.layers.modalities import Pictures, Sequence, Series


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our module and the recorded weights."""
    sizes, encoder, x = case.kwargs, case.kwargs["encoder"], case.inputs["x"]
    if case.meta["cls"] == "PatchEmbed":
        batch = {"pixels": x.transpose(0, 2, 3, 1)}
        tokenizer = Pictures(sizes["img_size"], sizes["patch_size"], x.shape[1])
    else:
        batch = {"series": x}
        tokenizer = Series(sizes["c_in"], x.shape[1])
    config = MetaTransformerConfig(
        (tokenizer,),
        width=encoder["dim"],
        depth=encoder["depth"],
        num_heads=encoder["num_heads"],
        mlp_dim=int(encoder["dim"] * encoder["mlp_ratio"]),
    )
    model = config.build()
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), batch)["params"])
    params = table(config).load(case.params, shapes)

    def tokens(batch):
        return model.apply({"params": params}, batch, method="tokens").tokens

    @jax.jit
    def every():
        stamps = {"stamps": case.inputs["x_mark"]} if "x_mark" in case.inputs else {}
        found = tokens({**batch, **stamps})
        encoded = model.apply({"params": params}, Sequence(found), method="encode")
        return {"tokens": found, "encoded": encoded, "tokens_without_mark": tokens(batch)}

    found = every()
    return {name: np.asarray(found[name]) for name in case.outputs}
