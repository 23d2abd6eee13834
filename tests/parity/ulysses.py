"""The exchange of DeepSpeed-Ulysses on devices of this machine, one for each rank."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from tests.parity.case import Case
from zoo.models.parts.layers.sequence import AXIS, block_sizes, to_heads
from zoo.train.mesh import MeshConfig, make_mesh
from zoo.train.recipes.ulysses import Ulysses


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output."""
    sizes = case.kwargs
    batch, length, heads, width = (sizes[n] for n in ("batch", "seq", "heads", "head_dim"))
    ranks, sequence = int(case.inputs["world"]), sizes["gather_idx"]
    system = Ulysses(ranks).build()
    q, k, v = (jnp.asarray(case.inputs[name]) for name in "qkv")
    with jax.set_mesh(make_mesh(MeshConfig(seq=ranks, data=1), jax.devices()[:ranks])):
        blocks = _exchanged(q, sequence)
        q, k, v = (jnp.moveaxis(x, sequence, 1) for x in (q, k, v))
        full = jnp.moveaxis(jax.jit(system.attend)(q, k, v), 1, sequence)

    formula = 4 * batch * length * heads * width * (ranks - 1) // ranks**2
    rest = (batch, length // ranks) if sequence == 1 else (length // ranks, batch)
    out = {
        "full": full,
        "elements_sent_per_rank": system.elements_sent(batch, length, heads, heads, width),
        # -1: they give it for heads that the ranks divide.
        "formula_4h_nm1_over_n2": -1 if heads % ranks else formula,
        # What the official code brings back: in sequence-first layout another shape than it got.
        "raw_output_shape": (*rest, heads, width)
        if sequence == 1
        else (batch, ranks * length, heads // ranks**2, width),
    }
    for rank, (block, size) in enumerate(zip(blocks, block_sizes(heads, ranks), strict=True)):
        out[f"q_after_a2a_rank{rank}"] = block[:, :, :size]
    return {name: np.asarray(array) for name, array in out.items()}


def _exchanged(x: jax.Array, sequence: int) -> list[np.ndarray]:
    """What each rank has after the first all-to-all, with the sequence on axis 0 or 1."""
    part = PartitionSpec(*(AXIS if axis == sequence else None for axis in range(2)))
    run = jax.shard_map(
        lambda x: to_heads(x, sequence=sequence)[None],
        in_specs=part,
        out_specs=PartitionSpec(AXIS),
        axis_names={AXIS},
    )
    return list(np.asarray(jax.jit(run)(x)))
