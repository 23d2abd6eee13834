"""Ridge regression for encoding models: from features of stimuli to what was measured.

The intercept is a column of ones before the features, and is penalised like them. Follows: the code
of arXiv:2406.14481.
"""

from collections.abc import Sequence

import numpy as np

from zoo.models.core.errors import UsageError


def ridge(features: np.ndarray, targets: np.ndarray, alphas: Sequence[float]) -> np.ndarray:
    """Weights for several penalties at once, by one singular value decomposition.

    Args:
      features: [n, d].
      targets: [n, e].
      alphas: A penalties, above 0.

    Returns:
      float64 [A, 1 + d, e]; the first row is the intercept.

    Raises:
      UsageError: arrays that do not fit each other, values that are not finite, or a penalty of 0.
    """
    if features.ndim != 2 or targets.ndim != 2 or len(features) != len(targets):
        raise UsageError(
            f"features {features.shape} and targets {targets.shape}: want [n, d] and [n, e]"
        )
    if not (np.isfinite(features).all() and np.isfinite(targets).all()):
        raise UsageError("features and targets: want finite numbers only")
    if min(alphas) <= 0:
        raise UsageError(f"alphas = {tuple(alphas)}: want penalties above 0")
    u, s, vt = np.linalg.svd(with_ones(features), full_matrices=False)
    projected = u.T @ targets.astype(np.float64)  # [r, e]
    shrunk = [(s / (s * s + alpha))[:, None] * projected for alpha in alphas]
    return np.stack([vt.T @ each for each in shrunk])


def with_ones(features: np.ndarray) -> np.ndarray:
    """[n, d] to float64 [n, 1 + d], what weights of `ridge` are multiplied with."""
    ones = np.ones((len(features), 1))
    return np.concatenate([ones, features.astype(np.float64)], 1)


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlation of every column: [..., n, e] and [..., n, e] to [..., e]; 0 where one of them is
    constant.
    """
    a, b = (x - x.mean(-2, keepdims=True) for x in (a, b))
    scale = np.linalg.norm(a, axis=-2) * np.linalg.norm(b, axis=-2)
    found: np.ndarray = np.where(scale > 0, (a * b).sum(-2) / np.where(scale > 0, scale, 1), 0.0)
    return found
