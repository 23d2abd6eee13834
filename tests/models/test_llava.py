"""The assembly: splicing, prefill and decoding, elastic budgets, devices."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.draw import draw
from tests.models.test_systems import random_batch, shapes
from zoo.models.core import registry
from zoo.models.core.names import tree_shardings
from zoo.models.core.types import IGNORE, TokenSet
from zoo.models.parts.assemblies.splice import splice

ROOM = 3


@pytest.fixture(scope="module")
def setup():
    config = registry.config("mqt_tiny")
    batch = random_batch(config)
    batch["text_mask"][1, 9:] = False
    batch["labels"] = np.where(np.arange(12) > 6, batch["ids"], IGNORE)
    model, params = config.build(), draw(shapes(config))
    run = jax.jit(
        lambda p, b, budget=None: model.apply({"params": p}, b, budget=budget),
        static_argnames="budget",
    )
    return config, model, params, batch, run


def test_splice_by_hand():
    """Two rows of two images with three tokens each, written out."""
    ids = jnp.array([[7, 9, 5, 9, 6], [9, 9, 4, 8, 0]])
    mask = jnp.array([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0]], bool)  # row 1: one image, one pad
    labels = jnp.array([[-100, -100, -100, -100, 6], [-100, -100, 4, 8, -100]])
    embedded = ids[..., None].astype(jnp.float32)
    vision = 100.0 + jnp.arange(12.0).reshape(2, 2, 3, 1)
    seen = jnp.ones((2, 2, 3), bool).at[0, 1, 2].set(False)
    stream = splice(
        ids, embedded, TokenSet(vision, seen), image_id=9, text_mask=mask, labels=labels
    )
    assert stream.slots == 6
    np.testing.assert_array_equal(
        stream.hidden[..., 0],
        [[7, 100, 101, 102, 5, 103, 104, 105, 6], [106, 107, 108, 109, 110, 111, 4, 8, 0]],
    )
    tokens = stream.tokens
    np.testing.assert_array_equal(
        tokens.valid, [[1, 1, 1, 1, 1, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0, 1, 1, 0]]
    )
    np.testing.assert_array_equal(
        tokens.position, [[0, 1, 2, 3, 4, 5, 6, 6, 7], [0, 1, 2, 2, 2, 2, 3, 4, 4]]
    )
    np.testing.assert_array_equal(
        tokens.tags["cell"], [[-1, 0, 1, 2, -1, 3, 4, 5, -1], [0, 1, 2, 3, 4, 5, -1, -1, -1]]
    )
    # The last real vision token of row 0 predicts 6, although a surplus slot lies between them.
    want = np.full((2, 9), IGNORE)
    want[0, 6], want[1, 2], want[1, 6] = 6, 4, 8
    np.testing.assert_array_equal(tokens.tags["label"], want)


def test_segments_stand_side_by_side(setup):
    """Two questions in one row give what each gives alone, in hidden states and in labels."""
    _, _, params, batch, run = setup
    one = {
        "pixels": batch["pixels"][:1],
        "ids": batch["ids"][:1, :6],
        "labels": batch["ids"][:1, :6],
    }
    other = {**one, "ids": np.concatenate([one["ids"][:, :3], batch["ids"][:1, 6:10]], 1)}
    other["labels"] = other["ids"]
    both = {**one, "ids": batch["ids"][:1, :10], "labels": batch["ids"][:1, :10]}
    both["segments"] = np.array([[0, 0, 0, 1, 1, 1, 2, 2, 2, 2]], np.int32)
    got, a, b = run(params, both), run(params, one), run(params, other)
    np.testing.assert_allclose(got.hidden[:, :-4], a.hidden, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.hidden[:, -4:], b.hidden[:, -4:], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(got.tokens.position[:, -4:], b.tokens.position[:, -4:])
    np.testing.assert_array_equal(got.tokens.tags["label"][:, -4:], b.tokens.tags["label"][:, -4:])
    start = (
        got.hidden.shape[1] - 5
    )  # the last token of segment 1 does not predict the first of segment 2
    assert got.tokens.tags["label"][0, start] == IGNORE


def test_decoding_equals_recomputation(setup):
    _, model, params, batch, run = setup
    whole = {k: batch[k] for k in ("pixels", "ids", "text_mask")}
    whole = {k: v[:1] for k, v in whole.items()}
    logits = jax.jit(lambda p, h: model.apply({"params": p}, h, method="head"))(
        params, run(params, whole).hidden
    )
    prompt = {**whole, "ids": whole["ids"][:, :-ROOM], "text_mask": whole["text_mask"][:, :-ROOM]}
    got, cache = jax.jit(lambda p, b: model.apply({"params": p}, b, room=ROOM, method="prefill"))(
        params, prompt
    )
    decode = jax.jit(lambda p, i, c: model.apply({"params": p}, i, c, method="decode"))
    for i in range(ROOM):
        np.testing.assert_allclose(got, logits[:, -ROOM - 1 + i], rtol=1e-4, atol=1e-5)
        got, cache = decode(
            params, whole["ids"][:, -ROOM + i : whole["ids"].shape[1] - ROOM + i + 1], cache
        )
    np.testing.assert_allclose(got, logits[:, -1], rtol=1e-4, atol=1e-5)


def test_a_row_does_not_see_its_padding_or_its_neighbours(setup):
    _, model, params, batch, _ = setup
    prompts = {k: batch[k] for k in ("pixels", "ids", "text_mask")}
    prefill = jax.jit(lambda p, b: model.apply({"params": p}, b, room=1, method="prefill"))
    both, _ = prefill(params, prompts)
    short = {k: v[1:] if k == "pixels" else v[1:, :9] for k, v in prompts.items()}
    alone, _ = prefill(params, short)
    np.testing.assert_allclose(both[1:], alone, rtol=1e-4, atol=1e-5)


def test_budgets_are_nested_and_static_equals_masked(setup):
    _, model, params, batch, run = setup
    encode = lambda m: model.apply(
        {"params": params}, batch["pixels"], budget=m, method="encode_image"
    )
    full = encode(None).tokens.tokens
    np.testing.assert_allclose(encode(3).tokens.tokens, full[:, :, :3], rtol=1e-5, atol=1e-6)
    cut = run(params, batch, budget=3)
    masked = jax.jit(lambda p, b, m: model.apply({"params": p}, b, budget=m))(
        params, batch, jnp.int32(3)
    )
    assert masked.hidden.shape[1] == cut.hidden.shape[1] + 1
    a, b = (
        np.asarray(o.hidden)[np.asarray(o.tokens.tags["label"]) != IGNORE] for o in (cut, masked)
    )
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    for wrong in (0, 5, -1):
        with pytest.raises(ValueError, match="budget"):
            encode(wrong)


def test_text_only_is_the_language_model(setup):
    """Without pixels there are no slots, and no placeholder is needed."""
    config, model, params, batch, _ = setup
    text = {"ids": batch["ids"][:, 2:]}
    out = model.apply({"params": params}, text)
    assert out.hidden.shape == (2, 10, config.decoder.width)


def test_another_image_size_is_refused(setup):
    _, model, params, batch, _ = setup
    with pytest.raises(ValueError, match=r"pixels: got \(.*20, 20, 3\)"):
        model.apply(
            {"params": params}, {**batch, "pixels": np.zeros((2, 1, 20, 20, 3), np.float32)}
        )


def test_eight_devices_equal_one(setup):
    config, model, params, batch, run = setup
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices (XLA_FLAGS=--xla_force_host_platform_device_count=8)")
    auto = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=auto)
    placed = jax.device_put(params, tree_shardings(shapes(config), mesh))
    with jax.set_mesh(mesh):
        got = jax.jit(lambda p, b: model.apply({"params": p}, b).hidden)(placed, batch)
    np.testing.assert_allclose(got, run(params, batch).hidden, rtol=1e-4, atol=1e-5)


def test_figures_of_the_paper():
    """8,923,136 parameters in the official connector, 8,660,992 of them trained; 7B in all."""
    config = registry.config("mqt_llava_7b")
    params = nn.unbox(shapes(config))
    own = sum(leaf.size for leaf in jax.tree.leaves(params["connector"]))
    keys = registry.entry("mqt").table(config).shapes(params)
    official = sum(int(np.prod(s)) for k, s in keys.items() if "query_abstractor" in k)
    assert (own, official) == (8_660_992, 8_923_136)
    llm = {"decoder": sum(leaf.size for leaf in jax.tree.leaves(params["decoder"]))}
    assert llm == {"decoder": 6_738_415_616}


def test_overrides_compose():
    config = registry.config("mqt_llava_7b", num_queries=64, tie_embeddings=True)
    assert config.connector.num_queries == 64 and config.decoder.tie_embeddings
    with pytest.raises(ValueError, match="square"):
        dataclasses.replace(config.connector, num_queries=5)
