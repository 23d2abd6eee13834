"""Fixed position tables, as NumPy constants."""

import numpy as np


def sincos_1d(positions: np.ndarray, dim: int) -> np.ndarray:
    """Rows [sin(p w_k), cos(p w_k)] with w_k = 10000^(-2 k / dim), k < dim / 2. float64
    [len(positions), dim].
    """
    if dim % 2:
        raise ValueError(f"dim: got {dim}, want an even number")
    omega = 10000.0 ** (-np.arange(dim // 2, dtype=np.float64) / (dim / 2))
    angle = np.outer(positions.astype(np.float64), omega)  # [P, dim / 2]
    return np.concatenate([np.sin(angle), np.cos(angle)], 1)


def sincos_2d(height: int, width: int, dim: int, *, before: int = 0) -> np.ndarray:
    """Sine-cosine table of a grid in row-major order, float32 [before + height * width, dim].

    Follows: MAE (arXiv:2111.06377): the first half of a row encodes the column, the second the row;
    so many rows of zeros `before` the grid are for a class token.
    """
    if dim % 4:
        raise ValueError(f"dim: got {dim}, want a multiple of 4")
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    table = [sincos_1d(columns.ravel(), dim // 2), sincos_1d(rows.ravel(), dim // 2)]
    grid = np.concatenate(table, 1).astype(np.float32)
    return np.pad(grid, ((before, 0), (0, 0)))
