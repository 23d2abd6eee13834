"""SimVLG: what must hold beside the goldens of encoder and frames."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from tests.models.draw import draw
from zoo.models.core import registry
from zoo.models.vlm.simvlg import (
    EvaConfig,
    FrameAttention,
    MergeEncoder,
    TomeFormer,
    with_frames,
)

TINY, FRAMES = registry.config("simvlg_tiny"), 3
VIDEO = registry.config("simvlg_video_tiny")


def shapes_of(config):
    return jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))["params"]


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(tree)))


def close(got, want, tolerance=2e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


@pytest.fixture(scope="module")
def params():
    """Of the model for videos; without its tower's own, those of the one for pictures."""
    return draw(shapes_of(VIDEO))


@pytest.fixture(scope="module")
def see():
    """Pixels to the tokens of the decoder."""

    @jax.jit
    def video(params, pixels):
        return VIDEO.build().apply({"params": params}, pixels, method="encode_image").tokens.tokens

    return video


def pixels(*lead):
    return np.random.default_rng(0).normal(size=(*lead, 16, 16, 3)).astype(np.float32)


def test_published_numbers_of_tokens():
    made = TomeFormer()
    assert made.lengths(257) == tuple(range(257, 28, -19))
    assert made.num_tokens((16, 16)) + 1 == 29
    assert registry.config("simvlg_opt_2_7b").slots == 29
    assert registry.config("simvlg_opt_2_7b.video").slots == 29
    assert TomeFormer(r=100, depth=3).lengths(9) == (9, 5, 3, 2)


def test_parameters():
    """The figures of the parts: BLIP-2's tower, BERT's layers, OPT."""
    tree = shapes_of(registry.config("simvlg_opt_2_7b"))
    layer = 25_248_768  # 1408 wide, 6144 in the MLP, no biases of keys
    assert count(tree["tower"]) == 39 * layer + 1408 + 257 * 1408 + 588 * 1408 + 1408
    bert = 85_054_464 + 514 * 768 + 2 * 768
    assert count(tree["connector"]["encoder"]) == bert
    assert count(tree["decoder"]) == 2_651_596_800
    video = shapes_of(registry.config("simvlg_opt_2_7b.video"))
    merge = 39 * (2 * (1408 * 256 + 256) + 1)
    assert count(video) == count(tree) + merge


def test_without_merging_it_is_bert():
    config = TomeFormer(width=16, depth=2, num_heads=2, mlp_dim=24, r=0, max_length=12)
    module, bert = MergeEncoder(config), config.bert.build()
    x = np.random.default_rng(1).normal(size=(2, 9, 16)).astype(np.float32)
    params = draw(jax.eval_shape(module.init, jax.random.key(0), x))
    states = jax.jit(module.apply)(params, x)
    plain = draw(jax.eval_shape(bert.init, jax.random.key(0), config.bert.inputs(1)))
    plain["params"]["stack"] = params["params"]["stack"]
    encode = jax.jit(lambda p, x: bert.apply(p, x, method="encode"))
    close(states[-1], encode(plain, states[0]).tokens, 1e-6)


def test_frames_start_as_pictures_on_their_own():
    """With a gain of zero frames do not see each other; they do with another, in any order."""
    module = FrameAttention(8, 2)
    x = np.random.default_rng(2).normal(size=(2, FRAMES, 5, 16)).astype(np.float32)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    run = jax.jit(module.apply)
    close(run(nn.unbox(variables), x), x, 0)
    drawn = draw(jax.eval_shape(module.init, jax.random.key(0), x))
    y = run(drawn, x)
    assert np.abs(y - x).max() > 1e-3
    close(run(drawn, x[:, ::-1]), y[:, ::-1])
    close(run(drawn, x[:1]), y[:1])


def test_a_video_of_one_picture(params, see):
    """Where frames do not see each other, a video that stands still is its picture."""
    tower = jax.tree.map(lambda x: x, params["tower"])
    merge = tower["stack"]["layers"].pop("temporal_merge")
    picture = pixels(2, 1)
    plain = jax.jit(
        lambda p, x: TINY.build().apply({"params": p}, x, method="encode_image").tokens.tokens
    )
    want = plain({**params, "tower": tower}, picture)
    assert want.shape == (2, 1, 11, 32)
    still = {**merge, "alpha": 0 * merge["alpha"]}
    tower["stack"]["layers"]["temporal_merge"] = still
    close(see({**params, "tower": tower}, np.repeat(picture, FRAMES, 1)), want)


def test_videos_do_not_see_each_other(params, see):
    """Nor does the order of frames matter."""
    both = pixels(1, 2 * FRAMES)
    tokens = see(params, both)
    assert tokens.shape == (1, 2, 11, 32)
    close(see(params, both[:, ::-1])[:, ::-1], tokens)
    other = both.copy()
    other[:, FRAMES:] += 1
    close(see(params, other)[:, 0], tokens[:, 0])


def test_bad_sizes():
    with pytest.raises(ValueError, match="class token"):
        dataclasses.replace(TINY, keep_class=False)
    with pytest.raises(ValueError, match="equal frames"):
        dataclasses.replace(TINY, connector=dataclasses.replace(TINY.connector, frames=2))
    with pytest.raises(ValueError, match="r = -1"):
        TomeFormer(r=-1)
    with pytest.raises(ValueError, match="frames = 0"):
        EvaConfig(frames=0)
    small = dataclasses.replace(TINY.tower, image_size=20)
    with pytest.raises(ValueError, match="at most max_length = 24"):
        shapes_of(dataclasses.replace(TINY, tower=small))
    assert with_frames(TINY, FRAMES) == VIDEO


def test_frames_that_make_no_video():
    """Three rows of four frames, which as one run would be whole videos."""
    shapes, model = shapes_of(VIDEO), VIDEO.build()
    given = jax.ShapeDtypeStruct((FRAMES, 4, 16, 16, 3), np.float32)

    def see(params, pixels):
        return model.apply({"params": params}, pixels, method="encode_image")

    with pytest.raises(ValueError, match="want 3 frames of every video"):
        jax.eval_shape(see, shapes, given)
