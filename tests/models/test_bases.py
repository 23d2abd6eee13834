"""What must hold for every base model. A new one is tested here without a new test."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from tests.models.draw import draw
from zoo.convert.place import abstract_variables
from zoo.models.core import registry
from zoo.models.core.errors import UsageError, ZooError
from zoo.models.core.hf import Fields
from zoo.models.core.names import spec_for, tree_names
from zoo.models.core.tree import flatten_dict

BASES = sorted(registry.base_index())


def shapes(config):
    return jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))["params"]


@pytest.mark.parametrize("slug", BASES)
def test_names_resolve_and_shard(slug):
    """On an fsdp mesh at least 95 % of the parameters of a full size are cut, but for vocabularies
    that the mesh does not divide, which every device has.
    """
    boxed = shapes(registry.config(slug))
    mesh = jax.sharding.AbstractMesh((8,), ("fsdp",))
    names = flatten_dict(tree_names(boxed))
    cut = total = 0
    for path, leaf in flatten_dict(nn.unbox(boxed)).items():
        if "vocab" in names[path] and leaf.shape[names[path].index("vocab")] % mesh.size:
            continue
        total += leaf.size
        cut += leaf.size * (len(spec_for(names[path], leaf.shape, mesh)) > 0)
    assert cut >= 0.95 * total


@pytest.mark.parametrize("slug", BASES)
def test_conversion_there_and_back(slug):
    base = registry.base(slug)
    (tiny,) = (config for name, config in base.variants.items() if name.endswith("_tiny"))
    table, params = base.table(tiny), draw(abstract_variables(tiny))  # statistics among them
    state = table.save(params)
    jax.tree.map(np.testing.assert_array_equal, table.load(state, params), params)
    key = sorted(state.keys() - table.aliases.keys())[0]
    with pytest.raises(ZooError, match=f"missing: {key}"):
        table.load({k: v for k, v in state.items() if k != key}, params)
    with pytest.raises(ZooError, match="extra: nobody"):
        table.load({**state, "nobody": np.zeros(2)}, params)


@pytest.mark.parametrize("slug", BASES)
def test_what_is_not_understood_is_refused(slug):
    for model_type, read in registry.base(slug).hf.items():
        fields = Fields(model_type, {"model_type": model_type, "new_kind_of_attention": 7})
        with pytest.raises(UsageError):
            read(fields)


def test_names_and_types_belong_to_one():
    rows = registry.base_index().values()
    names = [name for row in rows for name in row["variants"]]
    types = [kind for row in rows for kind in row["model_types"]]
    assert len(names) == len(set(names))
    assert len(types) == len(set(types))
    with pytest.raises(UsageError, match="did you mean llava"):
        registry.base_of("llavva")
    with pytest.raises(UsageError, match="llava_1_5_7b"):
        registry.config("llava_1_5_7bb")
