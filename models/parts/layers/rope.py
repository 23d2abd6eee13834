"""Rotary position embedding and its scalings to longer contexts.

Follows: arXiv:2104.09864, in the half-split form of Llama.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from zoo.models.core.types import Array


class Scaling(Protocol):
    """How the frequencies of a rotary embedding are changed for longer contexts."""

    @property
    def amplitude(self) -> float:
        """Factor of cosines and sines."""
        ...

    def frequencies(self, dim: int, theta: float, length: Array) -> np.ndarray | Array:
        """Radians per position, float32 [dim / 2], or [B, 1, dim / 2] if they depend on the
        `length` int [B, 1, 1] of the sequences.
        """
        ...


@dataclass(frozen=True)
class Linear:
    """All positions divided by `factor`. Follows: arXiv:2306.15595."""

    factor: float
    amplitude = 1.0

    def frequencies(self, dim: int, theta: float, length: Array) -> np.ndarray:
        """As in `Scaling`."""
        del length
        return rope_frequencies(dim, theta) / np.float32(self.factor)


@dataclass(frozen=True)
class DynamicNTK:
    """A base that grows with the length of the sequence once it exceeds `context`.

    The length is that of the tokens that are run: prefill rotates all by its own length, and every
    decoded token by its place, as transformers does, so past `context` decoding is not exactly a
    recomputation of the whole.
    """

    factor: float
    context: int
    amplitude = 1.0

    def frequencies(self, dim: int, theta: float, length: Array) -> Array:
        """As in `Scaling`."""
        ratio = jnp.maximum(length, self.context).astype(jnp.float32) / self.context
        base = theta * (self.factor * ratio - (self.factor - 1)) ** (dim / (dim - 2))
        return 1.0 / base ** (np.arange(0, dim, 2, dtype=np.float32) / dim)


@dataclass(frozen=True)
class Yarn:
    """Slow frequencies divided by `factor`, fast ones kept, a ramp between. Follows:
    arXiv:2309.00071.

    Attributes:
      factor: how much longer the context is than `original`.
      original: tokens of the context before.
      beta_fast: a frequency that turns more often than this within `original` is kept.
      beta_slow: one that turns less often is divided.
      truncate: whether the ends of the ramp are rounded outwards to whole frequencies.
      attention_factor: the amplitude; `0.1 ln(factor) + 1` by default.
    """

    factor: float
    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    @property
    def amplitude(self) -> float:
        """As in `Scaling`."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def frequencies(self, dim: int, theta: float, length: Array) -> np.ndarray:
        """As in `Scaling`."""
        del length

        def place(turns: float) -> float:
            """The (fractional) frequency that turns so often within the original context."""
            return dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = place(self.beta_fast), place(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high += 0.001 * (low == high)
        ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
        kept = rope_frequencies(dim, theta)
        return (kept * (1 - ramp) + kept / self.factor * ramp).astype(np.float32)


@dataclass(frozen=True)
class Llama3:
    """Wavelengths beyond `original / low` divided by `factor`, those below `original / high` kept,
    smoothly between. Follows: Llama 3.1 (arXiv:2407.21783).
    """

    factor: float
    original: int
    low: float = 1.0
    high: float = 4.0
    amplitude = 1.0

    def frequencies(self, dim: int, theta: float, length: Array) -> np.ndarray:
        """As in `Scaling`."""
        del length
        kept = rope_frequencies(dim, theta)
        turns = self.original * kept / (2 * math.pi)
        smooth = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return ((1 - smooth) * kept / self.factor + smooth * kept).astype(np.float32)


@dataclass(frozen=True)
class LongRope:
    """A divisor for every frequency: `short` ones up to the original length, `long` ones beyond.
    Follows: arXiv:2402.13753.

    The length is that of the tokens that are run, so keys that were cached while the sequence was
    short keep the short divisors. transformers drops its cache when generation passes `original`
    and reads the whole anew; shapes are static here, so whoever wants that prefills again.

    Attributes:
      short: divisors, one for each frequency.
      long: divisors, one for each frequency.
      original: the longest sequence that `short` is for.
      factor: how much longer the context is; decides the amplitude.
      attention_factor: the amplitude; `sqrt(1 + ln(factor) / ln(original))` by default.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int
    factor: float
    attention_factor: float | None = None

    @property
    def amplitude(self) -> float:
        """As in `Scaling`."""
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1 + math.log(max(self.factor, 1)) / math.log(self.original))

    def frequencies(self, dim: int, theta: float, length: Array) -> Array:
        """As in `Scaling`.

        Raises:
          ValueError: not one divisor for each frequency.
        """
        if not len(self.short) == len(self.long) == dim // 2:
            raise ValueError(
                f"longrope: {len(self.short)} short and {len(self.long)} long factors for "
                f"{dim // 2} frequencies; want one for each"
            )
        kept = rope_frequencies(dim, theta)
        short, long = (kept / np.asarray(d, np.float32) for d in (self.short, self.long))
        return jnp.where(length > self.original, long, short)


@dataclass(frozen=True)
class RopeConfig:
    """A rotary embedding.

    Attributes:
      theta: base; the slowest frequency is about 1 / theta.
      scaling: change of the frequencies; None for the plain ones.
      fraction: part of every head that is rotated, from its start.
      sections: with positions of several axes ([B, L, 3]: time, row, column), how many frequencies
        each axis has, cycling through the axes; their sum is half of what is rotated. Follows:
        Qwen2-VL (arXiv:2409.12191).
      interleaved: the axes take turns, frequency i going to axis i mod A, until an axis has had its
        section; what is left goes to the first. Every axis then has fast and slow frequencies.
        Follows: Qwen3-VL (arXiv:2511.21631).
    """

    theta: float = 10_000.0
    scaling: Linear | DynamicNTK | Yarn | Llama3 | LongRope | None = None
    fraction: float = 1.0
    sections: tuple[int, ...] = ()
    interleaved: bool = False

    @property
    def amplitude(self) -> float:
        """Factor of cosines and sines."""
        return 1.0 if self.scaling is None else self.scaling.amplitude

    def angles(self, head_dim: int, position: Array) -> Array:
        """The angle of every frequency at every token: float32 [B, L, R], 2 R <= head_dim.

        Where the frequencies depend on the length of the sequence, it is the greatest position of
        the row plus 1; transformers takes the greatest of the batch, so that there the numbers of
        a row depend on its neighbours.

        Args:
          head_dim: E.
          position: float32 [B, L] or, with `sections`, [B, L, A].

        Raises:
          ValueError: positions of several axes without `sections` for all frequencies.
        """
        dim = int(head_dim * self.fraction)
        if self.scaling is None:
            frequencies = rope_frequencies(dim, self.theta)
        else:
            length = position.reshape(position.shape[0], -1).max(-1).astype(jnp.int32) + 1
            frequencies = self.scaling.frequencies(dim, self.theta, length[:, None, None])
        if position.ndim == 2:
            return position[..., None] * frequencies
        if sum(self.sections) != dim // 2:
            raise ValueError(
                f"positions {position.shape} have several axes: sections = {self.sections} must "
                f"name {dim // 2} frequencies"
            )
        return position[..., self._axes(position.shape[-1])] * frequencies

    def _axes(self, count: int) -> np.ndarray:
        """Which of `count` axes each frequency belongs to."""
        if not self.interleaved:
            return np.repeat(np.arange(len(self.sections)) % count, self.sections)
        place = np.arange(sum(self.sections))
        axis = place % count
        return np.where(place < count * np.array(self.sections)[axis], axis, 0)


def rope_frequencies(dim: int, theta: float) -> np.ndarray:
    """Radians per position, float32 [dim / 2]: `theta ** (-2 i / dim)`."""
    return (1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float32) / dim)).astype(np.float32)


def rotate(x: Array, angle: Array, amplitude: float = 1.0) -> Array:
    """Rotate the pairs (x[i], x[i + R]), i < R, of every head by `angle[i]`, in float32.

    Args:
      x: [B, L, H, E]; what lies beyond 2 R of E passes as it is.
      angle: float32 [B, L, R].
      amplitude: factor of what is rotated.
    """
    half, kind = angle.shape[-1], x.dtype
    cos, sin = (amplitude * f(angle)[:, :, None] for f in (jnp.cos, jnp.sin))  # [B, L, 1, R]
    a, b, rest = jnp.split(x, (half, 2 * half), -1)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    turned = [(a * cos - b * sin).astype(kind), (b * cos + a * sin).astype(kind)]
    return jnp.concatenate(turned + [rest] * (rest.shape[-1] > 0), -1)
