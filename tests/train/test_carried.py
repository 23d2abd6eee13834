"""What training carries beside parameters: running statistics, and what the objective keeps."""

from dataclasses import replace

import flax.linen as nn
import jax
import numpy as np
import pytest

from tests.train.carried import NormedConfig, Remembering, carrying
from tests.train.test_step import batch
from tests.train.tiny import find_here, tiny
from zoo.loading import load
from zoo.models.core import codec
from zoo.models.core.errors import UsageError
from zoo.train.config import Faults, Start
from zoo.train.loop import train
from zoo.train.mesh import MeshConfig, batch_sharding, make_mesh, put_batch
from zoo.train.metrics import read_metrics
from zoo.train.setup import Setup
from zoo.train.step import make_eval_step


@pytest.fixture(scope="module")
def stepped():
    """(accumulate, batch) -> states before and after a step on 2 x 4 devices, and its metrics."""
    mesh = make_mesh(MeshConfig(fsdp=2))

    def run(accumulate, data):
        setup = Setup.of(carrying(accumulate=accumulate, batch_size=16))
        with jax.set_mesh(mesh):
            abstract = setup.state(mesh)
            state = setup.begin(abstract)
            before = jax.tree.map(np.array, state)
            after, metrics = setup.train_step(abstract)(
                state, put_batch(data, batch_sharding(mesh)), None
            )
        return setup, abstract, before, after, metrics

    return run


def moved(variance, found):
    return 0.9 * variance + 0.1 * found


def columns(setup, params, rows):
    """The deviations of what the model computes from these rows before it is divided by them."""
    ones = {"norm": {"variance": np.ones(8, np.float32) - 1e-5}}
    hidden = setup.model.apply({"params": params, "stats": ones}, rows).hidden
    return np.asarray(hidden, np.float64).var((0, 1))


def test_statistics_are_those_of_the_global_batch(stepped):
    data = batch(size=16)
    setup, abstract, before, after, metrics = stepped(1, data)
    np.testing.assert_allclose(
        after.stats["norm"]["variance"], moved(1.0, columns(setup, before.params, data)), rtol=1e-5
    )
    np.testing.assert_array_equal(after.aux["queue"], [0, 0, np.float32(metrics["loss"])])
    assert set(after.aux) == {"queue"}
    # What belongs to a parameter lies as it does.
    assert set(abstract.fixed) == {"teacher"}
    kernel = abstract.params["up"]["kernel"]
    assert abstract.fixed["teacher"]["up"]["kernel"].sharding == kernel.sharding
    np.testing.assert_array_equal(
        after.fixed["teacher"]["up"]["kernel"], before.params["up"]["kernel"]
    )
    assert metrics["near"] == 0


def test_parts_of_a_batch_hand_on_what_is_carried(stepped):
    data = batch(size=16)
    setup, _, before, after, _ = stepped(2, data)
    wanted = 1.0
    for part in range(2):
        rows = {name: array[part::2] for name, array in data.items()}
        wanted = moved(wanted, columns(setup, before.params, rows))
    np.testing.assert_allclose(after.stats["norm"]["variance"], wanted, rtol=1e-5)
    queue = np.asarray(after.aux["queue"])
    assert queue[0] == 0
    assert (queue[1:] > 0).all()


def test_a_step_that_is_not_finite_carries_nothing_on(stepped):
    data = batch(size=16)
    data["pixels"][3] = np.nan
    _, _, before, after, _ = stepped(1, data)
    jax.tree.map(
        np.testing.assert_array_equal, (after.stats, after.aux), (before.stats, before.aux)
    )


def test_evaluation_uses_the_statistics_and_changes_none():
    config, data = NormedConfig(), batch()
    model = config.build()
    variables = nn.unbox(jax.jit(model.init)(jax.random.key(0), data))
    assert set(variables) == {"params", "stats"}
    evaluate = make_eval_step(model, Remembering())
    aux = Remembering().init(model, variables, data)
    key = jax.random.key_data(jax.random.key(0))
    small = {"norm": {"variance": variables["stats"]["norm"]["variance"] / 4}}
    losses = [
        float(evaluate({**variables, "stats": stats}, aux, data, key)["loss"].value)
        for stats in (variables["stats"], small)
    ]
    wanted, _, changed = Remembering().loss(
        model, variables, aux, data, jax.random.key(0), None, train=False
    )
    np.testing.assert_allclose(losses[0], wanted["loss"].value, rtol=1e-6)
    assert abs(losses[1] - losses[0]) > 0.1
    assert "stats" not in changed


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that broke off and went on, and one that did not."""
    folder = tmp_path_factory.mktemp("runs")
    experiment = carrying(
        save_every=3, eval_every=5, eval_examples=8, steps=8, average=0.5,
        optim=replace(tiny().optim, state="bfloat16"), faults=Faults("skip", spike=50.0),
    )  # fmt: skip

    def crash(model, params, step):
        if step == 5:
            raise RuntimeError("power cut")
        return {}

    with pytest.raises(RuntimeError, match="power cut"):
        train(experiment, folder / "cut", on_eval=crash)
    return folder, train(experiment, folder / "cut"), train(experiment, folder / "whole")


def test_a_run_goes_on_with_what_it_carried(runs):
    folder, cut, whole = runs
    jax.tree.map(
        np.testing.assert_array_equal, (cut.params, cut.stats), (whole.params, whole.stats)
    )
    assert not np.allclose(whole.stats["norm"]["variance"], 1)
    ours, theirs = (read_metrics(folder / name / "metrics.jsonl") for name in ("cut", "whole"))
    for name in ("loss", "late", "near"):
        assert [r[name] for r in ours] == [r[name] for r in theirs]
    assert theirs[-1]["near"] > 0
    assert theirs[3]["late"] > 0
    checkpoints = folder / "whole" / "checkpoints"
    assert (checkpoints / "fixed").is_dir()
    assert {p.name for p in (checkpoints / "8").iterdir()} >= {"stats", "aux", "average"}
    assert not (checkpoints / "8" / "fixed").exists()


def test_statistics_are_exported_and_started_from(runs, monkeypatch):
    folder, _, whole = runs

    def find(name):
        return NormedConfig if name == codec._name(NormedConfig) else find_here(name)

    monkeypatch.setattr(codec, "_find", find)
    loaded = load(folder / "whole")
    assert set(loaded.variables) == {"params", "stats"}
    jax.tree.map(np.testing.assert_array_equal, loaded.stats, whole.stats)
    wanted = loaded.model.apply({"params": whole.params, "stats": whole.stats}, batch()).hidden
    np.testing.assert_allclose(loaded.model.apply(loaded.variables, batch()).hidden, wanted,
                               rtol=1e-5, atol=1e-6)  # fmt: skip

    said = []
    experiment = carrying(steps=2, start=(Start(str(folder / "whole")),), eval_every=1,
                          optim=replace(tiny().optim, lr=1e-9))  # fmt: skip
    begun = train(experiment, folder / "next", on_eval=lambda *a: said.append(a[2]) or {})
    # Two steps of a tenth each away from where the first run ended, not from 1.
    ratio = np.asarray(begun.stats["norm"]["variance"] / whole.stats["norm"]["variance"])
    assert said == [1, 2]
    assert (np.abs(ratio - 1) < 0.35).all()


def test_what_compares_a_whole_batch_is_not_cut():
    class Comparing(Remembering):
        whole_batch = True

    with pytest.raises(UsageError, match="accumulate is 2: Comparing reads batches as a whole"):
        tiny(objective=Comparing(), accumulate=2)
