from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from tests.train.tiny import TinyConfig
from zoo.models.core.errors import UsageError
from zoo.models.core.names import tree_names
from zoo.models.core.registry import config as zoo_config
from zoo.train.optim import (
    OptimConfig,
    decay_mask,
    learning_rate,
    make_optimizer,
    matrix_axes,
    stochastically_rounded,
)
from zoo.train.state import boxed_params


@pytest.mark.parametrize(
    ("schedule", "last"), [("cosine", 0.1), ("linear", 0.1), ("constant", 1.0)]
)
def test_schedule_grows_to_its_peak_and_arrives_at_its_end(schedule, last):
    rate = learning_rate(OptimConfig(lr=1.0, schedule=schedule, warmup=4, end=0.1), 20)
    rates = np.array([float(rate(step)) for step in range(21)])
    np.testing.assert_allclose(rates[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    assert rates.argmax() == 4
    np.testing.assert_allclose(rates[20], last, rtol=1e-5)


def test_without_warmup_the_first_step_has_the_peak():
    assert float(learning_rate(OptimConfig(lr=0.5, warmup=0), 3)(0)) == 0.5


def test_decay_acts_on_kernels_alone():
    model = TinyConfig()
    mask = decay_mask(nn.unbox(boxed_params(model.build(), model.inputs(1))))
    flat = {
        jax.tree_util.keystr(p, simple=True, separator="/"): m
        for p, m in jax.tree.leaves_with_path(mask)
    }
    assert {path for path, decays in flat.items() if decays} == {"up/kernel", "down/kernel"}


def test_muon_moves_matrices_orthogonally_and_leaves_the_rest_to_adam():
    model = zoo_config("mqt_tiny")
    boxed = boxed_params(model.build(), model.inputs(1))
    axes = matrix_axes(tree_names(boxed))
    layer = axes["decoder"]["stack"]["layers"]
    assert layer["q"]["kernel"] == MuonDimensionNumbers((1,), (2, 3))
    assert layer["out"]["kernel"] == MuonDimensionNumbers((1, 2), (3,))
    assert layer["down"]["kernel"] == MuonDimensionNumbers((1,), (2,))
    assert axes["connector"]["out"]["kernel"] == MuonDimensionNumbers((0, 1), (2,))
    assert axes["tower"]["patch"]["kernel"] is axes["decoder"]["lm_head"]["kernel"] is None
    assert layer["attn_norm"]["scale"] is axes["decoder"]["embedding"]["embedding"] is None

    names = {"kernel": ("layers", "embed", "mlp"), "bias": ("mlp",)}
    params = {"kernel": jnp.zeros((2, 4, 6)), "bias": jnp.zeros(6)}
    config = OptimConfig(name="muon", lr=0.1, warmup=0, schedule="constant", clip_norm=None)
    optimizer = make_optimizer(config, 10, names)
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), params)
    updates = jax.jit(lambda g: optimizer.update(g, optimizer.init(params), params)[0])(grads)
    singular = np.linalg.svd(updates["kernel"], compute_uv=False)
    # Newton-Schulz brings them to about 0.7 to 1.2 of lr * sqrt(rows / columns), either way round.
    assert (singular > 0.07).all()
    assert (singular < 0.15).all()
    # Adam's first step is the sign of the gradient; Nesterov's look ahead adds b1 / (1 + b1) of it.
    first = 0.1 * 0.15 * (1 + config.b1 / (1 + config.b1))
    np.testing.assert_allclose(np.abs(updates["bias"]), first, rtol=1e-3)


def test_gradients_are_clipped_by_their_global_norm():
    params = {"kernel": jnp.zeros(4)}
    config = OptimConfig(warmup=0, eps=1.0, lr=1.0, schedule="constant")

    def update(config, scale):
        optimizer = make_optimizer(config, 10)
        grads = {"kernel": jnp.full(4, scale)}
        return optimizer.update(grads, optimizer.init(params), params)[0]["kernel"]

    np.testing.assert_allclose(update(config, 100.0), update(config, 7.0), rtol=1e-6)
    loose = replace(config, clip_norm=None)
    assert not np.allclose(update(loose, 100.0), update(loose, 7.0))


def test_many_roundings_have_the_mean_of_the_value():
    values = jnp.array([1.0 + 1 / 3 * 2**-7, -3.1416, 1e-30, 65504.0, 0.0, 1.5])
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = jax.jit(jax.vmap(lambda key: stochastically_rounded(values, key)))(keys)
    assert drawn.dtype == jnp.bfloat16
    drawn = np.asarray(drawn, np.float64)
    assert set(drawn[:, 0]) == {1, 1 + 2**-7}  # its neighbours, none further away
    assert set(drawn[:, 1]) == {-3.15625, -3.140625}
    for column in (0, 1, 2, 3):
        low, high = np.unique(drawn[:, column])
        error = (high - low) / 2 / np.sqrt(len(keys))  # of the mean, at most
        assert abs(drawn[:, column].mean() - float(values[column])) < 5 * error
    assert (drawn[:, 4:] == [0, 1.5]).all()  # what needs no rounding stays
    wild = stochastically_rounded(jnp.array([jnp.inf, -jnp.inf, jnp.nan]), keys[0])
    np.testing.assert_array_equal(np.asarray(wild, np.float32), [np.inf, -np.inf, np.nan])


def test_half_a_state_learns_as_a_whole_one_does():
    """A least-squares problem: within a hundredth of what there is to learn, at every point."""
    rng = np.random.default_rng(0)
    inputs, wanted = rng.normal(size=(256, 16)), rng.normal(size=(16, 4))
    inputs, outputs = jnp.asarray(inputs, jnp.float32), jnp.asarray(inputs @ wanted, jnp.float32)

    def loss(params):
        return ((inputs @ params["kernel"] - outputs) ** 2).mean()

    def losses(state):
        optimizer = make_optimizer(OptimConfig(lr=0.02, warmup=0, state=state), 400)
        params = {"kernel": jnp.zeros((16, 4))}

        def step(carry, _):
            params, opt_state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        start = (params, optimizer.init(params))
        (_, opt_state), values = jax.jit(lambda c: jax.lax.scan(step, c, length=400))(start)
        moments = [x for x in jax.tree.leaves(opt_state) if x.ndim]
        assert {x.dtype for x in moments} == {jnp.dtype(state)}
        assert len(moments) == 2
        return np.asarray(values)

    wide, small = losses("float32"), losses("bfloat16")
    assert wide[-1] < 1e-3 * wide[0]
    assert np.abs(small - wide).max() < 0.01 * wide[0]
    assert small[-1] < 2e-3 * wide[0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "adam"), ("schedule", "cosin"), ("lr", 0), ("lr", -1), ("warmup", -1), ("end", 2),
        ("state", "float16"), ("b1", 1), ("b2", -0.1), ("eps", 0),
        ("weight_decay", -1), ("clip_norm", 0),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(field, value):
    with pytest.raises(UsageError, match=rf"optim\.{field} is"):
        OptimConfig(**{field: value})


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(UsageError, match=r"optim\.warmup is 11: want at most the 10 steps"):
        learning_rate(OptimConfig(warmup=11), 10)
