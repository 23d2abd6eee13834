"""Kernels of wide networks: the limit of finite ones, spectra and learning curves."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import REPO
from zoo.benchmarks import wide_cnn_kernels
from zoo.benchmarks.wide_cnn_kernels import (
    FiniteNetwork,
    KernelConfig,
    arc_cosine,
    fully_connected_ntk,
    learning_curve,
    table,
)
from zoo.evaluate.powerlaw import fit_power_law
from zoo.models.core.errors import UsageError

RECORD = json.loads(
    (REPO / "tests/goldens/wide_cnn_kernels/learning_curves.json").read_text("utf-8")
)["results"]
SHALLOW, DEEP, FULL = (KernelConfig(8, filters) for filters in ((2,), (2, 2), (2, 2, 2)))


def test_the_ends_of_the_arc_cosine_kernels():
    zero, one = arc_cosine(np.array([-1.0, 0.0, 1.0, 1 + 1e-12]))
    np.testing.assert_allclose(zero, [0, 0.5, 1, 1], atol=1e-12)
    np.testing.assert_allclose(one, [0, 1 / np.pi, 1, 1], atol=1e-12)


@pytest.mark.parametrize("config", [SHALLOW, DEEP, FULL])
def test_the_diagonal(config):
    """Of unit leaves: the RFK is 1, the NTK one more than the depth."""
    x = config.build().sample(4, np.random.default_rng(0))
    gram = config.build()(x)
    np.testing.assert_allclose(np.diag(gram.rfk), 1)
    np.testing.assert_allclose(np.diag(gram.ntk), 1 + len(config.filters))


def test_blocks_of_rows_change_nothing(monkeypatch):
    kernel = DEEP.build()
    rng = np.random.default_rng(0)
    x, y = kernel.sample(9, rng), kernel.sample(5, rng)
    whole = kernel(x, y)
    monkeypatch.setattr(wide_cnn_kernels, "_BLOCK", 50)
    parts = kernel(x, y)
    np.testing.assert_allclose(parts.ntk, whole.ntk)
    np.testing.assert_allclose(parts.rfk, whole.rfk)


def test_one_patch_that_is_the_whole_input_is_a_fully_connected_network():
    config = KernelConfig(6, (6,), normalize=True)
    x = np.random.default_rng(0).normal(size=(5, 6))
    np.testing.assert_allclose(config.build()(x).ntk, fully_connected_ntk(x, x, 1))


def test_inputs_are_left_as_they_are():
    x = np.random.default_rng(0).normal(size=(5, 8))
    before = x.copy()
    KernelConfig(8, (2, 2), normalize=True).build()(x)
    np.testing.assert_array_equal(x, before)


def test_wide_networks_have_these_features():
    width = 512
    model = FiniteNetwork(DEEP, width)
    x = jnp.asarray(DEEP.build().sample(6, np.random.default_rng(0)), jnp.float32)
    variables = nn.unbox(jax.jit(model.init)(jax.random.key(0), x))
    features = model.apply(variables, x, method="features").reshape(6, -1)
    found = np.asarray(features @ features.T) / features.shape[1] * 2 * 2**2
    want = DEEP.build()(np.asarray(x)).rfk
    np.testing.assert_allclose(found, want, atol=0.2)
    assert (found / want).mean() == pytest.approx(1, abs=0.05)


def test_conversion_there_and_back():
    model = FiniteNetwork(FULL, 3)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8)))["params"])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    state = table(FULL).save(params)
    assert state["conv.1.w"].shape == (1, 3, 3, 2, 2)
    jax.tree.map(np.testing.assert_array_equal, table(FULL).load(state, params), params)


def test_deeper_hierarchies_have_slower_spectra():
    """The more coordinates a kernel joins, the slower its eigenvalues fall."""
    slopes = []
    for config in (SHALLOW, DEEP, FULL):
        kernel = config.build()
        values = kernel.spectrum(kernel.sample(300, np.random.default_rng(0)))
        assert (np.diff(values) <= 0).all()
        slopes.append(fit_power_law(np.arange(10, 100), values[10:100]).beta)
    assert slopes[0] < slopes[1] < slopes[2] < 0


@pytest.mark.slow
def test_learning_curves_are_those_of_the_official_functions():
    """The same experiment, smaller and with other random numbers: how steep the curves are is
    decided by the hierarchy of the teacher.
    """
    slopes = []
    for (name, want), (teacher, student) in zip(
        RECORD.items(), ((SHALLOW, DEEP), (DEEP, DEEP), (FULL, FULL)), strict=True
    ):
        sizes, errors = want["P"][:4], np.array(want["mse"][:4])
        found = learning_curve(teacher.build(), student.build(), sizes, test=256, seeds=3)
        slopes.append((found.law.beta, fit_power_law(sizes, errors).beta))
        ratio = found.errors.mean(0) / errors
        assert ((ratio > 0.4) & (ratio < 2.5)).all(), name
    ours, theirs = np.array(slopes).T
    assert ours[0] < ours[1] < ours[2] < 0
    np.testing.assert_allclose(ours, theirs, atol=0.35)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: KernelConfig(9, (2, 2)), ValueError, "dim = 9: want a multiple"),
        (lambda: DEEP.build()(np.zeros((3, 9))), UsageError, r"want \[n, 8\]"),
        (
            lambda: learning_curve(KernelConfig(16).build(), DEEP.build(), [4, 8]),
            UsageError,
            "want one dim and one leaf size",
        ),
    ],
)
def test_what_does_not_fit_is_refused(run, error, message):
    with pytest.raises(error, match=message):
        run()
