"""iLLaMA against the official class, and the selection of a teacher's weights."""

import flax.linen as nn
import jax
import numpy as np

from tests.parity.case import Case
from zoo.models.core.types import Stream, Tokens
from zoo.models.parts.assemblies.classifier import ClassifierConfig
from zoo.models.vision.illama import SOFT_MASK, ILlamaConfig, hidden_width, selected, table


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our module and the recorded weights."""
    if not case.params:
        return _selection(case)
    sizes, pixels = case.kwargs, case.inputs["x"].transpose(0, 2, 3, 1)
    tower = ILlamaConfig(
        image_size=sizes["img_size"],
        patch_size=sizes["patch_size"],
        width=sizes["embed_dim"],
        depth=sizes["depth"],
        num_heads=sizes["num_heads"],
        mlp_dim=hidden_width(sizes["embed_dim"], sizes["mlp_ratio"]),
        channels=pixels.shape[-1],
    )
    config = ClassifierConfig(tower, num_classes=sizes["num_classes"])
    model, batch = config.build(), {"pixels": pixels}
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), batch)["params"])
    params = table(config).load(case.params, shapes)
    rate = case.meta["soft_mask_rate"]

    @jax.jit
    def forward(params):
        return model.apply({"params": params}, batch, soft_mask=rate, taps=(0, 1))

    final = forward(params)

    first = jax.tree.map(lambda leaf: leaf[0], params["tower"]["stack"]["layers"])
    layer = tower.plan()[0].block.clone(parent=None, name=None).bind({"params": first})
    hidden = final.features.taps[0]
    stream = Stream(hidden, Tokens.sequence(np.ones(hidden.shape[:2], bool)))
    attended = layer.attention(stream, None, {SOFT_MASK: rate})[0].hidden
    out = {
        "patch_embed": model.apply(
            {"params": params}, pixels, method=lambda model, x: model.tower.patch(x)
        ),
        "attn0": attended - hidden,
        "block0": final.features.taps[1],
        "cls_feature": final.pooled,
        "logits": final.logits,
    }
    return {name: np.asarray(out[name]) for name in case.outputs}


def _selection(case: Case) -> dict[str, np.ndarray]:
    """Smaller tensors of the teacher's, whose sizes the names of the outputs say."""
    found = {}
    for name in case.outputs:
        shape = tuple(int(size) for size in name.removeprefix("student_").split("x"))
        found[name] = selected(case.inputs[f"teacher{len(shape)}d"], shape)
    return found
