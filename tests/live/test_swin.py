"""Swin against the classes of transformers, at sizes whose windows do not fit; bias tables."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.live.reference import close, redraw, torch, transformers
from tests.live.test_vision import close_all, variables_of
from zoo.models.base import hub_swin
from zoo.models.core import registry
from zoo.models.core.hf import Fields
from zoo.models.parts.assemblies.classifier import ClassifierConfig
from zoo.models.parts.layers.window import resize_bias
from zoo.models.parts.towers.swin import SwinConfig
from zoo.models.vision import swin

SIZES = {
    "image_size": 40,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [3, 2],
    "num_heads": [2, 4],
    "window_size": 6,
}
TOWER = SwinConfig(
    image_size=40,
    patch_size=2,
    first_width=8,
    depths=(3, 2),
    num_heads=(2, 4),
    window=6,
    pad_first=True,
)


@pytest.mark.parametrize("shape", [(40, 40), (29, 51)])
def test_transformers(shape, tmp_path):
    """Logits, the last hidden state, gradients; configuration and keys of `save_pretrained`."""
    made = transformers.SwinConfig(**SIZES, num_labels=5, drop_path_rate=0.0)
    theirs = redraw(transformers.SwinForImageClassification(made))
    theirs.save_pretrained(tmp_path)
    file = json.loads((tmp_path / "config.json").read_text("utf-8"))
    config = registry.read_hf(Fields("swin", file))
    assert config == ClassifierConfig(TOWER, "mean", num_classes=5)
    table, state = hub_swin.table(config), load_file(tmp_path / "model.safetensors")
    params = table.load(state, variables_of(config))
    back = table.save(params)
    assert set(back) <= set(state)
    assert all(np.array_equal(back[key], state[key]) for key in back)

    pixels = np.random.default_rng(0).normal(size=(2, *shape, 3)).astype(np.float32)
    want = theirs(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), output_hidden_states=True)
    (want.logits**2).mean().backward()

    @jax.jit
    def ours(params):
        out = config.build().apply({"params": params}, {"pixels": pixels})
        return (out.logits**2).mean(), out

    grads, got = jax.grad(ours, has_aux=True)(params)
    close(got.logits, want.logits)
    last = want.reshaped_hidden_states[-1].permute(0, 2, 3, 1)
    close(got.features.pyramid[-1], last, what="hidden state")
    with torch.no_grad():
        for leaf in theirs.parameters():
            leaf.copy_(leaf.grad)
    theirs.save_pretrained(tmp_path)
    close_all(table.save(grads), load_file(tmp_path / "model.safetensors"), "evaluation")


@pytest.mark.parametrize(("old", "new"), [((7, 7), (12, 12)), ((3, 4), (2, 6))])
def test_bias_tables(old, new):
    """As torch interpolates them."""
    rows = [(2 * a - 1, 2 * b - 1) for a, b in (old, new)]
    table = np.random.default_rng(0).normal(size=(rows[0][0] * rows[0][1], 3)).astype(np.float32)
    grid = torch.from_numpy(table).reshape(1, *rows[0], 3).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(grid, size=rows[1], mode="bicubic", align_corners=False)
    close(resize_bias(table, old, new), want.permute(0, 2, 3, 1).reshape(-1, 3), 1e-5)


def test_for_other_images():
    """From 224 to 384 pixels, the parameters have the shapes of the published size."""
    config = registry.config("swin_tiny")
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), variables_of(config))
    larger, params = swin.for_images(config, params, image_size=24, window=6)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, variables_of(larger))
    assert larger.tower == dataclasses.replace(config.tower, image_size=24, window=6)
    table = params["tower"]["stages_0"]["layers"]["relative_bias"]["table"]
    np.testing.assert_allclose(table, np.ones(table.shape), rtol=1e-5)


@pytest.mark.parametrize("name", ["hub_swin_t", "hub_swin_l.384"])
def test_sizes_of_the_hub(name):
    """As many parameters as transformers counts, and the same configuration from its file."""
    config = registry.config(name)
    tower = config.tower
    made = transformers.SwinConfig(
        image_size=tower.image_size,
        embed_dim=tower.first_width,
        depths=list(tower.depths),
        num_heads=list(tower.num_heads),
        window_size=tower.window,
        num_labels=1000,
    )
    with torch.device("meta"):
        theirs = transformers.SwinForImageClassification(made)
    want = sum(leaf.numel() for leaf in theirs.parameters())
    assert sum(leaf.size for leaf in jax.tree.leaves(variables_of(config))) == want
    file = made.to_dict() | {"architectures": ["SwinForImageClassification"]}
    assert registry.read_hf(Fields(name, file)) == config
