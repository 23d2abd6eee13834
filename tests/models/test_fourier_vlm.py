"""Fourier-VLM: the matrices against the fast transform, energies, places, and figures."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from zoo.models.connectors.fourier_vlm import (
    FourierVLM,
    cells,
    compress,
    compress_by_fft,
    cosines,
)
from zoo.models.core import registry
from zoo.models.core.types import Features
from zoo.models.parts.reduce.base import Seen
from zoo.models.parts.reduce.report import vision_flops


def drawn(grid, width=5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, grid[0] * grid[1], width)).astype(np.float32)


@pytest.mark.parametrize(("grid", "kept"), [((6, 6), (3, 3)), ((7, 10), (5, 4)), ((4, 3), (1, 3))])
def test_products_are_the_transforms(grid, kept):
    x = drawn(grid)
    field = scipy.fft.dctn(x.reshape(2, *grid, -1), axes=(1, 2), norm="ortho")
    low = field[:, : kept[0], : kept[1]]
    want = scipy.fft.idctn(low, axes=(1, 2), norm="ortho").reshape(2, -1, x.shape[-1])
    got = np.asarray(compress(jnp.asarray(x), grid, kept))
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(compress_by_fft(jnp.asarray(x), grid, kept), want, atol=1e-5)
    energy = (got**2).sum()
    np.testing.assert_allclose(energy, (low**2).sum(), rtol=1e-5)
    assert energy <= (x**2).sum()


def test_half_precision():
    """The tokens' dtype comes back, and no bit is lost before that."""
    x = jnp.asarray(drawn((6, 6)), jnp.bfloat16)
    got = compress(x, (6, 6), (4, 4))
    assert got.dtype == jnp.bfloat16
    want = compress(x.astype(jnp.float32), (6, 6), (4, 4)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(got.astype(jnp.float32), want.astype(jnp.float32))


def test_all_frequencies_are_the_tokens_themselves():
    x = drawn((5, 8))
    np.testing.assert_allclose(compress(jnp.asarray(x), (5, 8), (5, 8)), x, atol=2e-6)
    np.testing.assert_allclose(cosines(7) @ cosines(7).T, np.eye(7), atol=1e-12)


@pytest.mark.parametrize(("rescale", "value"), [(False, 6.0), (True, 3.0)])
def test_a_constant_map(rescale, value):
    y = compress(jnp.full((1, 24 * 24, 2), 3.0), (24, 24), (12, 12), rescale=rescale)
    np.testing.assert_allclose(y, value, rtol=1e-5)


@pytest.mark.parametrize("kept", [(1, 1), (2, 3), (3, 5), (4, 6)])
def test_places(kept):
    """Every token stands for a part of the map, in whose midst it is."""
    index, groups = cells((4, 6), kept)
    assert sorted(set(groups.tolist())) == list(range(kept[0] * kept[1]))
    assert groups[index].tolist() == list(range(kept[0] * kept[1]))
    x = jnp.asarray(drawn((6, 6)))[:, None]
    reducer = FourierVLM(11)
    assert reducer.num_kept(36) == 9
    made = reducer.reduce(Seen(x, Features(x, (6, 6)), grid=(6, 6)), keep=9)
    assert made.tokens.shape == (2, 1, 9, 5) and made.index[0, 0, :3].tolist() == [0, 2, 4]


@pytest.mark.parametrize(("number", "less"), [(144, 75.4), (100, 83.0), (64, 89.1)])
def test_figures(number, less):
    """Products of the vision tokens in a 7B decoder, against those of 576."""
    name = "fourier_vlm_llava_1_5_7b" + ("" if number == 144 else f".{number}")
    config = registry.config(name)
    assert config.slots == number
    count = [
        vision_flops([tokens] * config.decoder.depth, width=4096, mlp_dim=11_008)
        for tokens in (number, 576)
    ]
    assert round(100 * (1 - count[0] / count[1]), 1) == less


def test_what_is_refused():
    x = jnp.zeros((1, 12, 2))
    with pytest.raises(ValueError, match="grid = "):
        compress(x, (3, 3), (2, 2))
    with pytest.raises(ValueError, match="kept = "):
        compress(x, (3, 4), (2, 5))
    with pytest.raises(ValueError, match="no square grid"):
        FourierVLM(4).num_kept(12)
