"""ViT-ResNAS: sub-networks in the weights of a larger one, what networks cost, the search."""

import random
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.draw import draw
from zoo.costing import cost
from zoo.models.core import registry
from zoo.models.core.errors import UsageError
from zoo.models.parts.layers.norms import LayerNorm
from zoo.models.vision.vit_resnas import supernet
from zoo.models.vision.vit_resnas.nets import (
    NETS,
    SPACES,
    Layer,
    Stage,
    StageSpace,
    largest,
    macs,
    smallest,
)
from zoo.models.vision.vit_resnas.search import SearchConfig, distinct, drawn, settled
from zoo.models.vision.vit_resnas.supernet import (
    Kept,
    accuracy_of,
    draw_kept,
    options_in_use,
    rewired,
    sliced,
)
from zoo.models.vision.vit_resnas.tower import FirstNorm

SPACE = (
    StageSpace((8, 6, 4), (3, 2), 4, (16, 12, 8), (False, True)),
    StageSpace((12, 8), (2, 1), 6, (24, 16), (False, True)),
)
SUPER = supernet(SPACE, 5, image_size=28, stem=4)
SUBNET = (
    Stage(6, (Layer(2, 4, 12), Layer(3, 4, 8, present=False))),
    Stage(8, (Layer(1, 6, 16), Layer(2, 6, 24))),
)
MACS = {
    "reference": 1_794_378_240,
    "t": 1_782_630_272,
    "s": 2_845_501_856,
    "m": 4_513_135_936,
}


def pixels(*sides, batch=4):
    return np.random.default_rng(1).normal(size=(batch, *sides, 3)).astype(np.float32)


def made(config, image):
    """A model, and its variables."""
    model = config.build()
    shapes = dict(jax.eval_shape(model.init, jax.random.key(0), {"pixels": image}))
    return model, nn.unbox(shapes), draw(shapes)


def test_a_sub_network_is_what_is_cut_out():
    """In one batch beside the whole network; and sorting all weights changes nothing."""
    image = pixels(28, 28)
    model, _, variables = made(SUPER, image)
    kept = Kept.of([SUBNET, largest(SPACE), smallest(SPACE), SUBNET])

    @jax.jit
    def run(params, kept):
        found = model.apply({**variables, "params": params}, {"pixels": image, "kept": kept})
        return found.logits, found.patch_logits

    masked = run(variables["params"], kept)
    config = replace(SUPER, tower=replace(SUPER.tower, net=SUBNET), space=None)
    small, shapes, _ = made(config, image)
    own = sliced(variables, shapes)
    out = jax.jit(small.apply)(own, {"pixels": image})
    for row in (0, 3):
        np.testing.assert_allclose(out.logits[row], masked[0][row], atol=1e-5)
        np.testing.assert_allclose(out.patch_logits[row], masked[1][row], atol=1e-5)
    assert np.abs(out.logits[2] - masked[0][2]).max() > 1e-3
    with pytest.raises(ValueError, match="which is smaller"):
        sliced(own, shapes | {"params": variables["params"]})

    params = jax.jit(rewired)(variables["params"])
    whole = Kept.of([largest(SPACE)] * 4)
    unmasked = run(variables["params"], whole)
    for want, got in zip(unmasked, run(params, whole), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    classes = out.logits.argmax(-1)
    score = accuracy_of(model, variables, {"pixels": image, "classes": classes})
    assert score(SUBNET) == 1
    assert score(largest(SPACE)) == (unmasked[0].argmax(-1) == classes).mean()
    layer = params["tower"]["layers_0_0"]
    size = np.abs(layer["up"]["kernel"]).sum(0) + np.abs(layer["up"]["bias"])
    size += np.abs(layer["down"]["kernel"]).sum(1)
    assert (np.diff(size) <= 1e-5).all()


def test_without_sub_networks_it_is_the_whole_network():
    """A norm that counts all channels is a LayerNorm."""
    x = pixels(3, batch=2)
    params = {"params": {"scale": np.float32([1, 2, 3]), "bias": np.float32([0, 1, 0])}}
    want = LayerNorm(1e-6).apply(params, x)
    for number in (None, jnp.full(2, 3)):
        np.testing.assert_allclose(FirstNorm().apply(params, x, number), want, atol=1e-6)


def test_every_option_in_use_is_drawn_as_often():
    draw_all = jax.jit(draw_kept, static_argnums=(1, 2, 3, 5))
    kept = draw_all(jax.random.key(0), SPACE, 24, 2, 8, 8)
    for width in (8, 6, 4):
        assert (kept.widths[:, 0] == width).sum() == 8
    for mlp_dim in (16, 12, 8):
        assert (kept.mlp_dims[:, 0] == mlp_dim).sum() == 8
    assert kept.present[:, [0, 2]].all() and kept.present[:, 1].sum() == 12
    for leaf in jax.tree.leaves(kept):  # dealt out in turn
        np.testing.assert_array_equal(leaf[:12], leaf[12:])
    first = draw_all(jax.random.key(0), SPACE, 24, 2, 0, 8)
    want = Kept.of([largest(SPACE)] * 24)
    jax.tree.map(np.testing.assert_array_equal, first, want)
    with pytest.raises(ValueError, match="a batch of 24, 5 examples for each sub-network"):
        draw_kept(jax.random.key(0), SPACE, 24, 5)


def test_options_come_into_use_one_by_one():
    assert [int(options_in_use(5, step, 30)) for step in (0, 7, 8, 15, 22, 23, 30, 99)] == [
        1, 1, 2, 3, 3, 4, 5, 5,
    ]  # fmt: skip
    assert int(options_in_use(5, 0, 0)) == 5


def test_a_layer_goes_with_the_one_before_it():
    space = (replace(SPACE[0], removable=(False, True, True, False)),)
    layers = tuple(Layer(3, 4, 16, present) for present in (True, False, True, True))
    (stage,) = settled(space, (Stage(8, layers),))
    assert [layer.present for layer in stage.layers] == [True, False, False, True]
    present = jax.jit(draw_kept, static_argnums=(1, 2, 3))(jax.random.key(1), space, 64, 1).present
    assert (present[:, 2] <= present[:, 1]).all() and present[:, 2].any()
    assert present[:, 1].sum() == 32 and present[:, [0, 3]].all()


@pytest.mark.parametrize("name", MACS)
def test_costs(name):
    assert macs(NETS[name]) == MACS[name]


def test_costs_are_those_of_the_program():
    config = registry.config("vit_resnas_tiny")
    found = cost("vit_resnas_tiny").flops["encode"].total / 2
    tower = config.tower
    head = tower.width * 5  # of one patch
    assert macs(tower.net, 28, stem=4, num_classes=5) + head == found


def towards(net):
    """An oracle that likes wide later stages and few heads."""
    return net[1].width - 0.1 * sum(layer.num_heads for layer in net[0].layers)


def test_the_search_finds_the_best_within_its_budget():
    high = macs(largest(SPACE), 28, stem=4, num_classes=5)
    low = macs(smallest(SPACE), 28, stem=4, num_classes=5)
    config = SearchConfig(
        SPACE,
        (low + high) / 2,
        least=0.8,
        image_size=28,
        stem=4,
        num_classes=5,
        first=10,
        rounds=6,
        parents=5,
        children=5,
    )
    asked = []

    def oracle(net):
        asked.append(net)
        return towards(net)

    found = config.build()(oracle)
    assert len(set(asked)) == len(asked) == found.tried
    assert all(config.fits(net) and settled(SPACE, net) == net for net in asked)
    assert found.macs == config.macs(found.net) <= config.budget
    assert found.score == max(map(towards, asked)) == found.best[-1]
    assert list(found.best) == sorted(found.best) and len(found.best) == 7
    assert found == config.build()(towards)
    with pytest.raises(ValueError, match="budget = 1: networks of the space cost"):
        replace(config, budget=1)
    with pytest.raises(UsageError, match="random networks fit"):
        replace(config, least=1.0).build()(towards)


def test_the_published_programmes():
    """Random networks of the published spaces, which the published networks are of."""
    for name in ("t", "s", "m"):
        config, rng = registry.config(f"vit_resnas_search_{name}"), random.Random(0)
        nets = distinct(lambda: drawn(config, rng), config.fits, 3, ())  # noqa: B023
        assert len(nets) == 3 and all(settled(config.space, net) == net for net in nets)
    for name, space in (("t", "t"), ("s", "s"), ("m", "s")):
        for stage, options in zip(NETS[name], SPACES[space], strict=True):
            assert stage.width in options.widths
            assert {layer.num_heads for layer in stage.layers} <= set(options.num_heads)
            assert {layer.mlp_dim for layer in stage.layers} <= set(options.mlp_dims)
            assert {layer.head_dim for layer in stage.layers} == {options.head_dim}


def test_images_of_any_size_and_dropped_paths():
    net = tuple(Stage(width, (Layer(2, 4, 16),)) for width in (8, 12))
    tower = replace(SUPER.tower, net=net, distill_token=True, drop_path=0.5, stem=0)
    config = replace(SUPER, tower=tower, space=None)
    image = pixels(28, 56, batch=4)
    model, _, variables = made(config, pixels(28, 28))

    @jax.jit
    def both(variables):
        out = model.apply(variables, {"pixels": image[:, None]}, taps=(1,))
        rngs = {"dropout": jax.random.key(0)}
        return out, model.apply(variables, {"pixels": image}, train=True, rngs=rngs).logits

    out, trained = both(variables)
    assert [x.shape for x in out.features.pyramid] == [(4, 1, 2, 4, 8), (4, 1, 1, 2, 12)]
    assert out.features.taps[1].shape == (4, 1, 8, 8) and out.features.grid == (1, 2)
    assert out.distill_logits.shape == (4, 1, 5) and out.patch_logits.shape == (4, 1, 2, 5)
    assert np.abs(out.logits[:, 0] - trained).max() > 1e-3


def test_wrong_settings():
    with pytest.raises(ValueError, match="image_size = 42: want a multiple of the stride 28"):
        replace(SUPER.tower, image_size=42)
    with pytest.raises(ValueError, match=r"widths \[12, 8\]: want none below"):
        replace(SUPER.tower, net=SUPER.tower.net[::-1])
    with pytest.raises(ValueError, match="want the largest network of the space"):
        replace(SUPER, tower=replace(SUPER.tower, net=SUBNET))
    with pytest.raises(ValueError, match=r"num_heads = \(2, 3\): want falling numbers"):
        replace(SPACE[0], num_heads=(2, 3))
    with pytest.raises(ValueError, match="with both sides multiples of 28"):
        SUPER.build().init(jax.random.key(0), {"pixels": pixels(28, 42)})
    with pytest.raises(ValueError, match="space = None"):
        replace(SUPER, space=None).draw_kept(jax.random.key(0), 4, 2)
