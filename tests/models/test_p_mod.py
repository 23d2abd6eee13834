"""p-MoD: the schedule, what a layer does to whom, caches, gradients and cost."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.conftest import REPO
from tests.models import toy
from tests.models.draw import draw
from tests.models.test_systems import random_batch, shapes
from zoo.models.connectors.mqt import MQT
from zoo.models.core import registry
from zoo.models.core.types import KV, Reserve, Stream, take
from zoo.models.decoders.p_mod import MoD, PMoD, num_kept
from zoo.models.parts.layers.plan import layers
from zoo.models.parts.layers.stack import Stack
from zoo.models.parts.reduce.report import kept_by_cell

SCHEDULE = json.loads((REPO / "tests/goldens/p_mod/schedule.json").read_text("utf-8"))
PUBLISHED = SCHEDULE["published"]

# Eight layers: two dense ones, one of 0.81, then five of 0.62, which are scanned.
DEPTH, POLICY = 8, PMoD(min_ratio=0.62)
DENSE = layers(toy.BLOCK, DEPTH)
STACK = Stack(POLICY.apply(DENSE, slots=toy.SLOTS))
PROMPT, TOTAL = toy.SLOTS + toy.PROMPT, toy.SLOTS + toy.PROMPT + toy.ANSWER


def close(got, want, tolerance=1e-5):
    assert float(jnp.abs(got - want).max()) <= tolerance * float(jnp.abs(want).max())


def parameters(stack, seed=0):
    return draw(jax.eval_shape(stack.init, jax.random.key(0), toy.stream(TOTAL)), seed)


def forward(stack):
    return jax.jit(lambda params, stream: stack.apply(params, stream))


@pytest.fixture(scope="module")
def case():
    params, run = parameters(STACK), forward(STACK)
    out, _, aux = run(params, toy.stream(TOTAL))
    return params, run, out, aux


# ------------------------------------------------------------------ schedule


def test_the_published_schedule():
    ratios = PMoD().ratios(32)
    assert list(ratios) == PUBLISHED["mod_layers"]
    got = [ratios.get(layer, 1.0) for layer in range(32)]
    np.testing.assert_allclose(got, PUBLISHED["ratios"], rtol=1e-12)
    assert np.mean(got) == pytest.approx(0.5375)
    for tokens in (576, 2928):
        assert [num_kept(tokens, ratio) for ratio in got] == PUBLISHED[f"kept_of_{tokens}"]


def test_the_unbounded_decays():
    for name in ("shiftedcos", "shiftedlinear"):
        ratios = PMoD(schedule=name, max_ratio=1.0, min_ratio=0.0).ratios(32)
        np.testing.assert_allclose(list(ratios.values()), SCHEDULE[f"raw_{name}_s0.5"], atol=1e-12)


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("deep_all", [2, 3, 4]),
        ("deep_all_include_last", [2, 3, 4, 5]),
        ("interleave", [1, 3, 5]),
    ],
)
def test_schedules_without_decay(text, chosen):
    assert PMoD.parse(text, factor=0.3).ratios(6) == dict.fromkeys(chosen, 0.3)


def test_chosen_layers():
    every = PMoD().ratios(32)
    assert PMoD(layers=(9, 31)).ratios(32) == {9: every[9], 31: 0.15}
    assert PMoD(layers=(0,)).ratios(32) == {0: 1.0}


def test_official_strings():
    assert PMoD.parse("shiftedcos_decay_0.85_0.15", "tanh_0.2_1") == PMoD()
    got = PMoD.parse("shiftedlinear_decay_0.75_0.25", "sigmoid_2_-0.5", factor=0.6)
    want = PMoD("shiftedlinear", 0.75, 0.25, 0.6, weight="sigmoid", scale=2.0, bias=-0.5)
    assert got == want
    plain = PMoD.parse("interleave", "softmax")
    assert (plain.weight, plain.scale, plain.bias) == ("softmax", 1.0, 1.0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PMoD.parse("shiftedcos"), "target_layers"),
        (lambda: PMoD.parse("cosine_decay_0.85_0.15"), "target_layers"),
        (lambda: PMoD.parse("interleave", "tanh_0.2"), "weight_norm"),
        (lambda: PMoD(schedule="linear"), "schedule"),
        (lambda: PMoD(target="vision"), "target"),
        (lambda: PMoD(weight="relu"), "weight"),
        (lambda: PMoD(max_ratio=0.1), "min_ratio"),
        (lambda: PMoD(factor=1.5), "factor"),
        (lambda: PMoD(scale=0.0), "scale"),
        (lambda: PMoD(layers=(1, 40)).ratios(32), r"layers \[40\]"),
        (
            lambda: PMoD().apply(layers(toy.BLOCK.clone(norm_place="post"), 6), slots=4),
            "norms come before",
        ),
        (lambda: PMoD().apply(PMoD().apply(DENSE, slots=4), slots=4), "twice"),
    ],
)
def test_refusals(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_counts_are_float32_products():
    """0.29 is a little less than it seems in float64, and 100 times it a little less than 29."""
    assert [int(100 * 0.29), num_kept(100, 0.29)] == [28, 29]
    assert num_kept(jnp.array([0, 100, 576]), 0.29).tolist() == [0, 29, 167]


# ------------------------------------------------------------------ a layer


def test_weights_by_hand():
    router, target = jnp.array([[0.5, 9.0, -1.0]]), jnp.array([[True, False, True]])
    x = np.array([0.5, -1.0])
    functions = {
        "tanh": np.tanh(x),
        "sigmoid": 1 / (1 + np.exp(-x)),
        "softmax": np.exp(x) / np.exp(x).sum(),
        "none": x,
    }
    for name, want in functions.items():
        got = PMoD(weight=name, scale=0.4, bias=0.7).weights(router, target)
        np.testing.assert_allclose(got[0, ::2], 0.4 * want + 0.7, rtol=1e-6)


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "softmax", "none"])
def test_a_row_without_targets_has_finite_gradients(name):
    policy, nobody = PMoD(weight=name, scale=3.0), jnp.zeros((1, 3), bool)
    used = lambda router: jnp.where(nobody, policy.weights(router, nobody), router).sum()
    np.testing.assert_array_equal(jax.grad(used)(jnp.ones((1, 3))), 1.0)


def test_who_becomes_what():
    """m + w f, w x, m + f and x, from the halves of the layer on the tokens that run."""
    stack = Stack((dataclasses.replace(DENSE[0], policies=(MoD(POLICY, 0.45),)),))
    params, stream = parameters(stack), toy.stream(TOTAL)
    out, _, (aux,) = forward(stack)(params, stream)
    own = jax.tree.map(lambda leaf: leaf[0], params["params"]["layers"])
    router = own.pop("router")["out"]
    layer = toy.BLOCK.bind({"params": own})

    tokens, x = stream.tokens, stream.hidden
    vision = np.asarray(tokens.modality == 1) & np.asarray(tokens.valid)
    w = 1 + 0.2 * jnp.tanh(x @ router["kernel"] + router["bias"])[..., 0]
    kept = vision.copy()
    for row, count in enumerate((5, 3)):  # of 12 and of 8
        order = np.argsort(-np.where(vision[row], w[row], -np.inf), kind="stable")
        kept[row, order[count:]] = False
    runs = (kept | ~vision) & np.asarray(tokens.valid)
    part = stream.replace(tokens=tokens.replace(valid=jnp.asarray(runs)))
    m, _, _ = layer.attention(part, None, {})
    f = layer.feed_forward(m, {})
    gate = jnp.where(vision, w, 1)[..., None]
    want = jnp.where(runs[..., None], m.hidden + gate * f, gate * x)
    close(out.hidden, want)
    pads = ~np.asarray(tokens.valid)
    np.testing.assert_array_equal(out.hidden[pads], x[pads])

    assert aux["kept"].tolist() == [5, 3]
    cells = np.asarray(tokens.tags["cell"])
    for row in range(toy.BATCH):
        got = np.asarray(aux["kept_cells"][row])
        assert got[got >= 0].tolist() == cells[row][kept[row]].tolist()


def test_nothing_kept():
    """A share that is none: vision tokens are scaled, text sees text alone."""
    stack = Stack(PMoD("interleave", factor=0.0).apply(layers(toy.BLOCK, 2), slots=toy.SLOTS))
    params, stream = parameters(stack), toy.stream(TOTAL)
    out, states, aux = jax.jit(lambda p, s: stack.apply(p, s, Reserve(0)))(params, stream)
    assert aux[1]["kept"].tolist() == [0, 0] and (np.asarray(aux[1]["kept_cells"]) == -1).all()
    assert states[1].k.shape[2] == TOTAL - toy.SLOTS
    assert np.isfinite(out.hidden).all()


def test_the_first_tile_runs_in_any_case():
    """`vision_hr`: four tokens are spared; of the other 8 and 4 half run."""
    policy = PMoD("interleave", target="vision_hr", tile=4)
    stack = Stack(policy.apply(layers(toy.BLOCK, 2), slots=toy.SLOTS))
    _, _, aux = forward(stack)(parameters(stack), toy.stream(TOTAL))
    assert aux[1]["kept"].tolist() == [4 + 4, 4 + 2]
    assert kept_by_cell(aux, toy.SLOTS)[1, :, :4].all()
    wide = Stack(dataclasses.replace(policy, tile=99).apply(layers(toy.BLOCK, 2), slots=4))
    out, _, _ = forward(wide)(parameters(wide), toy.stream(TOTAL))
    params = parameters(wide)
    del params["params"]["layers"]["router"]
    want, _, _ = forward(Stack(layers(toy.BLOCK, 2)))(params, toy.stream(TOTAL))
    valid = np.asarray(want.tokens.valid)
    close(out.hidden[valid], want.hidden[valid])


def test_text_may_be_skipped_too():
    """`all`: half of the valid tokens run; decoding runs everything that comes."""
    stack = Stack(PMoD("interleave", target="all").apply(layers(toy.BLOCK, 2), slots=toy.SLOTS))
    params, stream = parameters(stack), toy.stream(PROMPT)
    run = jax.jit(lambda p, s, c: stack.apply(p, s, c)[:2])
    _, states = run(params, stream, Reserve(1))
    valid = np.asarray(stream.tokens.valid.sum(-1))
    assert states[1].tokens.valid.sum(-1).tolist() == (valid // 2).tolist()
    assert states[1].k.shape[2] == PROMPT // 2 + 1
    whole = toy.stream(PROMPT + 1)
    token = jax.tree.map(lambda x: x[:, PROMPT:], (whole.hidden, whole.tokens))
    _, states = run(params, Stream(*token), states)
    assert states[1].tokens.valid.sum(-1).tolist() == (valid // 2 + 1).tolist()


# ------------------------------------------------------------------ a decoder


def test_each_row_keeps_its_own_share(case):
    _, _, _, aux = case
    ratios = POLICY.ratios(DEPTH)
    assert list(ratios) == list(range(2, DEPTH))
    for layer, report in enumerate(aux):
        assert ("kept" in report) == (layer in ratios)
        if layer in ratios:
            assert report["kept"].tolist() == [num_kept(n, ratios[layer]) for n in (12, 8)]
    mask = kept_by_cell(aux, toy.SLOTS)
    assert mask.shape == (DEPTH, toy.BATCH, toy.SLOTS) and mask[:2].all()
    assert mask[2:].sum(-1).tolist() == [report["kept"].tolist() for report in aux[2:]]
    assert len({tuple(row) for row in mask[3:, 0].tolist()}) > 1  # every layer chooses anew


def test_scanned_equals_unrolled(case):
    params, _, out, aux = case
    other, _, other_aux = forward(STACK.clone(scan=False))(params, toy.stream(TOTAL))
    close(out.hidden, other.hidden)
    jax.tree.map(np.testing.assert_array_equal, aux, other_aux)


def test_cached_decoding_equals_recomputation(case):
    params, _, out, _ = case
    run = jax.jit(lambda p, s, c: STACK.apply(p, s, c)[:2])
    _, states = run(params, toy.stream(PROMPT), Reserve(toy.ANSWER))
    caches = jax.tree.leaves(states, is_leaf=lambda x: isinstance(x, KV))
    text = toy.PROMPT + toy.ANSWER
    assert [cache.k.shape[-2] - text for cache in caches] == [12, 12, 9, 7]
    whole = toy.stream(TOTAL)
    for i in range(PROMPT, TOTAL):
        token = jax.tree.map(lambda x, i=i: x[:, i : i + 1], (whole.hidden, whole.tokens))
        got, states = run(params, Stream(*token), states)
        close(got.hidden[:, 0], out.hidden[:, i])


def test_the_future_changes_nothing(case):
    """Neither a token nor what any layer chooses."""
    params, run, out, aux = case
    stream = toy.stream(TOTAL)
    first = 2 + toy.SLOTS  # the text after the picture
    other, _, other_aux = run(params, stream.replace(hidden=stream.hidden.at[:, first:].add(1.0)))
    np.testing.assert_array_equal(other.hidden[:, :first], out.hidden[:, :first])
    jax.tree.map(np.testing.assert_array_equal, aux, other_aux)
    assert np.abs(other.hidden[:, -1] - out.hidden[:, -1]).max() > 0.1


def test_all_ratios_one_and_zero_routers_are_the_dense_decoder():
    stack = Stack(PMoD(max_ratio=1.0, min_ratio=1.0).apply(DENSE, slots=toy.SLOTS))
    params = parameters(stack)
    rows = params["params"]["layers"]
    rows["router"] = jax.tree.map(jnp.zeros_like, rows["router"])
    assert rows["router"]["out"]["kernel"].shape[0] == DEPTH
    got, _, _ = forward(stack)(params, toy.stream(TOTAL))
    dense = {"params": {"layers": {k: v for k, v in rows.items() if k != "router"}}}
    want, _, _ = forward(Stack(DENSE))(dense, toy.stream(TOTAL))
    valid = np.asarray(want.tokens.valid)
    close(got.hidden[valid], want.hidden[valid], 1e-6)


def test_text_alone_is_the_dense_decoder(case):
    params, run, _, _ = case
    text = toy.stream(TOTAL)
    index = jnp.array([[0, 1, *range(2 + toy.SLOTS, TOTAL)]] * toy.BATCH)
    text = Stream(take(text.hidden, index), take(text.tokens, index))
    got, _, _ = run(params, text)
    rows = {k: v for k, v in params["params"]["layers"].items() if k != "router"}
    want, _, _ = forward(Stack(DENSE))({"params": {"layers": rows}}, text)
    close(got.hidden, want.hidden, 1e-6)


@pytest.mark.parametrize("zero_init", [True, False])
def test_how_routers_start(zero_init):
    """At zero, or uniformly within one over the root of the width; their bias at zero."""
    stack = Stack(PMoD(zero_init=zero_init).apply(DENSE, slots=toy.SLOTS))
    router = stack.steps[-1].policies[0].module(toy.BLOCK)
    params = nn.unbox(jax.jit(router.init)(jax.random.key(0), jnp.ones((1, 2, 16))))["params"]
    kernel, bias = (np.asarray(params["out"][leaf]) for leaf in ("kernel", "bias"))
    assert kernel.shape == (16, 1) and bias.shape == (1,) and not bias.any()
    assert not kernel.any() if zero_init else 0.15 < np.abs(kernel).max() <= 0.25


def test_gradients_reach_the_routers():
    """All of them from all tokens; all but the last one from text, which has nobody after it."""
    plan = PMoD("deep_all_include_last").apply(layers(toy.BLOCK, 4), slots=toy.SLOTS)
    stack, stream = Stack(plan), toy.stream(TOTAL)
    params = parameters(stack)
    goal = jax.random.normal(jax.random.key(3), stream.hidden.shape)
    text = stream.tokens.modality[..., None] == 0

    @jax.jit
    def backward(params, seen):
        def loss(params):
            return jnp.where(seen, (stack.apply(params, stream)[0].hidden - goal) ** 2, 0).sum()

        return jax.grad(loss)(params)["params"]["layers"]["router"]["out"]

    for seen, last in ((jnp.ones_like(text), True), (text, False)):
        for leaf in jax.tree.leaves(backward(params, seen)):
            rows = np.abs(np.asarray(leaf)).reshape(leaf.shape[0], -1).max(-1)
            assert (rows > 0).tolist() == [True, last]


# ------------------------------------------------------------------ a model


@pytest.fixture(scope="module")
def model():
    """Two pictures, of which row 1 lacks one, up to 16 tokens each by a connector with budgets."""
    sizes = {"decoder.depth": 3, "tower.depth": 2, "num_images": 2}
    config = registry.config("p_mod_tiny", connector=MQT(num_queries=16, num_heads=2), **sizes)
    batch = {k: v for k, v in random_batch(config).items() if k in ("pixels", "ids", "text_mask")}
    batch["ids"][1] = [5, 3, 9, 8, 7, 30, 31, 32, 33, 0, 0, 3]  # one placeholder in the padding
    batch["text_mask"][1, 9:] = False
    module, params = config.build(), draw(shapes(config))
    prefill = jax.jit(
        lambda p, b, budget=None, mask=None: module.apply(
            {"params": p}, b, room=2, budget=budget if mask is None else mask, method="prefill"
        ),
        static_argnames="budget",
    )
    decode = jax.jit(lambda p, i, c: module.apply({"params": p}, i, c, method="decode"))
    return params, batch, prefill, decode, module


def answers(model, batch):
    """Logits after the prompt and after each of two more tokens."""
    params, _, prefill, decode, _ = model
    logits, cache = prefill(params, batch)
    found = [logits]
    for token in (40, 41):
        logits, cache = decode(params, jnp.full((len(batch["ids"]), 1), token), cache)
        found.append(logits)
    return np.stack(found, 1)  # [B, 3, V]


def test_a_batch_of_prompts_equals_one_by_one(model):
    """Row 1 is shorter, and has one picture where row 0 has two."""
    _, batch, _, _, _ = model
    together = answers(model, batch)
    short = {"pixels": batch["pixels"][1:, :1]}
    short |= {k: batch[k][1:, :9] for k in ("ids", "text_mask")}
    close(together[1:], answers(model, short), 5e-5)


def test_masked_budgets_equal_static_ones(model):
    """Five tokens of each picture: the share is one of those that count, not of the slots."""
    params, batch, prefill, _, _ = model
    static, _ = prefill(params, batch, budget=5)
    masked, _ = prefill(params, batch, mask=jnp.int32(5))
    close(masked, static, 5e-5)


def test_names_in_the_released_checkpoints():
    """Of six layers, four choose. The test of all systems has the full sizes."""
    config = registry.config("p_mod_tiny")
    keys = registry.entry("p_mod").table(config).shapes(nn.unbox(shapes(config)))
    layer = "model.layers.{}{}.self_attn.q_proj.weight"
    assert layer.format(1, "") in keys and layer.format(2, ".decoder_layer") in keys
    assert layer.format(2, "") not in keys and "model.layers.1.router.router.bias" not in keys
    assert keys["model.layers.2.router.router.weight"] == (1, 24)
    assert keys["model.layers.5.router.router.bias"] == (1,)
    assert keys["model.mm_projector.2.weight"] == (24, 24)
    tiled = dataclasses.replace(config, newline=True)
    newline = registry.entry("p_mod").table(tiled).shapes(nn.unbox(shapes(tiled)))
    assert newline.keys() - keys.keys() == {"model.image_newline"}


# ------------------------------------------------------------------ cost


@pytest.mark.parametrize(
    ("name", "vision", "published", "ours"),
    [("p_mod_llava_1_5_7b", 576, 8.38, 4.92), ("p_mod_llava_next_7b", 2928, 39.46, 21.91)],
)
def test_published_cost(name, vision, published, ours):
    """Of products with weights. The paper's table has 8.38 and 4.92, 39.46 and 21.94 TFLOPs."""
    text, d, m, vocabulary = 58, 4096, 11_008, 32_000
    found = zoo.cost(name, text_tokens=text)
    assert found.vision_tokens == vision
    kept = PUBLISHED[f"kept_of_{vision}"]
    layer = 8 * d * d + 6 * d * m
    head = 2 * (text + vision) * d * vocabulary
    dense = 32 * (text + vision) * layer + head
    routers = len(PUBLISHED["mod_layers"]) * 2 * (text + vision) * d
    by_hand = sum((text + n) * layer for n in kept) + head + routers
    assert found.flops["prefill"].weights == by_hand
    assert round(dense / 1e12, 2) == published and round(by_hand / 1e12, 2) == ours
    # Keys and values in bfloat16.
    assert found.kv_bytes["per_layer"] == [4 * d * (text + n) for n in kept]
    share = (found.kv_bytes["total"] - 32 * 4 * d * text) / (32 * 4 * d * vision)
    assert share == pytest.approx(0.5375, abs=1e-3)
