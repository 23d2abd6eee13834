"""γ-MoD: figures of the paper, and what must hold beside the goldens of single layers."""

import dataclasses
import json
from pathlib import Path
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

import zoo
from tests.models import toy
from tests.models.draw import draw
from zoo.models.core import registry
from zoo.models.core.errors import ZooError
from zoo.models.core.tree import flatten_dict
from zoo.models.core.types import IGNORE, KV, Reserve, Stream, Tokens
from zoo.models.decoders.gamma_mod import MODES, GammaMoD, SkipTokens, router_rows
from zoo.models.parts.layers.plan import Step
from zoo.models.parts.layers.stack import Stack

GOLDENS = Path(__file__).parents[1] / "goldens" / "gamma_mod"
PROMPT = toy.SLOTS + toy.PROMPT
TOTAL = PROMPT + toy.ANSWER
DEPTH = 6  # one plain layer, then enough to be scanned

TRAIN = GammaMoD(layers=tuple(range(1, DEPTH)), text_prefix=2, threshold=0.3)
INFER = dataclasses.replace(TRAIN, without_cache="infer")
BOUNDED = dataclasses.replace(INFER, capacity=0.5)
RULES = {"train": TRAIN, "infer": INFER, "bounded": BOUNDED}


def stack_of(config, depth=DEPTH):
    return Stack(config.apply((Step(toy.BLOCK),) * depth, slots=toy.SLOTS))


def drawn(stack, seed=0):
    """Parameters with a router that is rarely sure."""
    shapes = jax.eval_shape(stack.init, jax.random.key(0), toy.stream(TOTAL))
    params = draw(shapes, seed)
    params["params"]["layers"]["gamma_mod"]["router"]["kernel"] *= 0.5
    return params


def unpadded(row, length, total=TOTAL):
    """One row of the toy batch without its padding: the first `length` places of the batch."""
    whole = jax.tree.map(lambda leaf: leaf[row : row + 1], toy.stream(total))
    kept = np.flatnonzero(np.asarray(whole.tokens.valid[0]) & (np.arange(total) < length))
    hidden, tokens = jax.tree.map(lambda leaf: leaf[:, kept], (whole.hidden, whole.tokens))
    return Stream(hidden, tokens, int(tokens.modality.sum())), kept


def close(got, want, bound=2e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=bound * float(np.abs(want).max()))


PARAMS = drawn(stack_of(TRAIN))


@pytest.fixture(scope="module", params=list(RULES))
def case(request):
    config = RULES[request.param]
    stack = stack_of(config)
    run = jax.jit(lambda p, s: stack.apply(p, s)[::2])
    return request.param, config, run, *run(PARAMS, toy.stream(TOTAL))


def test_official_names_of_layers():
    for depth, want in (
        (n, json.loads((GOLDENS / "layer_modes.json").read_text())) for n in (32, 40)
    ):
        got = {name: list(GammaMoD(layers=name).chosen(depth)) for name in MODES}
        assert got == want[f"layers_{depth}"]


def published_flops(width, mlp_dim, depth, tokens, skipped):
    """As the published tables count: decoder layers alone, four of them whole, and attention of
    every token to every token.
    """

    def layer(n):
        return 8 * n * width**2 + 4 * n**2 * width + 6 * n * width * mlp_dim

    return 4 * layer(tokens) + (depth - 4) * layer(int(tokens * (1 - skipped)))


def test_published_flops():
    facts = json.loads((GOLDENS / "tflops.json").read_text())
    sizes = {32: (4096, 11_008), 40: (5120, 13_824)}
    for model, row in facts["table"].items():
        got = [
            published_flops(*sizes[row["layers"]], row["layers"], row["seq"], skip) / 1e12
            for skip in row["skip"]
        ]
        np.testing.assert_allclose(got, row["tflops"], atol=6e-4)
        printed = facts["published"][model]
        if model == "LLaVA-HR-13B":
            printed = [*printed[:2], 18.3]  # 18.346, which the paper prints as 18.4
        assert [round(n, 1) for n in got] == printed


@pytest.mark.parametrize(
    ("name", "tokens", "images"),
    [("gamma_mod_llava_7b", 800, 576), ("gamma_mod_llava_hr_7b", 1400, 1024)],
)
def test_cost_of_the_bounded_variants(name, tokens, images):
    """The prefix is the image and 35 more; the tables count neither head nor router."""
    found = zoo.cost(name, text_tokens=tokens - images)
    skipped = (images + 35) // 2
    head, routers = 2 * tokens * 4096 * 32_000, 28 * 2 * tokens * 4096 * 2
    want = published_flops(4096, 11_008, 32, tokens, skipped / tokens)
    assert found.flops["prefill"].total - head - routers == want
    assert found.params["decoder"] == 6_738_415_616 + 2 * 4096
    whole, part = tokens * 16_384, (tokens - skipped) * 16_384
    assert found.kv_bytes["per_layer"] == [whole] * 3 + [part] * 28 + [whole]


def test_scanned_equals_unrolled(case):
    name, config, _, out, aux = case
    if name == "infer":
        return  # the other two cover it
    loop = dataclasses.replace(stack_of(config), scan=False)
    other, _, other_aux = jax.jit(loop.apply)(PARAMS, toy.stream(TOTAL))
    close(other.hidden, out.hidden)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), aux, other_aux)


def test_how_many_run(case):
    """Row 0 has a prefix of 2 + 12 tokens, row 1 one of 2 + 8; 8 and 6 follow."""
    name, _, _, _, aux = case
    kept = np.array([report["kept"] for report in aux[1:]])
    assert "kept" not in aux[0]
    if name == "train":
        np.testing.assert_array_equal(kept, [[7 + 8, 5 + 6]] * (DEPTH - 1))
        assert all(report["router_loss"] > 0 for report in aux[1:])
    else:
        assert not any("router_loss" in report for report in aux)
        assert (kept < [22, 16]).any(0).all() and (kept > 0).all()
    if name == "infer":
        assert (kept > [7 + 8, 5 + 6]).any(0).all()
    if name == "bounded":
        assert (kept <= [7 + 8, 5 + 6]).all()


def test_what_does_not_run_stays_as_it_is(case):
    """Of one layer: bit for bit, and everything that runs changes."""
    _, config, _, _, _ = case
    stack = stack_of(dataclasses.replace(config, layers=(0,)), 1)
    params = drawn(stack, seed=3)
    stream = toy.stream(TOTAL)
    out, _, [aux] = jax.jit(stack.apply)(params, stream)
    same = (np.asarray(out.hidden) == np.asarray(stream.hidden)).all(-1)
    changed = (~same & np.asarray(stream.tokens.valid)).sum(-1)
    np.testing.assert_array_equal(changed, aux["kept"])
    assert same.sum() > 4


def test_rows_of_different_lengths(case):
    """A row of a batch with padding and surplus slots gives what it gives alone without them."""
    _, _, run, out, _ = case
    alone, kept = unpadded(1, TOTAL)
    got, _ = run(PARAMS, alone)
    close(got.hidden[0], np.asarray(out.hidden)[1, kept])


def test_later_tokens_change_no_earlier_ones(case):
    _, _, run, out, _ = case
    other = toy.stream(TOTAL)
    other = other.replace(hidden=other.hidden.at[:, -1].add(1.0))
    got, _ = run(PARAMS, other)
    np.testing.assert_array_equal(got.hidden[:, :-1], out.hidden[:, :-1])
    assert not np.array_equal(got.hidden[:, -1], out.hidden[:, -1])


def test_without_skipping_and_at_full_weight_it_is_the_plain_layer():
    """Feature 0 of every token is 1 and stays so, and from it the router says p = 1."""
    params = jax.tree.map(np.copy, PARAMS)
    layers = params["params"]["layers"]
    layers["out"]["kernel"][..., 0] = layers["down"]["kernel"][..., 0] = 0
    layers["attn_norm"]["scale"][:] = 1
    router = layers["gamma_mod"]["router"]["kernel"]
    assert router.shape == (1, toy.WIDTH, 2)
    router[:] = 0
    router[:, 0, 1] = 1e4
    plain = {k: v for k, v in layers.items() if k != "gamma_mod"}
    stream = toy.stream(TOTAL)
    stream = stream.replace(hidden=stream.hidden.at[..., 0].set(1.0))
    want = jax.jit(Stack((Step(toy.BLOCK),) * DEPTH).apply)({"params": {"layers": plain}}, stream)
    valid = np.asarray(stream.tokens.valid)
    for config in (dataclasses.replace(TRAIN, ratio=0.0), INFER):
        got, _, aux = jax.jit(stack_of(config).apply)(params, stream)
        np.testing.assert_array_equal(aux[-1]["kept"], valid.sum(-1))
        close(np.asarray(got.hidden)[valid], np.asarray(want[0].hidden)[valid], 1e-6)


@struct.dataclass
class OwnRouters(SkipTokens):
    """The same with a router for each layer."""

    shared: ClassVar[bool] = False


def test_the_shared_router_has_the_gradient_of_all_layers():
    shared = stack_of(TRAIN)
    plain = Step(toy.BLOCK)
    own = Stack((plain, *[Step(toy.BLOCK, (OwnRouters(TRAIN),))] * (DEPTH - 1)))
    target = jax.random.normal(jax.random.key(3), (toy.BATCH, TOTAL, toy.WIDTH))

    def gradient(stack, params):
        def loss(params):
            out, _, aux = stack.apply(params, toy.stream(TOTAL))
            extra = sum(report.get("router_loss", 0.0) for report in aux)
            return ((out.hidden - target) ** 2).mean() + extra

        grads = jax.jit(jax.grad(loss))(params)
        return grads["params"]["layers"]["gamma_mod"]["router"]["kernel"]

    one = gradient(shared, PARAMS)
    copies = jax.tree.map(lambda leaf: leaf, PARAMS)
    kernel = PARAMS["params"]["layers"]["gamma_mod"]["router"]["kernel"]
    copies["params"]["layers"]["gamma_mod"] = {
        "router": {"kernel": np.repeat(kernel, DEPTH - 1, 0)}
    }
    each = gradient(own, copies)
    assert one.shape == kernel.shape and each.shape[0] == DEPTH - 1
    assert (np.abs(each).max((1, 2)) > 0).all()
    np.testing.assert_allclose(one[0], each.sum(0), rtol=1e-4, atol=1e-6)


def decoded(config, prompts, depth=DEPTH, rows=slice(None)):
    """Prompt, then token by token: hidden states [B, answer, D] and the tokens of every cache."""
    stack = stack_of(config, depth)
    params, call = drawn(stack), jax.jit(stack.apply)
    _, states, _ = call(params, prompts, Reserve(toy.ANSWER))
    whole, out = toy.stream(TOTAL), []
    for i in range(PROMPT, TOTAL):
        token = jax.tree.map(lambda x, i=i: x[rows, i : i + 1], (whole.hidden, whole.tokens))
        step, states, _ = call(params, Stream(*token), states)
        out.append(np.asarray(step.hidden))
    caches = jax.tree.leaves(states, is_leaf=lambda x: isinstance(x, KV))
    return np.concatenate(out, 1), [cache.tokens for cache in caches]


def test_generation():
    """Rows of different lengths together give what each gives alone; and where decoding has the
    threshold of the prompt, what recomputing gives.
    """
    config = dataclasses.replace(BOUNDED, decode_threshold=BOUNDED.threshold)
    together, _ = decoded(config, toy.stream(PROMPT))
    alone, _ = unpadded(1, PROMPT, PROMPT)
    single, _ = decoded(config, alone, rows=slice(1, 2))
    close(together[1:], single)
    again, _, _ = jax.jit(stack_of(config).apply)(PARAMS, toy.stream(TOTAL))
    close(together, np.asarray(again.hidden)[:, -toy.ANSWER :])


def test_a_token_below_the_threshold_skips_the_layer_and_its_cache():
    config = dataclasses.replace(INFER, layers=(0,), threshold=0.0, decode_threshold=1.0)
    out, [tokens] = decoded(config, toy.stream(PROMPT), 1)
    np.testing.assert_array_equal(out, toy.stream(TOTAL).hidden[:, PROMPT:])
    prompt = toy.stream(PROMPT).tokens.valid.sum(-1)
    np.testing.assert_array_equal(tokens.valid.sum(-1), prompt)


def products(program):
    """How many products a program computes whichever of its branches are taken."""
    found = 0
    for equation in program.eqns:
        if equation.primitive.name != "cond":
            found += equation.primitive.name == "dot_general"
            inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
            found += sum(products(each) for each in inner if hasattr(each, "eqns"))
    return found


@pytest.mark.parametrize("style", ["llava_hr", "mini_gemini"])
def test_decoding_reads_no_weights_where_no_token_runs(style):
    """Beside the router's product all are in a branch; a version that never skips has none."""
    stack = stack_of(dataclasses.replace(INFER, layers=(0,), style=style), 1)
    params, prompt = drawn(stack), toy.stream(PROMPT)
    _, states, _ = jax.eval_shape(stack.apply, params, prompt, Reserve(1))
    token = jax.tree.map(lambda x: x[:, :1], (prompt.hidden, prompt.tokens))
    program = jax.make_jaxpr(stack.apply)(params, Stream(*token), states)
    outside = products(program.jaxpr)
    assert outside == 1 if style == "llava_hr" else outside > 7


def test_mini_gemini_decodes_every_token_at_its_place_in_the_whole():
    config = dataclasses.replace(
        INFER, layers=(0,), style="mini_gemini", threshold=0.5, decode_threshold=1.0
    )
    out, [tokens] = decoded(config, toy.stream(PROMPT), 1)
    assert (out != np.asarray(toy.stream(TOTAL).hidden[:, PROMPT:])).any(-1).all()
    assert tokens.valid[:, PROMPT:].all() and not tokens.valid[0, :PROMPT].all()
    want = toy.stream(TOTAL).tokens.position[:, PROMPT:]
    np.testing.assert_array_equal(tokens.position[:, PROMPT:], want)


def test_a_prompt_without_picture_beside_one_with():
    config = registry.config("gamma_mod_tiny")
    model = config.build()
    params = draw(jax.eval_shape(model.init, jax.random.key(0), config.inputs(1))["params"])
    ids = np.random.default_rng(0).integers(4, 320, (2, 12)).astype(np.int32)
    ids[0, 1] = ids[1, -1] = config.image_id
    mask = np.ones((2, 12), bool)
    mask[1, -1] = False
    pixels = jax.random.normal(jax.random.key(1), (2, 1, 16, 16, 3))
    prefill = jax.jit(
        lambda batch: model.apply({"params": params}, batch, room=1, method="prefill")[0]
    )
    whole = jax.jit(lambda batch: model.apply({"params": params}, batch).hidden)
    both = {"ids": ids, "text_mask": mask, "pixels": pixels}
    alone = {"ids": ids[1:, :-1], "text_mask": mask[1:, :-1]}
    close(prefill(both)[1:], prefill(alone))
    close(whole(both)[1:, :11], whole(alone))


def test_questions_side_by_side():
    """Each of two questions about one picture gets in training what it gets alone."""
    stream, tail = toy.stream(TOTAL), TOTAL - 4
    segment = jnp.asarray([[0] * (TOTAL - 8) + [1] * 4 + [2] * 4] * toy.BATCH)
    tokens = Tokens.sequence(stream.tokens.valid, segment=segment)
    tokens = tokens.replace(modality=stream.tokens.modality)
    run = jax.jit(stack_of(TRAIN).apply)
    both, _, _ = run(PARAMS, stream.replace(tokens=tokens))
    kept = np.r_[: TOTAL - 8, tail:TOTAL]
    hidden, tokens = jax.tree.map(lambda leaf: leaf[:, kept], (stream.hidden, stream.tokens))
    alone = Tokens.sequence(tokens.valid).replace(modality=tokens.modality)
    last, _, _ = run(PARAMS, Stream(hidden, alone, toy.SLOTS))
    real = np.asarray(tokens.valid)[:, -4:]
    assert real.sum() == 7
    close(np.asarray(both.hidden)[:, -4:][real], np.asarray(last.hidden)[:, -4:][real])


def test_text_alone_in_training():
    """LLaVA-HR's version runs it whole; Mini-Gemini's by half, the question first."""
    rng = np.random.default_rng(0)
    probability = jnp.asarray(rng.uniform(size=(2, 11)), jnp.float32)
    valid = np.ones((2, 11), bool)
    valid[1, 8:] = False
    answers = np.zeros((2, 11), bool)
    answers[0, 8:] = answers[1, 2:8] = True
    label = np.full((2, 11), IGNORE)  # of the token after each
    label[:, :-1][answers[:, 1:]] = 7
    tokens = Tokens.sequence(jnp.asarray(valid), label=jnp.asarray(label))
    stream = Stream(jnp.zeros((2, 11, 4)), tokens)
    index, runs = SkipTokens(TRAIN).choose(probability, stream, None)
    assert index is None and runs.all()
    policy = SkipTokens(dataclasses.replace(TRAIN, style="mini_gemini"))
    index, runs = policy.choose(probability, stream, None)
    assert index is None
    for row, count in ((0, 6), (1, 4)):
        score = np.where(valid[row], np.asarray(probability[row]) + ~answers[row], -1)
        assert set(np.flatnonzero(runs[row])) == set(np.argsort(-score)[:count])


def test_a_dense_model_becomes_one_with_a_new_router_and_nothing_else():
    config = registry.config("gamma_mod_tiny")
    dense = dataclasses.replace(config, policies=())
    trees = []
    for each in (config, dense):
        init = each.build().init
        boxed = jax.eval_shape(init, jax.random.key(0), each.inputs(1))["params"]
        trees.append({path: leaf.shape for path, leaf in flatten_dict(nn.unbox(boxed)).items()})
    path = ("decoder", "stack", "layers", "gamma_mod", "router", "kernel")
    assert trees[0] == {**trees[1], path: (1, config.decoder.width, 2)}


def test_the_router_starts_like_a_linear_map_of_pytorch():
    width = 64
    block = dataclasses.replace(toy.BLOCK, width=width)
    router = SkipTokens(TRAIN).module(block)
    kernel = nn.unbox(router.init(jax.random.key(0), jnp.zeros((1, 2, width))))["params"]["router"]
    bound = np.abs(np.asarray(kernel["kernel"])).max() * width**0.5
    assert 0.9 < bound <= 1.0 and set(kernel) == {"kernel"}


def test_checkpoints_repeat_the_router():
    table, kernel = router_rows((3, 4, 7)), np.random.default_rng(0).normal(size=(1, 6, 2))
    kernel = kernel.astype(np.float32)
    ours = {"stack": {"layers": {"gamma_mod": {"router": {"kernel": kernel}}}}}
    state = table.save(ours)
    assert sorted(state) == [f"model.layers.{i}.router.weight" for i in (3, 4, 7)]
    for array in state.values():
        np.testing.assert_array_equal(array, kernel[0].T)
    jax.tree.map(np.testing.assert_array_equal, table.load(state, ours), ours)
    state["model.layers.4.router.weight"] = state["model.layers.4.router.weight"] + 1
    with pytest.raises(ZooError, match="1 of 3 tensors differ"):
        table.load(state, ours)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": "half"}, "layers = 'half': want one of arank_mod, "),
        ({"ratio": 1.5}, "ratio = 1.5: want 0 to 1"),
        ({"capacity": -0.1}, "capacity = -0.1: want 0 to 1"),
        ({"style": "llava"}, "style = 'llava': want one of"),
        ({"without_cache": "test"}, "without_cache = 'test': want one of"),
        ({"text_prefix": -1}, "text_prefix = -1: want 0 or more"),
    ],
)
def test_wrong_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        GammaMoD(**fields)


def test_layers_and_decoders_that_it_cannot_have():
    plan = (Step(toy.BLOCK),) * 3
    with pytest.raises(ValueError, match=r"no layers \[5\]"):
        GammaMoD(layers=(1, 5)).apply(plan, slots=4)
    with pytest.raises(ValueError, match="names no layer of 3"):
        GammaMoD().apply(plan, slots=4)
    post = (Step(dataclasses.replace(toy.BLOCK, norm_place="post")),) * 3
    with pytest.raises(ValueError, match="norms before its layers"):
        GammaMoD(layers=(1,)).apply(post, slots=4)
