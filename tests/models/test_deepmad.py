"""DeepMAD: scores of the official code, the design, training."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

from tests.models.draw import draw
from tests.parity.deepmad import read
from zoo.models.core import registry
from zoo.models.vision.deepmad import DeepMADConfig, score
from zoo.models.vision.deepmad.design import DesignConfig
from zoo.models.vision.deepmad.nets import NETS
from zoo.models.vision.deepmad.score import Unit

GOLDENS = Path(__file__).parents[1] / "goldens" / "deepmad"
SCORES = {
    f"{path.stem}-{name}": found
    for path in sorted(GOLDENS.glob("*.json"))
    for name, found in json.loads(path.read_text("utf-8")).get("results", {}).items()
}
SMALL = (
    Unit("conv", 16, 3, 2),
    Unit("bottleneck", 32, 3, 2, 1, 16),
    Unit("bottleneck", 64, 3, 2, 1, 16),
)


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_the_official_ones(name):
    want = SCORES[name]
    net, side = read(want["structure"]), want["resolution"]
    levels = score.levels(net, side, sides_lost=True)
    facts = [[x.unit, x.blocks, x.convolutions, x.channels, x.side] for x in levels]
    np.testing.assert_array_equal(np.transpose(facts), want["stage_info"])
    stds = [block.log_std for block in score.blocks(net)]
    np.testing.assert_allclose(stds, want["block_log_std"], rtol=1e-12)
    entropies = score.entropies(net, side, sides_lost=True)
    np.testing.assert_allclose(entropies, want["score_list"], rtol=1e-12)
    total = score.score(net, side, penalised=False, sides_lost=True)
    np.testing.assert_allclose(total, want["score"], rtol=1e-12)
    rho = score.effectiveness(net, side)
    np.testing.assert_allclose(rho, want["efficient_score"], rtol=1e-12)
    assert score.parameters(net) == want["model_size"]
    assert levels[-1].convolutions == want["layers"]
    assert score.budgeted_flops(net, side) == want["flops"]


@pytest.mark.parametrize(
    ("name", "rho"),
    [("r18", 0.2991), ("r34", 0.3), ("r50", 0.2998), ("29m", 0.4965), ("29m.288", 0.4966)],
)
def test_released_networks_use_their_budget(name, rho):
    side, net = NETS[name]
    np.testing.assert_allclose(score.effectiveness(net, side), rho, atol=5e-5)


def test_penalty_and_sides():
    """Equal depths cost 10; the first two rows of bottlenecks do not count; sides matter."""
    rows = [Unit("bottleneck", 16, 3, 2, depth, 8) for depth in (1, 9, 4, 4)]
    assert score.penalty(rows) == 10
    np.testing.assert_allclose(score.penalty([*rows, rows[1]]), 10 * np.exp(np.std([4, 4, 9])))
    net = (Unit("conv", 8, 3, 2), Unit("inverted", 8, 3, 2, 1, 16))
    kept, lost = (score.levels(net, 32, sides_lost=lost)[-1] for lost in (False, True))
    assert (kept.side, lost.side) == (8, 1)
    np.testing.assert_allclose(kept.entropy - lost.entropy, 2 * np.log(8) * kept.log_std)


@pytest.mark.parametrize("solver", ["evolution", "differential"])
def test_the_design_keeps_to_its_budgets(solver):
    config = DesignConfig(
        SMALL,
        image_size=64,
        max_parameters=30_000,
        max_macs=4e6,
        max_effectiveness=0.4,
        solver=solver,
        population=16,
        candidates=600,
    )
    found = config.build()()
    assert found == config.build()()
    assert found.score > score.score(SMALL, 64) and found.tried <= 700
    assert found.parameters <= 30_000 and found.macs <= 4e6 and found.effectiveness <= 0.4
    assert [unit.stride for unit in found.net] == [2, 2, 2]
    assert all(unit.out % 8 == unit.inner % 8 == 0 for unit in found.net)
    loose = replace(config, max_effectiveness=None).build()()
    assert loose.score >= 0.9 * found.score


def test_both_solvers_find_the_best_of_a_small_space():
    """One row, of which all networks can be tried."""
    start = (Unit("bottleneck", 16, 3, 1, 1, 8),)
    config = DesignConfig(start, image_size=16, max_parameters=4000, population=30, candidates=3000)
    sides = range(8, 65, 8)
    space = itertools.product(sides, (3, 5), range(1, 5), sides)
    nets = [(Unit("bottleneck", out, k, 1, depth, inner),) for out, k, depth, inner in space]
    best = max(score.score(net, 16) for net in nets if not config.excess(net))
    differential = replace(config, solver="differential").build()()
    np.testing.assert_allclose(differential.score, best)
    assert config.build()().score >= best  # deeper ones are open to it


def test_programmes_of_the_paper_start_within_their_budgets():
    for name in ("r18", "29m"):
        config = replace(registry.config(f"deepmad_design_{name}"), population=8, candidates=200)
        assert config.build()().score > score.score(config.start, 224)


def test_training_moves_statistics():
    config = registry.config("deepmad_tiny")
    model = config.build()
    pixels = np.random.default_rng(0).normal(size=(4, 32, 48, 3)).astype(np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), {"pixels": pixels})
    variables = draw(nn.unbox(dict(shapes)))

    @jax.jit
    def both(variables):
        plain = model.apply(variables, {"pixels": pixels}, taps=(2,))
        return plain, *model.apply(variables, {"pixels": pixels}, train=True, mutable=["stats"])

    plain, trained, changed = both(variables)
    assert [x.shape[1:] for x in plain.features.pyramid] == [(16, 24, 8), (8, 12, 16), (4, 6, 12)]
    assert plain.features.taps[2].shape == (4, 96, 16)
    assert np.abs(plain.logits - trained.logits).max() > 1e-3
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), changed["stats"], variables["stats"])
    assert all(value > 0 for value in jax.tree.leaves(moved))


def test_wrong_settings():
    with pytest.raises(ValueError, match="kind = 'dense': want one of conv, bottleneck, inverted"):
        Unit("dense", 8)
    with pytest.raises(ValueError, match="a stride of 1 or 2 and an odd kernel"):
        Unit("conv", 8, 4)
    with pytest.raises(ValueError, match="image_size = 36: want a multiple of the stride 8"):
        DeepMADConfig(36, SMALL)
    with pytest.raises(ValueError, match="is beyond the budgets"):
        DesignConfig(SMALL, max_parameters=100)
    with pytest.raises(ValueError, match="solver = 'luck'"):
        DesignConfig(SMALL, solver="luck")
