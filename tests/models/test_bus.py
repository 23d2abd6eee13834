"""BUS against its formulas in plain numpy, at its limits, and in pre-training."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.draw import draw
from zoo.costing import measure
from zoo.models.core import registry
from zoo.models.core.errors import UsageError
from zoo.models.encoders.bus import BusConfig
from zoo.models.encoders.bus.tower import SelectiveConfig, patch_labels
from zoo.models.parts.reduce.scores import class_attention
from zoo.models.parts.towers.vit import ViTConfig
from zoo.train.objectives.fusion import ImageText, prefix_lengths, wrong_pairs

TINY = registry.config("bus_tiny")
WHOLE = dataclasses.replace(TINY, tower=dataclasses.replace(TINY.tower, ratio=1.0), summary=0)
ROWS, PATCHES = 4, 16


def given(rows=ROWS, seed=0):
    rng, place = np.random.default_rng(seed), np.arange(TINY.text_tokens)
    ids = rng.integers(5, 40, (rows, TINY.text_tokens)).astype(np.int32)
    mask = place < rng.integers(4, TINY.text_tokens + 1, (rows, 1))
    pixels = rng.normal(size=(rows, 16, 16, 3)).astype(np.float32)
    return {"pixels": pixels, "ids": ids, "text_mask": mask}


@functools.cache
def params():
    shapes = jax.eval_shape(TINY.build().init, jax.random.key(0), TINY.inputs(1))["params"]
    return draw(shapes)


def plain_tower(config, weights):
    """The tower's plain form, and its parameters."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(ViTConfig)}
    own = {name: x for name, x in weights.items() if name != "selector"}
    return ViTConfig(**fields).build(), {"params": own}


@functools.cache
def parts(config):
    """What the model makes of the batch piece by piece, and the plain tower's half and whole."""

    @jax.jit
    def run(params, batch):
        model = config.build()

        def use(name, *args):
            return model.apply({"params": params}, *args, method=name)

        text = use("read", batch["ids"], batch["text_mask"])
        seen = use("see", batch["pixels"], text[:, 0])
        summary = use("summarise", seen)
        tower, own = plain_tower(config.tower, params["tower"])
        plain = tower.apply(own, batch["pixels"], taps=(config.tower.select_after,), qk=(3,))
        fused = use("fuse", text, batch["text_mask"], summary)
        return text, seen, summary, fused, plain

    weights = {name: x for name, x in params().items() if config.summary or name != "abstraction"}
    return run(weights, given())


def close(got, want, tolerance=2e-5):
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max(), rtol=0)


# ------------------------------------------------------------------ the formulas


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def linear(x, w):
    return x @ w["kernel"] + w["bias"]


def norm(x, w):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12) * w["scale"] + w["bias"]


def attention(x, read, w, prefix=""):
    q, k, v = (
        np.einsum("ld,dhe->lhe", y, w[prefix + n]["kernel"]) + w[prefix + n]["bias"]
        for n, y in (("q", x), ("k", read), ("v", read))
    )
    logits = np.einsum("ihe,jhe->hij", q, k) / math.sqrt(q.shape[-1])
    weight = np.exp(logits - logits.max(-1, keepdims=True))
    mixed = np.einsum("hij,jhe->ihe", weight / weight.sum(-1, keepdims=True), v)
    return np.einsum("lhe,hed->ld", mixed, w[prefix + "out"]["kernel"]) + w[prefix + "out"]["bias"]


def test_the_selection():
    """σ of three linear layers over patch and text; the greatest half, in their order."""
    text, seen, _, _, plain = parts(TINY)
    w = params()["tower"]["selector"]
    half = np.asarray(plain.taps[1], np.float64)[:, 1:]
    for row in range(ROWS):
        v = linear(half[row], w["project"])
        u = np.concatenate([v, np.tile(np.asarray(text[row, 0]), (PATCHES, 1))], -1)
        want = linear(gelu(linear(gelu(linear(u, w["up"])), w["middle"])), w["score"])[:, 0]
        close(seen.relevance[row], want)
        best = sorted(np.argsort(-want, kind="stable")[: PATCHES // 2].tolist())
        assert seen.index[row].tolist() == best
    assert seen.tokens.shape == (ROWS, PATCHES // 2, 16)


def test_the_abstraction():
    """The four patches that the class token attends to most, and one layer that reads the eight."""
    _, seen, summary, _, _ = parts(TINY)
    w = jax.tree.map(lambda x: x[0], params()["abstraction"]["stack"]["layers"])
    for row in range(ROWS):
        every = np.asarray(seen.tokens[row], np.float64)
        x = every[np.sort(np.argsort(-np.asarray(seen.attention[row]), kind="stable")[:4])]
        x = norm(x + attention(x, x, w), w["attn_norm"])
        x = norm(x + attention(x, every, w, "cross_"), w["cross_norm"])
        x = norm(x + linear(gelu(linear(x, w["up"])), w["down"]), w["mlp_norm"])
        close(summary[row], np.concatenate([np.asarray(seen.cls[row])[None], x]))


def test_all_patches_without_abstraction_are_the_plain_model():
    text, seen, summary, fused, plain = parts(WHOLE)
    close(summary[:, 1:], plain.tokens, 1e-6)
    close(summary[:, 0], plain.cls, 1e-6)
    close(seen.attention, class_attention(*plain.qk[3]))
    bert, mask = TINY.text.build(), given()["text_mask"]
    together = jnp.concatenate([plain.cls[:, None], plain.tokens], 1)

    @jax.jit
    def encode(params, ids):  # layers without cross-attention pass the picture over
        hidden = bert.apply(params, ids, method="embed")
        return bert.apply(params, hidden, mask, context=together, method="encode").tokens

    close(fused, encode({"params": params()["text"]}, given()["ids"]), 1e-6)
    assert text.shape == fused.shape


@pytest.mark.parametrize(("ratio", "left"), [(1.0, 256), (0.5, 128), (0.3, 76)])
def test_later_layers_cost_what_they_keep(ratio, left):
    """Of the base size: exactly the products of so many tokens behind the sixth layer."""

    def flops(ratio):
        config = SelectiveConfig(ratio=ratio)
        assert config.num_kept == int(256 * ratio)
        tower = config.build()
        args = jnp.zeros((1, 256, 256, 3)), jnp.zeros((1, 768))
        shapes = nn.unbox(jax.eval_shape(tower.init, jax.random.key(0), *args))
        return measure(tower.apply, shapes, *args)[0].total

    def layer(n):
        return 2 * n * (4 * 768**2 + 2 * 768 * 3072) + 4 * n**2 * 768

    # The last layer's projections are counted once more, for its class attention.
    read = lambda n: 6 * n * 768**2 + 2 * n * 768
    few, all_of_them = 1 + left, 257
    saved = 6 * (layer(all_of_them) - layer(few)) + read(all_of_them) - read(few)
    assert flops(1.0) - flops(ratio) == saved


def test_sizes():
    """The text half and the fusion are ALBEF's."""
    shapes = jax.eval_shape(
        BusConfig().text.build().init, jax.random.key(0), BusConfig().text.inputs(1)
    )
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 123_697_722
    assert BusConfig().tower.num_kept == 128 and BusConfig().summary == 64


def test_boxes():
    """Patches of 4 pixels: what a box touches, edges not counted."""
    found = patch_labels([[4, 0, 8, 5], [0.5, 7.5, 1, 16]], (4, 4), (16, 16)).reshape(2, 4, 4)
    assert np.argwhere(found[0]).tolist() == [[0, 1], [1, 1]]
    assert np.argwhere(found[1]).tolist() == [[1, 0], [2, 0], [3, 0]]
    with pytest.raises(ValueError, match="left < right"):
        patch_labels([[4, 0, 4, 5]], (4, 4), (16, 16))


# ------------------------------------------------------------------ pre-training


def test_draws_of_pre_training():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 5)))
    keys = jax.random.split(jax.random.key(0), 200)
    texts, images = jax.vmap(lambda k: wrong_pairs(logits, k))(keys)
    assert (texts != jnp.arange(5)).all() and (images != jnp.arange(5)).all()
    chance = np.exp(np.asarray(logits[0])) * [0, 1, 1, 1, 1]
    often = np.bincount(np.asarray(texts[:, 0]), minlength=5) / 200
    assert np.abs(often - chance / chance.sum()).max() < 0.12
    mask = jnp.arange(9) < jnp.array([[2], [9]])
    cuts = jax.vmap(lambda k: prefix_lengths(mask, k))(keys)
    assert set(cuts[:, 0].tolist()) == {1} and set(cuts[:, 1].tolist()) == set(range(1, 9))

    objective = ImageText(mask_id=3, special=(0, 1), share=0.5)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 40, (60, 40)), jnp.int32)
    there = jnp.ones(ids.shape, bool).at[:, 30:].set(False)
    hidden, wanted = objective.hide(ids, there, jax.random.key(0), 40)
    free = np.asarray(there & (ids > 1))
    assert not np.asarray(wanted)[~free].any() and (hidden[~wanted] == ids[~wanted]).all()
    assert np.asarray(wanted)[free].mean() == pytest.approx(0.5, abs=0.05)
    assert (np.asarray(hidden)[np.asarray(wanted)] == 3).mean() == pytest.approx(0.8, abs=0.05)


def terms_of(params, batch):
    objective = ImageText(mask_id=3, special=(0,), share=0.4, queue=0, soft=0.0)
    model, key = TINY.build(), jax.random.key(0)
    found, _, carried = objective.loss(model, {"params": params}, {}, batch, key, None)
    assert not carried
    return {name: term.value for name, term in found.items()}


def greatest(tree, path):
    tree = functools.reduce(lambda each, key: each[key], path.split("/"), tree)
    return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def test_boxes_teach_the_selector():
    """And what comes before it; unknown patches do not count."""
    batch = jax.tree.map(jnp.asarray, given())
    label = np.random.default_rng(1).integers(-1, 2, (ROWS, PATCHES)).astype(np.float32)
    names = {"object_ids": batch["ids"], "object_mask": batch["text_mask"]}

    @jax.jit
    @jax.value_and_grad
    def boxes(params):
        return terms_of(params, {**batch, **names, "patch_labels": label})["patch_loss"]

    cost, grads = boxes(jax.tree.map(jnp.asarray, params()))
    assert greatest(grads, "abstraction") == greatest(grads, "writer") == 0
    assert all((np.abs(x) > 0).any() for x in jax.tree.leaves(grads["tower"]["selector"]))
    a = 1 / (1 + np.exp(-np.asarray(parts(TINY)[1].relevance, np.float64)))
    each = -np.where(label > 0, np.log(a), np.log(1 - a))
    close(cost, each[label >= 0].mean())


def test_the_slow_copy():
    """It is a mean of the past; what it has seen is compared with, and it softens what is right."""
    objective = ImageText(mask_id=3, special=(0,), share=0.4, momentum=0.75, queue=6, soft=0.25)
    model, batch, key = TINY.build(), jax.tree.map(jnp.asarray, given()), jax.random.key(0)
    weights = jax.tree.map(jnp.asarray, params())
    aux = objective.init(model, {"params": weights}, {})
    assert aux["images"].shape == aux["texts"].shape == (6, 8)
    np.testing.assert_allclose(np.linalg.norm(aux["texts"], axis=-1), 1, rtol=1e-6)
    aux["momentum"] = jax.tree.map(lambda x: 0.5 * x, weights)

    @jax.jit
    def run(weights, aux):
        terms, _, carried = objective.loss(model, {"params": weights}, aux, batch, key, None)
        ids, mask = batch["ids"], batch["text_mask"]
        hidden, wanted = objective.hide(ids, mask, jax.random.split(key, 4)[1], 40)

        def made(own):
            use = lambda name, *args: model.apply({"params": own}, *args, method=name)
            text = use("read", ids, mask)
            seen = use("see", batch["pixels"], text[:, 0])
            fused = use("fuse", use("read", hidden, mask), mask, use("summarise", seen))
            return use("image_of", seen.cls), use("text_of", text[:, 0]), use("predict", fused)

        moved = carried["aux"]["momentum"]
        return terms, carried["aux"], wanted, made(weights), made(moved)

    terms, carried, wanted, own, past = jax.tree.map(np.asarray, run(weights, aux))
    for moved, now in zip(jax.tree.leaves(carried["momentum"]), jax.tree.leaves(weights)):
        np.testing.assert_allclose(moved, 0.625 * now, rtol=1e-5, atol=1e-7)
    scale, log_costs = np.exp(params()["logit_scale"]), []
    for side, other, name in ((0, 1, "texts"), (1, 0, "images")):
        there = np.concatenate([past[other], aux[name]])
        np.testing.assert_allclose(carried[name], there[:6], rtol=1e-6)
        target = 0.25 * jax.nn.softmax(scale * past[side] @ there.T) + 0.75 * np.eye(4, 10)
        log_costs.append(-(target * jax.nn.log_softmax(scale * own[side] @ there.T)).sum(-1))
    close(terms["loss"].value, np.mean(log_costs))
    right = 0.75 * jax.nn.one_hot(batch["ids"], 40) + 0.25 * jax.nn.softmax(past[2])
    spelled = -(right * jax.nn.log_softmax(own[2])).sum(-1)
    close(terms["mask_loss"].value, spelled[wanted].mean())


@pytest.mark.thorough
def test_the_other_losses():
    """They leave the selector alone, reach all else, and fall in training."""
    batch = jax.tree.map(jnp.asarray, given())

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def others(params):
        found = terms_of(params, batch)
        return sum(found.values()), found

    weights = jax.tree.map(jnp.asarray, params())
    (first, values), grads = others(weights)
    assert sorted(values) == ["follow_loss", "loss", "mask_loss", "match_loss"]
    assert greatest(grads, "tower/selector") == 0
    for name in ("tower/patch", "abstraction", "text", "writer", "match_head", "image_projection"):
        assert greatest(grads, name) > 0, name

    text, seen, *_ = parts(TINY)
    image = linear(np.asarray(seen.cls, np.float64), params()["image_projection"])
    words = linear(np.asarray(text[:, 0], np.float64), params()["text_projection"])
    image, words = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (image, words))
    logits = image @ words.T * np.exp(params()["logit_scale"])
    normal = [np.log(np.exp(x).sum(-1)) for x in (logits, logits.T)]
    close(values["loss"], np.mean([each - np.diagonal(logits) for each in normal]))

    for _ in range(15):
        (last, _), grads = others(weights)
        weights = jax.tree.map(lambda p, g: p - 0.02 * g, weights, grads)
    assert last < 0.95 * first


def test_what_does_not_fit():
    for fields in ({"select_after": 0}, {"select_after": 12}, {"ratio": 0.0}, {"ratio": 1.5}):
        with pytest.raises(ValueError, match="want"):
            SelectiveConfig(**fields)
    with pytest.raises(ValueError, match="class token"):
        SelectiveConfig(class_token=False)
    with pytest.raises(ValueError, match="128 tokens"):
        BusConfig(summary=129)
    with pytest.raises(ValueError, match="width of the texts"):
        BusConfig(tower=SelectiveConfig(text_width=512))
    wrong = {"share": 1.0, "momentum": 1.0, "queue": -1, "soft": 1.0}
    for name, value in wrong.items():
        with pytest.raises(UsageError, match=f"objective.{name} is"):
            ImageText(**{name: value})
    with pytest.raises(UsageError, match="fuses images and texts"):
        ImageText().init(ViTConfig().build(), {}, {})
    with pytest.raises(UsageError, match="batch of one"):
        ImageText().loss(TINY.build(), {}, {}, given(1), jax.random.key(0), None)
