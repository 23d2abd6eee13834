"""Decoders without an original at hand: published sizes, positions of several axes, windows."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.models.core.registry import base
from zoo.models.core.tree import size_by_part
from zoo.models.core.types import Tokens
from zoo.models.parts.decoders.gqa import DecoderConfig
from zoo.models.parts.layers.attention import Sliding
from zoo.models.parts.layers.plan import cover
from zoo.models.parts.layers.rope import LongRope, RopeConfig

PUBLISHED = {
    # The numbers of parameters that the hub shows for (or that follow from the `total_size` of) the
    # checkpoints named in the files, tied heads counted once.
    "llama_1_7b": 6_738_415_616,
    "llama_2_7b": 6_738_415_616,
    "llama_2_13b": 13_015_864_320,
    "llama_3_8b": 8_030_261_248,
    "llama_3_1_8b": 8_030_261_248,
    "llama_3_2_1b": 1_235_814_400,
    "vicuna_7b": 6_738_415_616,
    "yi_6b": 6_061_035_520,
    "mistral_7b": 7_241_732_096,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_3b": 3_085_938_688,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "gemma_2_2b": 2_614_341_888,
    "gemma_2_9b": 9_241_705_984,
    "phi_3_mini_4k": 3_821_079_552,
    "phi_3_mini_128k": 3_821_079_552,
    "opt_125m": 125_239_296,
    "opt_350m": 331_196_416,
    "opt_1_3b": 1_315_758_080,
    "opt_2_7b": 2_651_596_800,
    "opt_6_7b": 6_658_473_984,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    config = base(name).variants[name]
    params = nn.unbox(jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1)))
    assert size_by_part(params["params"])["total"] == PUBLISHED[name]
    assert base(name).table(config).shapes(params["params"])


def test_equal_axes_are_one_axis():
    position = jnp.array([[0.0, 1, 2, 7]])
    three = jnp.repeat(position[..., None], 3, -1)
    rope = RopeConfig(sections=(1, 1, 2))
    np.testing.assert_allclose(rope.angles(8, three), RopeConfig().angles(8, position))


def test_each_axis_turns_its_own_frequencies():
    position = jnp.array([[[2.0, 3.0, 5.0]]])
    rope = RopeConfig(theta=16.0, sections=(1, 1, 2))
    want = np.array([2.0, 3.0, 5.0, 5.0]) * 16.0 ** -np.array([0.0, 0.25, 0.5, 0.75])
    np.testing.assert_allclose(rope.angles(8, position)[0, 0], want, rtol=1e-6)
    with pytest.raises(ValueError, match="sections"):
        RopeConfig().angles(8, position)


def test_long_divisors_begin_beyond_the_original_length():
    rope = RopeConfig(theta=1.0, scaling=LongRope((1.0, 1.0), (2.0, 4.0), 4, 2.0))
    short, long = (jnp.arange(float(n))[None] for n in (4, 5))
    np.testing.assert_allclose(rope.angles(4, short)[0, 3], [3.0, 3.0])
    np.testing.assert_allclose(rope.angles(4, long)[0, 3], [1.5, 0.75])
    with pytest.raises(ValueError, match="longrope"):
        rope.angles(8, short)


def test_a_window_counts_valid_tokens():
    """Padding between a prompt and what was decoded takes no place in the window."""
    valid = jnp.array([[True, True, True, False, False, True]])
    tokens = Tokens.sequence(valid)
    seen = Sliding(2)(tokens, tokens)[0]
    np.testing.assert_array_equal(np.flatnonzero(seen[5]), [2, 5])
    np.testing.assert_array_equal(np.flatnonzero(seen[1]), [0, 1])
    several = tokens.replace(position=jnp.zeros((1, 6, 3)))
    with pytest.raises(ValueError, match="sliding window"):
        Sliding(2)(several, several)


def test_alternating_windows_are_one_segment():
    config = DecoderConfig(depth=10, windows=(4, None))
    assert cover(tuple(step.kind for step in config.plan())) == ((0, 2, 5),)
