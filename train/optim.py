"""The optimizer: clipping, AdamW or Muon, the schedule of the learning rate, and what the state is
kept in.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from zoo.models.core.errors import UsageError
from zoo.models.parts.layers import low_rank
from zoo.train.parts import Part, assigned

Name = Literal["adamw", "muon"]
Schedule = Literal["cosine", "linear", "constant"]
StateDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class OptimConfig:
    """How parameters move.

    Attributes:
      name: the algorithm. "muon" moves kernels by orthogonalised momentum and all else by AdamW. It
        follows https://kellerjordan.github.io/posts/muon/, as optax has it.
      lr: peak learning rate; with Muon, of the kernels.
      adam_share: with Muon, the learning rate of all else as a share of `lr`.
      schedule: what the learning rate does between the warmup and the last step.
      warmup: steps of linear growth before the peak is reached.
      end: share of `lr` that cosine and linear schedules arrive at.
      b1, b2, eps: AdamW's.
      weight_decay: decoupled, times the learning rate; kernels only, not norms, biases and tables.
      clip_norm: gradients whose global norm is larger are scaled down to it; None clips nothing.
      state: of what the moments are kept in. "bfloat16" takes half the memory; they are rounded up
        or down by chance, so that what is too small for a change adds up all the same.
    """

    name: Name = "adamw"
    lr: float = 1e-3
    adam_share: float = 0.15
    schedule: Schedule = "cosine"
    warmup: int = 100
    end: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    state: StateDtype = "float32"

    def __post_init__(self) -> None:
        for field, value, choices in (
            ("name", self.name, get_args(Name)),
            ("schedule", self.schedule, get_args(Schedule)),
            ("state", self.state, get_args(StateDtype)),
        ):
            if value not in choices:
                raise UsageError(f"optim.{field} is {value!r}: want one of {', '.join(choices)}")
        wants = {
            "lr": (self.lr > 0, "more than 0"),
            "adam_share": (self.adam_share > 0, "more than 0"),
            "warmup": (self.warmup >= 0, "0 or more steps"),
            "end": (0 <= self.end <= 1, "a share from 0 to 1"),
            "b1": (0 <= self.b1 < 1, "from 0 to below 1"),
            "b2": (0 <= self.b2 < 1, "from 0 to below 1"),
            "eps": (self.eps > 0, "more than 0"),
            "weight_decay": (self.weight_decay >= 0, "0 or more"),
            "clip_norm": (self.clip_norm is None or self.clip_norm > 0, "more than 0, or None"),
        }
        for field, (good, want) in wants.items():
            if not good:
                raise UsageError(f"optim.{field} is {getattr(self, field)}: want {want}")


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Steps done so far -> learning rate of the next, over a run of `steps`.

    Raises:
      UsageError: the warmup is longer than the run.
    """
    if config.warmup > steps:
        raise UsageError(
            f"optim.warmup is {config.warmup}: want at most the {steps} steps of the run"
        )
    lr, rest = config.lr, max(steps - config.warmup, 1)
    match config.schedule:
        case "cosine":
            after = optax.cosine_decay_schedule(lr, rest, config.end)
        case "linear":
            after = optax.linear_schedule(lr, lr * config.end, rest)
        case "constant":
            after = optax.constant_schedule(lr)
    if not config.warmup:
        return after
    # The first step already learns something, and the peak comes right after the warmup.
    warmup = optax.linear_schedule(lr / (config.warmup + 1), lr, config.warmup)
    return optax.join_schedules([warmup, after], [config.warmup])


def make_optimizer(
    config: OptimConfig, steps: int, names: Any = None, parts: Sequence[Part] = ()
) -> optax.GradientTransformation:
    """The transformation of gradients into updates for a run of `steps`.

    Args:
      config: what to use.
      steps: length of the run.
      names: logical axis names of the parameters that train (`zoo.models.core.names.tree_names`),
        by which Muon knows matrices and parts are told apart; AdamW alone needs none.
      parts: those of them that train; none: all train alike.
    """
    if not parts:
        moves = _moves(config, steps, names)
    else:
        owner = assigned(parts, names)
        labels = jax.tree.map_with_path(
            lambda path, _: str(owner[_name(path)]), names, is_leaf=_is_names
        )
        each = {
            str(i): _moves(_of_part(config, part), steps, names) for i, part in enumerate(parts)
        }
        moves = optax.partition(each, labels)
    if config.state == "bfloat16":
        moves = rounded(moves)
    if config.clip_norm is None:
        return moves
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), moves)


class Rounded(NamedTuple):
    """The state of an optimizer with its float32 arrays in bfloat16, and the steps so far."""

    count: jax.Array
    state: Any


def rounded(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer with a state that is kept in bfloat16, see `stochastically_rounded`."""

    def init(params: Any) -> Rounded:
        small = jax.tree.map(
            lambda x: x.astype(jnp.bfloat16) if _is_wide(x) else x, optimizer.init(params)
        )
        return Rounded(jnp.int32(0), small)

    def update(grads: Any, kept: Rounded, params: Any = None) -> tuple[Any, Rounded]:
        wide = jax.tree.map(
            lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, kept.state
        )
        updates, wide = optimizer.update(grads, wide, params)
        leaves, structure = jax.tree.flatten(wide)
        key = jax.random.fold_in(jax.random.key(0), kept.count)
        small = [
            stochastically_rounded(x, jax.random.fold_in(key, i)) if _is_wide(x) else x
            for i, x in enumerate(leaves)
        ]
        return updates, Rounded(kept.count + 1, jax.tree.unflatten(structure, small))

    return optax.GradientTransformation(init, update)


def _is_wide(x: jax.Array) -> bool:
    return x.ndim > 0 and x.dtype == jnp.float32


def stochastically_rounded(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to one of the two nearest bfloat16, the nearer the likelier: right on average."""
    chance = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    # bfloat16 is the upper half of float32: the lower half carries over as often as it is large.
    raised = jax.lax.bitcast_convert_type(x, jnp.uint32) + chance
    upper = jax.lax.bitcast_convert_type(raised & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), upper, x).astype(jnp.bfloat16)


def _of_part(config: OptimConfig, part: Part) -> OptimConfig:
    """The configuration with what the part has of its own."""
    own = {"lr": part.lr, "weight_decay": part.weight_decay}
    return replace(config, **{name: value for name, value in own.items() if value is not None})


def _moves(config: OptimConfig, steps: int, names: Any) -> optax.GradientTransformation:
    """AdamW or Muon, without clipping."""
    schedule = learning_rate(config, steps)
    if config.name == "muon":
        return optax.contrib.muon(
            schedule,
            adam_learning_rate=lambda step: schedule(step) * config.adam_share,
            adam_b1=config.b1,
            adam_b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=lambda params: matrix_axes(_names_of(params, names)),
        )
    return optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )


def _names_of(params: Any, names: Any) -> Any:
    """The names of those parameters that are there: a part sees the others masked."""
    known = dict(jax.tree.leaves_with_path(names, is_leaf=_is_names))
    return jax.tree.map_with_path(lambda path, _: known[path], params)


def _is_names(leaf: Any) -> bool:
    return isinstance(leaf, tuple) and not isinstance(leaf, optax.MaskedNode)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def matrix_axes(names: Any) -> Any:
    """How Muon reads each kernel as a matrix; None for what it does not move.

    A kernel whose first axis is "embed" maps that one axis to the rest, any other all but the last
    axis to the last. Stacked layers are matrices of their own. Embeddings of patches and words,
    heads and tables are left to Adam.
    """

    def axes(path: Any, leaf: tuple[str | None, ...]) -> Any:
        outside = {"conv_in", "vocab", "codes", "classes"}
        if path[-1].key != "kernel" or outside.intersection(leaf):
            return None
        first = int(leaf[0] == "layers")
        inputs = 1 if leaf[first] == "embed" else len(leaf) - first - 1
        whole = tuple(range(first, len(leaf)))
        return optax.contrib.MuonDimensionNumbers(whole[:inputs], whole[inputs:])

    return jax.tree.map_with_path(axes, names, is_leaf=_is_names)


def decay_mask(params: Any) -> Any:
    """True for the leaves that weight decay acts on: kernels and their low-rank adapters."""
    decayed = (low_rank.KERNEL, low_rank.A, low_rank.B)
    return jax.tree.map_with_path(lambda path, _: path[-1].key in decayed, params)
