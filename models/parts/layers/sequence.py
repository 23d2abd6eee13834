"""Attention over a sequence that is divided over devices: they exchange parts of the sequence for
parts of the heads, attend, and exchange back. All else that a layer does to tokens it does to each
alone, so that nothing more is sent.

Follows: arXiv:2309.14509. On mesh axis `seq` of size P each device holds L / P tokens with all H
heads; after the exchange, all L tokens with the heads of one of P blocks, in their order. Masks
come from the rule and the tokens' facts, of which every device has all.
"""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from zoo.models.core.types import Array, Tokens

if TYPE_CHECKING:
    from zoo.models.parts.layers.attention import Attend, Rule

AXIS = "seq"
"""The axis of the mesh that sequences are divided over."""


def sequence_ranks() -> int:
    """How many devices of the current mesh share a sequence; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or dict(zip(mesh.axis_names, mesh.axis_types)).get(AXIS) != AxisType.Auto:
        return 1
    return mesh.shape[AXIS]


def check_length(length: int) -> None:
    """Raise ValueError if the tokens of a sequence cannot be shared out evenly."""
    ranks = sequence_ranks()
    if length % ranks:
        raise ValueError(
            f"sequences of {length} tokens on a mesh with seq={ranks}: want a multiple of {ranks}, "
            f"such as {length + -length % ranks}, or another mesh"
        )


def block_sizes(num_heads: int, ranks: int) -> list[int]:
    """How many heads each rank attends with: as equal as can be, the larger blocks first."""
    return [num_heads // ranks + (rank < num_heads % ranks) for rank in range(ranks)]


def to_heads(x: Array, *, sequence: int = 1) -> Array:
    """[B, L / P, H, E] to [B, L, ⌈H / P⌉, E]; rank r gets the r-th block of heads.

    Called within `jax.shard_map` over `AXIS`. Where P does not divide H, the last ranks have a head
    of zeros more than `block_sizes` says.

    Args:
      x: queries, keys or values.
      sequence: the axis of `x` along which the sequence lies.
    """
    x = _padded(x, jax.lax.axis_size(AXIS))
    return jax.lax.all_to_all(x, AXIS, split_axis=2, concat_axis=sequence, tiled=True)


def to_sequence(y: Array, num_heads: int, *, sequence: int = 1) -> Array:
    """The way back: [B, L, ⌈H / P⌉, E] to [B, L / P, H, E], without the heads of zeros."""
    y = jax.lax.all_to_all(y, AXIS, split_axis=sequence, concat_axis=2, tiled=True)
    return _unpadded(y, num_heads, jax.lax.axis_size(AXIS))


def exchanged(
    attend: "Attend",
    q: Array,
    k: Array,
    v: Array,
    rule: "Rule",
    query: Tokens,
    key: Tokens,
    **options: Any,
) -> Array:
    """`attend(q, k, v, rule, query, key, **options)` with the sequences divided over `AXIS`.

    Keys and values are exchanged as they are where the blocks of query heads and those of key heads
    belong together, and are repeated before where there are fewer of them than ranks, or where
    blocks differ in size.

    Args:
      attend: attention of whole sequences.
      q: [B, L, H, E] with L a multiple of P.
      k: [B, S, K, E] with S a multiple of P.
      v: [B, S, K, E].
      rule: who sees whom.
      query: tokens of q.
      key: tokens of k and v.
      **options: `scale` and `softcap`.

    Raises:
      ValueError: there are fewer heads than ranks.
    """
    ranks, heads = sequence_ranks(), q.shape[2]
    if heads < ranks:
        raise ValueError(
            f"{heads} attention heads on a mesh with seq={ranks}: want at most {heads}, since each "
            "of these devices attends with heads of its own"
        )
    repeats = kv_repeats(heads, k.shape[2], ranks)

    def of_a_block(q: Array, k: Array, v: Array, query: Tokens, key: Tokens) -> Array:
        if repeats > 1:
            k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
        q, k, v = to_heads(q), to_heads(k), to_heads(v)
        return to_sequence(attend(q, k, v, rule, query, key, **options), heads)

    part, whole = PartitionSpec(None, AXIS), PartitionSpec()
    run = jax.shard_map(
        of_a_block,
        in_specs=(part, part, part, whole, whole),
        out_specs=part,
        axis_names={AXIS},
        check_vma=False,
    )
    return run(q, k, v, query, key)


def kv_repeats(num_heads: int, num_kv_heads: int, ranks: int) -> int:
    """How often keys and values are repeated before they are exchanged, so that every block of
    query heads meets its own: once, P / K times, or once for each query head.
    """
    if num_heads % ranks == 0 and num_kv_heads % ranks == 0:
        return 1
    if num_heads % ranks == 0 and ranks % num_kv_heads == 0:
        return ranks // num_kv_heads
    return num_heads // num_kv_heads


def elements_sent(
    batch: int, length: int, num_heads: int, num_kv_heads: int, head_dim: int, ranks: int
) -> list[int]:
    """Numbers that each rank sends to others in the forward pass of a layer; the gradient needs as
    many again. Heads of zeros do not count.

    With P | K these are (2 H + 2 K) E B L (P - 1) / P²: twice the sequence on twice the devices
    changes nothing.
    """
    local = batch * length // ranks * head_dim
    keys = num_kv_heads * kv_repeats(num_heads, num_kv_heads, ranks)
    queries = block_sizes(num_heads, ranks)
    return [
        local * (num_heads - own)  # queries of other ranks' heads
        + 2 * local * (keys - key)  # their keys and values
        + local * own * (ranks - 1)  # results for other ranks' tokens
        for own, key in zip(queries, block_sizes(keys, ranks), strict=True)
    ]


def _padded(x: Array, ranks: int) -> Array:
    """Heads of zeros at the end of the smaller blocks, so that all are of one size."""
    *lead, heads, width = x.shape
    larger = heads % ranks
    if not larger:
        return x
    size = heads // ranks + 1
    head, tail = jnp.split(x, [larger * size], axis=-2)
    tail = tail.reshape(*lead, ranks - larger, size - 1, width)
    tail = jnp.pad(tail, [*[(0, 0)] * (tail.ndim - 2), (0, 1), (0, 0)])
    return jnp.concatenate([head, tail.reshape(*lead, -1, width)], -2)  # [..., P ⌈H / P⌉, E]


def _unpadded(y: Array, heads: int, ranks: int) -> Array:
    """The inverse of `_padded`."""
    *lead, _, width = y.shape
    larger = heads % ranks
    if not larger:
        return y
    size = heads // ranks + 1
    head, tail = jnp.split(y, [larger * size], axis=-2)
    tail = tail.reshape(*lead, ranks - larger, size, width)[..., :-1, :]
    return jnp.concatenate([head, tail.reshape(*lead, -1, width)], -2)
