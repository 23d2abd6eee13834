"""VWFormer: sizes and FLOPs of the heads, what a context holds, a head on a tower."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.draw import draw
from zoo.costing import measure
from zoo.models.core.registry import config
from zoo.models.dense.vwformer import SegmenterConfig, VWFormerConfig
from zoo.models.parts.layers.varying_window import SIDE, VaryingWindow, _shifted_copies
from zoo.models.parts.towers.swin import SwinConfig

COUNTS = {
    "vwformer_t": 7_624_726,
    "vwformer_b": 7_855_638,
    "vwformer_l": 8_317_462,
    "vwformer_t.city": 7_032_259,
    "vwformer_b.city": 7_263_171,
    "vwformer_l.city": 7_724_995,
}
GMACS = {"vwformer_t": 33.3, "vwformer_b": 33.6, "vwformer_l": 34.1}


def shapes(config):
    return jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name):
    made = shapes(config(name))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(made)) == COUNTS[name]


@pytest.mark.parametrize("name", GMACS)
def test_flops(name):
    """Published without bilinear resizing, which is two products of matrices here."""
    head = config(name)
    flops, _ = measure(head.build().apply, dict(shapes(head)), head.inputs(1))
    sides = ((32, 64), (16, 64), (64, 128))
    resizing = sum(new * old * (old + new) * head.width for old, new in sides)
    np.testing.assert_allclose(flops.total / 2e9 - resizing / 1e9, GMACS[name], rtol=0.01)


def test_strips_come_from_inside():
    """Windows of 2 cells, contexts of 4: a cell more on both sides."""
    row = jnp.arange(16).reshape(1, 1, 16, 1)
    got = np.asarray(_shifted_copies(row, 2, 2, 2)).ravel()
    np.testing.assert_array_equal(got, [3, *range(16), 12])
    wide = np.asarray(_shifted_copies(row, 4, 2, 2)).ravel()
    np.testing.assert_array_equal(wide, [5, 6, 7, *range(16), 8, 9, 10])


@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
def test_contexts_cost_as_much_as_windows(ratio):
    """Numbers of a context: those of a window, at every ratio."""
    module = VaryingWindow(64, ratio)
    x = jax.ShapeDtypeStruct((1, 16, 24, 64), jnp.float32)
    made = jax.eval_shape(module.init, jax.random.key(0), x)
    found = jax.eval_shape(lambda v, x: module.apply(v, x, method="contexts"), made, x)
    assert found.shape == (1, SIDE, SIDE, ratio * 2, ratio * 3, 64 // ratio**2)


@pytest.mark.parametrize("form", ["mixed", "city"])
def test_on_a_tower(form):
    """Any tower with a pyramid; sides are multiples of 64, not only squares."""
    tower = SwinConfig(
        image_size=128, first_width=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window=4
    )
    head = VWFormerConfig(tower.widths, width=16, num_classes=3, form=form, ratios=(2,), detail=4)
    model = SegmenterConfig(tower, head).build()
    pixels = jax.ShapeDtypeStruct((2, 64, 128, 3), jnp.float32)
    made = jax.eval_shape(model.init, jax.random.key(0), {"pixels": pixels})
    out = jax.eval_shape(model.apply, made, {"pixels": pixels})
    assert out.logits.shape == (2, 16, 32, 3) and out.fused.shape == (2, 8, 16, 16)
    with pytest.raises(ValueError, match="multiples of 8"):
        jax.eval_shape(
            model.apply, made, {"pixels": jax.ShapeDtypeStruct((2, 96, 128, 3), jnp.float32)}
        )


def test_dropped_channels():
    """In training whole channels of an image go; the rest is divided by their share."""
    head = VWFormerConfig((4, 6, 8, 10), 16, 3, ratios=(2,), detail=4, dropout=0.5, image_size=64)
    model, made = head.build(), draw(dict(shapes(head)))
    rng = np.random.default_rng(0)
    batch = {name: rng.normal(size=x.shape).astype("f4") for name, x in head.inputs(2).items()}
    key = {"dropout": jax.random.key(0)}
    run = jax.jit(lambda v: model.apply(v, batch, train=True, mutable=["stats"], rngs=key))
    out, changed = run(made)
    again, _ = run(made)
    assert np.isfinite(out.logits).all() and np.array_equal(out.logits, again.logits)
    assert np.abs(changed["stats"]["fuse"]["norm"]["mean"]).max() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratios": (3,)}, "whose squares divide"),
        ({"ratios": (16,)}, "want 1 to 8"),
        ({"widths": (1, 2)}, "4 levels"),
        ({"form": "ade"}, "want one of mixed, city"),
        ({"image_size": 100}, "multiple of 64"),
        ({"num_heads": 3}, "a divisor of 512"),
        ({"dropout": 1.0}, "0 <= dropout < 1"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        VWFormerConfig(**changes)
