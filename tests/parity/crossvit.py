"""CrossViT against timm's class."""

import flax.linen as nn
import jax
import numpy as np

from tests.parity.case import Case
from zoo.models.core.types import Stream, Tokens
from zoo.models.parts.layers.resize import resize_bicubic
from zoo.models.vision.crossvit import CrossViTClassifierConfig, CrossViTConfig, timm_table


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our module and the recorded weights."""
    sizes, pixels = case.kwargs, case.inputs["x"].transpose(0, 2, 3, 1)
    tower = CrossViTConfig(
        image_sizes=tuple(int(sizes["img_size"] * scale) for scale in sizes["img_scale"]),
        patch_sizes=tuple(sizes["patch_size"]),
        widths=tuple(sizes["embed_dim"]),
        depths=tuple((first, second) for first, second, _ in sizes["depth"]),
        num_heads=tuple(sizes["num_heads"]),
        mlp_ratios=tuple(sizes["mlp_ratio"][:2]),
        stem=sizes["multi_conv"],
        channels=pixels.shape[-1],
    )
    config = CrossViTClassifierConfig(tower, num_classes=sizes["num_classes"])
    model, batch = config.build(), {"pixels": pixels}
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), batch)["params"])
    params = timm_table(config).load(case.params, shapes)

    def inside(model, pixels):
        """Patches of both branches, and what the first class token reads in the first stage."""
        own, cut, after = model.tower, [], []
        for b, side in enumerate(tower.image_sizes):
            cut.append(own.patches[b](resize_bicubic(pixels, side, side)))
            x = own._embed(pixels, b)
            stream = Stream(x, Tokens.sequence(np.ones(x.shape[:2], bool)))
            after.append(own.stacks[b](stream, stop=tower.depths[0][b])[0].hidden)
        return cut, own.crossings[0].read(after[0][:, :1], after[1][:, 1:])

    @jax.jit
    def both_ways(params):
        found = model.apply({"params": params}, pixels, method=inside)
        return found, model.apply({"params": params}, batch)

    ((first, second), read), final = both_ways(params)
    cls = np.split(np.asarray(final.features.cls), [tower.widths[0]], -1)
    maps = (np.asarray(each) for each in final.features.pyramid)
    both = [
        np.concatenate([c[:, None], m.reshape(len(m), -1, m.shape[-1])], 1)
        for c, m in zip(cls, maps, strict=True)
    ]
    out = {
        "embed0": first,
        "embed1": second,
        "fusion0": read,
        "norm0": both[0],
        "norm1": both[1],
        "logits": final.logits,
    }
    return {name: np.asarray(out[name]) for name in case.outputs}
