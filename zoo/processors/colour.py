"""Luma and chroma: RGB pictures as Y, Cb and Cr and back, by the matrices of ITU-R BT.601.

Both forms have values from 0 to 255. In *full range* (JPEG) Y, Cb and Cr use all of it; in *studio
range* (video, and the literature on super-resolution, after MATLAB) Y lies between 16 and 235, Cb
and Cr between 16 and 240.
"""

from typing import Literal

import numpy as np

from zoo.models.core.errors import UsageError

Range = Literal["full", "studio"]

_RED, _BLUE = 0.299, 0.114
_GREEN = 1 - _RED - _BLUE
_FULL = np.array(
    [
        [_RED, _GREEN, _BLUE],
        [-0.5 * _RED / (1 - _BLUE), -0.5 * _GREEN / (1 - _BLUE), 0.5],
        [0.5, -0.5 * _GREEN / (1 - _RED), -0.5 * _BLUE / (1 - _RED)],
    ]
)
_SCALE = {"full": np.ones(3), "studio": np.array([219, 224, 224]) / 255}
_OFFSET = {"full": np.array([0.0, 128, 128]), "studio": np.array([16.0, 128, 128])}


def rgb_to_ycbcr(rgb: np.ndarray, range: Range = "full") -> np.ndarray:
    """RGB [..., 3] from 0 to 255 as Y, Cb, Cr [..., 3], float64 and neither rounded nor clipped."""
    _check("rgb", rgb, range)
    return (rgb.astype(np.float64) @ _FULL.T) * _SCALE[range] + _OFFSET[range]


def ycbcr_to_rgb(ycbcr: np.ndarray, range: Range = "full") -> np.ndarray:
    """The inverse of `rgb_to_ycbcr`; what lies outside of 0 to 255 is left so."""
    _check("ycbcr", ycbcr, range)
    full = (ycbcr.astype(np.float64) - _OFFSET[range]) / _SCALE[range]
    return full @ np.linalg.inv(_FULL).T


def _check(name: str, image: np.ndarray, range: str) -> None:
    if image.shape[-1:] != (3,):
        raise UsageError(f"{name}: got {image.shape}, want [..., 3]")
    if range not in _SCALE:
        raise UsageError(f"range = {range!r}: want one of {', '.join(_SCALE)}")
