"""What must hold for every method that leaves vision tokens out, by its name.

A new method is tested here without a new test. What its figures are, and what it keeps, is tested
in a file of its own.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.models.draw import draw
from zoo.models.core import registry
from zoo.models.core.errors import UsageError
from zoo.models.parts.reduce.base import Reducer, num_kept, schedule
from zoo.models.parts.reduce.report import kept_by_cell, seen_cells
from zoo.processors import tiling

METHODS = registry.reducers()
NO_IDENTITY = {"atp_llava", "zipvl"}  # for which `keep` is a bound, and not what remains
IN_LAYERS = {"crossget"}  # which add parameters to layers, that are not there where all is kept
EACH_LAYER = {"zipvl"}  # whose layers choose anew among all tokens
AT_FIRST = {"yopo"}  # whose later layers run none
ROUNDED = {"zipvl"}  # which decode with a rounded cache
BASE = "llava_tiny"
DEPTH = 6  # of the decoder, so that methods with stages have layers between them
ROWS, TEXT, ANSWER = 3, 12, 2


@functools.cache
def config(method=None, base=BASE, **overrides):
    if method is not None:
        overrides["reducer"] = method
    return registry.config(base, **{"decoder.depth": DEPTH, **overrides})


@functools.cache
def params(method=None, base=BASE):
    made = config(method, base, **({} if method is None else {"keep": 0.5}))
    shapes = jax.eval_shape(made.build().init, jax.random.key(0), made.inputs(1))["params"]
    return draw(shapes)


def prompts(base=BASE, rows=ROWS, seed=0):
    """A batch of prompts of unequal lengths, with a picture each, and room for an answer."""
    made, rng = config(base=base), np.random.default_rng(seed)
    side = made.tower.image_size
    ids = rng.integers(4, made.decoder.vocab_size, (rows, TEXT + ANSWER)).astype(np.int32)
    ids[:, 1] = made.image_id
    place = np.arange(TEXT + ANSWER)
    batch = {
        "ids": ids,
        "text_mask": place < rng.integers(6, TEXT, (rows, 1)),
        "guide": np.broadcast_to(place < TEXT, ids.shape),
    }
    sizes = [(side, side), (2 * side, side), (side, 2 * side)]
    tiles, places = [1] * rows, {}
    if base != BASE:
        readings = [[READ[base](sizes[i % 3], side)] for i in range(rows)]
        tiles = [row[0].tiles for row in readings]
        places = tiling.pack(readings, tokens=made.tile_tokens)
    pixels = [[rng.normal(size=(n, side, side, 3)).astype(np.float32)] for n in tiles]
    return {**batch, **places, "pixels": tiling.stack_tiles(pixels)}


def in_tiles(size, side):
    resolutions = [(a * side, b * side) for a, b in ((1, 2), (2, 1), (2, 2))]
    return tiling.anyres(size, resolutions, tile=side, grid=(4, 4))


def interpolated(size, side):
    twice = (2 * size[0], 2 * size[1])
    return tiling.anyres(twice, [(2 * side, 2 * side)], max_tiles=2, tile=side, grid=(4, 4))


def one_by_one(size, side):
    return tiling.whole_tiles(size[0] * size[1] // side**2, 4)


READ = {
    "llava_next_tiny": in_tiles,
    "llava_onevision_tiny": interpolated,
    "internvl_tiny": one_by_one,
}


@functools.cache
def runner(made, grads=False):
    """Of every row the logits after its last token; the vision tokens that enter the decoder, the
    tokens that leave it, the aux; and gradients, if asked for.
    """
    model = made.build()

    def read(self, batch):
        stream, memory = self.stream(batch, None)
        output, _, aux = self.decoder.run(stream, None, memory)
        last = jnp.where(output.tokens.valid, jnp.arange(output.hidden.shape[1]), 0).max(-1)
        logits = self.head(output.hidden[jnp.arange(len(last)), last])
        loss = jnp.mean(output.hidden.astype(jnp.float32) ** 3)
        return loss, (logits, stream.tokens, output.tokens, aux)

    def run(params, batch):
        return model.apply({"params": params}, batch, method=read)

    return jax.jit(jax.value_and_grad(run, has_aux=True) if grads else run)


def close(got, want, tolerance=2e-5):
    np.testing.assert_allclose(got, want, atol=tolerance * float(jnp.abs(want).max()), rtol=0)


def with_others(batch, row, seed=9):
    """The batch with other texts and pictures in all rows but one."""
    rng, others = np.random.default_rng(seed), np.arange(len(batch["ids"])) != row
    changed = {name: np.array(array) for name, array in batch.items()}
    changed["ids"][others] = np.where(
        batch["ids"][others] == 3, 3, rng.integers(4, 300, batch["ids"][others].shape)
    )
    shape = changed["pixels"][others].shape
    changed["pixels"][others] = rng.normal(size=shape).astype(np.float32)
    return changed


def seen_count(tokens, modality=1):
    return np.asarray(tokens.valid & (tokens.modality == modality)).sum(-1)


@pytest.mark.parametrize("method", sorted(set(METHODS) - NO_IDENTITY))
def test_keeping_all_is_the_plain_model(method):
    whole = params(method)
    plain = {name: whole[name] for name in whole if name != "reducer"}
    if method in IN_LAYERS:
        whole = plain = params()
    _, (got, *_) = runner(config(method, keep=1.0))(whole, prompts())
    _, (want, *_) = runner(config())(plain, prompts())
    close(got, want, 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_left(method):
    """Counts keep to the bound, text stays, no row depends on another, gradients are finite."""
    run, batch = runner(config(method, keep=0.5), grads=True), prompts()
    (_, (logits, first, last, aux)), grads = run(params(method), batch)
    left = seen_count(last) if method not in EACH_LAYER | AT_FIRST else np.ones(ROWS, int)
    assert ((left <= 8) & (left >= 1)).all()
    assert seen_count(last, 0).tolist() == (batch["text_mask"].sum(-1) - 1).tolist()
    other = run(params(method), with_others(batch, 1))[0][1][0]
    close(logits[1], other[1])
    assert np.abs(logits[0] - other[0]).max() > 1e-3
    kept = kept_by_cell(aux, 16, first=seen_cells(first))
    assert kept.shape == (DEPTH, ROWS, 16)
    assert (kept.sum(-1)[-1] <= 8).all()
    assert kept.any(-1).all() if method not in AT_FIRST else (kept.sum(-1).mean(0) == 8).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert np.abs(grads["tower"]["patch"]["kernel"]).max() > 0


@pytest.mark.parametrize("method", sorted(set(METHODS) - ROUNDED))
def test_decoding_equals_reading_all(method):
    """Logits from the cache are those of the whole sequence, read again with the answer."""
    made, batch = config(method, keep=0.5), prompts()
    batch["text_mask"][:] = True
    model, cut = made.build(), ("ids", "text_mask", "guide")
    prompt = {name: x[:, :TEXT] if name in cut else x for name, x in batch.items()}

    @jax.jit
    def read(params, batch):
        return model.apply({"params": params}, batch, room=ANSWER, method="prefill")

    @jax.jit
    def write(params, ids, cache):
        return model.apply({"params": params}, ids, cache, method="decode")

    _, cache = read(params(method), prompt)
    for place in range(TEXT, TEXT + ANSWER):
        logits, cache = write(params(method), batch["ids"][:, place : place + 1], cache)
    (_, (want, *_)), _ = runner(made, grads=True)(params(method), batch)
    close(logits, want)


def needs_class_token(method):
    """Whether the method is refused where there is none."""
    tower = dataclasses.replace(config().tower, class_token=False)
    try:
        for part in registry.reducer(method):
            if isinstance(part, Reducer):
                part.wants(tower, 2)
    except ValueError:
        return True
    return False


def merges(method):
    """Whether it merges tokens of tiles, and so wants these as the model has them."""
    parts = registry.reducer(method)
    return any(isinstance(p, Reducer) and p.merges and p.point != "slots" for p in parts)


# Of the pairs one in three is run; the others take minutes.
PAIRS = [
    pytest.param(method, base, marks=() if (i + j) % 3 == 0 else pytest.mark.thorough)
    for i, method in enumerate(METHODS)
    for j, base in enumerate(READ)
]


@pytest.mark.parametrize(("method", "base"), PAIRS)
def test_tiles(method, base):
    """Pictures in tiles, with newlines, interpolated, or merged by the connector: about the share
    of the tokens remains, each in its place, and batches are as rows alone.
    """
    batch = prompts(base)
    if not config(base=base).tower.class_token and needs_class_token(method):
        with pytest.raises(ValueError, match="class token"):
            config(method, base, keep=0.5)
        return
    if merges(method) and (base == "internvl_tiny" or "blend" in batch):
        with pytest.raises(ValueError, match="merges"):
            runner(config(method, base, keep=0.5))(params(method, base), batch)
        return
    made = config(method, base, keep=0.5)
    run, parameters = runner(made), params(method, base)
    _, (logits, first, last, aux) = run(parameters, batch)
    most = batch["tiles"][..., 0].sum(-1) * made.tile_tokens // 2
    most = np.maximum(most, -(-seen_count(first) // 2))  # in the decoder, newlines count too
    left = seen_count(last)
    if method in EACH_LAYER:
        left = (np.asarray(aux[-1]["kept_cells"]) >= 0).sum(-1)
    assert ((left <= most) & ((left >= 1) | (method in AT_FIRST))).all()
    newline = batch["pixels"].shape[1] * made.tile_tokens
    for row in seen_cells(last):
        cells = row[(row >= 0) & (row != newline)]
        assert len(set(cells.tolist())) == len(cells)
    _, (other, *_) = run(parameters, with_others(batch, 1))
    close(logits[1], other[1])


@pytest.mark.parametrize(
    "method", ["uniform", "aim", pytest.param("pyramiddrop", marks=pytest.mark.thorough)]
)
def test_frames_of_a_video(method):
    """Of three frames of four pooled tokens, half: of each frame, or within the decoder of all."""
    base, frames = "llava_onevision_tiny", 3
    plain, side = config(base=base), config(base=base).tower.image_size
    reading = tiling.pooled_frames(frames, (4, 4))
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 60, (1, 9)).astype(np.int32)
    ids[:, 1] = plain.image_id
    batch = {
        "ids": ids,
        "pixels": rng.normal(size=(1, frames, side, side, 3)).astype(np.float32),
        **tiling.pack([[reading]], tokens=plain.tile_tokens),
    }
    keep = (0.5, 0.5, 0.5) if method == "pyramiddrop" else 0.5
    made = config(method, base, keep=keep)
    _, (_, first, last, _) = runner(made)(params(base=base), batch)
    cells = seen_cells(first)[0]
    whole = 4 * frames + 1  # with the newline
    if method == "pyramiddrop":
        assert seen_count(first) == whole and seen_count(last) == whole // 2
        return
    assert np.bincount(cells[cells >= 0] // 4, minlength=4).tolist() == [2, 2, 2, 0]


# ------------------------------------------------------------------ names and numbers


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_kept(method):
    """Nothing, less, more than there is, and schedules of a length that no method has."""
    for keep in (0, -3, 0.0, 1.5, True, (4, 2) * 4, 17):
        with pytest.raises(ValueError, match=r"keep = .*want"):
            registry.config(BASE, reducer=method, keep=keep, **{"decoder.depth": DEPTH})


def test_schedules():
    assert num_kept(0.29, 16) == 4 and num_kept(0.01, 16) == 1 and num_kept(16, 16) == 16
    assert schedule((0.5, 4), 2, 16) == (8, 4) and schedule(3, 2, 16) == (3, 3)
    for keep in ((8, 4, 2), (4, 8), (8, 20)):
        with pytest.raises(ValueError, match=r"keep = .*want"):
            schedule(keep, 2, 16)


def test_a_name_stands_for_a_configuration():
    made = registry.config(BASE, reducer="fastervlm", keep=3)
    assert isinstance(made.reducer, Reducer) and made.slots == 3
    assert registry.override(made, {"keep": 0.5}, "x").slots == 8
    assert registry.override(made, {"reducer": None}, "x") == registry.config(BASE)
    with pytest.raises(UsageError, match="did you mean fastervlm"):
        zoo.create(BASE, reducer="fastvlm")
    with pytest.raises(UsageError, match="no decoder"):
        zoo.config("siglip_base_patch16_224", reducer="fastervlm")
    with pytest.raises(ValueError, match="class token"):
        zoo.create("llava_onevision_tiny", reducer="fastervlm")
    with pytest.raises(ValueError, match="keeps the grid"):
        zoo.create("mqt_tiny", reducer="fastervlm", keep=2)
    with pytest.raises(ValueError, match="Reducer"):
        dataclasses.replace(registry.config(BASE), reducer="fastervlm")


def test_positions_stay_where_they_are_asked_to():
    reducer = dataclasses.replace(registry.reducer("fastervlm", 4)[0], positions="original")
    for base, given in ((BASE, prompts()), ("llava_next_tiny", prompts("llava_next_tiny"))):
        every = config(base=base).build()
        kept = dataclasses.replace(config(base=base), reducer=reducer).build()
        weights = params(base=base)

        def tokens(model, weights=weights, given=given):
            return model.apply({"params": weights}, given, None, method="stream")[0].tokens

        want, got = (
            jax.jit(tokens, static_argnums=0)(every),
            jax.jit(tokens, static_argnums=0)(kept),
        )
        for row in range(ROWS):
            text = np.asarray(want.modality[row] == 0) & np.asarray(want.valid[row])
            ours = np.asarray(got.modality[row] == 0) & np.asarray(got.valid[row])
            if base == BASE:
                close(got.position[row][ours], want.position[row][text], 0)
                where = dict(zip(np.asarray(want.tags["cell"][row]).tolist(), want.position[row]))
                for cell, place in zip(
                    np.asarray(got.tags["cell"][row]).tolist(), got.position[row]
                ):
                    assert cell < 0 or where[cell] == place
            assert (np.diff(np.asarray(got.position[row])[np.asarray(got.valid[row])]) >= 1).all()
