"""ATP-LLaVA against its equations in plain numpy, and what must hold at their limits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.draw import draw
from zoo.models.core.types import IGNORE, Output, Stream, Tokens
from zoo.models.parts.decoders.gqa import Decoder, DecoderConfig
from zoo.models.reduction.atp_llava import ATP, Thresholds, spatial, target_distance
from zoo.train.objectives.lm import reported

SIZES = DecoderConfig(
    vocab_size=32, width=24, depth=3, num_heads=4, num_kv_heads=2, mlp_dim=32, context=64
)
BEFORE, SLOTS, AFTER = 2, 16, 6
LENGTH = BEFORE + SLOTS + AFTER
POLICY = ATP(layers=(1, 2), dim=4)
STEEP = dataclasses.replace(POLICY, temperature=1e7, target=1.0)
THRESHOLDS = (0.35, 0.2)  # near which drawn modules predict


def stream(label=False):
    """Two rows of a picture between words, the last two of them an answer, which does not guide;
    the second has 12 vision tokens and one word less.
    """
    rng, place = np.random.default_rng(0), np.arange(LENGTH)
    image = (place >= BEFORE) & (place < BEFORE + SLOTS)
    valid = np.ones((2, LENGTH), bool)
    valid[1, BEFORE + 12 : BEFORE + SLOTS], valid[1, -1] = False, False
    cell = np.where(image, place - BEFORE, -1) * np.ones((2, 1), int)
    answer = place >= LENGTH - np.array([[2], [3]])
    tags = {"cell": jnp.asarray(np.where(valid, cell, -1)), "guide": jnp.asarray(~answer)}
    if label:
        del tags["guide"]
        tags["label"] = jnp.full((2, LENGTH), IGNORE).at[0, -3:-1].set(5).at[1, -4:-2].set(7)
    tokens = Tokens.sequence(jnp.asarray(valid), **tags)
    tokens = tokens.replace(modality=jnp.broadcast_to(image, valid.shape).astype(jnp.int32))
    hidden = jnp.asarray(rng.normal(size=(2, LENGTH, SIZES.width)), jnp.float32)
    return Stream(hidden, tokens, SLOTS)


@functools.cache
def decoder(policy):
    plan = SIZES.plan()
    return Decoder(SIZES, plan if policy is None else policy.apply(plan, slots=SLOTS))


@functools.cache
def params():
    """Weights whose thresholds are near `THRESHOLDS` and differ by row and layer."""
    made = decoder(POLICY)
    shapes = jax.eval_shape(lambda k: made.init(k, stream(), method="run"), jax.random.key(0))
    found = draw(shapes["params"])
    own = found["stack"]["layers"]["atp"]
    own["start"] = np.tile(np.log(np.divide(THRESHOLDS, np.subtract(1, THRESHOLDS))), (2, 1))
    own["heads"]["kernel"] *= 0.3
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), found)


def starting(value):
    """The weights with thresholds that are the same for all."""
    found = jax.tree.map(lambda x: x, params())
    own = found["stack"]["layers"]["atp"]
    own["start"] = jnp.full((2, 2), value, jnp.float32)
    own["heads"] = {"kernel": jnp.zeros((2, 4, 2))}
    return found


def plain(weights):
    """Those of the model without the policy."""
    rows = {name: x for name, x in weights["stack"]["layers"].items() if name != "atp"}
    return {**weights, "stack": {"layers": rows}}


@functools.cache
def runner(policy):
    return jax.jit(lambda p, s: decoder(policy).apply({"params": p}, s, method="run")[::2])


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max(), rtol=0)


# ------------------------------------------------------------------ the equations


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rms(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + SIZES.norm_eps) * scale


def rotated(x):
    """[L, H, E] at positions 0, 1, ..."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * 10_000.0 ** -(np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def reference(weights, x, image, asks, *, soft, policy=POLICY):
    """One row without padding: its hidden states, and what each of the layers keeps.

    Args:
      weights: of the decoder.
      x: [L, D].
      image: bool [L].
      asks: bool [L], the words of the instruction.
      soft: whether masks fade, as in training, or are 0 and 1.
    """
    rows = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), weights["stack"]["layers"])
    number, mask, kept, modules = int(image.sum()), np.ones(len(x)), [], 0
    seen = np.tril(np.ones((len(x), len(x)), bool))
    for layer in range(1, SIZES.depth + 1):
        w = jax.tree.map(lambda leaf, at=layer - 1: leaf[at], {**rows, "atp": {}})
        y = rms(x, w["attn_norm"]["scale"])
        q, k, v = (np.einsum("ld,dhe->lhe", y, w[name]["kernel"]) for name in "qkv")
        q, k = rotated(q), rotated(k)
        k, v = (np.repeat(each, 2, 1) for each in (k, v))  # keys that two heads share
        logits = np.einsum("ihe,jhe->hij", q, k) / np.sqrt(q.shape[-1])
        a = np.exp(np.where(seen, logits, -1e9) - logits.max()) * seen * mask
        a /= a.sum(-1, keepdims=True)
        x = x + np.einsum("lhe,hed->ld", np.einsum("hij,jhe->ihe", a, v), w["out"]["kernel"])
        y = rms(x, w["mlp_norm"]["scale"])
        gate = y @ w["gate"]["kernel"]
        x = x + (gate * sigmoid(gate) * (y @ w["up"]["kernel"])) @ w["down"]["kernel"]
        if layer not in policy.layers:
            continue
        a = a.mean(0)
        own = number * (a * (image * mask)[:, None]).sum(0) / (image * mask).sum()
        cross = number * a[asks].mean(0)
        vector = np.zeros((2, SLOTS))
        vector[:, :number] = own[image], cross[image]
        m = jax.tree.map(lambda leaf, at=modules: leaf[at], rows["atp"])
        modules += 1
        z = vector.reshape(-1) @ m["mix"]["kernel"] + m["mix"]["bias"]
        red, space = sigmoid(z @ m["heads"]["kernel"] + m["start"])
        cell = np.cumsum(image) - 1
        on = (cell // 4 % 2 == 0) & (cell % 4 % 2 == 0)
        if soft:
            t = policy.temperature
            faded = sigmoid(t * ((own + cross) / 2 - red))
            faded = np.maximum(faded, on * sigmoid(t * (0.25 - space)))
        else:
            faded = ((own + cross) / 2 > red) | (on & (space < 0.25))
        mask = np.where(image, mask * faded, 1)
        kept.append(mask[image].sum())
    return rms(x, np.asarray(weights["final_norm"]["scale"], np.float64)), kept, mask > 0.5


@pytest.mark.parametrize("soft", [False, True])
def test_the_equations(soft):
    """Hidden states, kept tokens and losses of two rows; thresholds that cut some of both kinds."""
    given = stream(label=soft)
    out, aux = runner(POLICY)(params(), given)
    kept = []
    for row in range(2):
        there = np.asarray(given.tokens.valid[row])
        image = np.asarray(given.tokens.modality[row])[there] == 1
        asks = ~image
        asks[-2:] = False
        x = np.asarray(given.hidden[row], np.float64)[there]
        want, each, left = reference(params(), x, image, asks, soft=soft)
        got = np.asarray(out.hidden[row])[there]
        close(got[~image], want[~image])
        if not soft:
            assert np.asarray(out.tokens.valid[row])[there].tolist() == left.tolist()
            assert 0 < each[1] < each[0] < image.sum()
        kept.append(each)
    close(np.stack([aux[0]["kept"], aux[1]["kept"]], 1), np.array(kept))
    losses = reported(Output(out.hidden, out.tokens, aux))
    if not soft:
        assert not losses
        return
    share = (np.array(kept) / [[16], [12]]).mean(0)
    close(losses["prune_loss"].value, 0.05 * (share[0] * 1 + share[1] * 2))
    distance = abs(np.mean(kept, 1).mean() - (16 // 4 + 12 // 4) / 2)
    close(losses["target_loss"].value, 0.2 * distance)


def test_places_that_speak():
    """144 of 576 at a quarter, the rest at none; a denser grid under a sparser one."""
    place = np.asarray(spatial(jnp.arange(576), (24, 24), (2,), 3.0)).reshape(24, 24)
    assert (place[::2, ::2] == 0.25).all() and np.isfinite(place).sum() == 144
    both = np.asarray(spatial(jnp.arange(576), (24, 24), (2, 4), 3.0)).reshape(24, 24)
    assert (both[::4, ::4] == 1 - 3 / 16).all() and (both == 0.25).sum() == 108
    tiles = np.asarray(spatial(jnp.arange(1152), (24, 24), (2,), 3.0)).reshape(2, -1)
    assert (tiles == place.reshape(-1)).all()
    assert np.isfinite(spatial(jnp.arange(30), None, (2,), 3.0)).sum() == 8


# ------------------------------------------------------------------ limits


def test_low_thresholds_are_the_plain_model():
    """In training too, where masks are steep; then nothing is off the target of all tokens."""
    given = stream()
    valid = np.asarray(given.tokens.valid)
    want, _ = runner(None)(plain(params()), given)
    for policy, label in ((POLICY, False), (STEEP, True)):
        out, aux = runner(policy)(starting(-30.0), stream(label))
        close(np.asarray(out.hidden)[valid], np.asarray(want.hidden)[valid], 1e-6)
        np.testing.assert_allclose(aux[1]["kept"], [16, 12], rtol=1e-5)
    assert aux[1]["target_loss"] < 1e-4


def test_steep_masks_are_hard_ones():
    soft, faded = runner(STEEP)(params(), stream(label=True))
    hard, dropped = runner(POLICY)(params(), stream())
    left = np.asarray(hard.tokens.valid)
    assert left.sum() < np.asarray(soft.tokens.valid).sum() - 4
    close(np.asarray(soft.hidden)[left], np.asarray(hard.hidden)[left])
    for layer in range(2):
        close(np.asarray(faded[layer]["kept"]), np.asarray(dropped[layer]["kept"], np.float32))


@pytest.mark.thorough
def test_bounds():
    """One that is not met changes nothing, but that tokens leave the sequence instead of being
    masked; one that is met takes the best.
    """
    given = stream()
    free, aux = runner(POLICY)(params(), given)
    most = tuple(int(aux[layer]["kept"].max()) for layer in range(2))
    bounded = runner(dataclasses.replace(POLICY, keep=most))
    out, _ = bounded(params(), given)
    assert out.hidden.shape[1] == LENGTH - SLOTS + most[1]
    for row in range(2):
        ours, theirs = np.asarray(out.tokens.valid[row]), np.asarray(free.tokens.valid[row])
        close(np.asarray(out.hidden[row])[ours], np.asarray(free.hidden[row])[theirs])
    out, aux = bounded(starting(-30.0), given)
    for layer in range(2):
        assert aux[layer]["kept"].tolist() == [most[layer]] * 2


def test_budget():
    """Nothing where the mean is the target."""
    for kept, total, target, want in (
        ([100.0, 188.0], [576, 576], 0.25, 0),
        ([100.0, 200.0], [576, 576], 144, 6),
        ([100.0, 7.0, 0.0], [576, 100, 0], 0.25, abs((100 - 144) + (7 - 25)) / 2),
    ):
        assert target_distance(jnp.array(kept), jnp.array(total), target, 576) == want


# ------------------------------------------------------------------ models


def test_gradients_reach_the_thresholds():
    """From the answer alone, and from each of the two losses alone."""
    given = stream(label=True)

    @jax.jit
    @jax.jacrev
    def slopes(own):
        rows = {**params()["stack"]["layers"], "atp": own}
        weights = {**params(), "stack": {"layers": rows}}
        out, _, aux = decoder(POLICY).apply({"params": weights}, given, method="run")
        terms = reported(Output(out.hidden, out.tokens, aux))
        losses = {name: term.value for name, term in terms.items()}
        return {**losses, "answer": jnp.mean(out.hidden[:, -4] ** 3)}

    found = slopes(params()["stack"]["layers"]["atp"])
    assert sorted(found) == ["answer", "prune_loss", "target_loss"]
    for name, grads in found.items():
        for leaf in jax.tree.leaves(grads):
            assert np.isfinite(leaf).all(), name
            assert (np.abs(leaf).reshape(2, -1).max(1) > 0).all(), name


def test_sizes():
    shapes = jax.eval_shape(Thresholds(576, 64).init, jax.random.key(0), jnp.zeros((1, 2, 8)))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 1152 * 64 + 64 + 64 * 2 + 2
    assert ATP().chosen(32) == (4, 14, 24) and ATP().chosen(6) == (1, 2, 4)
    assert ATP().chosen(2) == (1,) and ATP().chosen(40) == (5, 17, 30)


def test_what_does_not_fit():
    plan = SIZES.plan()
    assert ATP().apply(plan, slots=0) == plan
    for policy, why in (
        (ATP(layers=(1, 3)), "others behind them"),
        (ATP(keep=(4, 8), layers=(1, 2)), "do not grow"),
        (ATP(keep=(8, 4, 2), layers=None), "schedule of 3, want 2"),
        (ATP(keep=17), "there are 16"),
    ):
        with pytest.raises(ValueError, match=why):
            policy.apply(plan, slots=16)
    for fields in (
        {"layers": (3, 2)},
        {"keep": (0.5,), "layers": (2, 3)},
        {"temperature": 0.0},
        {"strides": ()},
        {"target": 0},
        {"prune_weight": -1.0},
        {"grid": (0, 4)},
    ):
        with pytest.raises(ValueError, match="want"):
            ATP(**fields)
