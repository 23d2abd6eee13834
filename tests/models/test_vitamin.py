"""ViTamin: a foot of convolutions, the mean as the class token, dual encoders."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.draw import draw
from zoo.models.core import registry
from zoo.models.vision.vitamin import MBConv, ViTaminConfig, table

TINY = registry.config("vitamin_clip_tiny")


def test_the_shortcut_is_the_mean_of_what_is_in_the_picture():
    """A block whose branch is nothing, on ones: ones at the border as well."""
    module = MBConv(4, 4, 2)
    x = jnp.ones((1, 6, 6, 4))
    variables = draw(jax.eval_shape(module.init, jax.random.key(0), x))
    reduce = variables["params"]["reduce"]
    variables["params"]["reduce"] = {name: 0 * leaf for name, leaf in reduce.items()}
    np.testing.assert_allclose(module.apply(variables, x), jnp.ones((1, 3, 3, 4)), rtol=1e-6)


def test_dual_encoder():
    """Embeddings of unit length; the image's is the projected, normed mean of its tokens."""
    model = TINY.build()
    rng = np.random.default_rng(0)
    batch = {
        "pixels": rng.normal(size=(2, 32, 32, 3)).astype(np.float32),
        "ids": rng.integers(1, 64, (3, 12)).astype(np.int32),
    }
    variables = draw(jax.eval_shape(model.init, jax.random.key(0), batch))

    @jax.jit
    def run(variables):
        features = model.apply(variables, batch["pixels"], method=lambda m, x: m.vision(x))
        return model.apply(variables, batch), features

    out, features = run(variables)
    assert out.logits.shape == (2, 3) and features.grid == (2, 2)
    np.testing.assert_allclose(np.linalg.norm(out.text, axis=-1), 1, rtol=1e-5)
    norm = variables["params"]["vision"]["pool_norm"]
    mean = np.asarray(features.tokens.mean(1))
    y = (mean - mean.mean(-1, keepdims=True)) / np.sqrt(mean.var(-1, keepdims=True) + 1e-6)
    y = (y * norm["scale"] + norm["bias"]) @ variables["params"]["image_projection"]["kernel"]
    want = y / np.linalg.norm(y, axis=-1, keepdims=True)
    np.testing.assert_allclose(out.image, want, atol=1e-5)


# {name: millions of parameters of the images' and of the texts' side, as the official code counts}
@pytest.mark.parametrize(
    ("name", "millions"),
    {
        "vitamin_clip_s": (22.0, 40.4),
        "vitamin_clip_b": (87.5, 63.4),
        "vitamin_clip_l.224": (333.3, 123.7),
        "vitamin_clip_l2.336": (333.8, 354.0),
        "vitamin_clip_xl.384": (436.1, 488.7),
    }.items(),
)
def test_sizes_of_dual_encoders(name, millions):
    config = registry.config(name)
    shapes = jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))["params"]
    count = {key: sum(leaf.size for leaf in jax.tree.leaves(shapes[key])) for key in shapes}
    image = count["vision"] + count["image_projection"]
    text = count["text"] + count["text_projection"]
    np.testing.assert_allclose((image / 1e6, text / 1e6), millions, atol=0.06)


def test_keys_of_dual_encoders():
    """The layout of OpenCLIP, there and back."""
    shapes = nn.unbox(jax.eval_shape(TINY.build().init, jax.random.key(0), TINY.inputs(1)))
    params = draw(shapes)["params"]
    state = table(TINY).save(params)
    assert state["text.transformer.resblocks.1.attn.in_proj_weight"].shape == (72, 24)
    assert state["visual.head.proj.weight"].shape == (20, 16)
    assert "visual.trunk.patch_embed.backbone.stages.1.1.conv2_kxk.weight" in state
    back = table(TINY).load(state, shapes["params"])
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b), back, params)))


def test_wrong_sizes():
    with pytest.raises(ValueError, match="patch_size = 14: want 16"):
        ViTaminConfig(patch_size=14)
    with pytest.raises(ValueError, match="multiple"):
        ViTaminConfig(image_size=230)
    bad = {"pixels": np.zeros((1, 40, 40, 3), np.float32)}
    with pytest.raises(ValueError, match="both sides multiples of 16"):
        registry.create("vitamin_tiny").init(jax.random.key(0), bad)
