"""Power laws with an offset, `error = alpha * size^beta + gamma`, fitted to measured points.

For a given `gamma` the fit is a straight line through the logarithms, in closed form. A `gamma`
that is not given is the one whose curve has the least squared relative error, searched between 0
and 0.999 of the smallest error: near that error the logarithm of what is left explodes.

Follows: arXiv:1712.00409, section 3; intervals are Student's for the line and percentiles of
resampled points.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from zoo.models.core.errors import UsageError

_MOST = 0.999
_GRID = np.linspace(0, 1, 33)
_ROUNDS = 7
"""Each round looks closer by a factor of 16: the offset is found to a few parts in 10^9."""


@dataclass(frozen=True)
class PowerLaw:
    """A fitted curve.

    Attributes:
      alpha: the error at size 1, without the offset.
      beta: the exponent, negative where more data helps.
      gamma: the error that no size removes.
      beta_error: standard error of `beta`, `gamma` taken as known; NaN of two points.
      relative_error: root mean square of log(measured / fitted).
      r2: share of the variance of the logarithms (of `error - gamma`) that the line explains.
      points: how many were fitted.
    """

    alpha: float
    beta: float
    gamma: float
    beta_error: float
    relative_error: float
    r2: float
    points: int

    def __call__(self, size: float | np.ndarray) -> np.ndarray:
        """The error at `size`."""
        return self.alpha * np.asarray(size, np.float64) ** self.beta + self.gamma

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Confidence interval of `beta` by Student's distribution with `points - 2` degrees."""
        half = stdtrit(self.points - 2, 0.5 + confidence / 2) * self.beta_error
        return self.beta - half, self.beta + half

    def size_for(self, error: float) -> float:
        """The size at which the error is `error`.

        Raises:
          UsageError: no size reaches it.
        """
        if error <= self.gamma or not self.beta:
            raise UsageError(f"error = {error}: the curve stays above gamma = {self.gamma:.6g}")
        return float(((error - self.gamma) / self.alpha) ** (1 / self.beta))


def fit_power_law(
    sizes: Sequence[float] | np.ndarray,
    errors: Sequence[float] | np.ndarray,
    *,
    gamma: float | None = 0.0,
) -> PowerLaw:
    """The power law through points.

    Args:
      sizes: [n], positive, at least two different ones; three where `gamma` is searched.
      errors: [n], positive.
      gamma: the offset; None to search it.

    Raises:
      UsageError: points that no power law goes through, with the reason.
    """
    m, eps = _checked(sizes, errors, gamma)
    alpha, beta, offset = (float(x) for x in _solve(m, eps, gamma))
    line = np.log(alpha) + beta * np.log(m)
    log = np.log(eps - offset)
    rss, spread = np.sum((log - line) ** 2), np.sum((log - log.mean()) ** 2)
    freedom = len(m) - 2
    slope_error = np.nan
    if freedom:
        slope_error = np.sqrt(rss / freedom / np.sum((np.log(m) - np.log(m).mean()) ** 2))
    relative = np.log(eps) - np.log(np.exp(line) + offset)
    return PowerLaw(
        alpha,
        beta,
        offset,
        beta_error=float(slope_error),
        relative_error=float(np.sqrt(np.mean(relative**2))),
        r2=float(1 - rss / spread) if spread else 1.0,
        points=len(m),
    )


def bootstrap(
    sizes: Sequence[float] | np.ndarray,
    errors: Sequence[float] | np.ndarray,
    *,
    gamma: float | None = 0.0,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of `alpha`, `beta` and `gamma` over resampled points.

    Draws that cannot be fitted, because too few different sizes are in them, are left out.

    Args:
      sizes: as of `fit_power_law`.
      errors: likewise.
      gamma: likewise.
      samples: number of draws, with replacement, of as many points.
      confidence: share of the draws between the ends.
      seed: decides the draws.
    """
    m, eps = _checked(sizes, errors, gamma)
    drawn = np.random.default_rng(seed).integers(len(m), size=(samples, len(m)))
    least = 2 if gamma is not None else 3
    distinct = np.array([len(np.unique(row)) for row in m[drawn]])
    drawn = drawn[distinct >= least]
    found = _solve(m[drawn], eps[drawn], gamma)
    tail = 50 * (1 - confidence)
    ends = [np.percentile(value, (tail, 100 - tail)) for value in found]
    return {
        name: (float(low), float(high))
        for name, (low, high) in zip(("alpha", "beta", "gamma"), ends, strict=True)
    }


def _checked(
    sizes: Sequence[float] | np.ndarray, errors: Sequence[float] | np.ndarray, gamma: float | None
) -> tuple[np.ndarray, np.ndarray]:
    m, eps = np.asarray(sizes, np.float64), np.asarray(errors, np.float64)
    least = 2 if gamma is not None else 3
    if m.ndim != 1 or m.shape != eps.shape:
        raise UsageError(f"sizes {m.shape} and errors {eps.shape}: want one of each per point")
    if not (np.isfinite(m).all() and np.isfinite(eps).all() and (m > 0).all() and (eps > 0).all()):
        raise UsageError("sizes and errors: want positive finite numbers only")
    if len(np.unique(m)) < least:
        raise UsageError(f"{len(np.unique(m))} different sizes: want at least {least} for this fit")
    if gamma is not None and not 0 <= gamma < eps.min():
        raise UsageError(f"gamma = {gamma}: want 0 or more, and below every error ({eps.min():g})")
    return m, eps


def _solve(
    m: np.ndarray, eps: np.ndarray, gamma: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """alpha, beta and gamma [...] of points [..., n]."""
    if gamma is not None:
        alpha, beta, _ = _lines(m, eps, np.full((*eps.shape[:-1], 1), gamma))
        return alpha[..., 0], beta[..., 0], np.full(eps.shape[:-1], gamma)
    low = np.zeros((*eps.shape[:-1], 1))
    high = _MOST * eps.min(-1, keepdims=True)
    for _ in range(_ROUNDS):
        grid = low + (high - low) * _GRID  # [..., G]
        alpha, beta, loss = _lines(m, eps, grid)
        best = loss.argmin(-1)[..., None]
        step = (high - low) / (len(_GRID) - 1)
        chosen = np.take_along_axis(grid, best, -1)
        low, high = np.maximum(chosen - step, low), np.minimum(chosen + step, high)
    picked = (np.take_along_axis(x, best, -1)[..., 0] for x in (alpha, beta, grid))
    return tuple(picked)  # type: ignore[return-value]


def _lines(
    m: np.ndarray, eps: np.ndarray, gammas: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """alpha, beta and the squared relative error [..., G] for each offset [..., G]."""
    x = np.log(m)[..., None, :]  # [..., 1, n]
    y = np.log(eps[..., None, :] - gammas[..., None])  # [..., G, n]
    mean = x.mean(-1, keepdims=True)
    beta = ((x - mean) * y).sum(-1) / ((x - mean) ** 2).sum(-1)
    start = y.mean(-1) - beta * mean[..., 0]
    curve = np.exp(start[..., None] + beta[..., None] * x) + gammas[..., None]
    loss = ((np.log(eps)[..., None, :] - np.log(curve)) ** 2).sum(-1)
    return np.exp(start), beta, loss
