"""MMTok: words and padding, and what greedy coverage promises."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import REPO
from tests.models.draw import draw
from zoo.models.core import registry
from zoo.models.core.types import Features
from zoo.models.parts.reduce.base import Seen, Text
from zoo.models.parts.reduce.report import seen_cells
from zoo.models.parts.reduce.station import shown_tokens
from zoo.models.reduction.mmtok import MMTok, coverage, keywords, padding, pick
from zoo.processors.pixels import shown_in_square

RECORDED = json.loads((REPO / "tests/goldens/mmtok/text_and_padding.json").read_text("utf-8"))


@pytest.mark.parametrize(
    ("question", "words"), zip(RECORDED["questions"], RECORDED["filtered"], strict=True)
)
def test_words_of_a_question(question, words):
    assert keywords(question) == words


@pytest.mark.parametrize(
    ("size", "facts"), RECORDED["padding_patch_indices_first_last_count"].items()
)
def test_patches_of_padding(size, facts):
    found = padding(tuple(map(int, size.strip("()").split(",")))).tolist()
    assert len(found) == facts[2]
    assert ([found[0], found[-1]] if found else [None, None]) == facts[:2]


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (1000, 90), (336, 336)])
def test_padding_of_a_batch(size):
    """Where pictures lie in their squares, as processors say it, is where no padding is."""
    boxes = jnp.asarray([[shown_in_square(size[::-1], 336)]], jnp.int32)
    seen = shown_tokens(boxes, (24, 24), 14)[0, 0]
    assert sorted(padding(size).tolist()) == np.flatnonzero(~np.asarray(seen)).tolist()


def test_no_padding_is_kept():
    """A wide picture in a square: its two rows in the middle are left, fewer than may be kept."""
    config = registry.config("llava_tiny", reducer="mmtok", keep=12)
    model, shapes = config.build(), config.inputs(2)
    params = draw(jax.eval_shape(model.init, jax.random.key(0), shapes)["params"])
    side = config.tower.image_size
    ids = np.full(shapes["ids"].shape, 5, np.int32)
    ids[:, 1] = config.image_id
    batch = {
        "pixels": np.random.default_rng(0).normal(size=shapes["pixels"].shape).astype(np.float32),
        "ids": ids,
        "shown": np.array([[[side // 4, 0, 3 * side // 4, side]], [[0, 0, side, side]]], np.int32),
    }
    stream = jax.jit(lambda p, b: model.apply({"params": p}, b, None, method="stream")[0])
    wide, whole = seen_cells(stream(params, batch).tokens)
    assert sorted(wide[wide >= 0].tolist()) == list(range(4, 12))
    assert (whole >= 0).sum() == 12


def test_every_patch_of_padding():
    want = RECORDED["padding_patch_indices_480x640_width_height"]
    assert padding((480, 640)).tolist() == want


def drawn(n=12, m=5, seed=0):
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(rng.normal(size=(1, 1, *shape)), jnp.float32)
        for shape in ((m, 8), (n, 8), (n, 6))
    )


def test_gains_never_grow_and_all_can_be_kept():
    text, tokens, features = drawn()
    read, real = jnp.ones((1, 1, 5), bool), jnp.ones((1, 1, 12), bool)
    gain = coverage(text, tokens, features, read=read, real=real)
    rows = np.asarray(gain.sum(-1))[0, 0]
    np.testing.assert_allclose(rows, [1 / 5] * 5 + [0.5 / 12] * 12, rtol=1e-5)
    order = np.asarray(pick(gain, 12, real))[0, 0]
    assert sorted(order) == list(range(12))
    covered = np.maximum.accumulate(np.asarray(gain)[0, 0][:, order], 1).sum(0)
    steps = np.diff(covered, prepend=0)
    assert (np.diff(steps) <= 1e-6).all()


def test_without_alpha_the_text_alone_decides():
    text, tokens, features = drawn(seed=1)
    read, real = jnp.ones((1, 1, 5), bool), jnp.ones((1, 1, 12), bool)
    chosen = [
        pick(coverage(text, tokens, seen, read=read, real=real, alpha=alpha), 4, real).tolist()
        for alpha in (0.0, 50.0)
        for seen in (features, features[..., ::-1, :])
    ]
    assert chosen[0] == chosen[1] and chosen[2] != chosen[3]


def test_padding_is_not_seen():
    """Masked words and tokens change nothing, and tokens that are none are never kept."""
    text, tokens, features = drawn(seed=2)
    mask = jnp.arange(12)[None, None] < 9
    read = jnp.arange(5)[None] < 3

    @jax.jit
    def index(noise):
        wild = jnp.where(mask[..., None], 0, noise)
        seen = Seen(
            tokens + wild, Features(features + wild[..., :6], (3, 4)), mask, None, grid=(3, 4)
        )
        said = text[:, 0] + jnp.where(read[..., None], 0, noise)
        kept = MMTok(4).reduce(seen, Text(jnp.zeros((1, 5), int), said, read), keep=4)
        return kept.index, kept.mask

    (first, there), (second, _) = index(0.0), index(7.0)
    assert first.tolist() == second.tolist() and there.all() and (first < 9).all()


def test_published_budgets_and_what_is_refused():
    assert registry.config("mmtok_llava_1_5_7b.4").slots == 4
    assert registry.config("mmtok_llava_next_13b").slots == 5 * 32
    for wrong in ({"alpha": -0.1}, {"text_temperature": 0.0}, {"vision_temperature": -1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} = .*want"):
            MMTok(**wrong)
