"""Many networks in the weights of one: every dimension of a sub-network is the first part of that
of the largest.

`Kept` says which sub-network each example goes through, `draw_kept` draws them, `sliced` cuts one
out, and `rewired` moves what has large weights to the front, where most sub-networks share it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from zoo.models.core.types import Array, Batch
from zoo.models.vision.vit_resnas.nets import Net, Space
from zoo.models.vision.vit_resnas.search import Score

LEFT_OUT = (1, 1, 0, 0)
"""What is drawn for a layer that may be left out: as often that it is there as that it is not."""


class KeptLayer(NamedTuple):
    """What is there of a layer, int32 [B] each; None for all.

    Attributes:
      width: channels of what it reads.
      num_heads: attention heads.
      mlp_dim: hidden units.
      branch: channels of what it adds: those of `width`, or 0 where it is left out.
    """

    width: Array | None = None
    num_heads: Array | None = None
    mlp_dim: Array | None = None
    branch: Array | None = None


WHOLE = KeptLayer()
"""All of a layer."""


@struct.dataclass
class Kept:
    """One sub-network for each of B examples; the L layers of all stages are counted through.

    Attributes:
      widths: int32 [B, S], of each stage.
      num_heads: int32 [B, L].
      mlp_dims: int32 [B, L].
      present: bool [B, L].
    """

    widths: Array
    num_heads: Array
    mlp_dims: Array
    present: Array

    @classmethod
    def of(cls, nets: Sequence[Net]) -> "Kept":
        """These networks, one for each example."""
        layers = [[layer for stage in net for layer in stage.layers] for net in nets]

        def each(name: str, dtype: Any) -> Array:
            return jnp.asarray([[getattr(layer, name) for layer in row] for row in layers], dtype)

        widths = jnp.asarray([[stage.width for stage in net] for net in nets], jnp.int32)
        sizes = (each(name, jnp.int32) for name in ("num_heads", "mlp_dim"))
        return cls(widths, *sizes, each("present", bool))

    def layer(self, stage: int, number: int) -> KeptLayer:
        """What is kept of layer `number`, all stages counted through, of a stage."""
        width = self.widths[:, stage]
        branch = width * self.present[:, number]
        return KeptLayer(width, self.num_heads[:, number], self.mlp_dims[:, number], branch)


def accuracy_of(model: nn.Module, variables: Mapping[str, Any], batch: Batch) -> Score:
    """The oracle of a search: the share of images that a sub-network judges rightly, by one program
    for all of them.

    Args:
      model: the super-network.
      variables: its own.
      batch: `pixels` [B, H, W, C] and `classes` [B] that training has not seen.
    """
    classes = batch["classes"]

    @jax.jit
    def share(kept: Kept) -> Array:
        logits = model.apply(variables, {"pixels": batch["pixels"], "kept": kept}).logits
        return (logits.argmax(-1) == classes).mean()

    return lambda net: float(share(Kept.of([net] * len(classes))))


def first_channels(x: Array, number: Array | None) -> Array:
    """Zeros in all but the first `number` [B] channels of [B, ..., C]; None leaves all."""
    if number is None:
        return x
    number = number.reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.where(jnp.arange(x.shape[-1]) < number, x, jnp.zeros((), x.dtype))


def options_in_use(number: Array | int, step: Array | int, warmup: int) -> Array:
    """How many of so many options, the largest first, are drawn from: int32, 1 in the first step
    and all of them from step `warmup` on.
    """
    number = jnp.asarray(number, jnp.int32)
    grown = 1 + jnp.asarray(step, jnp.int32) * (number - 1) // max(warmup, 1)
    return jnp.clip(grown, 1, number) if warmup else number


def draw_options(key: Array, in_use: Array, groups: int, most: int) -> Array:
    """Draw an option of each of K dimensions for each group: int32 [K, groups], each of those in
    use as often as any other, or once more.

    Args:
      key: what the draws come from.
      in_use: int32 [K], the draws are below.
      groups: how many.
      most: the most options that a dimension has.
    """
    place = jnp.arange(groups + most - 1)
    noise = jax.random.uniform(key, (len(in_use), len(place)))
    whole_rounds = -(-groups // in_use) * in_use
    order = jnp.argsort(jnp.where(place < whole_rounds[:, None], noise, 2.0), -1)
    return order[:, :groups] % in_use[:, None]


def draw_kept(
    key: Array, space: Space, batch_size: int, examples: int, step: Array | int = 0, warmup: int = 0
) -> Kept:
    """Draw sub-networks for a batch: `batch_size / examples` of them, dealt out in turn.

    Every dimension is drawn by itself, so that all of its options in use are in every batch that
    has sub-networks enough.

    Args:
      key: what the draws come from.
      space: of the sub-networks.
      batch_size: B.
      examples: that go through the same sub-network.
      step: of the training, by which more options come into use.
      warmup: steps until all are.

    Raises:
      ValueError: the batch cannot be divided so.
    """
    if examples < 1 or batch_size % examples:
        raise ValueError(
            f"a batch of {batch_size}, {examples} examples for each sub-network: want a multiple"
        )
    layers = [(stage, i, gone) for stage in space for i, gone in enumerate(stage.removable)]
    options: list[Sequence[int]] = [stage.widths for stage in space]
    options += [stage.num_heads for stage, _, _ in layers]
    options += [stage.mlp_dims for stage, _, _ in layers]
    options += [LEFT_OUT if removable else (1,) for _, _, removable in layers]
    number = [len(each) for each in options]
    known = np.asarray([[*each, *(0,) * (max(number) - len(each))] for each in options], np.int32)
    in_use = options_in_use(np.asarray(number), step, warmup)
    index = draw_options(key, in_use, batch_size // examples, max(number))
    values = jnp.tile(jnp.take_along_axis(known, index, 1), (1, examples)).T  # [B, K]
    n, depth = len(space), len(layers)
    widths, heads, dims, present = jnp.split(values, [n, n + depth, n + 2 * depth], 1)
    # Those that may be left out go with the one before them.
    for i, (stage, place, removable) in enumerate(layers):
        if removable and place and stage.removable[place - 1]:
            present = present.at[:, i].multiply(present[:, i - 1])
    return Kept(widths, heads, dims, present.astype(bool))


def sliced(variables: Mapping[str, Any], shapes: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a sub-network: the first part of every array, along all of its axes.

    Args:
      variables: of the largest network, not boxed.
      shapes: those of the sub-network, as `jax.eval_shape` of its `init` has them; it may lack
        layers.

    Raises:
      ValueError: it is no sub-network.
    """
    found: dict[str, Any] = {}
    for name, want in nn.unbox(dict(shapes)).items():
        if name not in variables:
            raise ValueError(f"{name}: the largest network has nothing that is called so")
        have = variables[name]
        if isinstance(want, Mapping):
            found[name] = sliced(have, want)
        elif any(n > m for n, m in zip(want.shape, have.shape, strict=True)):
            raise ValueError(f"{name}: want {want.shape} of {have.shape}, which is smaller")
        else:
            found[name] = have[tuple(slice(n) for n in want.shape)]
    return found


def rewired(params: Mapping[str, Any]) -> dict[str, Any]:
    """The same function with the heads and the hidden units of every layer in the order of their
    weights, those with the largest sum of absolute values first.

    Args:
      params: of a layer, or of anything that has layers; not boxed.
    """
    if not {"q", "k", "v", "out", "up", "down"} <= params.keys():
        return {
            name: rewired(part) if isinstance(part, Mapping) else part
            for name, part in params.items()
        }
    heads = _total(params["out"]["kernel"], 0)
    for name in ("q", "k", "v"):
        heads += _total(params[name]["kernel"], 1) + _total(params[name]["bias"], 0)
    units = _total(params["up"]["kernel"], 1) + _total(params["up"]["bias"], 0)
    units += _total(params["down"]["kernel"], 0)
    by_head, by_unit = jnp.argsort(-heads), jnp.argsort(-units)
    moved = {name: _moved(params[name], by_head, 1) for name in ("q", "k", "v")}
    moved["out"] = _moved(params["out"], by_head, 0, bias=False)
    moved["up"] = _moved(params["up"], by_unit, 1)
    moved["down"] = _moved(params["down"], by_unit, 0, bias=False)
    return {**params, **moved}


def _total(x: Array, axis: int) -> Array:
    """Sums of absolute values over all other axes: [n]."""
    return jnp.abs(x).sum(tuple(i for i in range(np.ndim(x)) if i != axis))


def _moved(
    part: Mapping[str, Array], order: Array, axis: int, *, bias: bool = True
) -> dict[str, Array]:
    """A linear map whose axis is in another order, that of its bias too where it is one that comes
    out.
    """
    found = {**part, "kernel": jnp.take(part["kernel"], order, axis)}
    if bias:
        found["bias"] = jnp.take(part["bias"], order, 0)
    return found
