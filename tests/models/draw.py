"""Random parameters from shapes alone, without compiling an initialiser."""

import flax.linen as nn
import jax
import numpy as np


def draw(shapes, seed: int = 0):
    """Parameters of the (boxed) `shapes`: norm scales near 1, the rest normal with variance 1 /
    fan-in, which for depthwise kernels, if they are boxed, is the number of places.
    """
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        names = getattr(leaf, "names", ())
        leaf = nn.unbox(leaf)
        if not np.issubdtype(leaf.dtype, np.floating):
            return np.zeros(leaf.shape, leaf.dtype)
        fan_in = leaf.shape[-2] if leaf.ndim > 1 else leaf.size
        if "conv_in" in names and fan_in == 1:
            axes = zip(leaf.shape, names, strict=True)
            fan_in = np.prod([size for size, name in axes if name is None])
        noise = rng.normal(size=leaf.shape) / np.sqrt(fan_in)
        scale = path[-1].key in ("scale", "var")  # a variance is positive
        return (1 + 0.1 * noise if scale else noise).astype(leaf.dtype)

    boxed = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    return jax.tree_util.tree_map_with_path(one, shapes, is_leaf=boxed)
