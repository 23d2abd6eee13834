"""What a network of ViT-ResNAS consists of: stages of layers; the published ones, the spaces that
they were found in, and what a network costs.
"""

from dataclasses import dataclass

PATCH = 14
"""Side in pixels of what a token of the first stage stands for; a reduction halves a grid."""


@dataclass(frozen=True)
class Layer:
    """Sizes of a layer.

    Attributes:
      num_heads: attention heads.
      head_dim: their width.
      mlp_dim: hidden width of the MLP.
      present: False for a layer that a search has left out: its number stays.
    """

    num_heads: int
    head_dim: int
    mlp_dim: int
    present: bool = True


@dataclass(frozen=True)
class Stage:
    """Layers of one width.

    Attributes:
      width: D.
      layers: one after the other.
    """

    width: int
    layers: tuple[Layer, ...]


Net = tuple[Stage, ...]
"""A network: its stages, between which grids are reduced."""


@dataclass(frozen=True)
class StageSpace:
    """What a stage may be like.

    Attributes:
      widths: to choose from, falling.
      num_heads: likewise, of every layer.
      head_dim: the width of all heads.
      mlp_dims: likewise, of every layer.
      removable: for each layer whether it may be left out.
    """

    widths: tuple[int, ...]
    num_heads: tuple[int, ...]
    head_dim: int
    mlp_dims: tuple[int, ...]
    removable: tuple[bool, ...]

    def __post_init__(self) -> None:
        for name in ("widths", "num_heads", "mlp_dims"):
            values = getattr(self, name)
            if not values or list(values) != sorted(set(values), reverse=True) or values[-1] < 1:
                raise ValueError(f"{name} = {values}: want falling numbers of 1 or more")


Space = tuple[StageSpace, ...]
"""What a network may be like."""


def largest(space: Space) -> Net:
    """The network of all the most, which holds all others."""
    return _extreme(space, 0)


def smallest(space: Space) -> Net:
    """The network of all the least, without the layers that may be left out."""
    return _extreme(space, -1)


def _extreme(space: Space, at: int) -> Net:
    return tuple(
        Stage(
            each.widths[at],
            tuple(
                Layer(each.num_heads[at], each.head_dim, each.mlp_dims[at], not (at and removable))
                for removable in each.removable
            ),
        )
        for each in space
    )


def macs(
    net: Net,
    image_size: int = 224,
    *,
    stem: int = 24,
    num_classes: int = 1000,
    tokens: int = 1,
    channels: int = 3,
) -> int:
    """Multiplications and additions for an image: all products and convolutions.

    Args:
      net: the network.
      image_size: side in pixels.
      stem: channels within the stem of convolutions; 0 for patches alone.
      num_classes: of every token's head.
      tokens: those that stand for the image.
      channels: of the image.
    """
    side = image_size // PATCH
    width = net[0].width
    if stem:
        total = 9 * stem * (channels + 2 * stem) * (image_size // 2) ** 2
        total += width * stem * (PATCH // 2) ** 2 * side**2
    else:
        total = width * channels * PATCH**2 * side**2
    for number, stage in enumerate(net):
        if number:
            side //= 2
            total += width * stage.width * (9 * side**2 + tokens)
            width = stage.width
        n = side**2 + tokens
        for layer in stage.layers:
            inner = layer.num_heads * layer.head_dim
            cost = 2 * n * (2 * width * inner + n * inner + width * layer.mlp_dim)
            total += cost * layer.present
    return total + width * num_classes * tokens


def _net(*stages: tuple[int, int, tuple[int, ...], tuple[int, ...]]) -> Net:
    """Of width, width of heads, their numbers, and hidden widths of the layers."""
    return tuple(
        Stage(width, tuple(Layer(h, head_dim, f) for h, f in zip(heads, mlp_dims, strict=True)))
        for width, head_dim, heads, mlp_dims in stages
    )


# Sizes: the scripts of the official code.
NETS = {
    "reference": _net(
        (192, 64, (3,) * 4, (768,) * 4),
        (384, 64, (6,) * 4, (1536,) * 4),
        (768, 64, (12,) * 4, (3072,) * 4),
    ),
    "t": _net(
        (176, 32, (3, 3, 3, 4, 4), (704, 576, 640, 576, 704)),
        (352, 48, (10, 8, 8, 8, 10, 10), (1408, 1408, 1280, 1408, 1280, 1024)),
        (704, 64, (10, 10, 10, 8, 8), (2560, 1792, 2816, 2816, 2560)),
    ),
    "s": _net(
        (220, 32, (5, 5, 7, 5, 5, 5), (880, 880, 800, 720, 720, 720)),
        (440, 48, (10, 10, 10, 10, 12, 12), (1760, 1440, 1920, 1600, 1600, 1440)),
        (880, 64, (16, 12, 16, 12, 14), (3200, 3200, 2880, 2240, 2560)),
    ),
    "m": _net(
        (240, 32, (7, 6, 7, 8, 7, 8, 6), (960, 960, 800, 960, 880, 880, 800)),
        (640, 48, (10, 14, 14, 16, 14, 16, 16), (1120, 1760, 1920, 1760, 1440, 1760, 1920)),
        (880, 64, (16, 10, 16, 12, 16, 14), (3200, 3840, 3840, 3200, 3520, 3520)),
    ),
}
"""The network that the paper designs by hand, and those that were found."""


def _space(widths: tuple[int, ...], step: int, heads: int, removable: tuple[bool, ...]) -> Space:
    """Three stages, each of twice the width: hidden widths are 12 to 6 steps, and the widths of all
    heads together, of 32, 48 and 64 each, three numbers below the most.
    """
    most = (heads, 2 * heads, 2 * heads)
    falls = (1, 2, 2)
    return tuple(
        StageSpace(
            tuple(width * 2**i for width in widths),
            tuple(most[i] - falls[i] * k for k in range(4)),
            (32, 48, 64)[i],
            tuple(step * k * 2**i for k in range(12, 5, -1)),
            removable,
        )
        for i in range(3)
    )


SPACES = {
    "t": _space((256, 224, 192, 176, 160), 64, 6, (False, True) * 3),
    "s": _space((320, 280, 240, 220, 200), 80, 8, (False, True) * 3 + (False,)),
}
"""The spaces of the paper: T was found in the first, S and M in the second."""

BUDGETS = {"t": ("t", 1_794_400_000), "s": ("s", 2_900_000_000), "m": ("s", 4_600_000_000)}
"""{network: its space, and multiplications and additions at most}."""
