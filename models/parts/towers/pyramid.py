"""What hierarchical towers have in common: one feature map per stage."""

from zoo.models.core.types import Array, Features


def pyramid_features(
    pyramid: tuple[Array, ...], taps: tuple[int, ...] = (), *, last: Array | None = None
) -> Features:
    """The features of a tower of stages.

    Args:
      pyramid: outputs of the stages, [..., h_i, w_i, C_i].
      taps: stages, from 1, whose outputs to return as tokens too.
      last: [..., h, w, D], the last output after what ends the tower, such as a norm; by default
        as it is.

    Raises:
      ValueError: a stage that is not there.
    """
    if bad := [tap for tap in taps if not 1 <= tap <= len(pyramid)]:
        raise ValueError(f"taps {bad}: want 1 to {len(pyramid)}, the stages of the tower")
    last = pyramid[-1] if last is None else last
    found = {tap: as_tokens(pyramid[tap - 1]) for tap in taps}
    return Features(as_tokens(last), last.shape[-3:-1], taps=found, pyramid=pyramid)


def as_tokens(grid: Array) -> Array:
    """[..., h, w, D] to [..., h w, D]."""
    return grid.reshape(*grid.shape[:-3], -1, grid.shape[-1])


def check_image_size(image_size: int, stride: int) -> None:
    """Raise ValueError unless images of this side are a multiple of the stride of a tower."""
    if image_size < stride or image_size % stride:
        raise ValueError(f"image_size = {image_size}: want a multiple of the stride {stride}")
