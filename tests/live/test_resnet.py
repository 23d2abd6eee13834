"""ResNets against timm's, plain and with the blurred strides of FFCV's recipe."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from tests.live.reference import close, redraw, state_of, timm, torch
from tests.live.test_regnet import running, shapes
from tests.live.test_vision import assert_same
from zoo.models.core.registry import config
from zoo.models.parts.assemblies.classifier import ClassifierConfig, head_table
from zoo.models.parts.towers.resnet import ResNetConfig, resnet_table
from zoo.train.recipes.mrl import table as mrl_table

DEPTHS = (2, 3, 1, 1)


class Blurred(torch.nn.Module):
    """A convolution of what a fixed filter has blurred."""

    def __init__(self, conv):
        super().__init__()
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        kernel = torch.outer(line, line)[None, None].repeat(conv.in_channels, 1, 1, 1)
        self.register_buffer("blur_filter", kernel)
        self.conv = conv

    def forward(self, x):
        x = torch.nn.functional.conv2d(x, self.blur_filter, padding=1, groups=x.shape[1])
        return self.conv(x)


def blurred(model):
    """The model with a filter before every strided convolution but the first."""
    for layer in (model.layer2, model.layer3, model.layer4):
        layer[0].conv2 = Blurred(layer[0].conv2)
        layer[0].downsample[0] = Blurred(layer[0].downsample[0])
    return model


def small(blurpool):
    """A small one of timm's, ours, and the keys."""
    theirs = timm.models.resnet.ResNet(
        timm.models.resnet.Bottleneck, DEPTHS, num_classes=7, channels=(4, 8, 12, 16)
    )
    theirs = running(redraw(blurred(theirs) if blurpool else theirs))
    tower = ResNetConfig(64, DEPTHS, (16, 32, 48, 64), blurpool=blurpool)
    ours = ClassifierConfig(tower, pool="mean", num_classes=7)
    table = (resnet_table(tower).under("tower") + head_table(ours, head="fc")).with_stats()
    return theirs, ours, table


@pytest.mark.slow
def test_a_blurred_one_gives_the_same():
    """Logits, gradients and statistics, in evaluation and in training."""
    assert_same(*small(True), (96, 64), 2e-3)


@pytest.mark.slow
def test_a_plain_one_gives_the_same():
    """Logits in evaluation and in training, and statistics."""
    theirs, ours, table = small(False)
    variables = table.load(state_of(theirs), shapes(ours))
    pixels = np.random.default_rng(0).normal(size=(2, 96, 64, 3)).astype(np.float32)
    outer, model = torch.from_numpy(pixels.transpose(0, 3, 1, 2)), ours.build()
    with torch.no_grad():
        want, trained = theirs(outer), theirs.train()(outer)
    close(jax.jit(model.apply)(variables, {"pixels": pixels}).logits, want)
    step = jax.jit(lambda v, x: model.apply(v, {"pixels": x}, train=True, mutable=["stats"]))
    out, changed = step(variables, pixels)
    close(out.logits, trained, what="in training")
    back, after = table.save({**variables, "stats": nn.unbox(changed["stats"])}), state_of(theirs)
    assert set(back) == {key for key in after if "num_batches" not in key}
    for key, array in back.items():
        close(array, after[key], what=key)


@pytest.mark.parametrize("name", ["mrl_resnet50", "mrl_resnet50.efficient"])
def test_the_published_one_has_the_official_keys(name):
    ours = config(name)
    with torch.device("meta"):
        theirs = blurred(timm.create_model("resnet50", num_classes=0))
    state = {f"module.{key}": tuple(leaf.shape) for key, leaf in theirs.state_dict().items()}
    found = mrl_table(ours).shapes(shapes(ours))
    heads = {key: found.pop(key) for key in sorted(found) if ".fc." in key}
    assert found == {key: shape for key, shape in state.items() if "num_batches" not in key}
    first = heads["module.fc.nesting_classifier_0.weight"]
    assert first == ((1000, 2048) if ours.head.efficient else (1000, 8))
    assert len(heads) == (2 if ours.head.efficient else 18)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"depths": (1, 2)}, "want one of each per stage"), ({"widths": (6,) * 4}, "multiples of 4")],
)
def test_wrong_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        ResNetConfig(**sizes)
