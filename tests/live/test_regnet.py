"""RegNets X and Y against timm's, through the key table; Z is in `test_vision`."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from tests.live.reference import close, redraw, state_of, timm, torch
from zoo.models.core.registry import config
from zoo.models.parts.towers.regnet import RegNetConfig
from zoo.train.recipes.fast_scaling import ClassifierConfig, regnet, table, timm_table

PLAIN = {"stem_width": 8, "image_size": 64}
SMALL = {
    "x": (regnet(8.0, 8, 2.0, 8, 4, se_ratio=0.0, **PLAIN), {}),
    "y": (regnet(8.0, 8, 2.0, 8, 4, **PLAIN), {"se_ratio": 0.25}),
}


def shapes(config):
    found = jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))
    return nn.unbox(dict(found))


def running(module, seed=1):
    """`module` with running statistics that are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in module.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            drawn = torch.rand(buffer.shape, generator=generator)
            buffer.copy_(drawn + 0.5 if name.endswith("var") else drawn - 0.5)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_small_one_gives_the_same(name):
    tower, options = SMALL[name]
    sizes = timm.models.regnet.RegNetCfg(
        depth=8, w0=8, wa=8.0, wm=2.0, group_size=4, stem_width=8, **options
    )
    theirs = running(redraw(timm.models.regnet.RegNet(sizes, num_classes=7)))
    ours = ClassifierConfig(tower, pool="mean", num_classes=7)
    variables = timm_table(ours).load(state_of(theirs), shapes(ours))
    pixels = np.random.default_rng(0).normal(size=(2, 96, 64, 3)).astype(np.float32)
    model = ours.build()
    outer = torch.from_numpy(pixels.transpose(0, 3, 1, 2))
    with torch.no_grad():
        want = theirs(outer)
        maps = theirs.forward_intermediates(outer, intermediates_only=True)[1:5]
    out = jax.jit(model.apply)(variables, {"pixels": pixels})
    close(out.logits, want)
    for number, ours_map in enumerate(out.features.pyramid[: len(maps)]):
        theirs_map = maps[number].permute(0, 2, 3, 1)
        if theirs_map.shape == ours_map.shape:  # the last one stands after the last convolution
            close(ours_map, theirs_map, what=f"stage {number + 1}")

    with torch.no_grad():
        want = theirs.train()(outer)
    step = jax.jit(lambda v, x: model.apply(v, {"pixels": x}, train=True, mutable=["stats"]))
    trained, changed = step(variables, pixels)
    close(trained.logits, want, what="in training")
    back = timm_table(ours).save({**variables, "stats": nn.unbox(changed["stats"])})
    after = state_of(theirs)
    for key, array in back.items():
        close(array, after[key], what=key)


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("regnetx_3_2gf", "regnetx_032"),
        ("regnety_400mf", "regnety_004"),
        ("regnety_4gf", "regnety_040"),
        ("regnetz_500mf", "regnetz_005"),
        ("regnetz_4gf", "regnetz_040"),
        ("regnetz_4gf_h", "regnetz_040_h"),
    ],
)
def test_full_sizes_have_the_same_parameters(name, original):
    ours = config(name)
    with torch.device("meta"):
        theirs = timm.create_model(original)
    state = {key: tuple(leaf.shape) for key, leaf in theirs.state_dict().items()}
    want = {key: shape for key, shape in state.items() if "num_batches" not in key}
    variables = shapes(ours)
    assert timm_table(ours).shapes(variables) == want
    official = table(ours).shapes(variables)
    assert sorted(official.values()) == sorted(want.values())
    assert {"stem.bn.running_var", "s1.b1.f.a_bn.weight", "s2.b1.f.c.weight"} <= set(official)
    assert (
        ("s1.b1.proj.weight" in official) == ("s1.b1.bn.weight" in official) != ours.tower.inverted
    )
    assert ("s4.b2.f.se.f_ex.2.bias" in official) == bool(ours.tower.se_ratio)
    assert ("head.conv.weight" in official) == bool(ours.tower.head_width)


def test_an_odd_size_is_rounded_up():
    tower = RegNetConfig(image_size=33, depths=(1,), widths=(8,), group_widths=(4,), stem_width=8)
    assert tower.grid == (9, 9)
