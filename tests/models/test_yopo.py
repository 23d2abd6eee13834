"""YOPO: what must hold beside the goldens of the official layers."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

import zoo
from tests.models import toy
from tests.models.draw import draw
from zoo.models.core import registry
from zoo.models.core.types import Reserve, Stream
from zoo.models.parts.decoders.gqa import DecoderConfig
from zoo.models.parts.layers.plan import Step
from zoo.models.parts.layers.stack import Stack
from zoo.models.reduction.yopo import Calibrate, Yopo, active_heads, head_mask, linear_share

DEPTH, PROMPT = 3, toy.SLOTS + toy.PROMPT
TOTAL = PROMPT + toy.ANSWER
HEADS = head_mask([[1, 1, 1, 1], [1, 0, 0, 1], [0, 1, 1, 1]])
ALIKE = head_mask([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]])
CUT = Yopo(window=3, heads=HEADS, mlp_ratio=2, layers=2, grid=(3, 4))
POLICIES = {
    "cut": CUT,
    "keys are shared": dataclasses.replace(CUT, heads=ALIKE),
    "dropped": dataclasses.replace(CUT, drop=True),
}


def stack_of(policy, block=toy.BLOCK):
    plan = (Step(block),) * DEPTH
    return Stack(plan if policy is None else policy.apply(plan, slots=toy.SLOTS))


PARAMS = draw(jax.eval_shape(stack_of(None).init, jax.random.key(0), toy.stream(TOTAL)))


def run(policy, stream, params=PARAMS, block=toy.BLOCK):
    return jax.jit(stack_of(policy, block).apply)(params, stream)


def text_of(stream):
    """The hidden states of the text, row by row."""
    text = np.asarray(stream.tokens.valid & (stream.tokens.modality == 0))
    return np.concatenate([np.asarray(stream.hidden[i])[text[i]] for i in range(len(text))])


def close(got, want, tolerance=2e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("heads", [None, head_mask(np.ones((DEPTH, 4)))])
def test_nothing_cut_is_the_plain_decoder(heads):
    policy = Yopo(heads=heads, layers=DEPTH)
    got, want = (run(each, toy.stream(TOTAL))[0] for each in (policy, None))
    close(got.hidden, want.hidden, 1e-6)


@pytest.mark.parametrize("name", POLICIES)
def test_decoding_equals_reading_all(name):
    whole, stack = toy.stream(TOTAL), stack_of(POLICIES[name])
    step = jax.jit(lambda stream, state: stack.apply(PARAMS, stream, state)[:2])
    _, state = step(toy.stream(PROMPT), Reserve(toy.ANSWER))
    want = run(POLICIES[name], whole)[0].hidden
    for place in range(PROMPT, TOTAL):
        part = jax.tree.map(lambda x, at=place: x[:, at : at + 1], (whole.hidden, whole.tokens))
        out, state = step(Stream(*part), state)
        close(out.hidden[:, 0], want[:, place - TOTAL])


def test_heads_that_share_keys_are_as_heads_with_keys_of_their_own():
    block = toy.BLOCK.clone(num_kv_heads=4)
    layers = dict(PARAMS["params"]["layers"])
    for name in ("k", "v"):
        layers[name] = {"kernel": np.repeat(layers[name]["kernel"], 2, axis=2)}
    want = run(CUT, toy.stream(TOTAL), {"params": {"layers": layers}}, block)[0]
    close(run(CUT, toy.stream(TOTAL))[0].hidden, want.hidden)


def changed(stream, slot):
    return stream.replace(hidden=stream.hidden.at[:, 2 + slot].add(1.0))


def test_who_sees_a_vision_token():
    """In one layer: itself, its neighbours on the 3 x 4 grid, before and behind it, and the text
    that comes later; in a layer behind the last one that is read, no value of it reaches the text.
    """
    policy = dataclasses.replace(CUT, heads=None, mlp_ratio=1)
    stack = Stack(policy.apply((Step(toy.BLOCK),) * DEPTH, slots=toy.SLOTS))
    first = jax.jit(lambda s: stack.apply(PARAMS, s, stop=1)[0].hidden)
    stream = toy.stream(TOTAL)
    moved = np.abs(first(changed(stream, 5)) - first(stream)).max(-1) > 1e-6
    assert np.flatnonzero(moved[0, :2]).size == 0
    assert np.flatnonzero(moved[0, 2:14]).tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert moved[0, 14:].all()

    last = jax.jit(lambda p, s: stack.apply(p, s, start=2)[0])
    layers = dict(PARAMS["params"]["layers"])
    layers["k"] = {"kernel": np.zeros_like(layers["k"]["kernel"])}
    blind = {"params": {"layers": layers}}  # all keys weigh the same, so values alone matter
    close(text_of(last(blind, changed(stream, 5))), text_of(last(blind, stream)), 1e-6)
    plain = jax.jit(lambda s: stack_of(None).apply(blind, s, start=2)[0])
    assert np.abs(text_of(plain(changed(stream, 5))) - text_of(plain(stream))).max() > 1e-3


def test_vision_leaves_the_sequence():
    out, _, aux = run(POLICIES["dropped"], toy.stream(TOTAL))
    stays = run(CUT, toy.stream(TOTAL))[0]
    assert out.slots == 0 and out.whole == toy.SLOTS
    assert out.hidden.shape[1] == TOTAL - toy.SLOTS
    assert (np.asarray(aux[2]["left_cells"]) == -1).all()
    assert np.abs(text_of(out) - text_of(stays)).max() > 1e-4  # the denominators


def test_a_budget_is_a_number_of_layers():
    """Two of three layers run 8 of 12 tokens on the mean; all tokens are the plain decoder."""
    plan = (Step(toy.BLOCK),) * DEPTH
    want = Yopo(mlp_ratio=2, layers=2, drop=True).apply(plan, slots=12)
    for keep in (8, 0.6):
        assert Yopo(mlp_ratio=2, keep=keep).apply(plan, slots=12) == want
    for keep in (12, 1.0):
        assert Yopo(mlp_ratio=2, keep=keep).apply(plan, slots=12) == plan


def test_calibration():
    """With equal attention to all that is seen, what is paid to vision is known."""
    layers = dict(PARAMS["params"]["layers"])
    layers["q"] = {"kernel": np.zeros_like(layers["q"]["kernel"])}
    params, stream = {"params": {"layers": layers}}, toy.stream(TOTAL)
    out, _, aux = run(Calibrate(), stream, params)
    close(out.hidden, run(None, stream, params)[0].hidden, 1e-6)
    for row in range(toy.BATCH):
        valid = np.asarray(stream.tokens.valid[row])
        seen = np.tril(np.ones((TOTAL, TOTAL))) * valid * valid[:, None]
        paid = (seen / np.maximum(seen.sum(1, keepdims=True), 1)).sum(0)
        image = np.asarray(stream.tokens.modality[row]) == 1
        want = paid[image].sum() / paid[~image].sum()
        np.testing.assert_allclose(aux[1]["vision_ratio"][row], [want] * 4, rtol=1e-5)


def test_votes_for_heads():
    ratios = np.zeros((100, 4, 3))
    ratios[:40, 2:, 0], ratios[:41, 2:, 1] = 1, 1
    got = active_heads(ratios, 0.077)
    assert got.tolist() == [[True] * 3] * 2 + [[False, True, False]] * 2
    with pytest.raises(ValueError, match="want"):
        active_heads(ratios[0], 0.1)


def test_released_fields_and_published_cost():
    fields = {"attncut_w": 5, "layercut_num": 20, "mlpcut_ratio": 2, "headcut_num": 30}
    mask = np.arange(40 * 40).reshape(40, 40) % 40 < 30
    policy = Yopo.read(fields, mask)
    made = registry.config("yopo_llava_1_5_13b")
    assert dataclasses.replace(policy, heads=None) == made.policies[0]
    assert round(linear_share(policy, made.decoder), 2) == 0.29
    assert linear_share(Yopo(), made.decoder) == 1
    with pytest.raises(ValueError, match="released mask"):
        Yopo.read(fields)
    with pytest.raises(ValueError, match="no layercut_num"):
        Yopo.read({"attncut_w": 5, "mlpcut_ratio": 2})


def test_parameters():
    made = registry.config("yopo_llava_1_5_13b")
    shapes = jax.eval_shape(made.build().init, jax.random.key(0), made.inputs(1))["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(shapes)))
    assert count == 13_015_864_320 + 303_507_456 + 31_467_520  # Vicuna, CLIP, projector


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 0}, "window = 0: want"),
        ({"mlp_ratio": 0.5}, "mlp_ratio = 0.5: want"),
        ({"layers": 0}, "layers = 0: want"),
        ({"drop": True}, "drop: want"),
        ({"grid": (0, 4)}, "want rows and columns"),
        ({"keep": 0.5, "layers": 2}, "want either this or"),
        ({"keep": (0.5, 0.2)}, "one stage"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Yopo(**fields)


def test_what_does_not_fit_the_decoder():
    bad = {
        "make no square": Yopo(window=3),
        "layers = 9: the decoder has 3": Yopo(layers=9),
        "there are 12 tokens": Yopo(keep=13),
        "heads of 2 layers": Yopo(heads=HEADS[:2]),
        "heads of layer 0: 3": Yopo(heads=head_mask(np.ones((3, 3)))),
    }
    for message, policy in bad.items():
        with pytest.raises(ValueError, match=message):
            stack_of(policy)
    with pytest.raises(ValueError, match="norms come first"):
        stack_of(CUT, toy.BLOCK.clone(norm_place="post"))
    zoo.create("llava_tiny", policies=(Yopo(window=3, layers=1),))
    assert DecoderConfig(depth=2).plan() == Yopo(window=3).apply(
        DecoderConfig(depth=2).plan(), slots=0
    )
