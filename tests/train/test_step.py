import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.tiny import TinyConfig, tiny
from zoo.models.core.errors import UsageError
from zoo.train.mesh import MeshConfig, batch_sharding, check_batch_size, make_mesh, put_batch
from zoo.train.objectives import Mean, NextToken
from zoo.train.optim import OptimConfig, learning_rate, make_optimizer
from zoo.train.state import abstract_state, boxed_params, initial_state, state_bytes
from zoo.train.step import make_train_step


def batch(seed=0, size=8):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 300, (size, 24)).astype(np.int32)
    labels = np.where(rng.random((size, 24)) < 0.3, ids, -100).astype(np.int32)
    pixels = rng.standard_normal((size, 1, 8, 8, 3)).astype(np.float32)
    return {"pixels": pixels, "ids": ids, "labels": labels, "text_mask": ids >= 0}


@pytest.fixture
def mesh():
    mesh = make_mesh(MeshConfig(fsdp=2))
    with jax.set_mesh(mesh):
        yield mesh


def prepared(mesh, optim):
    config = TinyConfig()
    model, inputs, optimizer = config.build(), config.inputs(1), make_optimizer(optim, 10)
    boxed = boxed_params(model, inputs)
    abstract = abstract_state(boxed, optimizer, mesh)
    state = initial_state(model, inputs, optimizer, abstract, 0)
    step = make_train_step(model, NextToken(), optimizer, learning_rate(optim, 10), abstract)
    assert (
        state_bytes(boxed, optimizer)
        == 3 * 4 * sum(x.size for x in jax.tree.leaves(state.params)) + 8
    )
    return state, step


def test_loss_is_the_mean_over_labelled_tokens_of_the_whole_batch():
    model = TinyConfig().build()
    data = batch()
    params = jax.tree.map(
        lambda x: x.value if hasattr(x, "value") else x,
        jax.jit(model.init)(jax.random.key(0), data)["params"],
        is_leaf=lambda x: hasattr(x, "value"),
    )
    objective, key = NextToken(), jax.random.key(0)
    loss, metrics = jax.jit(lambda p, b: objective.loss(model, p, b, key, None))(params, data)

    hidden = model.apply({"params": params}, data).hidden
    logits = np.asarray(hidden @ params["embedding"].T, np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = [
        (-logp[b, t, data["labels"][b, t + 1]], logits[b, t].argmax() == data["labels"][b, t + 1])
        for b in range(8)
        for t in range(23)
        if data["labels"][b, t + 1] != -100
    ]
    np.testing.assert_allclose(loss, np.mean([w for w, _ in wanted]), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"].value, loss)
    np.testing.assert_allclose(
        metrics["accuracy"].value, np.mean([r for _, r in wanted]), atol=1e-7
    )
    assert metrics["loss"].weight == len(wanted)


def test_a_batch_that_teaches_nothing_has_no_loss():
    assert Mean(jnp.float32(0), jnp.float32(0)).value == 0


def test_budgets_are_drawn_evenly_and_reproducibly():
    objective = NextToken(budgets=(2, 4, 6, 8))
    drawn = [objective.variant(7, step) for step in range(2000)]
    assert drawn == [objective.variant(7, step) for step in range(2000)]
    assert drawn != [objective.variant(8, step) for step in range(2000)]
    counts = [drawn.count(budget) for budget in (2, 4, 6, 8)]
    assert sum(counts) == 2000
    assert min(counts) > 430
    assert NextToken().variant(0, 0) is None
    with pytest.raises(UsageError, match="budgets"):
        NextToken(budgets=(0, 2))


def test_state_is_divided_as_its_names_say_and_stays_so(mesh):
    state, step = prepared(mesh, OptimConfig(warmup=0))
    placed = jax.tree.map(lambda x: x.sharding, state)
    assert state.params["up"]["kernel"].sharding.spec == jax.sharding.PartitionSpec("fsdp")
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == (8, 32)]
    assert len(moments) == 2
    assert all(m.sharding == state.params["up"]["kernel"].sharding for m in moments)
    state, metrics = step(state, put_batch(batch(), batch_sharding(mesh)), None)
    assert jax.tree.map(lambda x: x.sharding, state) == placed
    assert set(metrics) == {"loss", "accuracy", "grad_norm", "lr"}
    assert int(state.step) == 1


def test_a_step_that_is_not_finite_leaves_parameters_as_they_were(mesh):
    state, step = prepared(mesh, OptimConfig(warmup=0))
    sharding = batch_sharding(mesh)
    state, _ = step(state, put_batch(batch(0), sharding), None)
    before = jax.tree.map(np.array, (state.params, state.opt_state))
    poisoned = batch(1)
    poisoned["pixels"][3] = np.nan
    state, metrics = step(state, put_batch(poisoned, sharding), None)
    assert np.isnan(metrics["loss"])
    state, _ = step(state, put_batch(batch(2), sharding), None)
    assert int(state.fault) == 1  # the first step at fault, not the last
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), before)


@pytest.mark.parametrize("sizes", [{"data": 0}, {"data": -1, "fsdp": -1}, {"tensor": -2}])
def test_impossible_meshes_are_refused(sizes):
    with pytest.raises(UsageError, match="mesh"):
        MeshConfig(**sizes)


def test_mesh_covers_all_devices():
    assert dict(make_mesh(MeshConfig(fsdp=4)).shape)["data"] == 2
    assert make_mesh(MeshConfig(), jax.devices()[:1]).size == 1
    for sizes in ({"fsdp": 3}, {"data": 4}, {"data": 16}):
        with pytest.raises(UsageError, match="product is 8"):
            make_mesh(MeshConfig(**sizes))
    with pytest.raises(UsageError, match="multiple of 8"):
        check_batch_size(12, make_mesh(MeshConfig(fsdp=2)))


def test_experiments_refuse_what_cannot_be():
    for field in ("steps", "batch_size", "log_every", "save_every", "keep"):
        with pytest.raises(UsageError, match=f"{field} is 0"):
            tiny(**{field: 0})
    with pytest.raises(UsageError, match="max_bad_share"):
        tiny(max_bad_share=1.5)
