"""What must hold for every registered system, by its form.

A new system is tested here without a new test.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.draw import draw
from zoo.models.core import registry
from zoo.models.core.config import ModelConfig
from zoo.models.core.errors import ZooError
from zoo.models.core.names import spec_for, tree_names
from zoo.models.core.tree import flatten_dict
from zoo.models.core.types import Output
from zoo.models.parts.assemblies.masked import MaskedConfig

SYSTEMS = sorted(registry.index())
ALL = {name: c for slug in SYSTEMS for name, c in registry.entry(slug).variants.items()}
VARIANTS = [name for name, config in ALL.items() if isinstance(config, ModelConfig)]
OTHERS = [name for name in ALL if name not in VARIANTS]
TINY = [name for name in VARIANTS if name.endswith("_tiny")]
# Tracing a full size takes seconds: of every system the first is traced, the others on request.
LARGE = {registry.resolve(name)[0]: name for name in reversed(VARIANTS) if name not in TINY}
EACH = [
    pytest.param(name, marks=() if name in {*TINY, *LARGE.values()} else pytest.mark.thorough)
    for name in VARIANTS
]
KINDS = {registry.entry(name).card.kind: name for name in reversed(TINY)}
ONE_OF_EACH_KIND = [
    pytest.param(name, marks=() if name in KINDS.values() else pytest.mark.thorough)
    for name in TINY
]


@functools.cache
def variables(config):
    """Shapes of `params`, and of `stats` where a model keeps some."""
    return jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))


def shapes(config):
    """What key tables speak of: the parameters; with statistics, both under these names."""
    found = dict(variables(config))
    return found if "stats" in found else found["params"]


def random_batch(config, size=2, seed=0):
    """A batch of the shapes that the configuration names, with one placeholder per image."""
    rng, batch = np.random.default_rng(seed), {}
    for name, spec in config.inputs(size).items():
        if name == "ids" and hasattr(config, "image_id"):
            ids = rng.integers(config.image_id + 1, config.decoder.vocab_size, spec.shape)
            ids[:, 1 : 1 + config.num_images] = config.image_id
            batch[name] = ids.astype(np.int32)
        elif name == "ids":
            batch[name] = rng.integers(1, 16, spec.shape).astype(np.int32)
        elif name == "text_mask":
            batch[name] = np.ones(spec.shape, bool)
        elif np.issubdtype(spec.dtype, np.floating):
            batch[name] = rng.normal(size=spec.shape).astype(np.float32)
    if "ids" in batch:
        batch["labels"], batch["segments"] = batch["ids"], np.zeros_like(batch["ids"])
    return batch


def test_every_model_has_a_tiny_variant():
    slugs = {registry.resolve(name)[0] for name in VARIANTS}
    assert {registry.resolve(name)[0] for name in TINY} == slugs


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_model_is_built(name):
    assert registry.create(name) is not None


@pytest.mark.parametrize("name", EACH)
def test_names_resolve_and_shard(name):
    """All logical names are known; on an fsdp mesh at least 95 % of the parameters of a full size
    are cut.
    """
    boxed = variables(registry.config(name))["params"]
    mesh = jax.sharding.AbstractMesh((8,), ("fsdp",))
    names = flatten_dict(tree_names(boxed))
    cut = total = 0
    for path, leaf in flatten_dict(nn.unbox(boxed)).items():
        if any(n == "vocab" and size % 8 for n, size in zip(names[path], leaf.shape)):
            continue  # such as BERT's 30,522 words, which no such mesh divides
        total += leaf.size
        cut += leaf.size * (len(spec_for(names[path], leaf.shape, mesh)) > 0)
    if total > 1e8:
        assert cut >= 0.95 * total


@pytest.mark.parametrize("name", EACH)
def test_the_key_table_fits_at_full_size(name):
    table = registry.entry(name).table
    if table is None:
        pytest.skip("no official checkpoint")
    config = registry.config(name)
    keys = table(config).shapes(nn.unbox(shapes(config)))
    assert len(keys) > 5


@pytest.mark.parametrize("name", TINY)
def test_conversion_there_and_back(name):
    table = registry.entry(name).table
    if table is None:
        pytest.skip("no official checkpoint")
    config = registry.config(name)
    table, params = table(config), draw(shapes(config))
    state = table.save(params)
    back = table.load(state, params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    key = sorted(state)[0]
    with pytest.raises(ZooError, match=f"missing: {key}"):
        table.load({k: v for k, v in state.items() if k != key}, params)
    with pytest.raises(ZooError, match="extra: nobody"):
        table.load({**state, "nobody": np.zeros(2)}, params)
    with pytest.raises(ZooError, match=f"misshapen: {key}"):
        table.load({**state, key: np.zeros((1, 2, 3, 4, 5))}, params)


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_value_and_gradient(name):
    """Finite, deterministic; every parameter has a gradient, but for those that the forward pass
    never reads.
    """
    config = registry.config(name)
    model, batch = config.build(), random_batch(config)
    kept = draw(dict(variables(config)))
    params = kept.pop("params")
    options = {}
    if isinstance(config, MaskedConfig):  # which hides nothing unless it is told what
        patches = (2, config.tower.grid[0] * config.tower.grid[1])
        options["draws"] = np.random.default_rng(1).random(patches).astype(np.float32)

    def loss(params):
        out = model.apply({"params": params, **kept}, batch, **options)
        if isinstance(out, Output):
            logits = model.apply({"params": params}, out.hidden, method="head")
            return jnp.mean(jax.nn.logsumexp(logits, -1) ** 2) + jnp.mean(out.hidden**3)
        leaves = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum(jnp.mean(x**2) + jnp.mean(x**3) for x in leaves)

    step = jax.jit(jax.value_and_grad(loss))
    (value, grads), (again, _) = step(params), step(params)
    assert np.isfinite(value) and value == again
    unread = set(getattr(config, "unread", ()))
    dead = {path for path, g in flatten_dict(grads).items() if not np.abs(g).max() > 0}
    assert dead == {tuple(path.split("/")) for path in unread}
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
