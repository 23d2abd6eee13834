"""One of each family on a mesh of eight devices gives the numbers of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.draw import draw
from zoo.models.core import registry
from zoo.models.core.names import tree_shardings
from zoo.models.core.types import Output
from zoo.train.mesh import MeshConfig, make_mesh

MESHES = {"fsdp": MeshConfig(data=2, fsdp=4), "tensor": MeshConfig(data=1, fsdp=2, tensor=4)}


def batch_of(config, rng):
    """Eight rows of the shapes that the configuration names, a placeholder for each image."""
    batch = {}
    for name, spec in config.inputs(8).items():
        if name == "text_mask":
            batch[name] = np.ones(spec.shape, bool)
        elif name == "ids":
            batch[name] = rng.integers(4, 60, spec.shape, np.int32)
            if hasattr(config, "image_id"):
                batch[name][:, 1 : 1 + config.num_images] = config.image_id
        elif np.issubdtype(spec.dtype, np.floating):
            batch[name] = rng.normal(size=spec.shape).astype(np.float32)
    return batch


@pytest.mark.parametrize("name", ["qwen3_tiny", "gemma2_tiny", "llava_tiny", "clip_tiny"])
@pytest.mark.parametrize("kind", MESHES)
def test_a_mesh_changes_nothing(name, kind):
    config = registry.config(name)
    model, rng = config.build(), np.random.default_rng(0)
    boxed = jax.eval_shape(model.init, jax.random.key(0), config.inputs(1))["params"]
    params, batch = draw(boxed), batch_of(config, rng)

    def run(params, batch):
        out = model.apply({"params": params}, batch)
        if isinstance(out, Output):
            return model.apply({"params": params}, out.hidden, method="head")
        return out.logits

    expected = jax.jit(run)(params, batch)
    mesh = make_mesh(MESHES[kind])
    sharded = jax.device_put(params, tree_shardings(boxed, mesh))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(sharded))
    with jax.set_mesh(mesh):
        got = jax.jit(run)(sharded, jax.tree.map(jnp.asarray, batch))
    scale = np.abs(expected).max()
    assert np.abs(np.asarray(got) - expected).max() <= 5e-5 * scale
