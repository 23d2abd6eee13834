import flax.linen as nn
import jax
import numpy as np
import pytest

from tests.train.test_step import batch
from tests.train.tiny import TinyConfig, tiny
from zoo.models.core.errors import UsageError
from zoo.models.core.names import tree_names
from zoo.models.core.tree import flatten_dict
from zoo.train.loop import train
from zoo.train.mesh import MeshConfig, batch_sharding, make_mesh, put_batch
from zoo.train.objectives import NextToken
from zoo.train.optim import OptimConfig, learning_rate, make_optimizer
from zoo.train.parts import Part, assigned, divide, joined
from zoo.train.state import abstract_state, boxed_params, initial_state, state_bytes
from zoo.train.step import make_train_step

PARTS = (
    Part("embedding", frozen=True),
    Part("up/.*", lr=0.5),
    Part("down/.*"),
    Part("norm/.*", weight_decay=0.1),
)


def boxed():
    config = TinyConfig()
    return boxed_params(config.build(), config.inputs(1))


def test_every_parameter_belongs_to_one_part():
    owner = assigned(PARTS, boxed())
    assert owner == {"embedding": 0, "up/kernel": 1, "down/kernel": 2, "norm/scale": 3}
    trained, frozen = divide(PARTS, boxed())
    assert set(trained) == {"up", "down", "norm"}
    assert set(frozen) == {"embedding"}
    assert jax.tree.structure(joined(trained, frozen)) == jax.tree.structure(boxed())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([Part("up/.*"), Part("down/.*"), Part("norm/.*")], "embedding is matched by no pattern"),
        ([Part(".*"), Part("up/.*")], r"up/kernel is matched by '\.\*' and 'up/\.\*'"),
        ([Part(".*"), Part("upp/kernel")], "'upp/kernel' matches no parameter; nearest: 'up/ker"),
        ([Part("up")], "'up' matches no parameter"),  # of the whole path
        ([Part(".*", frozen=True)], "nothing trains"),
    ],
)
def test_what_is_matched_by_none_or_by_two_is_listed(parts, message):
    with pytest.raises(UsageError, match=message):
        divide(parts, boxed())


@pytest.mark.parametrize(
    "wrong",
    [
        {"pattern": "("},
        {"pattern": ".", "lr": 0.0},
        {"pattern": ".", "weight_decay": -1.0},
        {"pattern": ".", "frozen": True, "lr": 1.0},
    ],
)
def test_impossible_parts_are_refused(wrong):
    with pytest.raises(UsageError, match="part "):
        Part(**wrong)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_parts_move_at_their_own_rates_and_the_frozen_do_not(name):
    config = TinyConfig()
    optim = OptimConfig(
        name=name, lr=0.1, warmup=0, schedule="constant", clip_norm=None, weight_decay=0.0
    )
    model, inputs = config.build(), config.inputs(1)
    trained, frozen = divide(PARTS, boxed())
    optimizer = make_optimizer(optim, 10, tree_names(trained), PARTS[1:])
    # Adam's first step is the learning rate in the direction of the gradient's sign; without parts:
    plain = make_optimizer(optim, 10, tree_names(boxed()))
    mesh = make_mesh(MeshConfig(fsdp=2))
    with jax.set_mesh(mesh):
        data = put_batch(batch(), batch_sharding(mesh))

        def moved(optimizer, trained, frozen):
            abstract = abstract_state(trained, optimizer, mesh, frozen=frozen)
            state = initial_state(model, inputs, optimizer, abstract, 0)
            before = jax.tree.map(np.array, joined(state.params, state.frozen))
            step = make_train_step(
                model, NextToken(), optimizer, learning_rate(optim, 10), abstract
            )
            state, _ = step(state, data, None)
            after = joined(state.params, state.frozen)
            return state, jax.tree.map(lambda b, a: np.asarray(a) - b, before, after)

        state, by_parts = moved(optimizer, trained, frozen)
        _, alike = moved(plain, boxed(), {})
    assert not by_parts["embedding"].any()
    assert alike["embedding"].any()
    np.testing.assert_allclose(
        by_parts["up"]["kernel"], 5 * alike["up"]["kernel"], rtol=1e-3, atol=1e-6
    )
    np.testing.assert_allclose(by_parts["down"]["kernel"], alike["down"]["kernel"], rtol=1e-3,
                               atol=1e-6)  # fmt: skip
    # Nothing of the frozen table, 320 x 8, is in the optimizer's state.
    assert not any(x.shape == (320, 8) for x in jax.tree.leaves(state.opt_state))
    assert state_bytes(trained, optimizer) < state_bytes(boxed(), plain) / 3


def test_no_gradient_of_the_frozen_is_computed():
    config = TinyConfig()
    model, inputs, optim = config.build(), config.inputs(8), OptimConfig(warmup=0)
    parts = (Part("(up|down|embedding).*", frozen=True), Part("norm/.*"))
    trained, frozen = divide(parts, boxed())
    optimizer = make_optimizer(optim, 10, tree_names(trained), parts[1:])
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])

    def products(trained, frozen, optimizer):
        abstract = abstract_state(trained, optimizer, mesh, frozen=frozen)
        step = make_train_step(model, NextToken(), optimizer, learning_rate(optim, 10), abstract)
        return str(jax.make_jaxpr(lambda s, b: step(s, b, None))(abstract, inputs)).count(
            "dot_general"
        )

    # Forward: up, down and the head. Backward through the head alone, to the scale before it.
    assert products(trained, frozen, optimizer) == 3 + 1
    assert products(boxed(), {}, make_optimizer(optim, 10)) == 3 + 6


def test_the_frozen_are_on_the_disk_once_and_a_run_continues(tmp_path):
    experiment = tiny(parts=PARTS, save_every=2, keep=3, steps=6, eval_every=2, average=0.5)

    def crash(model, params, step):
        assert set(params) == {"embedding", "up", "down", "norm"}
        if step == 4:
            raise RuntimeError("power cut")
        return {}

    with pytest.raises(RuntimeError, match="power cut"):
        train(experiment, tmp_path / "cut", on_eval=crash)
    checkpoints = tmp_path / "cut" / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["2", "frozen"]
    found = train(experiment, tmp_path / "cut")
    wanted = train(experiment, tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted.params)
    names = {"/".join(path) for path in flatten_dict(nn.unbox(found.params))}
    assert names == {"embedding", "up/kernel", "down/kernel", "norm/scale"}

    table = next((checkpoints / "frozen").rglob("d/*"))
    table.write_bytes(table.read_bytes()[:-1])
    with pytest.raises(Exception, match=r"frozen parameters in .* cannot be used"):
        train(experiment, tmp_path / "cut")
