"""The contract between an objective and the loop."""

import inspect
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
from flax import struct
from jax.sharding import Mesh

from zoo.models.core.types import Batch

Variant = Hashable
"""What the host chooses anew for each step, static in the compiled step: one program per value."""

Variables = Mapping[str, Any]
"""Unboxed `params`, and `stats` where the model keeps some."""

Carried = Mapping[str, Any]
"""What a step has changed beside the parameters: `stats`, all of them, and entries of `aux`."""


@struct.dataclass
class Mean:
    """A mean over `weight` things whose sum is `total`, both float32 scalars.

    Means of parts of a batch add up to the mean of the whole, in evaluation as for gradients.
    """

    total: jax.Array
    weight: jax.Array

    @property
    def value(self) -> jax.Array:
        """The mean; 0 of nothing."""
        return self.total / jax.numpy.maximum(self.weight, 1)


Means = Mapping[str, Mean]


def classes_of(shape: tuple[int, ...]) -> Batch:
    """The shape of `classes`, one for each place of `shape`."""
    return {"classes": jax.ShapeDtypeStruct(shape, jax.numpy.int32)}


@dataclass(frozen=True)
class Objective:
    """Base of all objectives.

    Attributes:
      fixed: names of entries of `aux` that no step changes, such as a teacher: they lie on the disk
        once, not in every checkpoint.
      whole_batch: whether the loss of a batch is no sum over its examples, as where they are
        compared with one another: such a batch cannot be cut into parts.
    """

    fixed: ClassVar[tuple[str, ...]] = ()
    whole_batch: ClassVar[bool] = False

    def variant(self, seed: int, step: int) -> Variant:
        """The static choice for training step `step`, the same on every host."""
        return None

    def targets(self, model: nn.Module, inputs: Batch) -> Batch:
        """Shapes of what its batches hold besides what the model takes, such as classes.

        Args:
          model: the module.
          inputs: shapes of what it takes.
        """
        return {}

    def init(self, model: nn.Module, variables: Variables, inputs: Batch) -> dict[str, Any]:
        """What this objective carries from step to step (`aux`): queues, teachers, averages.

        It is traced. A leaf may be boxed with the names of its axes; one whose path ends in that of
        a parameter of its shape lies as this does; all else is on every device.

        Args:
          model: the module.
          variables: those that training starts with.
          inputs: shapes of a batch of one example.
        """
        return {}

    def load(self, mesh: Mesh) -> dict[str, Any]:
        """Entries of `aux`, as arrays on the mesh, that come from files and not from `init`.

        `init` says their shapes; it is called once, when a run begins.
        """
        return {}

    def loss(
        self,
        model: nn.Module,
        variables: Variables,
        aux: Mapping[str, Any],
        batch: Batch,
        key: jax.Array,
        variant: Variant,
        *,
        train: bool = True,
    ) -> tuple[Means, Means, Carried]:
        """What training lowers, what is only reported, and what is carried to the next step.

        Args:
          model: the module, see `applied`.
          variables: its own.
          aux: what `init` made and earlier steps have changed.
          batch: global arrays; sums over their leading axis run over all devices.
          key: the random key of this step, the same for all parts of its batch.
          variant: what `variant` chose; None in evaluation, which is the model at its fullest.
          train: whether this is a step of training. In evaluation `stats` are used as they are.

        Returns:
          The terms of the loss, which training adds up, one of them called `loss`; further metrics;
          and what has changed of `stats` and `aux`, {} if nothing: parts of a batch that is cut
          hand it on to one another, and evaluation drops it. No weight of a term depends on
          `variables` or `aux`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no loss")


def applied(
    model: nn.Module,
    variables: Variables,
    *args: Any,
    train: bool,
    key: jax.Array,
    method: str = "__call__",
    **options: Any,
) -> tuple[Any, Carried]:
    """What a model computes, and the `stats` that it has changed meanwhile, {} if there are none.

    Args:
      model: the module. Where its method has an argument `train`, it is told.
      variables: its own.
      *args: of the method.
      train: whether dropout drops and batch statistics are those of the batch.
      key: for what is drawn.
      method: which one.
      **options: keyword arguments of the method.
    """
    if "train" in inspect.signature(getattr(model, method)).parameters:
        options["train"] = train
    if not train:
        return model.apply(variables, *args, method=method, **options), {}
    rngs = {"dropout": key}
    if "stats" not in variables:
        return model.apply(variables, *args, method=method, rngs=rngs, **options), {}
    out, changed = model.apply(
        variables, *args, method=method, rngs=rngs, mutable="stats", **options
    )
    return out, {"stats": nn.unbox(changed["stats"])}
