"""Fourier-VLM: the map of vision tokens on a smaller grid, made of its low frequencies.

Every channel of the tower's tokens is a small picture. Its cosine transform (DCT-II, orthonormal)
is cut to the low frequencies and transformed back on a grid of that size. Nothing is learned, but
models are trained with it.

Follows: arXiv:2508.06038.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from zoo.models.base import llava
from zoo.models.core.card import Card
from zoo.models.core.registry import register
from zoo.models.core.types import Array, TokenSet
from zoo.models.parts.assemblies.llava_hub import hub_table
from zoo.models.parts.reduce.base import Keep, Reducer, Seen, Text, num_kept

CARD = Card(
    slug="fourier_vlm",
    paper="arXiv:2508.06038",
    code="https://github.com/whyisverysmart/Fourier-Compressor",
    differs=(
        "Two products with constant matrices take the place of the transforms (same numbers), and "
        "float32 is accepted; the official function wants half precision.",
        "`rescale=True` keeps the size of the tokens, for models that were not trained with it; by "
        "default a constant map grows by the ratio of the sides, as in the official code.",
        "The models of the LLaVA family take it; Qwen2-VL and Qwen2.5-VL do not.",
    ),
)

Grid = tuple[int, int]


def cosines(size: int) -> np.ndarray:
    """The orthonormal DCT-II of so many values as a matrix, float64 [frequency, place]."""
    k, n = np.arange(size)[:, None], np.arange(size)
    scale = np.where(k == 0, 1, 2) / size
    return np.sqrt(scale) * np.cos(np.pi * (2 * n + 1) * k / (2 * size))


@functools.cache
def low_pass(size: int, kept: int) -> np.ndarray:
    """From `size` values to the `kept` that have their low frequencies, float32 [kept, size]."""
    return (cosines(kept).T @ cosines(size)[:kept]).astype(np.float32)


def compress(tokens: Array, grid: Grid, kept: Grid, *, rescale: bool = False) -> Array:
    """Tokens [..., H W, D] of a grid on a smaller one, [..., h w, D], computed in float32.

    Args:
      tokens: row by row.
      grid: (H, W).
      kept: (h, w), no larger.
      rescale: divide by sqrt(H W / (h w)), so that a constant map stays what it is.

    Raises:
      ValueError: a grid of another number of tokens, or a larger one to be kept.
    """
    if grid[0] * grid[1] != tokens.shape[-2]:
        raise ValueError(f"grid = {grid}: want one of the {tokens.shape[-2]} tokens")
    if not (1 <= kept[0] <= grid[0] and 1 <= kept[1] <= grid[1]):
        raise ValueError(f"kept = {kept}: want a grid of 1 x 1 to {grid[0]} x {grid[1]}")
    x = tokens.astype(jnp.float32).reshape(*tokens.shape[:-2], *grid, tokens.shape[-1])
    down, across = (jnp.asarray(low_pass(*pair)) for pair in zip(grid, kept, strict=True))
    exact = {"precision": jax.lax.Precision.HIGHEST}
    y = jnp.einsum("hy,...yxd->...hxd", down, x, **exact)
    y = jnp.einsum("wx,...hxd->...hwd", across, y, **exact)
    if rescale:
        y = y * math.sqrt(kept[0] * kept[1] / (grid[0] * grid[1]))
    return y.reshape(*tokens.shape[:-2], -1, tokens.shape[-1]).astype(tokens.dtype)


def compress_by_fft(tokens: Array, grid: Grid, kept: Grid) -> Array:
    """`compress` by fast transforms in the order of the official code, so that float32 is rounded
    on the way as there; for comparison. Arguments and result as there.
    """
    x = tokens.astype(jnp.float32).reshape(*tokens.shape[:-2], *grid, tokens.shape[-1])
    x = jnp.moveaxis(x, -1, -3)  # [..., D, H, W]
    x = _transform(_transform(x).mT)[..., : kept[1], : kept[0]]  # [..., D, w, h]
    x = _transform_back(_transform_back(x).mT)  # [..., D, h, w]
    y = jnp.moveaxis(x, -3, -1)
    return y.reshape(*tokens.shape[:-2], -1, tokens.shape[-1]).astype(tokens.dtype)


def _transform(x: Array) -> Array:
    """The orthonormal DCT-II along the last axis: an FFT of the even places, then the odd ones
    backwards, turned by quarter steps.
    """
    size = x.shape[-1]
    spectrum = jnp.fft.fft(jnp.concatenate([x[..., ::2], x[..., 1::2][..., ::-1]], -1))
    turn = -jnp.arange(size, dtype=x.dtype) * math.pi / (2 * size)
    y = spectrum.real * jnp.cos(turn) - spectrum.imag * jnp.sin(turn)
    return 2 * (y / _lengths(size))


def _transform_back(x: Array) -> Array:
    """The inverse of `_transform`."""
    size = x.shape[-1]
    real = x / 2 * _lengths(size)
    imaginary = -jnp.pad(real[..., :0:-1], [(0, 0)] * (x.ndim - 1) + [(1, 0)])
    turn = jnp.arange(size, dtype=x.dtype) * math.pi / (2 * size)
    cos, sin = jnp.cos(turn), jnp.sin(turn)
    spectrum = jax.lax.complex(real * cos - imaginary * sin, real * sin + imaginary * cos)
    y = jnp.fft.ifft(spectrum).real
    half = size - size // 2
    return (
        jnp.zeros_like(y).at[..., ::2].set(y[..., :half]).at[..., 1::2].set(y[..., : half - 1 : -1])
    )


def _lengths(size: int) -> Array:
    """Lengths of the cosines, twice over: float32 [size]."""
    return jnp.asarray([2 * math.sqrt(size if k == 0 else size / 2) for k in range(size)])


def cells(grid: Grid, kept: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Which part of a grid each token of a smaller one stands for.

    Returns:
      the patch in the middle of each part, int32 [h w]; the part of every patch, int32 [H W].
    """
    lines = [np.arange(size) * small // size for size, small in zip(grid, kept, strict=True)]
    middles = [
        np.array([np.flatnonzero(line == part).mean() for part in range(small)]).astype(int)
        for line, small in zip(lines, kept, strict=True)
    ]
    middle = middles[0][:, None] * grid[1] + middles[1]
    part = lines[0][:, None] * kept[1] + lines[1]
    return middle.reshape(-1).astype(np.int32), part.reshape(-1).astype(np.int32)


@dataclass(frozen=True)
class FourierVLM(Reducer):
    """The method.

    Attributes:
      keep: tokens of every tile that remain, as a number or a share; of these, as many as make the
        largest square.
      rescale: whether tokens keep their size, as a frozen projector wants it.
    """

    keep: Keep = 0.25
    rescale: bool = False

    merges: ClassVar[bool] = True

    def num_kept(self, tokens: int) -> int:
        """Tokens of a tile that remain: a square number.

        Raises:
          ValueError: more than there are, or tokens that are no square grid.
        """
        number = num_kept(self.keep, tokens)
        if math.isqrt(tokens) ** 2 != tokens:
            raise ValueError(f"Fourier-VLM: {tokens} tokens of a tile are no square grid")
        return math.isqrt(number) ** 2

    def reduce(self, seen: Seen, text: Text | None = None, *, keep: int) -> TokenSet:
        """The tokens of the smaller grid, each in the middle of the patches that it stands for."""
        del text
        assert seen.grid is not None
        kept = (math.isqrt(keep),) * 2
        tokens = compress(seen.tokens, seen.grid, kept, rescale=self.rescale)
        lead = tokens.shape[:-2]
        index, groups = (jnp.broadcast_to(x, (*lead, x.size)) for x in cells(seen.grid, kept))
        return TokenSet(tokens, index=index, groups=groups)


_LLAVA, _TINY = llava.VARIANTS["llava_1_5_7b"], llava.VARIANTS["llava_tiny"]

VARIANTS = {
    "fourier_vlm_llava_1_5_7b": replace(_LLAVA, reducer=FourierVLM()),
    **{
        f"fourier_vlm_llava_1_5_7b.{n}": replace(_LLAVA, reducer=FourierVLM(n))
        for n in (36, 64, 100, 256)
    },
    "fourier_vlm_tiny": replace(_TINY, reducer=FourierVLM(4)),
}

register(CARD, VARIANTS, table=hub_table, reducers={"fourier_vlm": FourierVLM})
