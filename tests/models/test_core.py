"""Names, key tables, norms and positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from zoo.models.core.errors import ZooError
from zoo.models.core.keytable import Constant, Row, Table, conv, flat, linear, split
from zoo.models.core.names import shard, spec_for
from zoo.models.core.types import KV, Tokens
from zoo.models.parts.layers.norms import LayerNorm, RMSNorm
from zoo.models.parts.layers.positions import sincos_2d
from zoo.models.parts.layers.resize import resize_bicubic
from zoo.models.parts.layers.rope import RopeConfig, rotate

MESH = AbstractMesh((2, 4, 2), ("data", "fsdp", "tensor"))


def test_names_resolve_strictly():
    assert spec_for(("embed", "heads", "head_dim"), (8, 4, 16), MESH) == PartitionSpec(
        "fsdp", "tensor"
    )
    assert spec_for(("batch", "seq", "act_embed"), (8, 5, 6), MESH) == PartitionSpec(
        ("data", "fsdp")
    )
    # 4 does not divide 6: replicated
    assert spec_for(("embed", None), (6, 4), MESH) == PartitionSpec()
    with pytest.raises(ValueError, match=r"unknown logical axis 'embd'.*embed"):
        spec_for(("embd",), (8,), MESH)
    with pytest.raises(ValueError, match="used twice"):
        spec_for(("embed", "embed"), (8, 8), MESH)
    with pytest.raises(ValueError, match="one name"):
        spec_for(("embed",), (8, 8), MESH)


def test_shard_without_a_mesh_is_nothing():
    x = jnp.ones((2, 3))
    assert shard(x, "batch", "seq") is x


def table():
    return Table(
        (
            Row("stack/layers/q/kernel", "layers.{}.q.weight", linear(), steps=(0, 2)),
            Row("out/kernel", "out.weight", linear(2)),
            Row(("a", "b"), "ab", split(2, flat)),
            Row("patch", "patch.weight", conv),
            Constant("pos", lambda: np.arange(4.0)),
        )
    ).under("model", "net.")


def params():
    rng = np.random.default_rng(0)
    leaves = {"q": (2, 6, 2, 3), "out": (2, 3, 6), "a": (2, 3), "b": (2, 3), "patch": (2, 2, 3, 5)}
    x = {k: rng.normal(size=s).astype(np.float32) for k, s in leaves.items()}
    return {
        "model": {
            "stack": {"layers": {"q": {"kernel": x["q"]}}},
            "out": {"kernel": x["out"]},
            "a": x["a"],
            "b": x["b"],
            "patch": x["patch"],
        }
    }


def test_key_tables_convert_both_ways():
    ours = params()
    theirs = table().save(ours)
    x = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)
    q = theirs["net.layers.2.q.weight"]
    kernel = ours["model"]["stack"]["layers"]["q"]["kernel"][1]
    np.testing.assert_allclose(
        x @ q.T, np.einsum("ld,dhe->lhe", x, kernel).reshape(4, 6), rtol=1e-5
    )
    assert set(theirs) == set(table().shapes(ours))
    assert theirs["net.ab"].shape == (12,) and theirs["net.patch.weight"].shape == (5, 3, 2, 2)
    jax.tree.map(np.testing.assert_array_equal, table().load(theirs, ours), ours)


def test_key_tables_list_every_problem():
    ours, theirs = params(), table().save(params())
    theirs["net.layers.2.q.wieght"] = theirs.pop("net.layers.2.q.weight")
    theirs["net.out.weight"] = theirs["net.out.weight"][:3]
    with pytest.raises(ZooError) as error:
        table().load(theirs, ours)
    text = str(error.value)
    assert "missing: net.layers.2.q.weight (6, 6) (nearest: net.layers.2.q.wieght)" in text
    assert "extra: net.layers.2.q.wieght" in text
    assert "misshapen: net.out.weight is (3, 6), want (6, 6)" in text
    bad = {**table().save(ours), "net.pos": np.ones(4)}
    with pytest.raises(ZooError, match="another architecture"):
        table().load(bad, ours)
    with pytest.raises(ZooError, match="in no row: model/extra"):
        table().save({"model": {**ours["model"], "extra": np.ones(2)}})


def test_norms():
    x = jax.random.normal(jax.random.key(0), (3, 8)) * 4 + 1
    y, _ = LayerNorm(1e-5).init_with_output(jax.random.key(0), x)
    want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, want, atol=1e-5)
    y, _ = RMSNorm(1e-6).init_with_output(jax.random.key(0), x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16


def test_rotation_depends_on_distance_only():
    angle = lambda p: RopeConfig().angles(8, jnp.array([[p]]))
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    dot = lambda a, b: float((rotate(q, angle(a)) * rotate(k, angle(b))).sum())
    assert dot(3.0, 1.0) == pytest.approx(dot(10.5, 8.5), abs=1e-5)
    assert dot(0.0, 0.0) == pytest.approx(float((q * k).sum()), abs=1e-5)


def test_position_tables():
    table = sincos_2d(2, 3, 8)
    assert table.shape == (6, 8)
    np.testing.assert_array_equal(table[0, :4], table[3, :4])  # the same column
    np.testing.assert_array_equal(table[0, 4:], table[2, 4:])  # the same row
    constant = resize_bicubic(jnp.ones((3, 3, 2)), 5, 7)
    np.testing.assert_allclose(constant, 1.0, atol=1e-6)
    # One row halfway between two others: the cubic with a = -0.75 weighs its neighbours -3/32 and
    # 19/32.
    middle = resize_bicubic(jnp.array([0.0, 0.0, 1.0, 1.0, 0.0, 0.0]).reshape(6, 1, 1), 3, 1)[
        1, 0, 0
    ]
    assert float(middle) == pytest.approx(2 * 19 / 32, abs=1e-6)


def test_cache_appends_at_the_cursor():
    tokens = Tokens.sequence(jnp.ones((1, 2), bool))
    k = jnp.ones((1, 2, 1, 1))
    cache = KV.start(k, k, tokens, 2)
    one = Tokens.sequence(jnp.ones((1, 1), bool))
    cache = cache.append(5 * k[:, :1], 6 * k[:, :1], one)
    np.testing.assert_array_equal(cache.k[0, 0, :, 0], [1, 1, 5, 0])
    np.testing.assert_array_equal(cache.tokens.valid[0], [True, True, True, False])
