from dataclasses import dataclass, replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding, PartitionSpec

from tests.train.tiny import TinyConfig, TinyModel, tiny
from zoo.models.core.errors import UsageError
from zoo.models.core.names import spec_for
from zoo.models.parts.layers.embed import Embed
from zoo.train.config import Faults
from zoo.train.mesh import MeshConfig, batch_sharding, check_batch_size, make_mesh, put_batch
from zoo.train.objectives import Mean, NextToken
from zoo.train.objectives.lm import _sums, sequence_logps
from zoo.train.optim import OptimConfig, learning_rate, make_optimizer
from zoo.train.plan.collectives import traffic
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


def prepared(mesh, optim, faults=None):
    config = TinyConfig()
    model, inputs, optimizer = config.build(), config.inputs(1), make_optimizer(optim, 10)
    boxed = boxed_params(model, inputs)
    abstract = abstract_state(boxed, optimizer, mesh)
    state = initial_state(model, inputs, optimizer, abstract, 0)
    step = make_train_step(
        model, NextToken(), optimizer, learning_rate(optim, 10), abstract, faults=faults or Faults()
    )
    assert (
        state_bytes(boxed, optimizer)
        == 3 * 4 * sum(x.size for x in jax.tree.leaves(state.params)) + 8
    )
    return state, step


def test_loss_is_the_mean_over_labelled_tokens_of_the_whole_batch():
    model = TinyConfig().build()
    data = batch()
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), data)["params"])
    objective, key = NextToken(), jax.random.key(0)
    terms, others, carried = jax.jit(
        lambda p, b: objective.loss(model, {"params": p}, {}, b, key, None)
    )(params, data)
    assert carried == {}

    hidden = model.apply({"params": params}, data).hidden
    logits = np.asarray(hidden @ params["embedding"].T, np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = [
        (-logp[b, t, data["labels"][b, t + 1]], logits[b, t].argmax() == data["labels"][b, t + 1])
        for b in range(8)
        for t in range(23)
        if data["labels"][b, t + 1] != -100
    ]
    assert set(terms) == {"loss"}
    np.testing.assert_allclose(terms["loss"].value, np.mean([w for w, _ in wanted]), rtol=1e-5)
    np.testing.assert_allclose(others["accuracy"].value, np.mean([r for _, r in wanted]), atol=1e-7)
    assert terms["loss"].weight == len(wanted)


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
    assert set(metrics) == {"loss", "accuracy", "grad_norm", "lr", "fault", "skipped"}
    assert int(state.step) == 1


def test_half_a_state_lies_as_its_parameters_do(mesh):
    config, optimizer = TinyConfig(), make_optimizer(OptimConfig(warmup=0, state="bfloat16"), 10)
    boxed = boxed_params(config.build(), config.inputs(1))
    abstract = abstract_state(boxed, optimizer, mesh)
    moments = [x for x in jax.tree.leaves(abstract.opt_state) if x.shape == (8, 32)]
    assert [x.dtype for x in moments] == [jnp.bfloat16] * 2
    assert {x.sharding for x in moments} == {abstract.params["up"]["kernel"].sharding}
    size = sum(x.size for x in jax.tree.leaves(abstract.params))
    assert state_bytes(boxed, optimizer) == (4 + 2 + 2) * size + 12


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
    assert int(state.skipped) == 0
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), before)


def test_steps_at_fault_are_skipped_up_to_a_number(mesh):
    sharding = batch_sharding(mesh)
    poisoned = batch(1)
    poisoned["pixels"][3] = np.nan
    order = [batch(0), poisoned, batch(2), poisoned, batch(3)]

    def run(batches, most):
        state, step = prepared(mesh, OptimConfig(warmup=3), Faults(do="skip", most=most))
        reports = []
        for each in batches:
            state, metrics = step(state, put_batch(each, sharding), None)
            reports.append({name: float(value) for name, value in metrics.items()})
        return jax.tree.map(np.array, state), reports

    skipping, reports = run(order, most=2)
    assert (skipping.step, skipping.skipped, skipping.fault) == (5, 2, -1)
    assert [r["skipped"] for r in reports] == [0, 1, 1, 2, 2]
    # What is left out leaves no trace but the count: not in moments, learning rate, mean loss.
    without, plain = run(order[::2], most=0)
    same = ("params", "opt_state", "typical")
    jax.tree.map(
        np.testing.assert_array_equal,
        [getattr(skipping, name) for name in same],
        [getattr(without, name) for name in same],
    )
    assert [reports[i]["lr"] for i in (0, 2, 4)] == [r["lr"] for r in plain]
    stopped, _ = run(order, most=1)
    assert (stopped.skipped, stopped.fault) == (2, 3)


def test_a_loss_that_jumps_is_at_fault(mesh):
    sharding = batch_sharding(mesh)
    state, step = prepared(mesh, OptimConfig(warmup=0), Faults(spike=1.5))
    wild = batch(1)
    wild["pixels"] *= 1e3
    found = []
    for each in (wild, *[batch(i) for i in range(10)], wild):
        state, metrics = step(state, put_batch(each, sharding), None)
        found.append(float(metrics["loss"]))
    assert int(state.fault) == 11  # the first one is wild, but what is usual was not known yet
    assert np.isfinite(found).all()


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


class Reporting(TinyModel):
    """Two layers that report."""

    def __call__(self, batch, *, budget=None):
        out = super().__call__(batch, budget=budget)
        each = (out.hidden**2).mean((1, 2))  # the mean over rows of what a row reports
        reports = (
            {"router_loss": 0.1 * each.mean(), "kept": each.sum()},
            {},
            {"router_loss": 0.2 * each.mean(), "other_loss": jnp.float32(3.0)},
        )
        return replace(out, aux=reports)


@dataclass(frozen=True)
class ReportingConfig(TinyConfig):
    def build(self):
        return Reporting(self.width)


@pytest.fixture(scope="module")
def reporting():
    """The reporting model, its parameters and a function (objective) -> terms, others, gradient."""
    model = Reporting(8)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), batch())["params"])

    def run(objective):
        def loss(params):
            variables = {"params": params}
            terms, others, _ = objective.loss(
                model, variables, {}, batch(), jax.random.key(0), None
            )
            return sum(mean.value for mean in terms.values()), (terms, others)

        (_, (terms, others)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return terms, others, grads

    return model, params, run


def test_what_layers_report_as_losses_is_summed_and_trained(reporting):
    model, params, run = reporting
    terms, others, grads = run(NextToken())
    assert set(terms) == {"loss", "router_loss", "other_loss"}
    assert set(others) == {"accuracy"}
    hidden = np.asarray(model.apply({"params": params}, batch()).hidden)
    np.testing.assert_allclose(terms["router_loss"].value, 0.3 * (hidden**2).mean(), rtol=1e-5)
    np.testing.assert_allclose(terms["other_loss"].value, 3.0, rtol=1e-6)

    def reported(params):
        aux = model.apply({"params": params}, batch()).aux
        return aux[0]["router_loss"] + aux[2]["router_loss"]

    def without(params):
        variables = {"params": params}
        terms, *_ = NextToken().loss(TinyModel(8), variables, {}, batch(), jax.random.key(0), None)
        return terms["loss"].value

    wanted = jax.tree.map(jnp.add, jax.grad(reported)(params), jax.grad(without)(params))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-6), grads, wanted)


def test_logits_in_chunks_give_the_same_loss_and_gradient(reporting):
    _, _, run = reporting
    plain = run(NextToken(z_loss=0.01))
    for chunk in (1, 7, 24):  # 24 tokens: divided, with a rest, whole
        chunked = run(NextToken(z_loss=0.01, chunk=chunk))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), plain,
                     chunked)  # fmt: skip
    assert "z_loss" in plain[0]


def sizes(jaxpr):
    """The number of elements of every value that is computed, in programs within programs too."""
    for equation in jaxpr.eqns:
        yield from (var.aval.size for var in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from sizes(inner)


def test_chunked_logits_are_never_whole(monkeypatch):
    model, key = TinyModel(8), jax.random.key(0)
    params = nn.unbox(model.init(key, batch())["params"])
    whole = 8 * 24 * 320

    def most(objective):
        def loss(params):
            terms, *_ = objective.loss(model, {"params": params}, {}, batch(), key, None)
            return terms["loss"].value

        return max(sizes(jax.make_jaxpr(jax.value_and_grad(loss))(params).jaxpr))

    assert most(NextToken()) == whole
    assert most(NextToken(chunk=6)) == whole // 4
    monkeypatch.setattr("zoo.train.objectives.chunks.WHOLE_LOGITS", 320 * 6)
    assert most(NextToken()) == whole // 4


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "fsdp": 4},
        {"data": 1, "fsdp": 2, "tensor": 2, "seq": 2},
        {"data": 1, "expert": 4, "seq": 2},
    ],
    ids=lambda sizes: "-".join(sizes),
)
def test_each_device_computes_the_logits_of_its_own_tokens(sizes):
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((8, 96, 8)).astype(np.float32)
    label = np.where(rng.random((8, 96)) < 0.3, rng.integers(0, 64, (8, 96)), -100)
    table = rng.standard_normal((64, 8)).astype(np.float32)

    def run(chunk, lies=None):
        def loss(table, hidden, label):
            found = _sums(lambda table, x: x @ table.T, table, hidden, label, chunk)
            rows = sequence_logps(lambda table, x: x @ table.T, table, hidden, label, chunk)
            total = found.cross_entropy + 0.1 * found.squared_normaliser
            return total + (rows[0] * jnp.arange(8)).sum(), (found.right, rows)

        step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), in_shardings=lies)
        compiled = step.lower(table, hidden, label).compile()
        return compiled(table, hidden, label), compiled.as_text()

    wanted, _ = run(96)
    mesh = make_mesh(MeshConfig(**sizes))
    with jax.set_mesh(mesh):
        names = {(64, 8): ("vocab", "vocab_embed"), (8, 96, 8): ("batch", "seq", None)}
        lies = [NamedSharding(mesh, spec_for(n, shape, mesh)) for shape, n in names.items()]
        lies.append(NamedSharding(mesh, spec_for(("batch", "seq"), (8, 96), mesh)))
        found, text = run(16, tuple(lies))
        sent = traffic(text, dict(mesh.shape))
        more = traffic(run(32, tuple(lies))[1], dict(mesh.shape))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), found, wanted)
    # The table, and its gradient, are sent twice, once for each of the losses, whatever the number
    # of chunks; hidden states, twelve times as large, are not.
    assert sent == more
    between = {axes: n for (_, axes), n in sent.items() if "tensor" not in axes}
    assert sum(between.values()) < 2 * 3 * table.nbytes + 1024


def test_a_table_comes_to_the_words_of_each_device():
    rng = np.random.default_rng(0)
    params = {"embedding": rng.standard_normal((64, 8)).astype(np.float32)}
    ids = rng.integers(0, 64, (8, 96))

    def loss(params, ids):
        return jnp.sin(Embed(64, 8).apply({"params": params}, ids)).sum()

    step = jax.value_and_grad(loss)
    wanted = jax.jit(step)(params, ids)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    with jax.set_mesh(mesh):
        lies = {"embedding": NamedSharding(mesh, PartitionSpec("fsdp"))}, batch_sharding(mesh)
        compiled = jax.jit(step, in_shardings=lies).lower(params, ids).compile()
        found = compiled(params, ids)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), found, wanted)
    # It and its gradient are sent, and none of what is looked up, twelve times as much.
    sent = sum(traffic(compiled.as_text(), dict(mesh.shape)).values())
    assert sent < 3 * params["embedding"].nbytes + 64


def test_the_z_loss_is_that_of_the_normaliser(reporting):
    model, params, run = reporting
    terms, _, _ = run(NextToken(z_loss=0.5))
    logits = np.asarray(model.apply({"params": params}, batch()).hidden @ params["embedding"].T)
    learned = batch()["labels"][:, 1:] != -100
    squared = np.log(np.exp(logits.astype(np.float64)).sum(-1))[:, :-1][learned] ** 2
    np.testing.assert_allclose(terms["z_loss"].value, 0.5 * squared.mean(), rtol=1e-5)


def test_accumulated_gradients_are_those_of_the_whole_batch(mesh):
    # Plain gradient descent: the change of the parameters is the gradient. Rows have unequally many
    # labels, so that a mean of means would be another number.
    data = batch()
    data["labels"][1:4] = -100
    config, optimizer = ReportingConfig(), optax.sgd(1.0)
    model, inputs = config.build(), config.inputs(1)
    abstract = abstract_state(boxed_params(model, inputs), optimizer, mesh)

    def stepped(accumulate, chunk):
        state = initial_state(model, inputs, optimizer, abstract, 0)
        step = make_train_step(
            model,
            NextToken(z_loss=0.01, chunk=chunk),
            optimizer,
            lambda _: 1.0,
            abstract,
            accumulate=accumulate,
        )
        return step(state, put_batch(data, batch_sharding(mesh)), None)

    whole, cut = stepped(1, None), stepped(4, 7)
    assert set(whole[1]) == set(cut[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), whole, cut)


def test_the_state_is_used_up_and_its_average_follows(mesh):
    config, optim = TinyConfig(), OptimConfig(warmup=0, schedule="constant")
    model, inputs, optimizer = config.build(), config.inputs(1), make_optimizer(optim, 10)
    boxed = boxed_params(model, inputs)
    abstract = abstract_state(boxed, optimizer, mesh, averaged=True)
    state = initial_state(model, inputs, optimizer, abstract, 0)
    assert state_bytes(boxed, optimizer, averaged=True) - state_bytes(boxed, optimizer) == sum(
        x.nbytes for x in jax.tree.leaves(state.params)
    )
    step = make_train_step(
        model, NextToken(), optimizer, learning_rate(optim, 10), abstract, decay=0.15
    )
    kept = [np.asarray(state.params["up"]["kernel"])]
    for seed in range(3):
        before = state
        state, _ = step(state, put_batch(batch(seed), batch_sharding(mesh)), None)
        assert all(x.is_deleted() for x in jax.tree.leaves(before))
        kept.append(np.asarray(state.params["up"]["kernel"]))
    wanted = kept[0]
    for number, params in enumerate(kept[1:]):
        decay = min(0.15, (1 + number) / (10 + number))
        wanted = decay * wanted + (1 - decay) * params
    np.testing.assert_allclose(state.average["up"]["kernel"], wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(state.served["up"]["kernel"], state.average["up"]["kernel"])
