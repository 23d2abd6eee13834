"""The multi-scale wrapper against the official function, around its toy encoder."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.parity.case import Case
from zoo.models.core.keytable import Table, conv, weight_rows
from zoo.models.core.types import Features
from zoo.models.parts.layers.conv import Conv
from zoo.models.parts.layers.resize import resize_bicubic
from zoo.models.vision.s2 import multiscale, tiles


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, in the official order of axes."""
    options = case.kwargs
    pixels = jnp.asarray(case.inputs["x"].transpose(0, 2, 3, 1))
    side = pixels.shape[1]
    scales = options.get("scales", ())
    sizes = tuple(options.get("img_sizes") or (int(side * scale) for scale in scales))
    tile = options.get("max_split_size") or side
    encode = _encoder(case)
    features = multiscale(encode, pixels, sizes, tile, options.get("resize_output_to_idx") or 0)

    found = features.tokens
    if options.get("num_prefix_token"):
        found = jnp.concatenate([features.cls[:, None], found], 1)
    if options.get("output_shape") == "bchw":
        found = found.reshape(-1, *features.grid, found.shape[-1]).transpose(0, 3, 1, 2)
    large = max(sizes)
    split = tiles(pixels, large, tile).transpose(1, 2, 0, 5, 3, 4)
    out = {
        "features": found,
        "largest_bicubic": resize_bicubic(pixels, large, large).transpose(0, 3, 1, 2),
        "split": split.reshape(-1, *split.shape[3:]),
    }
    return {name: np.asarray(out[name]) for name in case.outputs}


def _encoder(case: Case):
    """tanh(convolution), with the mean of its tokens as the class token."""
    width, channels, size, _ = case.params["conv.weight"].shape
    module = Conv(width, size, stride=size, padding=0)
    one = jnp.zeros((1, size, size, channels))
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), one))
    table = Table(tuple(weight_rows("conv", "conv", conv)))
    params = table.load(case.params, {"conv": shapes["params"]})["conv"]

    def encode(x):
        lead = x.shape[:-3]
        grid = jnp.tanh(module.apply({"params": params}, x.reshape(-1, *x.shape[-3:])))
        tokens = grid.reshape(*lead, -1, width)
        return Features(tokens, grid.shape[1:3], cls=tokens.mean(-2))

    return encode
