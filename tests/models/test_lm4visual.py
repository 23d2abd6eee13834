"""The frozen layer: sizes, order of tokens, layers of a language model, what trains."""

import re

import flax.linen as nn
import jax
import numpy as np
import pytest

from tests.models.draw import draw
from zoo.configs.lm4visual_digits import config as experiment
from zoo.convert.place import abstract_params
from zoo.models.core.errors import UsageError, ZooError
from zoo.models.vision.lm4visual import (
    FROZEN,
    VARIANTS,
    BorrowedConfig,
    FrozenLayers,
    LM4VisualConfig,
    borrow,
    layers_table,
    vit,
)
from zoo.train.parts import assigned

TINY = VARIANTS["lm4visual_tiny"]


def shapes(config):
    return nn.unbox(jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1)))


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("name", "mappers"), [("s16", 3_145_728), ("b16", 6_291_456)])
def test_parameters(name, mappers):
    insert = shapes(VARIANTS[f"lm4visual_{name}"])["params"]["tower"]["insert"]
    assert size(insert["into"]) + size(insert["back"]) == mappers
    assert size(insert["llm"]) == 202_383_360 and size(insert["norm"]) == 4096


def test_order_of_tokens():
    """No positions and no mask: the insert gives tokens back in any order that they came in."""
    module = FrozenLayers(TINY.tower.llm, 16)
    x = np.random.default_rng(0).normal(size=(2, 6, 16)).astype(np.float32)
    params = draw(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    order = np.array([3, 0, 5, 1, 4, 2])
    run = jax.jit(lambda x: module.apply({"params": params}, x))
    np.testing.assert_allclose(run(x[:, order]), run(x)[:, order], rtol=1e-4, atol=1e-5)


def llama(params, layout):
    """A language model of three layers; in the hub's layout the rows of queries and keys stand in
    another order inside of both heads.
    """
    rng, made = np.random.default_rng(1), {}
    meta, hub = (layers_table("{}.", name, range(1)) for name in ("meta", "hub"))
    pairs = dict(zip(meta.shapes(params), hub.shapes(params), strict=True))
    for number in range(3):
        for key, shape in meta.shapes(params).items():
            leaf = rng.normal(size=shape).astype(np.float32)
            if layout == "meta":
                made[f"layers.{number}{key[1:]}"] = leaf
                continue
            if key.endswith((".wq.weight", ".wk.weight")):  # neighbours become halves
                leaf = leaf.reshape(2, -1, 2, leaf.shape[1]).swapaxes(1, 2).reshape(leaf.shape)
            made[f"model.layers.{number}{pairs[key][1:]}"] = leaf
    return made


def test_borrowed_layers():
    """The last of three layers; its last norm stays 1; both layouts give the same numbers."""
    params = draw(shapes(TINY)["params"])
    x = np.random.default_rng(2).normal(size=(1, 5, 16)).astype(np.float32)
    run = jax.jit(lambda tree: FrozenLayers(TINY.tower.llm, 16).apply({"params": tree}, x))
    found = {}
    for layout in ("meta", "hub"):
        made = llama(params["tower"]["insert"]["llm"], layout)
        insert = borrow(params, made, TINY, layout)["tower"]["insert"]
        assert (insert["norm"]["scale"] == 1).all()
        found[layout] = run(insert)
        out = insert["llm"]["layers"]["out"]["kernel"][0].reshape(24, 24)
        key = [key for key in made if re.search(r"\.2\..*\.(wo|o_proj)\.", key)]
        np.testing.assert_array_equal(out, made.pop(*key).T)
        with pytest.raises(ZooError, match=re.escape(f"missing: {key[0]}")):
            borrow(params, made, TINY, layout)
    scale = np.abs(found["meta"]).max()
    np.testing.assert_allclose(found["meta"], found["hub"], rtol=1e-4, atol=1e-4 * scale)


def test_what_trains():
    """Of the recipe: all but the borrowed layers and their norm."""
    found = experiment()
    params = abstract_params(found.model)
    owner = assigned(found.parts, params)
    frozen = {path for path, part in owner.items() if found.parts[part].frozen}
    want = {path for path in owner if any(re.fullmatch(p, path) for p in FROZEN)}
    assert frozen == want and any("llm" in path for path in frozen)
    assert any("into" in path for path in owner.keys() - frozen)


def test_bad_settings():
    with pytest.raises(ValueError, match="want 0 to 31"):
        BorrowedConfig(first_layer=32)
    with pytest.raises(ValueError, match="a divisor of 4096"):
        BorrowedConfig(num_heads=30)
    with pytest.raises(ValueError, match="want no final norm"):
        LM4VisualConfig()
    with pytest.raises(ValueError, match="a class token alone"):
        LM4VisualConfig(vit(registers=2))
    with pytest.raises(UsageError, match="layout is 'torch'"):
        borrow({}, {}, TINY, "torch")
