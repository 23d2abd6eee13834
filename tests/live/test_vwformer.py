"""The pixel decoders of VWFormer against torch, window by window."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from tests.live.reference import close, state_of, torch
from tests.live.test_vision import drawn
from zoo.models.core.errors import ZooError
from zoo.models.dense.vwformer import LEVELS, VWPixelsConfig, table

F = torch.nn.functional
SIZES = {
    "widths": (4, 6, 8, 10),
    "width": 16,
    "out_width": 8,
    "ratios": (2, 4),
    "num_heads": 2,
    "detail": 4,
    "groups": 4,
    "image_size": 128,
}


class Map(torch.nn.Conv2d):
    """A convolution with a norm of its own or of others, and a ReLU."""

    def __init__(self, entering, width, norm, side=1, bias=False):
        super().__init__(entering, width, side, bias=bias)
        self.norm = norm

    def forward(self, x):
        return F.relu(self.norm(super().forward(x)))


class Decoder(torch.nn.Module):
    """The decoder as its equations say, with the official names."""

    def __init__(self, c):
        super().__init__()
        self.c, self.end = c, "_0" if c.scales else ""
        one = torch.nn.GroupNorm(c.groups, c.width)
        for level, width in enumerate(c.widths[1:], 2):
            self.add_module(f"linear_c{level}", Map(width, c.width, one))
        self.linear_c1 = Map(c.widths[0], c.detail, torch.nn.BatchNorm2d(c.detail))
        self.linear_fuse = Map(3 * c.width, c.width, one)
        parts = {
            "short_path": Map(c.width, c.width, one),
            "image_pool": torch.nn.Sequential(
                torch.nn.AdaptiveAvgPool2d(1), Map(c.width, c.width, one)
            ),
            "cat": Map((2 + len(c.ratios)) * c.width, c.width, one),
            "attn": torch.nn.ModuleList(
                torch.nn.MultiheadAttention(c.width, c.num_heads, batch_first=True)
                for _ in c.ratios
            ),
            "ds": torch.nn.ModuleList(
                Map(c.width, c.width // r**2, torch.nn.BatchNorm2d(c.width // r**2), r, bias=True)
                for r in c.ratios
            ),
        }
        for name, part in parts.items():
            self.add_module(name + self.end, part)
        norm = torch.nn.GroupNorm(c.groups, c.out_width)
        self.low_level_fuse = Map(c.width + c.detail, c.out_width, norm)
        if c.scales:
            self.proj = torch.nn.ModuleList(
                Map(width, c.out_width, torch.nn.GroupNorm(c.groups, c.out_width))
                for width in c.widths[1:]
            )

    def branch(self, x, number):
        r = self.c.ratios[number]
        height, width = (side // 8 for side in x.shape[2:])
        wide = getattr(self, f"ds{self.end}")[number](F.pad(x, (r // 2 - 1, r // 2) * 2))
        for axis, size in ((3, width), (2, height)):
            near, far, length = (r + 1) * size // 2, r * size, x.shape[axis]
            ends = wide.narrow(axis, near, far - near), wide.narrow(axis, length - far, far - near)
            wide = torch.cat([ends[0], wide, ends[1]], axis)
        y = torch.empty_like(x)
        for i in range(8):
            for j in range(8):
                rows = slice(i * height, (i + 1) * height)
                columns = slice(j * width, (j + 1) * width)
                asked = x[:, :, rows, columns].flatten(2).transpose(1, 2)
                seen = wide[:, :, rows.start :, columns.start :][:, :, : r * height, : r * width]
                seen = seen.unflatten(3, (width, r)).unflatten(2, (height, r))
                seen = seen.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
                told = getattr(self, f"attn{self.end}")[number](asked, seen, seen)[0]
                y[:, :, rows, columns] = told.transpose(1, 2).unflatten(2, (height, width))
        return y + x if self.c.skip else y

    def forward(self, c1, *coarse):
        sides = coarse[0].shape[2:]
        maps = [
            F.interpolate(getattr(self, f"linear_c{level}")(x), size=sides, mode="nearest")
            for level, x in enumerate(coarse, 2)
        ]
        x = self.linear_fuse(torch.cat(maps[::-1], 1))
        mean = getattr(self, f"image_pool{self.end}")(x).expand(-1, -1, *sides)
        found = [getattr(self, f"short_path{self.end}")(x), mean]
        found += [self.branch(x, number) for number in range(len(self.c.ratios))]
        x = getattr(self, f"cat{self.end}")(torch.cat(found, 1))
        x = F.interpolate(x, size=c1.shape[2:], mode="bilinear")
        x = self.low_level_fuse(torch.cat([x, self.linear_c1(c1)], 1))
        return x, [self.proj[i](coarse[i]) for i in (2, 1, 0)] if self.c.scales else []


@pytest.mark.parametrize(
    "options",
    [
        {"skip": False, "scales": True},
        pytest.param({"skip": True}, marks=pytest.mark.thorough),
    ],
    ids=["mask2former", "maskformer"],
)
def test_pixel_decoders(options):
    """Features and levels; every tensor there, and back but for the bias that the mean takes in."""
    config = VWPixelsConfig(**SIZES, **options)
    theirs = drawn(Decoder(config)).eval()
    rng = np.random.default_rng(0)
    shapes = {name: (2, 128 // s, 64 // s) for name, s in zip(LEVELS, (4, 8, 16, 32), strict=True)}
    batch = {
        name: rng.normal(size=(*shapes[name], width)).astype(np.float32)
        for name, width in zip(LEVELS, config.widths, strict=True)
    }
    made = jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))
    state = state_of(theirs)
    variables = table(config).load(state, nn.unbox(dict(made)))
    got = jax.jit(config.build().apply)(variables, batch)
    with torch.no_grad():
        want, scales = theirs(
            *(torch.from_numpy(batch[name].transpose(0, 3, 1, 2).copy()) for name in LEVELS)
        )
    close(got.features, want.permute(0, 2, 3, 1))
    assert len(got.scales) == len(scales)
    for ours, level in zip(got.scales, scales, strict=True):
        close(ours, level.permute(0, 2, 3, 1))

    back = table(config).save(variables)
    assert set(back) == {key for key in state if "num_batches" not in key}
    moved = {key for key in back if not np.array_equal(back[key], state[key])}
    taken = [f"ds{theirs.end}.{i}" for i in range(len(config.ratios))]
    assert moved == {f"{ds}.{leaf}" for ds in taken for leaf in ("bias", "norm.running_mean")}
    again = table(config).load(back, nn.unbox(dict(made)))
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    changed = {**state, "linear_c3.norm.weight": state["linear_c3.norm.weight"] + 1}
    with pytest.raises(ZooError, match="one module, and its tensors differ"):
        table(config).load(changed, nn.unbox(dict(made)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 3}, "width = 16: want a multiple of groups = 3"),
        ({"widths": (4, 6)}, "4 levels"),
        ({"image_size": 100}, "multiple of 64"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        VWPixelsConfig(**SIZES | changes)
