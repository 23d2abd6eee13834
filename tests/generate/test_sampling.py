"""The logits that tokens are drawn from, against NumPy, and the draws themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.generate.sampling import Sampling, choose, penalize, warp
from zoo.models.core.errors import UsageError

V = 50


@pytest.fixture(scope="module")
def logits():
    """Rows of all sorts: ordinary, flat, full of ties, with zeros of both signs and with -inf."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(6, V)).astype(np.float32) * 3
    rows[1] = 1.5
    rows[2] = np.round(rows[2])
    rows[3, ::2], rows[3, 1::2] = 0.0, -0.0
    rows[4, 5:] = -np.inf
    rows[5] *= 30
    return rows


def sorted_top_k(row, k):
    bound = np.sort(row)[-min(k, V)]
    return np.where(row < bound, -np.inf, row)


def sorted_top_p(row, p):
    order = np.argsort(row, kind="stable")
    share = np.exp(row[order].astype(np.float64) - row.max())
    removed = np.cumsum(share / share.sum()) <= 1 - p
    removed[-1] = False
    return np.where(removed[np.argsort(order)], -np.inf, row)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, V, 1000])
@pytest.mark.parametrize("top_p", [1e-9, 0.21, 0.73, 0.999, 1.0])
def test_warping_is_that_of_sorted_logits(logits, temperature, top_k, top_p):
    found = compiled_warp(logits, Sampling(temperature, top_k, top_p).knobs(6))
    for row, ours in zip(logits / np.float32(temperature), np.asarray(found), strict=True):
        expected = sorted_top_k(row, top_k) if top_k else row
        expected = sorted_top_p(expected, top_p) if top_p < 1 else expected
        np.testing.assert_array_equal(ours, expected)


compiled_warp = jax.jit(warp)


def test_the_settings_are_data(logits):
    compiled_warp(logits, Sampling(1.0, 3, 0.5).knobs(6))
    programs = compiled_warp._cache_size()
    compiled_warp(logits, Sampling(0.1, 0, 1.0).knobs(6))
    assert compiled_warp._cache_size() == programs


def test_a_penalty_makes_seen_tokens_less_likely(logits):
    seen = np.arange(V) % 3 == 0
    found = np.asarray(penalize(logits, jnp.asarray(seen), jnp.float32(1.3)))
    expected = np.where(logits < 0, logits * np.float32(1.3), logits / np.float32(1.3))
    np.testing.assert_array_equal(found, np.where(seen, expected, logits))


def test_draws_follow_the_distribution():
    row, draws = np.array([0.0, 1.0, 2.0, -1.0], np.float32), 4000
    logits = np.tile(row, (draws, 1))
    for sampling in (Sampling(1.0), Sampling(2.0), Sampling(1.0, top_k=2), Sampling(1.0, 0, 0.7)):
        knobs = sampling.knobs(draws)
        tokens = choose(logits, jnp.zeros((draws, 4), bool), knobs, jnp.int32(0))
        expected = np.asarray(jax.nn.softmax(warp(row[None], knobs)[0]))
        counts = np.bincount(np.asarray(tokens), minlength=4)
        assert (np.abs(counts / draws - expected) < 0.03).all()
        assert (counts[expected == 0] == 0).all()


def test_a_row_draws_by_its_own_seed_and_step(logits):
    rows, none = np.tile(logits[:1], (6, 1)), jnp.zeros((6, V), bool)
    together = choose(rows, none, Sampling(5.0, seed=3).knobs(6), jnp.int32(0))
    assert len(set(together.tolist())) > 1
    for i in range(6):
        alone = choose(rows[:1], none[:1], Sampling(5.0, seed=3 + i).knobs(1), jnp.int32(0))
        assert alone[0] == together[i]
    later = choose(rows, none, Sampling(5.0, seed=3).knobs(6), jnp.int32(1))
    assert later.tolist() != together.tolist()
    assert Sampling(seed=2**32 - 1).knobs(2).seeds.tolist() == [2**32 - 1, 0]


def test_at_temperature_0_the_most_likely_token_is_taken(logits):
    none = jnp.zeros((6, V), bool)
    found = choose(logits, none, Sampling().knobs(6), jnp.int32(0))
    assert found.tolist() == logits.argmax(-1).tolist()
    seen = jnp.asarray(logits == logits.max(-1, keepdims=True))
    found = choose(logits, seen, Sampling(repetition_penalty=9.0).knobs(6), jnp.int32(0))
    assert found[0] != logits[0].argmax()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": 1.0, "top_k": -1}, "top_k is -1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"top_k": 5}, "at temperature 0 none is drawn"),
        ({"top_p": 0.5}, "at temperature 0 none is drawn"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        Sampling(**settings)
