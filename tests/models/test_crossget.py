"""CrossGET: what must hold beside the goldens of its matching and its tower."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.models.draw import draw
from zoo.convert.transfer import plan_transfer
from zoo.models.core import registry
from zoo.models.core.types import Tokens
from zoo.models.parts.layers.attention import BySize, causal, everything
from zoo.models.parts.reduce.merge import likeness, match_all, merge_pairs
from zoo.models.reduction.crossget import CrossGET
from zoo.models.reduction.crossget.encoder import CrossTokens, lengths
from zoo.models.reduction.crossget.guidance import divergence, repeats
from zoo.train.objectives.contrastive import Contrastive
from zoo.train.objectives.lm import NextToken

TINY, DUAL = registry.config("crossget_tiny"), registry.config("crossget_clip_tiny")
RNG = np.random.default_rng


def shapes_of(config):
    return jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(2))["params"]


@functools.cache
def params(config):
    return draw(shapes_of(config))


def batch_of(config, seed=0):
    rng, batch = RNG(seed), {}
    for name, spec in config.inputs(2).items():
        batch[name] = rng.normal(size=spec.shape).astype(np.float32)
        if name in ("ids", "labels"):
            batch[name] = rng.integers(4, 60, spec.shape).astype(np.int32)
    if "labels" in batch:
        batch["ids"][:, 1] = config.image_id
        batch["segments"] = np.zeros_like(batch["ids"])
    batch["text_mask"] = np.ones_like(batch["ids"], bool)
    return batch


# ------------------------------------------------------------------ figures of the paper


def test_published_numbers_of_tokens():
    clip = lengths((16,) * 12, 198)
    assert clip[1] == 182 and clip[-1] == 12
    made = registry.config("crossget_llava_1_5_7b")
    assert made.reducer.numbers(23, 576) == (13,) * 23 and made.slots == 278
    tower = made.running_tower
    policies = [step.policies[-1] for step in tower.plan()]
    assert [policy.r for policy in policies] == [13] * 23 + [0]
    assert lengths((13,) * 23, 578)[-1] == 279  # with the class token


@pytest.mark.parametrize(("r", "share"), [(16, 0.58), (12, 0.69), (8, 0.80)])
def test_published_flops(r, share):
    """What the official README says of both encoders of CLIP ViT-B/16, to about a percent;
    comparing all tokens with all counts.
    """

    def encoder(numbers, width):
        each = [
            4 * before * width**2 + 2 * before**2 * width + 8 * after * width**2
            for before, after in itertools.pairwise(numbers)
        ]
        return sum(each)

    patches = 196 * 768 * 768
    whole = encoder([197] * 13, 768) + patches + encoder([77] * 13, 512)
    numbers = lengths((r,) * 12, 198)
    matching = sum(number**2 * 768 for number in numbers[:-1])
    ours = encoder(numbers, 768) + matching + patches + encoder([78] * 13, 512)
    assert ours / whole == pytest.approx(share, abs=0.006)


@pytest.mark.parametrize("keep", [192, 128, 64, 8, 575])
def test_any_number_is_shared_out(keep):
    numbers = CrossGET(keep).numbers(23, 576)
    assert lengths(numbers, 578)[-1] == keep + 1
    assert numbers == tuple(sorted(numbers, reverse=True))


def test_how_layers_of_tower_and_decoder_meet():
    """Each layer of the tower `int((i + 1) L / V) - int(i L / V)` times, as the official code."""
    for layers, depth in ((23, 32), (24, 40), (3, 2), (5, 5)):
        counts = [int((i + 1) * depth / layers) - int(i * depth / layers) for i in range(layers)]
        want = [i for i, count in enumerate(counts) for _ in range(count)]
        assert list(repeats(layers, depth)) == want


# ------------------------------------------------------------------ matching


@functools.partial(jax.jit, static_argnames="r")
def merged_into(x, importance, protected, *, r):
    found = match_all(likeness(x, protected), importance, r)
    return found, *merge_pairs(x, jnp.ones(x.shape[:2]), found, importance)


def test_merging():
    """Sizes add up, protected tokens stay as they are, groups say who went where."""
    x, importance = RNG(0).normal(size=(3, 12, 5)), RNG(1).normal(size=(3, 12))
    protected = np.isin(np.arange(12), (0, 4, 11))
    found, merged, size = merged_into(x, importance, protected, r=4)
    assert merged.shape == (3, 8, 5) and np.allclose(size.sum(-1), 12)
    for row in range(3):
        assert (np.diff(found.index[row]) > 0).all()
        assert not set(found.source[row].tolist()) & set(found.index[row].tolist())
        into = found.index[row][found.groups[row][found.source[row]]]
        np.testing.assert_array_equal(into, found.target[row])
        counts = np.bincount(found.groups[row], minlength=8)
        np.testing.assert_array_equal(counts, size[row])
        for token in (0, 4, 11):
            at = int(np.flatnonzero(found.index[row] == token)[0])
            assert size[row, at] == 1
            np.testing.assert_allclose(merged[row, at], x[row, token], rtol=1e-6)


def test_of_two_that_are_nearest_one_stays():
    """Twins that matter as much become one, whose value is theirs; of those that tie the first."""
    x = RNG(0).normal(size=(3, 6, 5))
    x = np.concatenate([x, x], 1)
    found, merged, size = merged_into(x, np.zeros((3, 12)), np.zeros(12, bool), r=4)
    assert (found.source < 6).all()
    np.testing.assert_array_equal(found.target - found.source, 6)
    np.testing.assert_allclose(merged, np.take_along_axis(x, found.index[..., None], 1), atol=1e-6)
    assert np.sort(size, -1).tolist() == [[1, 1, 1, 1, 2, 2, 2, 2]] * 3


def test_a_token_counts_as_often_as_it_has_parts():
    tokens = Tokens.sequence(jnp.ones((1, 3), bool), size=jnp.asarray([[1.0, 2.0, 4.0]]))
    logs = np.log([1, 2, 4])
    np.testing.assert_allclose(BySize(everything)(tokens, tokens)[0], [logs] * 3, rtol=1e-6)
    seen = BySize(causal)(tokens, tokens)[0]
    np.testing.assert_allclose(seen[2], logs, rtol=1e-6)
    assert seen[0, 1] < -1e30
    plain = Tokens.sequence(jnp.ones((1, 3), bool))
    assert BySize(everything)(plain, plain) is None


# ------------------------------------------------------------------ the encoders


@functools.partial(jax.jit, static_argnums=0)
def read(config, weights, ids):
    return config.build().apply({"params": weights}, ids)


def test_without_merging_texts_are_read_as_by_clip():
    """No token of a text sees the cross token, which comes behind all."""
    plain, config = (
        dataclasses.replace(DUAL.text, policies=policies) for policies in ((), (CrossTokens(0),))
    )
    weights, ids = params(DUAL)["text"], batch_of(DUAL)["ids"]
    layers = {name: x for name, x in weights["stack"]["layers"].items() if name != "cross"}
    bare = {**weights, "stack": {"layers": layers}}
    got, want = read(config, weights, ids), read(plain, bare, ids)
    np.testing.assert_allclose(got.cls, want.cls, atol=1e-6)
    np.testing.assert_allclose(got.tokens[:, :-1], want.tokens, atol=1e-5)
    assert got.tokens.shape[1] == 13 and len(got.aux) == 2 and not want.aux


def test_sizes_and_the_end_of_a_text():
    """Of every layer the parts of all tokens are those that there were; the token that stands for
    a text is protected, wherever it is, and pooled.
    """
    config = dataclasses.replace(DUAL.text, pool="end")
    weights = params(DUAL)["text"]
    ids = RNG(0).integers(1, 60, (3, 12)).astype(np.int32)
    ends = np.array([3, 11, 6])
    ids[np.arange(3), ends] = config.end_id

    features = read(config, weights, ids)
    assert features.tokens.shape == (3, 13 - 2 * 2, 24)
    for report in features.aux:
        np.testing.assert_allclose(report["size"].sum(-1), 13)
    place = np.asarray(features.aux[-1]["place"])
    size = np.asarray(features.aux[-1]["size"])
    for row, end in enumerate(ends):
        at = int(np.flatnonzero(place[row] == end)[0])
        assert size[row, at] == 1 and size[row, 0] == 1 and size[row, -1] == 1
        np.testing.assert_array_equal(features.cls[row], features.tokens[row, at])


# ------------------------------------------------------------------ LLaVA and training


@pytest.fixture(scope="module")
def trained():
    """Of the tiny LLaVA the loss of cross tokens, with weight 1; gradients of that of language, and
    of this.
    """
    config = dataclasses.replace(TINY, reducer=CrossGET(0.5, weight=1.0))
    model, batch = config.build(), batch_of(config)
    batch["labels"] = np.where(batch["ids"] == config.image_id, -100, batch["labels"])

    @jax.jit
    def parts(weights):
        def losses(weights):
            variables = {"params": weights}
            terms, *_ = NextToken().loss(model, variables, {}, batch, jax.random.key(0), None)
            return terms["loss"].value, terms["guidance_loss"].value

        (_, value), pull = jax.vjp(losses, weights)
        return value, pull((1.0, 0.0))[0], pull((0.0, 1.0))[0]

    return parts(params(config))


@pytest.mark.thorough
def test_the_loss_reaches_cross_tokens_alone(trained):
    value, _, grads = trained
    assert np.isfinite(value) and value > 0
    live = {
        "/".join(str(key.key) for key in path)
        for path, grad in jax.tree_util.tree_leaves_with_path(grads)
        if np.abs(grad).max() > 0
    }
    at = "stack/layers/cross/token"
    assert live == {f"tower/{at}", f"decoder/{at}"}
    assert (np.abs(grads["tower"]["stack"]["layers"]["cross"]["token"]).max(-1) > 0).tolist() == [
        True,
        True,
        False,  # the layer that LLaVA does not read
    ]


@pytest.mark.thorough
def test_language_reaches_cross_tokens_too(trained):
    _, grads, _ = trained
    for part in ("tower", "decoder"):
        assert np.abs(grads[part]["stack"]["layers"]["cross"]["token"]).max() > 0


def test_divergence():
    a, b = RNG(0).normal(size=(2, 4, 7))
    softmax = [np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b)]
    mean = sum(softmax) / 2
    want = sum((mean * np.log(mean / p)).sum(-1) for p in softmax) / 2
    np.testing.assert_allclose(divergence(a, b), want, rtol=1e-4)
    np.testing.assert_allclose(divergence(a, a), 0, atol=1e-6)


def test_the_loss_of_the_dual_encoder_is_added():
    def loss(weights):
        variables, key = {"params": weights}, jax.random.key(0)
        return Contrastive().loss(DUAL.build(), variables, {}, batch_of(DUAL), key, None)

    assert set(jax.eval_shape(loss, params(DUAL))[0]) == {"loss", "guidance_loss"}


def test_groups_are_of_patches():
    """What a figure shows: every patch is a part of one kept token, whose place is its own."""

    @jax.jit
    def see(weights, pixels):
        return TINY.build().apply({"params": weights}, pixels, method="encode_image").tokens

    kept = see(params(TINY), batch_of(TINY)["pixels"])
    assert kept.tokens.shape == (2, 1, 8, 24) and kept.groups.shape == (2, 1, 16)
    index, groups = np.asarray(kept.index), np.asarray(kept.groups)
    assert (index[..., -1] == -1).all() and (index[..., :-1] >= 0).all()
    assert groups.min() >= 0 and groups.max() <= 6
    own = np.take_along_axis(groups, index[..., :-1], -1)
    np.testing.assert_array_equal(own, np.broadcast_to(np.arange(7), own.shape))


def test_parameters():
    tower, decoder = (params(TINY)[part]["stack"]["layers"] for part in ("tower", "decoder"))
    assert tower["cross"]["token"].shape == (3, 16)
    assert decoder["cross"]["token"].shape == (2, 24)


def test_a_loaded_model_takes_it():
    """`with_` adds the learned vectors, and takes them off again."""
    plain = registry.config("llava_tiny")
    merging = registry.override(plain, {"reducer": "crossget", "keep": 8}, "llava_tiny")
    added = {f"{part}/stack/layers/cross/token" for part in ("tower", "decoder")}
    there, back = plan_transfer(plain, merging, "x"), plan_transfer(merging, plain, "x")
    assert there.new == back.unused == added
    assert not there.unused
    assert not back.new


@pytest.mark.parametrize(
    ("base", "options", "match"),
    [
        ("llava_tiny", {"keep": 2}, r"keep = 2: 2 layers.*want 5 to 16"),
        ("llava_tiny", {"keep": 17}, "want 1 to 16"),
        ("llava_onevision_tiny", {}, "class token"),
        ("s2_tiny", {}, "plain ViT"),
    ],
)
def test_what_it_cannot_do(base, options, match):
    with pytest.raises(ValueError, match=match):
        zoo.create(base, reducer="crossget", **options)


def test_settings_of_the_encoders():
    with pytest.raises(ValueError, match="want 0 tokens or more"):
        CrossTokens(-1)
    with pytest.raises(ValueError, match="importance"):
        CrossTokens(1, importance="mean")
    with pytest.raises(ValueError, match="2 numbers"):
        CrossTokens((1, 2)).numbers(3)
    deeper = dataclasses.replace(DUAL.text, depth=3)
    with pytest.raises(ValueError, match="equal depths"):
        dataclasses.replace(DUAL, text=deeper)
    with pytest.raises(ValueError, match="reads one layer"):
        dataclasses.replace(TINY, vision_layer=(1, 2))
    plain = dataclasses.replace(DUAL.text, policies=())
    with pytest.raises(ValueError, match="CrossTokens"):
        dataclasses.replace(DUAL, text=plain)
