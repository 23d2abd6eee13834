"""PyramidDrop, AIM, ZipVL and G-Search: what the papers' figures are, and what is computed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.test_reduction import TEXT, config, params, prompts, runner
from zoo.models.core import registry
from zoo.models.core.types import Tokens
from zoo.models.parts.decoders.dropping import asking
from zoo.models.parts.layers import mixed_kv
from zoo.models.parts.reduce.report import kept_by_cell, seen_cells, vision_flops
from zoo.models.reduction.aim import AIMPrune, Merging, importance, merge_steps
from zoo.models.reduction.aim import published_flops as aim_flops
from zoo.models.reduction.g_search import (
    GSearch,
    at_rates,
    greedy,
    maximise,
    search_sigmoid,
    sigmoid_rates,
)
from zoo.models.reduction.pyramiddrop import PyramidDrop, tokens_per_layer
from zoo.models.reduction.zipvl import ZipVL, column_mass, least_number, probed

# ------------------------------------------------------------------ PyramidDrop


@pytest.mark.parametrize(
    ("tokens", "mean", "tera", "whole"), [(576, 270, 1.777, 3.817), (2880, 1350, 9.46, 20.83)]
)
def test_figures_of_pyramiddrop(tokens, mean, tera, whole):
    layers = tokens_per_layer(PyramidDrop(layers=(8, 16, 24)), 32, tokens)
    assert layers == tokens_per_layer(PyramidDrop(), 32, tokens)
    assert sum(layers) / 32 == mean
    sizes = {"width": 4096, "mlp_dim": 11_008}
    assert vision_flops(layers, **sizes) / 1e12 == pytest.approx(tera, rel=5e-4)
    assert vision_flops([tokens] * 32, **sizes) / 1e12 == pytest.approx(whole, rel=5e-4)


def test_who_asks():
    """In training the tokens before answers, else the last token of the question."""
    valid = jnp.ones((2, 8), bool)
    label = jnp.array([[-100, -100, 5, 6, -100, 7, 8, -100], [-100] * 8])
    tokens = Tokens.sequence(valid, label=label)
    rows, there = asking(tokens, turns=3)
    assert rows[0][there[0]].tolist() == [2, 5]
    assert rows[1][there[1]].tolist() == [7]
    guide = jnp.arange(8) < jnp.array([[4], [6]])
    rows, there = asking(Tokens.sequence(valid, guide=guide))
    assert rows.tolist() == [[3], [5]] and there.all()


def test_stages_that_do_not_fit():
    plan = config().decoder.plan()
    for policy, why in (
        (PyramidDrop((0.5, 0.25), layers=(2, 9)), "no layers"),
        (PyramidDrop((4, 8, 2)), "do not grow"),
        (PyramidDrop((0.5,) * 6 + (0.1,)), "has 6 layers"),
    ):
        with pytest.raises(ValueError, match=why):
            policy.apply(plan, slots=16)
    for fields in ({"layers": (3, 2)}, {"keep": (0.5,), "layers": (2, 3)}, {"positions": "kept"}):
        with pytest.raises(ValueError, match="want"):
            PyramidDrop(**fields)


# ------------------------------------------------------------------ AIM


def test_figures_of_aim():
    assert merge_steps(196, 49) == (98, 49) and merge_steps(576, 72) == (288, 144, 72)
    assert merge_steps(27, 9) == (13, 5) and merge_steps(5, 5) == ()
    qwen, vicuna = AIMPrune(start=14).retained(28), AIMPrune(start=13).retained(32)
    assert sum(qwen) / 28 == 0.625 and round(sum(vicuna) / 32, 3) == 0.516
    assert AIMPrune().retained(28) == qwen and set(AIMPrune(1.0).retained(28)) == {1.0}
    sizes = {"width": 3584, "mlp_dim": 18_944, "kv_width": 512, "text": 100}
    whole = aim_flops((6272,) * 28, **sizes)
    pruned = aim_flops(tuple(1568 * share for share in qwen), **sizes)
    assert (round(whole / 1e12, 2), round(pruned / 1e12, 2)) == (99.46, 14.75)


@pytest.mark.parametrize(
    ("name", "slots"), [("aim_llava_1_5_7b", 72), ("aim_llava_onevision_7b", 1568)]
)
def test_slots_of_aim_at_full_size(name, slots):
    made = registry.config(name)
    model, batch = made.build(), made.inputs(1)
    variables = jax.eval_shape(model.init, jax.random.key(0), batch)

    def read(model, batch):
        stream, memory = model.stream(batch, None)
        return stream, model.decoder.run(stream, None, memory)[0]

    first, last = jax.eval_shape(lambda v, b: model.apply(v, b, method=read), variables, batch)
    assert first.slots == slots == made.slots and last.slots == 0


def test_frames_are_merged_one_by_one():
    """Each group as if it were alone, what has no group left out; twins become themselves."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 14, 4)), jnp.float32)
    group = jnp.array([[0] * 6 + [2] * 3 + [1] * 5])  # the last five first; 2 is none
    both = Merging.start(x, group, 2).step(jnp.full((1, 14), 3), jnp.full((1, 14), 3)).result(6)
    for first, stop, at in ((0, 6, slice(0, 3)), (9, 14, slice(3, 6))):
        alone = Merging.start(x[:, first:stop], jnp.zeros((1, stop - first), int), 1)
        alone = alone.step(jnp.full((1, stop - first), 3), jnp.full((1, stop - first), 3))
        np.testing.assert_allclose(both.tokens[0, 0, at], alone.tokens[0, :3], rtol=1e-6)
        assert (both.index[0, 0, at] == alone.place[0, :3] + first).all()
    assert both.mask.all() and (both.groups[0, 0, 6:9] == -1).all()
    for slot in (*range(6), *range(9, 14)):
        members = np.asarray(both.groups[0, 0]) == both.groups[0, 0, slot]
        mean = np.asarray(x)[0, members].mean(0)
        np.testing.assert_allclose(both.tokens[0, 0, both.groups[0, 0, slot]], mean, rtol=1e-5)
    twins = jnp.repeat(x[:, :4], 2, 1)
    halved = Merging.start(twins, jnp.zeros((1, 8), int), 1).step(
        jnp.full((1, 8), 4), jnp.ones((1, 8))
    )
    np.testing.assert_allclose(halved.tokens[:, :4], x[:, :4], rtol=1e-5)


def test_importance_flows_to_the_first():
    logits = jnp.where(jnp.tril(jnp.ones((5, 5), bool)), 0.0, jnp.finfo(jnp.float32).min)
    weight = importance(logits[None, None], jnp.full((1, 5), 0.2), 0.1, 1)
    want = [sum(1 / (n + 1) for n in range(j, 5)) / 5 for j in range(5)]
    np.testing.assert_allclose(weight[0], want, rtol=1e-5)
    more = importance(logits[None, None], jnp.full((1, 5), 0.2), 0.1, 5)
    assert more[0, 0] > 0.9 and (jnp.diff(more[0]) < 0).all()


def test_what_aim_runs():
    """Half of the tokens, then an eighth of these less after each layer from the third on."""
    made = config("aim", keep=0.5)
    _, (_, first, _, aux) = runner(made)(params("aim"), prompts())
    kept = kept_by_cell(aux, 16, first=seen_cells(first)).sum(-1)
    assert (kept == np.array([8, 8, 8, 8, 7, 6])[:, None]).all()


# ------------------------------------------------------------------ ZipVL


def test_how_many_are_important():
    mass = jnp.array([[0.1, 0.5, 0.15, 0.25], [1.0, 0.0, 0.0, 0.0]])
    for tau, want in ((0.5, [1, 1]), (0.7, [2, 1]), (0.89, [3, 1]), (0.95, [4, 1])):
        assert least_number(mass, tau).tolist() == want
    logits = jnp.where(jnp.array([[1, 1, 0], [1, 1, 1]]), 0.0, jnp.finfo(jnp.float32).min)
    total, each = column_mass(logits[None, None], jnp.ones((1, 2), bool))
    np.testing.assert_allclose(total[0], [5 / 6, 5 / 6, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(each[0], [5 / 12, 5 / 12, 1 / 3], rtol=1e-6)
    valid = jnp.arange(12) < jnp.array([[12], [3]])
    rows, there = probed(Tokens.sequence(valid), 4, 2)
    assert [sorted(r[t].tolist()) for r, t in zip(rows, there)] == [[0, 4, 8, 9, 10, 11], [0, 1, 2]]


def test_without_rounding_all_important_tokens_are_the_plain_model():
    policy = ZipVL(tau=1.0, bits=(16, 16))
    plain = config()
    whole = dataclasses.replace(plain, policies=(policy,))
    batch = {name: x for name, x in prompts().items() if name != "guide"}
    batch["text_mask"] = batch["text_mask"][:, :TEXT]
    batch["ids"] = batch["ids"][:, :TEXT]

    def answer(made):
        model, weights = made.build(), {"params": params()}
        first, cache = model.apply(weights, batch, room=2, method="prefill")
        token = first.argmax(-1)[:, None].astype(jnp.int32)
        second, cache = model.apply(weights, token, cache, method="decode")
        return first, second, cache

    want, got = jax.jit(lambda: answer(plain)[:2])(), jax.jit(lambda: answer(whole)[:2])()
    for ours, theirs in zip(got, want):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize(("bits", "per_number"), [((4, 2), 3), ((4, 0), 2), ((16, 2), 9)])
def test_bytes_of_the_cache(bits, per_number):
    """(ρ high + (1 - ρ) low) bits for each number; what is read is as near as levels are."""
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(size=(2, 16, 3, 8)), jnp.float16) for _ in "kv")
    tokens = Tokens.sequence(jnp.ones((2, 16), bool))
    chosen = jnp.arange(16) % 2 == jnp.array([[0], [1]])
    state = mixed_kv.MixedKV.start(k, v, tokens, chosen, capacity=8, bits=bits, room=3)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((state.k, state.v)))
    assert size == 2 * k.size * per_number / 8
    keys, _ = state.read()
    kept = state.tokens
    assert kept.valid.shape[1] == (8 if bits[1] == 0 else 16) + 3
    rows = [(r, s) for r, s in np.ndindex(2, kept.valid.shape[1]) if kept.valid[r, s]]
    assert len(rows) == (16 if bits[1] == 0 else 32)
    for row, place in rows:
        origin = int(kept.order[row, place])
        error = np.abs(keys[row, place] - k[row, origin]).max()
        levels = 2 ** (bits[0] if chosen[row, origin] else bits[1]) - 1
        assert error <= 0.51 * float(k.max() - k.min()) / levels
    more = state.append(k[:, :1], v[:, :1], jax.tree.map(lambda x: x[:, :1], tokens))
    np.testing.assert_array_equal(more.read()[0][:, -3], k[:, 0])


# ------------------------------------------------------------------ G-Search


def test_greedy_finds_the_least_schedule():
    need = (1.0, 0.75, 0.75, 0.5, 0.125, 0.125)
    calls = []

    def accuracy(rates):
        calls.append(rates)
        return 1.0 - 0.1 * sum(rate < least for rate, least in zip(rates, need))

    assert greedy(accuracy, 6) == need
    assert len(calls) <= 1 + 5 * 5 and all(r[0] == 1 for r in calls)
    assert greedy(accuracy, 6, tolerance=0.25) < need


@pytest.mark.parametrize(("depth", "budget"), [(32, 0.125), (32, 0.5), (6, 0.5), (4, 1.0)])
def test_sigmoids_keep_the_budget(depth, budget):
    for slope in (0.05, 0.5, 5.0):
        rates = sigmoid_rates(depth, budget, slope, 1.5)
        assert rates[0] == 1 and list(rates) == sorted(rates, reverse=True)
        assert np.mean(rates) == pytest.approx(budget, abs=1e-3)
    with pytest.raises(ValueError, match="the first runs all"):
        sigmoid_rates(4, 0.2, 1.0)


def test_the_optimiser_beats_draws():
    def hill(point):
        return -float(((point - np.array([0.3, 0.8])) ** 2).sum())

    _, found = maximise(hill, 2, calls=15, seed=1)
    rng = np.random.default_rng(1)
    assert found > max(hill(rng.random(2)) for _ in range(60))
    want = sigmoid_rates(12, 0.5, 1.0, 1.0)
    policy, best = search_sigmoid(
        lambda rates: -float(np.abs(np.subtract(rates, want)).sum()), 12, 0.5, calls=15
    )
    assert best > -0.5 and policy.keep == 0.5


def test_masking_is_dropping():
    """Searches mask, what they find drops: the same logits; all ones are the plain model."""
    rates, batch = (1.0, 1.0, 0.75, 0.5, 0.5, 0.1875), prompts()
    score = at_rates(config())
    dropped = dataclasses.replace(config(), policies=(GSearch(rates),))
    _, (want, _, _, aux) = runner(dropped)(params(), batch)
    np.testing.assert_allclose(score(params(), batch, rates), want, atol=2e-5)
    assert kept_by_cell(aux, 16).sum(-1)[:, 0].tolist() == [16, 16, 12, 8, 8, 3]
    _, (plain, *_) = runner(config())(params(), batch)
    np.testing.assert_allclose(score(params(), batch, (1.0,) * 6), plain, atol=2e-5)
    with pytest.raises(ValueError, match="there are 16 tokens"):
        GSearch((20, 10, 9, 8, 7, 6)).apply(config().decoder.plan(), slots=16)
    with pytest.raises(ValueError, match="do not grow"):
        GSearch((1.0, 0.5, 0.6, 0.5, 0.5, 0.5)).apply(config().decoder.plan(), slots=16)
