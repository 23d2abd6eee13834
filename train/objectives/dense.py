"""Classes of pixels and voxels: cross-entropy, soft Dice, and outputs at several resolutions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.models.core.errors import UsageError
from zoo.models.core.types import IGNORE, Array, Batch
from zoo.models.parts.layers.resize import nearest_index, resize_bilinear
from zoo.train.objectives.base import (
    Carried,
    Mean,
    Means,
    Objective,
    Variables,
    Variant,
    applied,
    classes_of,
)


@dataclass(frozen=True)
class Segment(Objective):
    """Cross-entropy of the logits of every place with its class and, if wanted, soft Dice.

    A model may hand on logits of lower resolutions, too, for deep supervision; the classes that
    these are compared with are the nearest ones.

    Attributes:
      dice: the weight of `1 - soft_dice`; that of the cross-entropy is 1.
      background: whether class 0 counts for Dice.
      batch_dice: Dice of all examples together, which a batch that is cut cannot have; otherwise
        the mean of those of each.
      levels: the weights of the losses of all outputs, the finest first; empty for 1 of that alone.
      ignore: the class of places that teach nothing.
    """

    dice: float = 0.0
    background: bool = False
    batch_dice: bool = False
    levels: tuple[float, ...] = ()
    ignore: int = IGNORE

    def __post_init__(self) -> None:
        if self.dice < 0:
            raise UsageError(f"objective.dice is {self.dice}: want 0 or more")
        if any(weight < 0 for weight in self.levels) or (self.levels and not self.levels[0]):
            raise UsageError(
                f"objective.levels is {self.levels}: want 0 or more each, and more for the first"
            )

    @property
    def whole_batch(self) -> bool:  # type: ignore[override]
        """Whether the loss is no sum over examples."""
        return self.dice > 0 and self.batch_dice

    def targets(self, model: nn.Module, inputs: Batch) -> Batch:
        """One class for each place."""
        return classes_of(inputs["pixels"].shape[:-1])

    def loss(
        self,
        model: nn.Module,
        variables: Variables,
        aux: Mapping[str, Any],
        batch: Batch,
        key: Array,
        variant: Variant,
        *,
        train: bool = True,
    ) -> tuple[Means, Means, Carried]:
        """The terms: `loss`, the cross-entropy of the finest output, `dice_loss`, and the same of
        level 1, 2, ... with this number behind. Metrics: the `accuracy` of places, and `mean_iou`
        and `mean_dice`, means over images of the mean over the classes that they have or are given.

        Args:
          model: returns `logits` [B, *grid, K] and perhaps `coarse`, those of lower levels.
            Logits of images of a lower resolution than the classes are enlarged.
          variables: as of `Objective.loss`.
          aux: likewise.
          batch: what the model takes, and `classes` int [B, *grid].
          key: as of `Objective.loss`.
          variant: likewise.
          train: likewise.

        Raises:
          UsageError: there are more `levels` than outputs.
        """
        del aux, variant
        out, carried = applied(model, variables, batch, train=train, key=key)
        outputs = (enlarged(out.logits, batch["classes"]), *getattr(out, "coarse", ()))
        weights = self.levels or (1.0,)
        if len(weights) > len(outputs):
            raise UsageError(
                f"objective.levels is {self.levels}: the model has {len(outputs)} outputs"
            )
        terms: dict[str, Mean] = {}
        for level, (weight, logits) in enumerate(zip(weights, outputs, strict=False)):
            if weight:
                end = f"_{level}" if level else ""
                terms |= {
                    f"{name}{end}": Mean(weight * term.total, term.weight)
                    for name, term in self._terms(logits, batch["classes"]).items()
                }
        return terms, self._metrics(outputs[0], batch["classes"]), carried

    def _terms(self, logits: Array, classes: Array) -> dict[str, Mean]:
        """Of one output."""
        classes = nearest(classes, logits.shape[1:-1])
        counted = classes != self.ignore
        each = jnp.where(counted, place_entropy(logits, classes), 0.0)
        terms = {"loss": Mean(each.sum(), counted.sum(dtype=jnp.float32))}
        if self.dice:
            parts = overlaps(jax.nn.softmax(logits.astype(jnp.float32), -1), classes, counted)
            if self.batch_dice:
                parts = tuple(part.sum(0, keepdims=True) for part in parts)
            lost = 1 - soft_dice(*parts)[:, 0 if self.background else 1 :]
            terms["dice_loss"] = Mean(self.dice * lost.sum(), jnp.float32(lost.size))
        return terms

    def _metrics(self, logits: Array, classes: Array) -> dict[str, Mean]:
        """Of the finest output."""
        counted = classes != self.ignore
        guess = logits.argmax(-1)
        right = ((guess == classes) & counted).sum(dtype=jnp.float32)
        number = logits.shape[-1]
        both, one, other = overlaps(jax.nn.one_hot(guess, number), classes, counted)
        there = one + other > 0  # [B, K]

        def mean(share: Array) -> Mean:
            """The mean over images."""
            each = jnp.where(there, share, 0).sum(-1) / jnp.maximum(there.sum(-1), 1)
            return Mean(each.sum(), jnp.float32(len(each)))

        union = jnp.maximum(one + other - both, 1)
        return {
            "accuracy": Mean(right, counted.sum(dtype=jnp.float32)),
            "mean_iou": mean(both / union),
            "mean_dice": mean(2 * both / jnp.maximum(one + other, 1)),
        }


def place_entropy(logits: Array, classes: Array) -> Array:
    """Nats [B, *grid] of logits [B, *grid, K]; of classes below 0, those of class 0."""
    known = jax.nn.log_softmax(logits.astype(jnp.float32), -1)
    index = jnp.clip(classes, 0, logits.shape[-1] - 1)[..., None]
    return -jnp.take_along_axis(known, index, -1)[..., 0]


def overlaps(shares: Array, classes: Array, counted: Array) -> tuple[Array, Array, Array]:
    """What overlaps are made of, for each example and class, float32 [B, K] each: what is given and
    is there, what is given, and what is there.

    Args:
      shares: [B, *grid, K], of each class in each place.
      classes: int [B, *grid], those that are there.
      counted: bool [B, *grid], the places that count.
    """
    axes = tuple(range(1, shares.ndim - 1))
    given = shares * counted[..., None]
    there = jax.nn.one_hot(classes, shares.shape[-1]) * counted[..., None]
    return (given * there).sum(axes), given.sum(axes), there.sum(axes)


def soft_dice(both: Array, given: Array, there: Array, *, smooth: float = 1e-5) -> Array:
    """Twice the overlap by the sum of both, 1 where there is nothing of either."""
    return (2 * both + smooth) / (given + there + smooth)


def nearest(classes: Array, grid: tuple[int, ...]) -> Array:
    """Classes [B, *grid] at another resolution, by torch's "nearest"."""
    for axis, size in enumerate(grid, 1):
        if classes.shape[axis] != size:
            classes = jnp.take(classes, nearest_index(classes.shape[axis], size), axis)
    return classes


def enlarged(logits: Array, classes: Array) -> Array:
    """Logits of images [B, h, w, K] at the resolution of classes [B, H, W], bilinear; those of
    volumes are there already.

    Raises:
      ValueError: they are of volumes and are not.
    """
    if logits.shape[:-1] == classes.shape:
        return logits
    if logits.ndim != 4 or classes.ndim != 3:
        raise ValueError(f"classes: got {classes.shape}, want those of logits {logits.shape[:-1]}")
    return resize_bilinear(logits, *classes.shape[1:])
