"""Fewer vision tokens where pictures have their native resolution: a share of each prompt's, with
the positions that they had.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.models.draw import draw
from zoo.models.parts.assemblies.qwen_vl import QwenVLConfig
from zoo.processors.native import NativeSpec

BASE = "qwen2_5_vl_tiny"
METHODS = ("mmtok", "uniform")


@pytest.fixture(scope="module")
def plain():
    return zoo.config(BASE)


@pytest.fixture(scope="module")
def params(plain):
    shapes = jax.eval_shape(plain.build().init, jax.random.key(0), plain.inputs(1))["params"]
    return draw(shapes)


@pytest.fixture(scope="module")
def batch(plain):
    """Two pictures of 8 and 4 tokens, and one of 6, each with text before and behind."""
    spec, rng = NativeSpec.of(plain), np.random.default_rng(0)
    side, picture = spec.factor, plain.image_id

    def seen(rows, columns):
        size = (1, rows * side, columns * side, 3)
        return spec.picture(rng.normal(size=size).astype(np.float32))

    words = rng.integers(4, 100, (2, 9)).tolist()
    ids = [[*words[0][:3], picture, *words[0][3:6], picture, *words[0][6:]], words[1]]
    ids[1][2] = picture
    shown = [[seen(2, 4), seen(2, 2)], [seen(3, 2)]]
    return spec.batch(ids, shown, placeholders=(picture, plain.video_id), pad=0)


def reading(config):
    """The spliced tokens, and the logits of all."""

    def read(self, batch):
        stream, memory = self.stream(batch, None)
        output, _, _ = self.decoder.run(stream, None, memory)
        return stream.tokens, self.head(output.hidden)

    model = config.build()
    return jax.jit(lambda params, batch: model.apply({"params": params}, batch, method=read))


@pytest.fixture(scope="module")
def whole(plain, params, batch):
    return jax.tree.map(np.asarray, reading(plain)(params, batch))


def test_keeping_all_is_the_plain_model(monkeypatch, params, batch, whole):
    """Through the station, which a model that keeps all goes around."""
    config = zoo.config(BASE, reducer="uniform", keep=1.0)
    assert not config.reducing
    monkeypatch.setattr(QwenVLConfig, "reducing", property(lambda self: True))
    tokens, logits = reading(config)(params, batch)
    there = whole[0].valid
    np.testing.assert_array_equal(tokens.valid, there)
    np.testing.assert_array_equal(tokens.position[there], whole[0].position[there])
    scale = np.abs(whole[1][there]).max()
    np.testing.assert_allclose(logits[there], whole[1][there], atol=1e-6 * scale, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_what_remains_keeps_its_position(method, params, batch, whole):
    config = zoo.config(BASE, reducer=method, keep=0.5)
    tokens, _ = jax.tree.map(np.asarray, reading(config)(params, batch))
    full = whole[0]
    for row, most in enumerate((6, 3)):
        image = tokens.valid[row] & (tokens.modality[row] == 1)
        assert image.sum() == most
        places = {c: p for c, p in zip(full.tags["cell"][row], full.position[row]) if c >= 0}
        for cell, position in zip(tokens.tags["cell"][row][image], tokens.position[row][image]):
            np.testing.assert_array_equal(position, places[cell])
        text, before = (x.valid[row] & (x.modality[row] == 0) for x in (tokens, full))
        np.testing.assert_array_equal(tokens.position[row][text], full.position[row][before])


def test_decoding_equals_reading_all(params, batch):
    """The next token from the cache, and read again as a part of the text."""
    config = zoo.config(BASE, reducer="uniform", keep=0.5)
    model = config.build()

    @jax.jit
    def write(params, batch):
        apply = lambda *args, **options: model.apply({"params": params}, *args, **options)
        logits, cache = apply(batch, room=1, method="prefill")
        token = logits.argmax(-1)[:, None].astype(jnp.int32)
        return token, apply(token, cache, method="decode")[0]

    token, got = map(np.asarray, write(params, batch))
    longer = dict(batch)
    end, count = batch["text_mask"].sum(1), batch["sizes"].sum(1)
    longer["ids"], longer["text_mask"] = batch["ids"].copy(), batch["text_mask"].copy()
    longer["positions"] = batch["positions"].copy()
    shown = (batch["ids"] == config.image_id) & batch["text_mask"]
    for row in range(2):
        place = end[row] - shown[row].sum() + count[row]
        if longer["ids"][row, end[row]] == config.image_id:  # a surplus one, of padding
            longer["ids"][row, -1] = config.image_id
        longer["ids"][row, end[row]], longer["text_mask"][row, end[row]] = token[row, 0], True
        longer["positions"][row, place] = longer["positions"][row, :place].max() + 1
    tokens, logits = jax.tree.map(np.asarray, reading(config)(params, longer))
    last = np.where(tokens.valid, np.arange(tokens.valid.shape[1]), 0).max(1)
    want = logits[np.arange(2), last]
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize(
    ("method", "keep", "message"),
    [
        ("uniform", 4, "want a share"),
        ("fastervlm", 0.5, "class token"),
        ("fopru", 0.5, "reads layers of the tower"),
        ("aim", 0.5, "merges tokens on a grid"),
    ],
)
def test_what_cannot_be_had(method, keep, message):
    with pytest.raises(ValueError, match=message):
        zoo.create(BASE, reducer=method, keep=keep)


def test_levels():
    reducer = zoo.config(BASE, reducer="uniform", keep=0.5).reducer
    with pytest.raises(ValueError, match="levels"):
        dataclasses.replace(zoo.config("qwen3_vl_tiny"), reducer=reducer)
