"""The released solutions, from configs/classification of the official code."""

from zoo.models.vision.deepmad.score import Unit

Row = tuple[int, int, int, int, int]
"""Kernel, channels, stride, depth, inner channels."""


def plain(stem: int, *rows: Row) -> tuple[Unit, ...]:
    """A stem and rows of bottlenecks."""
    return (
        Unit("conv", stem, 3, 2),
        *(Unit("bottleneck", o, k, s, n, b) for k, o, s, n, b in rows),
    )


def inverted(stem: int, tail: int, *rows: Row) -> tuple[Unit, ...]:
    """A stem, rows of inverted bottlenecks, and a last convolution."""
    return (
        Unit("conv", stem, 3, 2),
        *(Unit("inverted", o, k, s, n, b) for k, o, s, n, b in rows),
        Unit("conv", tail, 1),
    )


NETS: dict[str, tuple[int, tuple[Unit, ...]]] = {
    "r18": (
        224,
        plain(
            32,
            (5, 96, 2, 1, 40),
            (5, 384, 2, 6, 40),
            (5, 384, 2, 9, 64),
            (3, 1024, 1, 10, 104),
            (5, 672, 2, 12, 104),
        ),
    ),
    "r34": (
        224,
        plain(
            24,
            (5, 128, 2, 1, 24),
            (5, 512, 2, 10, 48),
            (5, 896, 2, 13, 88),
            (5, 1024, 1, 11, 104),
            (5, 616, 2, 14, 128),
        ),
    ),
    "r50": (
        224,
        plain(
            32,
            (5, 128, 2, 1, 40),
            (5, 512, 2, 11, 48),
            (5, 872, 2, 12, 88),
            (5, 1024, 1, 13, 104),
            (5, 1232, 2, 15, 120),
        ),
    ),
    "29m": (
        224,
        inverted(
            40,
            1792,
            (5, 40, 1, 2, 240),
            (5, 85, 2, 4, 512),
            (5, 134, 2, 6, 800),
            (5, 201, 2, 6, 1208),
            (5, 312, 2, 5, 1872),
        ),
    ),
    "29m.288": (
        288,
        inverted(
            40,
            1792,
            (5, 61, 2, 4, 368),
            (5, 96, 2, 4, 576),
            (5, 145, 2, 5, 872),
            (5, 217, 1, 6, 1304),
            (5, 328, 2, 4, 1968),
        ),
    ),
    "50m": (
        224,
        inverted(
            48,
            2048,
            (5, 112, 2, 7, 672),
            (5, 168, 2, 9, 1008),
            (5, 252, 2, 7, 1512),
            (5, 378, 2, 3, 2272),
            (3, 576, 1, 1, 3456),
        ),
    ),
    "89m": (
        224,
        inverted(
            56,
            2560,
            (5, 136, 2, 10, 816),
            (5, 204, 2, 9, 1224),
            (5, 326, 2, 7, 1952),
            (5, 490, 2, 4, 2944),
            (3, 744, 1, 1, 4464),
        ),
    ),
}
"""{name: side of the images, network}."""
