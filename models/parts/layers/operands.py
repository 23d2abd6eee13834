"""What a kernel may be besides an array, and `contract`, which every linear map goes through.

An operand stands in the tree of parameters where the kernel would: `model.apply` takes it without
any change in the model. Its first leaf has the kernel's shape, which is what Flax checks. All of
its leaves share the kernel's leading axes, so that a stack of layers cuts its rows out of every
leaf alike.
"""

import functools
import itertools
import string
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from zoo.models.core.types import Array


@struct.dataclass
class LowRank:
    """The kernel `base + scale a b`. Follows: arXiv:2106.09685.

    Attributes:
      base: the kernel [..., in axes, out axes], or another operand.
      a: [..., in axes, R].
      b: [..., R, out axes].
      scale: float32 [...].
    """

    base: Any
    a: Array
    b: Array
    scale: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel."""
        shape: tuple[int, ...] = self.base.shape
        return shape

    @property
    def size(self) -> int:
        """Numbers in all of it."""
        return int(sum(leaf.size for leaf in jax.tree.leaves(self)))

    @property
    def rank(self) -> int:
        """R."""
        return int(self.a.shape[-1])

    @property
    def lead(self) -> int:
        """How many leading axes are those of stacked layers."""
        return int(self.a.ndim + self.b.ndim - 2 - len(self.shape))

    def merged(self) -> Array:
        """The kernel as one array, computed in float32, in the dtype of `base`."""
        base, lead = merged(self.base), self.lead
        a = self.a.reshape(*self.shape[:lead], -1, self.rank).astype(jnp.float32)
        b = self.b.reshape(*self.shape[:lead], self.rank, -1).astype(jnp.float32)
        product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        scaled = product * jnp.reshape(self.scale, (*self.shape[:lead], 1, 1))
        return (base.astype(jnp.float32) + scaled.reshape(self.shape)).astype(base.dtype)


def contract(eq: str, x: Array, w: Any) -> Array:
    """`einsum(eq, x, w)` in the dtype of `x`. Every linear map of the zoo goes through here.

    Args:
      eq: such as "bld,dhe->blhe". For an operand the contracted axes of `w` come first.
      x: input.
      w: an array, or an operand.
    """
    if isinstance(w, LowRank):
        down, up = _through(eq)
        inner = jnp.einsum(down, x, w.a.astype(x.dtype))
        inner = (inner * w.scale).astype(x.dtype)  # [..., R]
        return contract(eq, x, w.base) + jnp.einsum(up, inner, w.b.astype(x.dtype))
    return _product(_spelled(eq, x.ndim), x, w.astype(x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(eq: str, x: Array, w: Array) -> Array:
    """`einsum(eq, x, w)`, whose gradient to the kernel is laid out as the kernel is.

    JAX's own rule computes the transpose of that gradient and turns it round, which made a step of
    training on a CPU a third longer. Derivatives in forward mode are to be taken of a gradient
    (`jvp` of `grad`): of the product alone JAX refuses them.
    """
    return jnp.einsum(eq, x, w)


def _product_forward(eq: str, x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return jnp.einsum(eq, x, w), (x, w)


def _product_backward(eq: str, kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = kept
    inputs, out = eq.split("->")
    of_x, of_w = inputs.split(",")
    return jnp.einsum(f"{out},{of_w}->{of_x}", g, w), jnp.einsum(f"{of_x},{out}->{of_w}", x, g)


_product.defvjp(_product_forward, _product_backward)


@functools.lru_cache(maxsize=256)
def _spelled(eq: str, ndim: int) -> str:
    """`eq` with a letter for each axis of an x of `ndim` that its ellipsis stands for."""
    free = (letter for letter in string.ascii_uppercase if letter not in eq)
    named = len(eq.split(",")[0].replace("...", ""))
    return eq.replace("...", "".join(itertools.islice(free, ndim - named)))


@functools.lru_cache(maxsize=256)
def _through(eq: str) -> tuple[str, str]:
    """The two contractions of a low-rank kernel in place of the one of `eq`."""
    inputs, out = eq.split("->")
    x, w = inputs.split(",")
    summed = "".join(axis for axis in w if axis not in out)
    kept = w.removeprefix(summed)
    if not summed or summed + kept != w or set(kept) & set(x) or not set(summed) <= set(x):
        raise ValueError(f"{eq!r}: a low-rank kernel wants its contracted axes first")
    rest = "".join(axis for axis in x if axis not in summed)
    rank = next(letter for letter in "r" + string.ascii_letters if letter not in eq)
    return f"{x},{summed}{rank}->{rest}{rank}", f"{rest}{rank},{rank}{kept}->{out}"


def joined_inputs(w: Any, num_in: int) -> Any:
    """A kernel or operand whose `num_in` leading axes, those contracted, are one."""
    if isinstance(w, LowRank):
        a = w.a.reshape(-1, w.rank)
        return LowRank(joined_inputs(w.base, num_in), a, w.b, w.scale)
    return w.reshape(-1, *w.shape[num_in:])


def is_operand(leaf: Any) -> bool:
    """Whether something in the place of a kernel is no array."""
    return isinstance(leaf, LowRank)


def merged(leaf: Any) -> Any:
    """An operand as one array; anything else as it is."""
    return leaf.merged() if isinstance(leaf, LowRank) else leaf


def merge(params: Any) -> Any:
    """Parameters with every operand as one array."""
    return jax.tree.map(merged, params, is_leaf=is_operand)


def unmerge(params: Any) -> Any:
    """Parameters with the base of every operand in its place, bit for bit what it was."""

    def base(leaf: Any) -> Any:
        return base(leaf.base) if isinstance(leaf, LowRank) else leaf

    return jax.tree.map(base, params, is_leaf=is_operand)


def has_operands(params: Any) -> bool:
    """Whether any kernel of a tree is an operand."""
    return any(map(is_operand, jax.tree.leaves(params, is_leaf=is_operand)))
