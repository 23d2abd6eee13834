"""Recoverable Compression: outliers, bounds, what the text recovers, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.draw import draw
from zoo.models.core import registry
from zoo.models.core.types import Features
from zoo.models.parts.reduce.base import Seen, Text
from zoo.models.parts.reduce.outliers import count_outliers, outlier_factors
from zoo.models.reduction.recoverable_compression import RecoverableCompression, recover


def test_factors_of_an_even_row_are_one():
    """But at its ends, whose neighbours are all on one side; and what stands apart is found."""
    even = jnp.arange(41.0)
    np.testing.assert_allclose(outlier_factors(even, neighbours=4)[6:-6], 1, rtol=1e-4)
    x = even.at[7].set(90.0).at[30].set(-50.0)
    factors = np.asarray(outlier_factors(x, neighbours=4))
    assert set(np.flatnonzero(factors > 1.5)) == {7, 30}
    real = jnp.arange(41) != 7
    assert count_outliers(x, neighbours=4, real=real) == 1
    other = outlier_factors(x.at[7].set(12.0), neighbours=4, real=real)
    np.testing.assert_allclose(
        other[:7], outlier_factors(x, neighbours=4, real=real)[:7], rtol=1e-6
    )


def drawn(size=100, width=16, seed=0):
    rng = np.random.default_rng(seed)
    attention = rng.gamma(0.3, size=size)
    words = rng.normal(size=size) ** 3 * 0.01
    return tuple(
        jnp.asarray(x, jnp.float32)
        for x in (
            rng.normal(size=(size, width)),
            attention / attention.sum(),
            rng.normal(size=(size, width)),
            words,
        )
    )


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("keep", [99, 40, 12, 1])
def test_bounds_and_places(keep, fixed):
    patches, attention, keys, words = drawn()
    made = recover(patches, attention, keys, words, keep=keep, fixed=fixed)
    number = int(made.mask.sum())
    index, groups = np.asarray(made.index), np.asarray(made.groups)
    assert 1 <= number <= keep and made.mask[:number].all()
    assert len(set(index[:number].tolist())) == number and (index[number:] == -1).all()
    assert groups.max() < number
    assert groups[index[:number]].tolist() == list(range(number))
    kept = number - int(made.num_centres) - (made.num_centres > 0)
    assert (np.diff(index[:kept]) > 0).all()
    np.testing.assert_array_equal(made.tokens[:kept], patches[index[:kept]])
    if made.num_centres:
        rest = np.flatnonzero(groups == number - 1)
        want = np.asarray(attention)[rest] @ np.asarray(patches)[rest]
        np.testing.assert_allclose(made.tokens[number - 1], want, atol=1e-5)


def test_the_text_recovers_what_is_not_seen():
    patches, attention, keys, _ = drawn(seed=3)
    quiet = int(jnp.argmin(attention))
    words = jnp.asarray(np.random.default_rng(1).normal(size=100) * 1e-3, jnp.float32)
    words = words.at[quiet].set(0.2)
    with_text = recover(patches, attention, keys, words, keep=80)
    without = recover(patches, attention, keys, keep=80)
    kept = [
        np.asarray(made.sight[: int(made.num_sight)]).tolist()
        + np.asarray(made.words[: int(made.num_words)]).tolist()
        for made in (with_text, without)
    ]
    assert quiet in kept[0] and quiet not in kept[1] and without.num_words == 0


def test_clip_compares_patches_and_text():
    """The vector of the text decides, over CLIP's projection; without one there is an error."""
    rng = np.random.default_rng(0)
    config = RecoverableCompression(0.5, embedding_dim=6)
    x, q, k = (jnp.asarray(rng.normal(size=(2, 1, 17, 2, 4)), jnp.float32) for _ in range(3))
    taps = x.reshape(2, 1, 17, 8)
    features = Features(taps[:, :, 1:], (4, 4), taps={3: taps}, qk={3: (q, k)})
    seen = Seen(taps[:, :, 1:], features, grid=(4, 4), layer=2, prefix=1)
    text = Text(jnp.zeros((2, 3), int), jnp.zeros((2, 3, 4)), jnp.ones((2, 3), bool))
    guided = text.replace(vector=jnp.asarray(rng.normal(size=(2, 6)), jnp.float32))
    module = config.build(8, 4)
    params = draw(jax.eval_shape(lambda: module.init(jax.random.key(0), seen, guided, keep=8)))
    made = module.apply(params, seen, guided, keep=8)
    assert made.tokens.shape == (2, 1, 8, 8) and np.isfinite(made.tokens).all()
    kernel = params["params"]["image_projection"]["kernel"]
    projected = np.asarray(taps[:, :, 1:] @ kernel)
    projected = projected / np.linalg.norm(projected, axis=-1, keepdims=True)
    vector = guided.vector / np.linalg.norm(guided.vector, axis=-1, keepdims=True)
    relevance = np.einsum("bmnp,bp->bmn", projected, vector) / np.sqrt(6)
    want = config.reduce(seen, keep=8, relevance=jnp.asarray(relevance))
    np.testing.assert_allclose(made.tokens, want.tokens, atol=1e-5)
    for wrong in (text, guided.replace(vector=guided.vector[:, :5]), None):
        with pytest.raises(ValueError, match="guide_vector: got"):
            module.apply(params, seen, wrong, keep=8)


def test_full_size():
    """288 of 576 tokens at most; CLIP's projection is all that is added."""
    config = registry.config("recoverable_compression_llava_1_5_7b")
    assert config.slots == 288
    batch = config.inputs(1)
    assert batch["guide_vector"].shape == (1, 768)
    shapes = jax.eval_shape(config.build().init, jax.random.key(0), batch)["params"]
    added = sum(leaf.size for leaf in jax.tree.leaves(shapes["reducer"]))
    assert added == 1024 * 768
    tower = dataclasses.replace(config.tower, class_token=False)
    with pytest.raises(ValueError, match="class token"):
        dataclasses.replace(config, tower=tower)
