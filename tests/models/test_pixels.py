"""Images that a model does not take, for every model that takes images alone: one clear error each.

A new one is tested here without a new test. Nothing is computed: models are traced as far as the
images are looked at.
"""

import jax
import numpy as np
import pytest

from zoo.models.core import registry
from zoo.models.core.config import ModelConfig

ALL = {
    name: config
    for slug in sorted(registry.index())
    for name, config in registry.entry(slug).variants.items()
    if name.endswith("_tiny") and isinstance(config, ModelConfig)
}
NAMES = [name for name, config in ALL.items() if set(config.inputs(1)) == {"pixels"}]


def traced(name, pixels):
    """Shapes of what the model returns; the images themselves are no part of the program."""
    model = ALL[name].build()
    return jax.eval_shape(lambda key: model.init(key, {"pixels": pixels}), jax.random.key(0))


@pytest.mark.parametrize("name", NAMES)
def test_images_that_do_not_fit(name):
    shape = ALL[name].inputs(1)["pixels"].shape
    with pytest.raises(ValueError, match="pixels: got uint8, want floats: scaled to 0 to 1"):
        traced(name, np.zeros(shape, np.uint8))
    wrong = (*shape[:-1], shape[-1] + 1)
    with pytest.raises(ValueError, match=rf"pixels: got .*, want .* {shape[-1]}\], channels last"):
        traced(name, np.zeros(wrong, np.float32))
    broken = np.zeros(shape, np.float32)
    broken[(0,) * len(shape)] = np.nan
    with jax.debug_nans(True), pytest.raises(ValueError, match="1 numbers are NaN or infinite"):
        traced(name, broken)


ANY_SIDE = {
    "crossvit_tiny",  # resizes
    "espcn_tiny",
    "fast_scaling_tiny",
    "fastvlm_encoder_tiny",
    "inceptionnext_tiny",
    "smt_tiny",
    "swin_tiny",  # pads
}
"""Those whose images may have any sides, as tests of their own show."""


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ANY_SIDE])
def test_sides_that_divide_nothing(name):
    """A row and three columns more: the others say what they want instead."""
    batch, height, width, *rest = ALL[name].inputs(1)["pixels"].shape
    with pytest.raises(ValueError, match="want"):
        traced(name, np.zeros((batch, height + 1, width + 3, *rest), np.float32))
