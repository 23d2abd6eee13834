"""From coarse to fine: the model against the same steps taken one after the other on one picture,
with sequences as long as they are. The parts are compared with the official ones in tests/parity.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.models.draw import draw
from zoo.models.core.tree import size_by_part
from zoo.models.core.types import Stream, Tokens
from zoo.models.parts.layers.resize import resize_bilinear
from zoo.processors import pyramid

CONFIG = zoo.config("lrs_vqa_tiny")
SIDE, WHOLE = 2, 16
SIZES = ((60, 33), (20, 70))
PROMPTS = ([5, 3, 9, 10, 11], [3, 8, 12])


def parameters(config):
    return draw(jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))["params"])


@pytest.fixture(scope="module")
def setting():
    rng = np.random.default_rng(0)
    pictures = [rng.normal(size=(*size, 3)).astype(np.float32) for size in SIZES]
    batch = pyramid.pyramid_batch(pictures, block=16, base=32, side=SIDE)
    ids = np.zeros((2, max(map(len, PROMPTS))), np.int32)
    for row, prompt in zip(ids, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    batch["ids"] = ids
    batch["text_mask"] = np.arange(ids.shape[1]) < np.array([[len(p)] for p in PROMPTS])
    return pictures, batch, parameters(CONFIG)


LENGTH, TILES = 120, 16
"""What sequences and batches of tiles are filled up to, so that one program serves all."""


@functools.partial(jax.jit, static_argnames="model")
def encoded(model, params, tiles):
    """The tokens of tiles, all of them and half as many per side."""
    made = model.apply({"params": params}, tiles[None], method="encode_image").tokens.tokens[0]
    return made, resize_bilinear(made.reshape(len(made), 4, 4, -1), SIDE, SIDE)


@functools.partial(jax.jit, static_argnames="model")
def embedded(model, params, ids):
    return model.apply({"params": params}, ids, method=lambda m, ids: m.decoder.embed(ids))


@functools.partial(jax.jit, static_argnames="model")
def scores(model, params, hidden, valid, part):
    """What the region focus module says of a sequence [L, D]."""
    tokens = Tokens.sequence(jnp.ones((1, LENGTH), bool)).replace(valid=valid[None])
    look = lambda m, stream, part: m.focus(stream, part)
    stream = Stream(hidden[None], tokens)
    return model.apply({"params": params}, stream, part[None], method=look)[0][0]


@functools.partial(jax.jit, static_argnames="model")
def logits_after(model, params, hidden, length):
    """Of the token after the first `length` of a sequence [L, D]."""

    def read(m, stream):
        stream, _, _ = m.decoder.run(stream)
        return m.decoder.head(stream.hidden[0, length - 1])

    valid = jnp.arange(LENGTH) < length
    stream = Stream(hidden[None], Tokens.sequence(valid[None]))
    return model.apply({"params": params}, stream, method=read)


def filled(rows, length):
    """Rows [n, ...] and zeros up to `length` of them, float32."""
    more = [(0, length - len(rows))] + [(0, 0)] * (np.ndim(rows) - 1)
    return np.pad(np.asarray(rows, np.float32), more)


def steps(model, params, picture, prompt):
    """The sequence that the decoder reads for one picture, as the official code makes it."""
    ratio = model.config.ratio

    def pooled(tiles):
        return np.asarray(encoded(model, params, filled(tiles, TILES))[1])[: len(tiles)]

    def embed(ids):
        many = np.zeros((1, 8), np.int32)
        many[0, : len(ids)] = ids
        return np.asarray(embedded(model, params, many))[0, : len(ids)]

    def canvas(level, size, tokens):
        """Rows with newlines [rows, columns + 1, D] of tiles, and which cells are real."""
        rows, columns = level.blocks
        width = model.config.decoder.width
        whole = np.zeros((rows * SIDE, columns * SIDE, width))
        real = np.zeros(whole.shape[:2], bool)
        for number, tile in tokens.items():
            y, x = number // columns * SIDE, number % columns * SIDE
            whole[y : y + SIDE, x : x + SIDE], real[y : y + SIDE, x : x + SIDE] = tile, True
        h, w = pyramid.covered(size, whole.shape[:2])
        newline = np.broadcast_to(np.asarray(params["newline"]), (h, 1, width))
        whole = np.concatenate([whole[:h, :w], newline], 1)
        return whole, np.concatenate([real[:h, :w], np.ones((h, 1), bool)], 1)

    def best(local, real):
        """The numbers of the best tokens and of the newlines."""
        first = np.concatenate([before, small, colon])
        hidden = np.concatenate([first, local.reshape(-1, local.shape[-1]), after])
        place = np.arange(LENGTH)
        part = (place >= len(first)) & (place < len(hidden) - len(after))
        valid = place < len(hidden)
        valid[part] = real.ravel()
        weights = np.asarray(scores(model, params, filled(hidden, LENGTH), valid, part))[part]
        order = np.argsort(np.where(real.ravel(), -weights, np.inf), kind="stable")
        ends = np.arange(real.shape[1] - 1, real.size, real.shape[1])
        return np.unique(np.concatenate([order[: int(real.sum() * ratio)], ends]))

    at = prompt.index(CONFIG.image_id)
    before, after = embed(prompt[:at]), embed(prompt[at + 1 :])
    colon, size = embed([CONFIG.separator_id]), picture.shape[:2]
    thumbnail = pyramid.blocks_of(picture, pyramid.thumbnail(size, block=16), 16)[0]
    small = np.asarray(encoded(model, params, filled(thumbnail, TILES))[0])[0]
    levels = pyramid.pyramid(size, block=16, base=32)
    coarse, fine = levels[0], levels[min(1, len(levels) - 1)]
    tiles = pooled(pyramid.blocks_of(picture, coarse, 16).reshape(-1, 16, 16, 3))
    local, real = canvas(coarse, size, dict(enumerate(tiles)))
    row, column = np.divmod(best(local, real), real.shape[1])
    scale = [np.float32(n / m) for n, m in zip(fine.blocks, real.shape, strict=True)]
    down = np.floor(row.astype(np.float32) * scale[0]).astype(int)
    across = np.floor(column.astype(np.float32) * scale[1]).astype(int)
    wanted = np.unique(down * fine.blocks[1] + across)
    tiles = pooled(pyramid.blocks_of(picture, fine, 16).reshape(-1, 16, 16, 3)[wanted])
    local, real = canvas(fine, fine.size, dict(zip(wanted.tolist(), tiles, strict=True)))
    parts = local.reshape(-1, local.shape[-1])[best(local, real)]
    return np.concatenate([before, small, colon, parts, after])


@functools.partial(jax.jit, static_argnames="model")
def run(model, params, batch):
    """What the decoder reads, and what it says then and after one more token."""
    variables = {"params": params}
    stream, _ = model.apply(variables, batch, None, method="stream")
    logits, cache = model.apply(variables, batch, room=1, method="prefill")
    token = logits.argmax(-1)[:, None].astype(jnp.int32)
    more, _ = model.apply(variables, token, cache, method="decode")
    return stream, logits, token, more


def test_the_steps_of_the_official_code(setting):
    """And generation equals reading the whole sequence anew."""
    pictures, batch, params = setting
    model = CONFIG.build()
    stream, logits, token, more = run(model, params, batch)
    for b, (picture, prompt) in enumerate(zip(pictures, PROMPTS, strict=True)):
        hidden = steps(model, params, picture, prompt)
        valid = np.asarray(stream.tokens.valid[b])
        assert valid.sum() == len(hidden) <= CONFIG.text_tokens + stream.slots
        np.testing.assert_allclose(np.asarray(stream.hidden[b])[valid], hidden, atol=1e-4)
        position = np.asarray(stream.tokens.position[b])[valid]
        np.testing.assert_array_equal(position, np.arange(len(hidden)))
        want = logits_after(model, params, filled(hidden, LENGTH), len(hidden))
        np.testing.assert_allclose(logits[b], want, atol=1e-3)
        ids = np.zeros((1, 8), np.int32)
        ids[0, 0] = token[b, 0]
        whole = np.concatenate([hidden, np.asarray(embedded(model, params, ids))[0, :1]])
        want = logits_after(model, params, filled(whole, LENGTH), len(whole))
        np.testing.assert_allclose(more[b], want, atol=1e-3)


def test_fewer_tiles_are_encoded(setting):
    """With a bound that is no bound nothing changes; with one of one tile, one is read."""
    _, batch, params = setting
    tiles = batch["crops"].shape[2]

    def cells(most):
        model = dataclasses.replace(CONFIG, ratio=1.0, max_tiles=most).build()
        run = jax.jit(lambda p, b: model.apply({"params": p}, b, None, method="stream")[0].tokens)
        tokens = run(params, batch)
        cell = np.where(tokens.valid, tokens.tags["cell"], -1)
        return [set(row[(row >= WHOLE) & (row < WHOLE + tiles * 4)]) for row in cell]

    assert cells(tiles) == cells(None)
    assert all(len({(cell - WHOLE) // 4 for cell in row}) == 1 for row in cells(1))


def test_sizes():
    """The module has one more layer than it runs; the rest is a LLaVA with a newline."""
    for name in ("lrs_vqa_qwen2_7b", "lrs_vqa_vicuna_7b"):
        config = zoo.config(name)
        shapes = nn.unbox(
            jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))["params"]
        )
        parts = size_by_part(shapes)
        d = config.decoder
        layers = sum(leaf.size for leaf in jax.tree.leaves(shapes["decoder"]["stack"]))
        assert parts["focus"] == layers // d.depth * (config.focus_depth + 1) + d.width
        assert parts["newline"] == d.width
        keys = zoo.models.core.registry.entry(name).table(config).shapes(shapes)
        assert "model.mm_projector.token_pruner.layers.4.self_attn.q_proj.weight" in keys
        assert "model.mm_projector.mlp_projector.2.bias" in keys


def test_bad_input(setting):
    _, batch, params = setting
    for wrong, match in (
        ({"ratio": 0.0}, "ratio = 0.0"),
        ({"focus_depth": 0}, "focus_depth = 0"),
        ({"max_tiles": 0}, "max_tiles = 0"),
        ({"fine_tiles": 5}, "square numbers"),
        ({"newline": False}, "newline=True"),
    ):
        with pytest.raises(ValueError, match=match):
            dataclasses.replace(CONFIG, **wrong)
    model = CONFIG.build()

    def refused(match, batch, budget=None):
        with pytest.raises(ValueError, match=match):
            jax.eval_shape(
                lambda p, b: model.apply({"params": p}, b, budget, method="stream"), params, batch
            )

    refused("needs crops", {k: v for k, v in batch.items() if k != "crops"})
    refused("keeps a share", batch, 4)
    refused("no square", {k: v for k, v in batch.items() if not k.endswith(("layout", "sizes"))})
