"""Kernels of infinitely wide convolutional networks with a hierarchy of patches that do not
overlap: the neural tangent kernel (NTK) and the random-feature kernel (RFK, also NNGP) in closed
form, their spectra, and how kernel regression with them learns a random function of another
hierarchy.

The d coordinates of an input are cut into leaves of s_1, s_2 neighbouring leaves make a node, and
so on up to d / (s_1 ... s_L) roots. What can be learned with few examples is decided by the patches
that the target sees, not by d.

Follows: arXiv:2208.01003. Everything is float64, which arc cosines near 1 need.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.evaluate.powerlaw import PowerLaw, fit_power_law
from zoo.models.core.card import Card
from zoo.models.core.config import SystemConfig
from zoo.models.core.errors import UsageError
from zoo.models.core.keytable import Row, Table, Transform
from zoo.models.core.registry import register
from zoo.models.core.types import Array

CARD = Card(
    slug="wide_cnn_kernels",
    paper="arXiv:2208.01003",
    code="https://github.com/alesfav/convolutional_neural_kernels",
    differs=(
        "Inputs are never changed in place; the official NTK normalises its arguments.",
        "Grams are computed in blocks of rows, so that the tree is never held for all pairs.",
        "The training sets of one learning curve are prefixes of one draw.",
    ),
)

_BLOCK = 1 << 22
"""The most numbers of the tree, rows x columns x leaves, that are in memory at once."""


@dataclass(frozen=True)
class KernelConfig(SystemConfig):
    """A hierarchy of patches.

    Attributes:
      dim: d, coordinates of an input.
      filters: s_1 to s_L, the leaves first.
      normalize: whether every leaf is brought to unit length first; otherwise it has to have it.
    """

    dim: int = 8
    filters: tuple[int, ...] = (2, 2)
    normalize: bool = False

    def __post_init__(self) -> None:
        if not self.filters or min(self.filters) < 1 or self.dim % math.prod(self.filters):
            raise ValueError(
                f"dim = {self.dim}: want a multiple of the product of filters = {self.filters}"
            )

    @property
    def tree(self) -> tuple[int, ...]:
        """Axes of an input: roots, s_L, ..., s_1."""
        return (self.dim // math.prod(self.filters), *self.filters[::-1])

    def build(self) -> "HierarchicalKernel":
        """The kernel."""
        return HierarchicalKernel(self)


@dataclass(frozen=True)
class Gram:
    """Kernels between two sets of inputs, float64 [n, m] each."""

    ntk: np.ndarray
    rfk: np.ndarray


def arc_cosine(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The arc-cosine kernels of degree 0 and 1 of a cosine, clipped to [-1, 1]."""
    t = np.clip(t, -1, 1)
    rest = np.pi - np.arccos(t)
    return rest / np.pi, (np.sqrt(1 - t * t) + rest * t) / np.pi


@dataclass(frozen=True)
class HierarchicalKernel:
    """The kernels of one hierarchy."""

    config: KernelConfig

    def __call__(self, x: np.ndarray, y: np.ndarray | None = None) -> Gram:
        """Kernels between inputs x [n, d] and y [m, d], by default x again.

        Raises:
          UsageError: inputs of another dimension.
        """
        a = self._leaves("x", x)
        b = a if y is None else self._leaves("y", y)
        rows = max(1, _BLOCK // max(1, b.size // b.shape[-1]))
        parts = [self._recurse(a[i : i + rows], b) for i in range(0, len(a), rows)]
        ntk, rfk = (np.concatenate(part) for part in zip(*parts, strict=True))
        return Gram(ntk, rfk)

    def sample(self, number: int, rng: np.random.Generator) -> np.ndarray:
        """Inputs [number, d] whose leaves are independent uniform points on the sphere."""
        leaves = rng.standard_normal((number, *self.config.tree))
        leaves /= np.linalg.norm(leaves, axis=-1, keepdims=True)
        return leaves.reshape(number, -1)

    def spectrum(self, x: np.ndarray) -> np.ndarray:
        """Eigenvalues of the NTK as an operator on the distribution of x [n, d], falling: those of
        the Gram matrix over n.
        """
        return np.linalg.eigvalsh(self(x).ntk)[::-1] / len(x)

    def _leaves(self, name: str, x: np.ndarray) -> np.ndarray:
        if x.ndim != 2 or x.shape[1] != self.config.dim:
            raise UsageError(f"{name}: got {x.shape}, want [n, {self.config.dim}]")
        leaves = x.astype(np.float64).reshape(-1, *self.config.tree)
        if self.config.normalize:
            leaves = leaves / np.linalg.norm(leaves, axis=-1, keepdims=True)
        return leaves

    def _recurse(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """NTK and RFK of leaves [n, roots, ..., s_1] and [m, roots, ..., s_1]."""
        cosine = np.einsum("n...s,m...s->nm...", a, b)
        ntk = cosine
        for _ in self.config.filters:  # from the leaves up; the last mean is over the roots
            zero, one = arc_cosine(cosine)
            cosine = one.mean(-1)
            ntk = (zero * ntk).mean(-1) + cosine
        return ntk, cosine


def fully_connected_ntk(x: np.ndarray, y: np.ndarray, depth: int) -> np.ndarray:
    """The NTK of a fully connected network of `depth` hidden layers between inputs [n, d] and
    [m, d], which are brought to unit length: the same recursion without a tree.
    """
    both = (v.astype(np.float64) for v in (x, y))
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in both)
    cosine = a @ b.T
    ntk = cosine
    for _ in range(depth):
        zero, cosine = arc_cosine(cosine)
        ntk = zero * ntk + cosine
    return ntk


@dataclass(frozen=True)
class LearningCurve:
    """Test errors of kernel regression.

    Attributes:
      sizes: [P], numbers of training examples.
      errors: [seeds, P], mean squared errors.
      law: the power law through the means over the seeds.
    """

    sizes: np.ndarray
    errors: np.ndarray
    law: PowerLaw


def learning_curve(
    teacher: HierarchicalKernel,
    student: HierarchicalKernel,
    sizes: Sequence[int],
    *,
    test: int = 512,
    seeds: int = 6,
    ridge: float = 1e-10,
    jitter: float = 1e-9,
) -> LearningCurve:
    """How regression with the student's NTK learns Gaussian fields with the teacher's NTK as their
    covariance.

    Args:
      teacher: the kernel of the fields.
      student: that of the regression, of inputs of the same dimension and leaf size.
      sizes: numbers of training examples.
      test: examples on which errors are measured.
      seeds: independent draws of inputs and field.
      ridge: added to the diagonal of the student's Gram matrix.
      jitter: added to the teacher's, so that it has a square root.

    Raises:
      UsageError: the two see inputs of different kinds.
    """
    ours, theirs = student.config, teacher.config
    if (ours.dim, ours.filters[0]) != (theirs.dim, theirs.filters[0]):
        raise UsageError(f"teacher {theirs} and student {ours}: want one dim and one leaf size")
    errors, most = np.empty((seeds, len(sizes))), max(sizes)
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        x = student.sample(most + test, rng)
        covariance = teacher(x).ntk + jitter * np.eye(len(x))
        target = np.linalg.cholesky(covariance) @ rng.standard_normal(len(x))
        gram = student(x, x[:most]).ntk  # [most + test, most]
        for i, size in enumerate(sizes):
            known = gram[:size, :size] + ridge * np.eye(size)
            weights = np.linalg.solve(known, target[:size])
            errors[seed, i] = np.mean((gram[most:, :size] @ weights - target[most:]) ** 2)
    return LearningCurve(np.array(sizes), errors, fit_power_law(sizes, errors.mean(0)))


class FiniteNetwork(nn.Module):
    """The network of finite width whose kernels these are in the limit: [n, d] -> [n, 1].

    Every patch has filters of its own; all weights are standard normal and are divided by the
    square root of their fan-in when they are used.

    Attributes:
      config: the hierarchy.
      width: channels after every layer.
    """

    config: KernelConfig
    width: int

    def setup(self) -> None:
        c, normal, kernels = self.config, nn.initializers.normal(1.0), []
        patches, channels = c.dim, 1
        for number, size in enumerate(c.filters):
            patches //= size
            shape = (patches, size, channels, self.width)
            boxed = nn.with_logical_partitioning(normal, (None, None, "conv_in", "conv_out"))
            kernels.append(self.param(f"kernel_{number}", boxed, shape))
            channels = self.width
        self.kernels = kernels
        boxed = nn.with_logical_partitioning(normal, (None, "embed"))
        self.readout = self.param("readout", boxed, (patches, self.width))

    def features(self, x: Array) -> Array:
        """[n, d] to [n, roots, width]: the inner product of two such is the RFK times
        `roots width / (s_1 2^L)` in the limit.
        """
        x = x[..., None]  # [n, patches, C]
        for kernel in self.kernels:
            patches, size, channels, _ = kernel.shape
            x = x.reshape(-1, patches, size, channels)
            x = jnp.einsum("npsc,pscd->npd", x, kernel) / math.sqrt(size * channels)
            x = jax.nn.relu(x)
        return x

    def __call__(self, x: Array) -> Array:
        """[n, d] to [n, 1]."""
        y = jnp.einsum("npd,pd->n", self.features(x), self.readout)
        return y[:, None] / math.sqrt(self.readout.size)


_filter = Transform(
    "filter",
    lambda theirs, _: [theirs[0][0].transpose(2, 3, 1, 0)],
    lambda ours: [ours[0].transpose(3, 2, 0, 1)[None]],
)
"""Theirs is [1, out, in, patches, size], ours [patches, size, in, out]."""

_readout = Transform(
    "readout",
    lambda theirs, shapes: [theirs[0].reshape(shapes[0][::-1]).T],
    lambda ours: [ours[0].T.reshape(-1, 1)],
)
"""Theirs is [width patches, 1], ours [patches, width]."""


def table(config: KernelConfig) -> Table:
    """Keys of the official finite network."""
    rows = [Row(f"kernel_{i}", f"conv.{i}.w", _filter) for i in range(len(config.filters))]
    return Table((*rows, Row("readout", "beta", _readout)))


VARIANTS = {
    "wide_cnn_kernels_d8": KernelConfig(),
    "wide_cnn_kernels_d8_shallow": KernelConfig(filters=(2,)),
    "wide_cnn_kernels_d8_deep": KernelConfig(filters=(2, 2, 2)),
}

register(CARD, VARIANTS)
