"""Convolutions and norms of feature maps against torch's."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from tests.live.reference import close, torch
from zoo.models.core.keytable import conv
from zoo.models.parts.layers.conv import Conv
from zoo.models.parts.layers.norms import BatchNorm, GroupNorm, InstanceNorm

RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def theirs(x):
    """Channels first."""
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def ours(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


@pytest.mark.parametrize(
    ("axes", "options"),
    [
        (1, {"kernel_size": 3, "padding": 1}),
        (2, {"kernel_size": (3, 5), "stride": 2, "padding": (1, 2), "groups": 2}),
        (2, {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 4}),
        (3, {"kernel_size": 3, "stride": (1, 2, 2), "padding": 1, "bias": False}),
    ],
)
def test_convolutions(axes, options):
    kind = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[axes - 1]
    module, x = kind(4, 8, **options), draw(2, *(7, 6, 5)[:axes], 4)
    size = module.kernel_size
    names = {"stride": module.stride, "dilation": module.dilation, "groups": module.groups}
    layer = Conv(8, size, padding=module.padding, bias=module.bias is not None, **names)
    params = {"kernel": conv.load([module.weight.detach().numpy()], [None])[0]}
    if module.bias is not None:
        params["bias"] = module.bias.detach().numpy()
    close(layer.apply({"params": params}, x), ours(module(theirs(x))), 1e-5)
    back = conv.save([params["kernel"]])[0]
    np.testing.assert_array_equal(back, module.weight.detach().numpy())
    made = nn.unbox(layer.init(jax.random.key(0), x)["params"])
    assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, params)


def test_padding_keeps_the_size():
    x = draw(1, 6, 7, 2)
    for kernel, dilation in ((3, 1), (7, 1), ((1, 11), 1), (3, 3)):
        layer = Conv(2, kernel, dilation=dilation, groups=2)
        assert layer.init_with_output(jax.random.key(0), x)[0].shape == x.shape


@pytest.mark.parametrize("axes", [0, 2, 3])
def test_batch_norm(axes):
    """Three steps of training, then evaluation; gradients in both."""
    module = (torch.nn.BatchNorm1d, None, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)[axes](5)
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(draw(5)))
        module.bias.copy_(torch.from_numpy(draw(5)))
    layer, shape = BatchNorm(), (4, *(3, 4, 2)[:axes], 5)
    variables = {
        "params": {"scale": module.weight.detach().numpy(), "bias": module.bias.detach().numpy()},
        "stats": {"mean": np.zeros(5, np.float32), "var": np.ones(5, np.float32)},
    }

    def loss(params, stats, x, train):
        variables = {"params": params, "stats": stats}
        y, changed = layer.apply(variables, x, train=train, mutable=["stats"])
        return (y**3).sum(), (y, changed["stats"])

    for train in (True, True, True, False):
        x = 2 * draw(*shape) + 1
        module.train(train).zero_grad()
        image = theirs(x).requires_grad_()
        want = module(image)
        (want**3).sum().backward()
        (grads, slope), (y, stats) = jax.grad(loss, (0, 2), has_aux=True)(
            variables["params"], variables["stats"], x, train
        )
        variables["stats"] = stats
        close(y, ours(want), 1e-5)
        close(slope, ours(image.grad), 1e-4)
        close(grads["scale"], module.weight.grad, 1e-4)
        close(stats["mean"], module.running_mean, 1e-5)
        close(stats["var"], module.running_var, 1e-5)


@pytest.mark.parametrize(
    ("layer", "module"),
    [
        (GroupNorm(3, 1e-6), torch.nn.GroupNorm(3, 6, eps=1e-6)),
        (InstanceNorm(), torch.nn.InstanceNorm3d(6, affine=True)),
        (InstanceNorm(affine=False), torch.nn.InstanceNorm3d(6)),
    ],
)
def test_other_norms(layer, module):
    x, params = draw(2, 3, 4, 2, 6), {}
    if module.weight is not None:
        with torch.no_grad():
            module.weight.copy_(torch.from_numpy(draw(6)))
            module.bias.copy_(torch.from_numpy(draw(6)))
        params = {"scale": module.weight.detach().numpy(), "bias": module.bias.detach().numpy()}
    close(layer.apply({"params": params}, x), ours(module(theirs(x))), 1e-5)
