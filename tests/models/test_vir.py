"""Retention: its forms agree, in values and in gradients, and continue from a state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.models.parts.layers.retention import (
    decay_mask,
    log_decays,
    retain,
    retain_chunks,
    retain_tokens,
)
from zoo.models.vision.vir import VARIANTS, VirConfig, state_size

GAMMAS = log_decays(3)
Q, K, V = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 11, 3, 4)), jnp.float32)


def test_decays():
    np.testing.assert_allclose(np.exp(GAMMAS)[[0, -1]], [1 - 1 / 32, 1 - 1 / 512])
    mask = decay_mask(GAMMAS, 4)
    np.testing.assert_allclose(mask[1, 3, 1], np.exp(GAMMAS)[1] ** 2, rtol=1e-6)
    assert not mask[:, 0, 1:].any() and (mask[:, range(4), range(4)] == 1).all()


FORMS = {
    "recurrent": lambda q, k, v: retain_tokens(q, k, v, GAMMAS)[0],
    "chunks of 4": lambda q, k, v: retain_chunks(q, k, v, GAMMAS, 4)[0],
    "one chunk": lambda q, k, v: retain_chunks(q, k, v, GAMMAS, 40)[0],
}


def loss(form):
    return jax.jit(jax.value_and_grad(lambda q, k, v: (form(q, k, v) ** 2).sum(), (0, 1, 2)))


@pytest.fixture(scope="module")
def parallel():
    return loss(lambda q, k, v: retain(q, k, v, GAMMAS))(Q, K, V)


@pytest.mark.parametrize("form", FORMS)
def test_forms_agree(form, parallel):
    """Values (by their squares) and all gradients."""
    got = loss(FORMS[form])(Q, K, V)
    for ours, want in zip(jax.tree.leaves(got), jax.tree.leaves(parallel), strict=True):
        np.testing.assert_allclose(ours, want, rtol=1e-4, atol=1e-4)


def test_a_state_goes_on():
    """Some tokens in chunks and the rest one by one: what all at once gives, and the same state."""
    first, state = retain_chunks(Q[:, :7], K[:, :7], V[:, :7], GAMMAS, 3)
    rest, last = retain_tokens(Q[:, 7:], K[:, 7:], V[:, 7:], GAMMAS, state)
    want, whole = retain_tokens(Q, K, V, GAMMAS)
    np.testing.assert_allclose(jnp.concatenate([first, rest], 1), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(last, whole, rtol=1e-5, atol=1e-5)


def test_what_is_causal():
    """A later token changes nothing before it, but with the softmax of the released code."""
    changed = K.at[:, -1].add(1.0)
    same = retain(Q, changed, V, GAMMAS) - retain(Q, K, V, GAMMAS)
    assert not np.abs(same[:, :-1]).max() and np.abs(same[:, -1]).max() > 0.1
    later = V.at[:, -1].add(1.0)
    leaks = retain(Q, K, later, GAMMAS, softmax=True) - retain(Q, K, V, GAMMAS, softmax=True)
    assert np.abs(leaks[:, 0]).min() > 1e-3


def test_cost_of_the_recurrent_form():
    """A state of fixed size, against keys and values of all tokens."""
    tower = VARIANTS["vir_s16"].tower
    assert state_size(tower) == 12 * 6 * 64 * 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "both"}, "want one of parallel"),
        ({"form": "chunks", "softmax": True}, "want the form 'parallel'"),
        ({"chunk": 0}, "chunk = 0"),
        ({"image_size": 50}, "a multiple of patch_size"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        VirConfig(**changes)
    if changes == {"chunk": 0}:
        with pytest.raises(ValueError, match="size = 0"):
            retain_chunks(Q, K, V, GAMMAS, 0)
