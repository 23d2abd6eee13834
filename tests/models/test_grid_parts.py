"""Parts of vision systems: repeated blocks, dropped paths, windows, what is said of bad images."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.draw import draw
from zoo.costing import measure
from zoo.models.core.keytable import Ignored, Row, Table, norm_rows
from zoo.models.core.names import tree_names
from zoo.models.parts.layers.depthwise import Filters, each_filtered
from zoo.models.parts.layers.embed import check_pixels
from zoo.models.parts.layers.gates import DropPath, SqueezeExcite, drop_path_stages
from zoo.models.parts.layers.linear import dense
from zoo.models.parts.layers.norms import BatchNorm
from zoo.models.parts.layers.repeat import Repeat
from zoo.models.parts.layers.stack import unstack
from zoo.models.parts.layers.window import (
    APART,
    partition,
    relative_index,
    reverse,
    shift,
    shift_mask,
)
from zoo.models.parts.towers.swin import SwinBlock
from zoo.models.parts.towers.vit import ViTConfig


class Block(nn.Module):
    """Norm, linear map, dropped path; `factor` is static, `rate` and `plus` differ per block."""

    width: int = 6
    factor: float = 1.0

    def setup(self):
        self.norm = BatchNorm()
        self.up = dense(self.width, self.width, bias=True)
        self.drop_path = DropPath()

    def __call__(self, x, *, rate=None, plus=0.0, train=False):
        y = self.factor * jnp.tanh(self.up(self.norm(x, train=train))) + plus
        return x + self.drop_path(y, rate, train=train)


@pytest.mark.parametrize(("blocks", "depth"), [((Block(),), 3), ((Block(), Block(factor=0.5)), 11)])
def test_repeat(blocks, depth):
    """As one block after another: outputs, statistics, gradients; few and many, in turns; and the
    same from rows that are apart, as a CPU keeps them for inference.
    """
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3, 6)), jnp.float32)
    plus = np.linspace(-1, 1, depth, dtype=np.float32)
    module = Repeat(tuple(block.clone(parent=None) for block in blocks), depth)
    boxed = jax.jit(module.init)(jax.random.key(0), x)
    names = tree_names(boxed["params"])
    assert names["layers"]["up"]["kernel"] == ("layers", "embed", "mlp")
    variables = nn.unbox(boxed)
    kernel = np.asarray(variables["params"]["layers"]["up"]["kernel"])
    assert kernel.shape == (depth, 6, 6)
    assert len(np.unique(kernel[:, 0, 0])) == depth  # each is drawn for itself

    def repeated(params, train):
        own, each = {**variables, "params": params}, {"plus": plus, "rate": None}
        y, changed = module.apply(own, x, train=train, each=each, mutable=["stats"])
        return (y**2).mean(), changed["stats"]

    def one_by_one(params, train):
        y, changes = x, []
        for i in range(depth):
            rows = (params["layers"], variables["stats"]["layers"])
            row = jax.tree.map(lambda leaf, i=i: leaf[i], rows)
            own, block = {"params": row[0], "stats": row[1]}, blocks[i % len(blocks)]
            y, changed = block.apply(own, y, plus=plus[i], train=train, mutable=["stats"])
            changes.append(changed["stats"])
        stats = jax.tree.map(lambda *leaves: jnp.stack(leaves), *changes)
        return (y**2).mean(), {"layers": stats}

    @jax.jit
    def every(params, apart):
        runs = [(run, train) for run in (repeated, one_by_one) for train in (False, True)]
        found = [jax.value_and_grad(run, has_aux=True)(params, train) for run, train in runs]
        return found, repeated(apart, False)[0]

    apart = unstack(variables["params"], names)
    found, value = every(variables["params"], apart)
    for got, want in zip(*map(jax.tree.leaves, (found[:2], found[2:])), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(value, found[0][0][0], rtol=1e-5)


def test_dropped_paths():
    """For a share of the examples the branch is missing, for the others it is larger; none without
    training; every block draws for itself.
    """
    drop, x = DropPath(), jnp.ones((4000, 2))
    rngs = {"dropout": jax.random.key(0)}
    y = drop.apply({}, x, 0.25, train=True, rngs=rngs)
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert abs(float((y[:, 0] == 0).mean()) - 0.25) < 0.03
    np.testing.assert_array_equal(y[:, 0], y[:, 1])
    assert drop.apply({}, x, 0.25, train=False) is x
    assert drop.apply({}, x, None, train=True) is x
    first, second = drop_path_stages((2, 3), 0.4)
    np.testing.assert_allclose([*first, *second], [0, 0.1, 0.2, 0.3, 0.4], rtol=1e-6)
    assert drop_path_stages((2, 3), 0.0) == (None, None)
    with pytest.raises(ValueError, match="want 0 <= drop_path < 1"):
        drop_path_stages((2,), 1.0)

    module, x = Repeat(Block(parent=None), 11), jnp.ones((64, 1, 6))
    variables = draw(jax.eval_shape(module.init, jax.random.key(0), x))
    rate = {"rate": np.full(11, 0.5, np.float32)}

    @jax.jit
    def both(key):
        dropped = module.apply(variables, x, train=True, each=rate, rngs={"dropout": key})
        return dropped, module.apply(variables, x, each=rate), module.apply(variables, x)

    dropped, plain, without = both(jax.random.key(2))
    np.testing.assert_array_equal(plain, without)
    # Of 2 ** 11 ways through eleven blocks, 64 examples hardly ever take the same.
    assert len(np.unique(np.asarray(dropped)[:, 0, 0])) > 50


def test_dropped_paths_of_a_transformer():
    """Both halves of a layer; without training, nothing changes."""
    sizes = {"image_size": 8, "patch_size": 4, "width": 8, "depth": 6, "num_heads": 2, "mlp_dim": 8}
    plain, dropping = ViTConfig(**sizes).build(), ViTConfig(**sizes, drop_path=0.5).build()
    pixels = jnp.ones((64, 8, 8, 3))
    variables = draw(jax.eval_shape(plain.init, jax.random.key(1), pixels))

    @jax.jit
    def three(key):
        dropped = dropping.apply(variables, pixels, train=True, rngs={"dropout": key})
        same = dropping.apply(variables, pixels)
        return dropped.tokens, same.tokens, plain.apply(variables, pixels).tokens

    dropped, same, want = three(jax.random.key(2))
    np.testing.assert_allclose(same, want, rtol=1e-5, atol=1e-6)
    # The first layer drops nothing, the others their halves with rates up to a half.
    assert len(np.unique(np.asarray(dropped)[:, 0, 0])) > 20


@pytest.mark.parametrize(
    ("grid", "window"), [((6,), (3,)), ((6, 8), (3, 2)), ((4, 6, 2), (2, 2, 2))]
)
def test_windows(grid, window):
    x = np.random.default_rng(0).normal(size=(2, *grid, 5)).astype(np.float32)
    cut = partition(x, window)
    first = x[(0, *(slice(w) for w in window))]
    np.testing.assert_array_equal(cut[0, 0], first.reshape(-1, 5))
    np.testing.assert_array_equal(reverse(cut, window, grid), x)
    by = tuple(w // 2 for w in window)
    back = shift(shift(jnp.asarray(x), by), tuple(-step for step in by))
    np.testing.assert_array_equal(back, x)
    index = relative_index(window)
    assert index.shape == (cut.shape[2],) * 2
    sides = [2 * w - 1 for w in window]
    assert index.min() == 0 and index.max() == np.prod(sides) - 1
    assert (np.diag(index) == (np.prod(sides) - 1) // 2).all()
    with pytest.raises(ValueError, match="in multiples of"):
        partition(x[:, 1:], window)


def test_masks():
    """Tokens that a shift brings together from opposite ends do not see each other, and have no
    weight at all.
    """
    grid, window, by = (6, 6), (3, 3), (1, 1)
    mask = np.asarray(shift_mask(grid, window, by))
    places = np.arange(36).reshape(1, 6, 6, 1)
    moved = partition(np.asarray(shift(jnp.asarray(places), by)), window)[0, :, :, 0]
    rows, columns = moved // 6, moved % 6
    far = (np.abs(rows[:, :, None] - rows[:, None]) > 2) | (
        np.abs(columns[:, :, None] - columns[:, None]) > 2
    )
    np.testing.assert_array_equal(mask != 0, far)
    assert np.exp(np.float32(APART)) < 1e-40
    assert shift_mask(grid, window, (0, 0)) is None


def test_one_window_is_plain_attention():
    """With a bias for every pair."""
    block = SwinBlock(width=8, num_heads=2, mlp_dim=8, window=(3, 3), shift=(0, 0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 3, 8)), jnp.float32)
    variables = draw(jax.eval_shape(block.init, jax.random.key(1), x))

    def plain(m, x):
        tokens = x.reshape(2, 9, 8)
        q, k, v = (part(tokens) for part in (m.q, m.k, m.v))
        logits = jnp.einsum("blhe,bshe->bhls", q, k) / 2 + m.relative_bias()
        y = jnp.einsum("bhls,bshe->blhe", jax.nn.softmax(logits, -1), v)
        return m.out(y).reshape(x.shape)

    both = jax.jit(lambda v: [block.apply(v, x, method=m) for m in ("attention", plain)])
    np.testing.assert_allclose(*both(variables), rtol=1e-5, atol=1e-5)


def test_squeeze_and_excite():
    layer = SqueezeExcite(6, 2)
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 6)).astype(np.float32)
    params = draw(jax.eval_shape(layer.init, jax.random.key(1), x))["params"]
    reduce, expand = params["reduce"], params["expand"]
    hidden = np.maximum(x.mean((1, 2)) @ reduce["kernel"] + reduce["bias"], 0)
    gate = 1 / (1 + np.exp(-(hidden @ expand["kernel"] + expand["bias"])))
    got = jax.jit(layer.apply)({"params": params}, x)
    np.testing.assert_allclose(got, x * gate[:, None, None], rtol=1e-5, atol=1e-6)


def test_bad_images():
    """One clear line for each mistake."""
    good = np.zeros((2, 8, 8, 3), np.float32)
    check_pixels(good, side=8, multiple=4)
    for bad, options, message in (
        (good.astype(np.uint8), {}, "got uint8, want floats"),
        (good[..., :2], {}, r"got \(2, 8, 8, 2\), want \[..., height, width, 3\]"),
        (good.transpose(0, 3, 1, 2), {}, "channels last"),
        (good, {"side": 16}, r"want \[..., 16, 16, 3\]"),
        (good[:, :6], {"multiple": 4}, "multiples of 4"),
        (good[:, :2], {"least": 4}, "sides of 4 pixels or more"),
        (good[0, 0], {}, r"got \(8, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            check_pixels(bad, **options)


def test_bad_numbers():
    """With `jax.debug_nans`, images that are not finite are refused, also in a compiled model."""
    pixels = np.zeros((1, 4, 4, 3), np.float32)
    pixels[0, 2, 1, 0] = np.nan

    @jax.jit
    def model(pixels):
        check_pixels(pixels)
        return pixels * 2

    check_pixels(pixels)
    with jax.debug_nans(True):
        for run in (check_pixels, model):
            with pytest.raises(ValueError, match=r"NaN or infinite, the first at \(0, 2, 1, 0\)"):
                run(pixels)


def test_tables_with_statistics():
    """Counts of batches are passed over where they are there, and never written."""
    table = Table((Row("up", "up.weight"), *norm_rows("norm", "bn.{}", steps=(3, 5), stats=True)))
    whole = table.under("tower", "model.").with_stats()
    ones, zeros = np.ones((2, 4), np.float32), np.zeros((2, 4), np.float32)
    tree = {
        "params": {"tower": {"up": ones, "norm": {"scale": ones, "bias": zeros}}},
        "stats": {"tower": {"norm": {"mean": zeros, "var": ones}}},
    }
    state = whole.save(tree)
    assert "model.bn.5.running_var" in state and not any("num_batches" in key for key in state)
    counted = {**state, "model.bn.3.num_batches_tracked": np.int64(7)}
    for given in (state, counted):
        jax.tree.map(np.testing.assert_array_equal, whole.load(given, tree), tree)
    assert any(isinstance(row, Ignored) for row in whole.rows)


@pytest.mark.parametrize(
    ("shape", "sides", "strides", "padding", "dilation", "times"),
    [
        ((2, 9, 10, 3), (3, 5), (1, 1), (1, 2), (1, 1), 1),
        ((2, 9, 10, 3), (3, 3), (2, 2), (1, 1), (1, 1), 2),
        ((2, 11, 8, 4), (3, 3), (1, 2), (2, 1), (2, 1), 1),
        ((1, 14, 14, 2), (2, 2), (3, 3), (0, 0), (1, 1), 1),
        ((1, 5, 6, 7, 2), (3, 3, 3), (1, 2, 1), (1, 1, 1), (1, 1, 1), 2),
    ],
)
def test_channels_filtered_by_taps_are_convolved(shape, sides, strides, padding, dilation, times):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], shape)
    kernel = jax.random.normal(keys[1], (*sides, 1, shape[-1] * times))
    filters = Filters(strides, padding, dilation, shape[-1])
    want, back = jax.vjp(jax.jit(filters), x, kernel)
    dy = jax.random.normal(keys[2], want.shape)
    got = jax.jit(filters.by_taps)(x, kernel), *jax.jit(filters.gradients_by_taps)(x, kernel, dy)
    for ours, theirs in zip(got, (want, *back(dy)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_channels_filtered_alone_count_as_a_convolution():
    filters = Filters((1, 1), (1, 1), (1, 1), 4)
    x, kernel = jax.ShapeDtypeStruct((2, 6, 5, 4), "float32"), jnp.ones((3, 3, 1, 4))
    flops, _ = measure(lambda kernel, x: each_filtered(filters, x, kernel), kernel, x)
    assert flops.total == flops.weights == 2 * 9 * 2 * 6 * 5 * 4
