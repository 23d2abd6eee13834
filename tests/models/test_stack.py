"""The decoder mechanism: what must hold for every plan."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import toy
from tests.models.draw import draw
from zoo.models.core.names import tree_names
from zoo.models.core.tree import flatten_dict
from zoo.models.core.types import KV, Reserve, Stream
from zoo.models.parts.layers.plan import Step, cover
from zoo.models.parts.layers.selection import pick, put
from zoo.models.parts.layers.stack import Stack, unstack

TOTAL = toy.SLOTS + toy.PROMPT + toy.ANSWER
KEY = jax.random.key(1)


def close(got, want):
    assert float(jnp.abs(got - want).max()) <= 1e-5 * float(jnp.abs(want).max())


def shapes(stack):
    return jax.eval_shape(stack.init, KEY, toy.stream(TOTAL), None, toy.memory())


def forward(stack):
    return jax.jit(
        lambda p, s, **k: stack.apply(p, s, None, toy.memory(), **k),
        static_argnames=("start", "stop"),
    )


@pytest.fixture(scope="module", params=list(toy.PLANS))
def case(request):
    stack = Stack(toy.PLANS[request.param])
    params = draw(shapes(stack))

    @jax.jit
    def run(params, stream):
        out, _, aux = stack.apply(params, stream, None, toy.memory())
        return out, aux

    out, aux = run(params, toy.stream(TOTAL))
    return request.param, stack, params, run, out, aux


def test_scanned_equals_unrolled(case):
    _, stack, params, _, out, aux = case
    loop = dataclasses.replace(stack, scan=False)
    other, _, other_aux = jax.jit(lambda p, s: loop.apply(p, s, None, toy.memory()))(
        params, toy.stream(TOTAL)
    )
    close(out.hidden, other.hidden)
    jax.tree.map(np.testing.assert_array_equal, aux, other_aux)


def test_unstacked_rows_give_the_same(case):
    _, stack, params, _, out, _ = case
    names = tree_names(shapes(stack)["params"])
    rows = {"params": unstack(params["params"], names)}
    assert isinstance(jax.tree.leaves(rows, is_leaf=lambda x: isinstance(x, tuple))[0], tuple)
    whole = toy.stream(TOTAL)
    got = jax.jit(lambda p, s: stack.apply(p, s, Reserve(1), toy.memory())[0])(rows, whole)
    close(got.hidden, out.hidden)


def test_cached_decoding_equals_recomputation(case):
    _, stack, params, _, out, _ = case
    prompt = toy.SLOTS + toy.PROMPT
    prefill = jax.jit(lambda p, s: stack.apply(p, s, Reserve(toy.ANSWER), toy.memory())[:2])
    first, states = prefill(params, toy.stream(prompt))
    whole = toy.stream(TOTAL)
    step = jax.jit(lambda p, s, c: stack.apply(p, s, c, toy.memory())[:2])
    tail = out.hidden[:, -toy.ANSWER :]
    close(first.hidden[:, -1][:1], out.hidden[:1, -toy.ANSWER - 1])
    for i in range(toy.ANSWER):
        hidden, tokens = jax.tree.map(
            lambda x, i=i: x[:, prompt + i : prompt + i + 1], (whole.hidden, whole.tokens)
        )
        got, states = step(params, Stream(hidden, tokens), states)
        close(got.hidden[:, 0], tail[:, i])


def test_cache_lengths_follow_the_policies():
    stack = Stack(toy.PLANS["drop"])
    prompt = toy.SLOTS + toy.PROMPT
    run = lambda p, s: stack.apply(p, s, Reserve(toy.ANSWER), toy.memory())[1]
    states = jax.eval_shape(run, shapes(stack), toy.stream(prompt))
    caches = jax.tree.leaves(states, is_leaf=lambda x: isinstance(x, KV))
    lengths = [cache.k.shape[-2] for cache in caches]  # few repeats: a state for each layer
    text = toy.PROMPT + toy.ANSWER
    assert lengths == [12 + text, 6 + text, 6 + text, 3 + text, 3 + text]


def test_padding_changes_nothing(case):
    """Row 1 has fewer vision and text tokens than row 0; alone it gives the same."""
    _, stack, params, _, out, _ = case
    alone = jax.tree.map(lambda x: x[1:], toy.stream(TOTAL))
    memory = {"taps": toy.memory()["taps"][:, 1:]}
    got, _, _ = jax.jit(lambda p, s: stack.apply(p, s, None, memory))(params, alone)
    valid = np.asarray(out.tokens.valid[1])
    close(got.hidden[0][valid], out.hidden[1][valid])


def test_causal(case):
    """A change of the last token changes no other."""
    _, _, params, run, out, _ = case
    other = toy.stream(TOTAL)
    other = other.replace(hidden=other.hidden.at[:, -1].add(1.0))
    got, _ = run(params, other)
    np.testing.assert_array_equal(got.hidden[:, :-1], out.hidden[:, :-1])
    assert np.abs(got.hidden[:, -1] - out.hidden[:, -1]).max() > 0.1


def test_policies_leave_the_names_and_shapes_of_the_base_weights(case):
    _, _, params, _, _, _ = case
    base = flatten_dict(
        jax.eval_shape(Stack(toy.PLANS["dense"]).init, KEY, toy.stream(TOTAL))["params"]
    )
    mine = flatten_dict(params["params"])
    for path, leaf in base.items():
        assert mine[path].shape[1:] == nn.unbox(leaf).shape[1:], path
    assert all(
        isinstance(v, nn.LogicallyPartitioned) and v.names[0] == "layers" for v in base.values()
    )


def test_every_row_gets_a_gradient(case):
    name, _, params, run, _, _ = case
    target = jax.random.normal(jax.random.key(3), (toy.BATCH, 1, toy.WIDTH))
    loss = lambda p: ((run(p, toy.stream(TOTAL))[0].hidden - target) ** 2).sum()
    for path, grad in flatten_dict(jax.jit(jax.grad(loss))(params)["params"]).items():
        rows = np.abs(np.asarray(grad)).reshape(grad.shape[0], -1).max(1)
        assert np.isfinite(rows).all() and (rows > 0).all(), (name, path, rows)


def test_rows_are_owned():
    rows = lambda plan, stack, leaf: flatten_dict(
        nn.unbox(shapes(Stack(toy.PLANS[plan])))["params"]
    )[stack, *leaf].shape[0]
    assert rows("switch", "layers", ("up", "kernel")) == 3
    assert rows("switch", "layers", ("experts", "kernel")) == 3
    assert rows("switch", "layers", ("q", "kernel")) == 6
    assert rows("inserted", "inner", ("q", "kernel")) == 2
    assert rows("depth", "layers", ("router", "Proj_0", "kernel")) == 4
    assert rows("shared", "layers", ("bias", "Proj_0", "kernel")) == 1


def test_kept_counts_follow_the_scanned_ratio():
    stack = Stack(toy.PLANS["depth"])
    _, _, aux = forward(stack)(draw(shapes(stack)), toy.stream(TOTAL))
    kept = [report["kept"].tolist() for report in aux[2:]]
    assert kept == [[7, 5], [6, 4], [4, 2], [3, 2]]  # trunc(12 r), trunc(8 r)


@pytest.mark.parametrize("name", ["dense", "drop", "mixed"])
def test_in_pieces(name):
    stack = Stack(toy.PLANS[name])
    params, run = draw(shapes(stack)), forward(stack)
    whole, _, _ = run(params, toy.stream(TOTAL))
    stream = toy.stream(TOTAL)
    for start, stop in ((0, 2), (2, 3), (3, None)):
        stream, _, _ = run(params, stream, start=start, stop=stop)
    close(stream.hidden, whole.hidden)
    with pytest.raises(ValueError, match="the plan has"):
        run(params, stream, stop=99)


def test_cover_traces_least():
    assert cover(("a",) * 32) == ((0, 1, 32),)
    assert cover(("a", "b") * 12) == ((0, 2, 12),)
    assert cover(("a",) * 8 + ("b",) * 24) == ((0, 1, 8), (8, 1, 24))
    traced = sum(period for _, period, _ in cover(("a", "i", "a", "a") * 7 + ("a",)))
    assert traced <= 5


def test_depth_does_not_change_compilation():
    """A scanned plan of 40 layers has the jaxpr size of one of 4."""
    size = lambda n: len(
        str(jax.make_jaxpr(Stack((Step(toy.BLOCK),) * n).init)(KEY, toy.stream(TOTAL)))
    )
    assert size(40) < 1.2 * size(4)


def test_a_policy_that_splits_the_layer_must_be_innermost():
    with pytest.raises(ValueError, match="innermost"):
        toy.d(toy.Depth(0.5, 4), toy.Compressed())


def test_pick_never_moves_text_and_put_inverts():
    rng = np.random.default_rng(0)
    score = jnp.asarray(rng.normal(size=(3, 9)), jnp.float32)
    candidate = jnp.asarray([[0, 1, 1, 1, 1, 0, 0, 0, 0]] * 3, bool)
    index, keep = pick(score, candidate, jnp.array([0, 1, 3]), slots=4, capacity=3)
    assert index.shape == (3, 8)
    for row in range(3):
        text = [i for i in np.asarray(index[row]) if not candidate[row, i]]
        assert text == [0, 5, 6, 7, 8]
        kept = [
            i
            for i, k in zip(np.asarray(index[row]), np.asarray(keep[row]), strict=True)
            if k and candidate[row, i]
        ]
        best = sorted(np.argsort(-np.asarray(score[row, 1:5]), kind="stable")[: len(kept)] + 1)
        assert kept == best and len(kept) == (0, 1, 3)[row]
    base = jnp.zeros((3, 9))
    back = put(base, index, jnp.take_along_axis(score, index, 1), keep)
    want = np.where(
        [[j in set(np.asarray(index[r])[np.asarray(keep[r])]) for j in range(9)] for r in range(3)],
        score,
        0,
    )
    np.testing.assert_array_equal(back, want)
    with pytest.raises(ValueError, match="capacity"):
        pick(score, candidate, jnp.array([0, 1, 3]), slots=4, capacity=5)
