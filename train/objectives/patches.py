"""Classes of images and of their patches: mixed images whose patches know what they show."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.models.core.errors import UsageError
from zoo.models.core.types import Array, Batch
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
from zoo.train.objectives.classify import cross_entropy, hits, smoothed


@dataclass(frozen=True)
class PatchMix(Objective):
    """Cross-entropy of the logits of images with `classes`, and of those of their patches.

    Half of a batch has a box of whole cells from other images at the same place, and the patches of
    the box have their classes; the other half is blended with other images, and so are the classes
    of all of its patches. Evaluation is plain, and of images alone. Follows: arXiv:2104.12753, as
    arXiv:2109.00642 uses it.

    Attributes:
      smoothing: the share of a label that is spread over all classes.
      mixup: alpha of Beta(alpha, alpha), the law of the share of an image that is blended.
      weight: of the patches' term.
    """

    smoothing: float = 0.1
    mixup: float = 0.8
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing <= 1:
            raise UsageError(f"objective.smoothing is {self.smoothing}: want a share from 0 to 1")
        if self.mixup <= 0 or self.weight < 0:
            raise UsageError(
                f"objective.mixup is {self.mixup}, objective.weight {self.weight}: want more than "
                "0, and 0 or more"
            )

    def targets(self, model: nn.Module, inputs: Batch) -> Batch:
        """One class for each picture."""
        return classes_of(inputs["pixels"].shape[:1])

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
        """The loss of images, in training that of patches too; how often the class is likeliest.

        Args:
          model: returns `logits` [B, K] and `patch_logits` [B, N, K], those of the cells of
            `model.config.tower.stride` pixels.
          variables: as of `Objective.loss`.
          aux: likewise.
          batch: `pixels` [B, H, W, C] and `classes` [B].
          key: what the draws come from.
          variant: as of `Objective.loss`.
          train: likewise.

        Raises:
          UsageError: the model has no classes of patches.
        """
        del aux, variant
        classes, (drawn, own) = batch["classes"], jax.random.split(key)
        if train:
            pixels, shares = mixed_patches(
                drawn, batch["pixels"], model.config.tower.stride, self.mixup
            )
            batch = {**batch, "pixels": pixels}
        out, carried = applied(model, variables, batch, train=train, key=own)
        if out.patch_logits is None:
            raise UsageError("PatchMix: the model has no classes of patches; want `patch_head`")
        wanted = smoothed(classes, out.logits.shape[-1], self.smoothing if train else 0.0)
        count = jnp.float32(len(classes))
        found = {name: Mean(right, count) for name, right in hits(out.logits, classes).items()}
        if not train:
            return {"loss": Mean(cross_entropy(out.logits, wanted).sum(), count)}, found, carried
        patches = jnp.einsum("bnc,ck->bnk", shares, wanted)  # [B, N, K]
        each = cross_entropy(out.logits, patches.mean(1))
        of_patches = self.weight * cross_entropy(out.patch_logits, patches)
        terms = {
            "loss": Mean(each.sum(), count),
            "patch_loss": Mean(of_patches.sum(), jnp.float32(of_patches.size)),
        }
        return terms, found, carried


def mixed_patches(key: Array, pixels: Array, cell: int, mixup: float) -> tuple[Array, Array]:
    """Mix a batch of images, each half with images of its own.

    Args:
      key: what is drawn comes from it.
      pixels: [B, H, W, C], of which H and W are multiples of
      cell: the side of a cell.
      mixup: alpha of the law of shares.

    Returns:
      the mixed images, and float32 [B, N, B], the shares of all images in each of the N cells.
    """
    batch, height, width = pixels.shape[:3]
    rows, columns = height // cell, width // cell
    keys = jax.random.split(key, 3)
    in_first = jnp.arange(batch) < batch // 2
    order = jnp.argsort(jax.random.uniform(keys[0], (batch,)) + ~in_first)  # within each half
    box = draw_box(keys[1], rows, columns).astype(jnp.float32)
    blend = jnp.full((rows, columns), 1 - jax.random.beta(keys[2], mixup, mixup))
    other = jnp.where(in_first[:, None, None], box, blend)  # [B, rows, columns], of the other image
    one, two = jnp.eye(batch), jax.nn.one_hot(order, batch)
    flat = other.reshape(batch, -1, 1)
    shares = one[:, None] * (1 - flat) + two[:, None] * flat
    wide = other.repeat(cell, 1).repeat(cell, 2)[..., None]
    mixed = pixels * (1 - wide) + jnp.take(pixels, order, 0) * wide
    return mixed.astype(pixels.dtype), shares


def draw_box(key: Array, rows: int, columns: int) -> Array:
    """A box of any shape and place that covers an even share of the cells: bool [rows, columns]."""
    keys = jax.random.split(key, 4)
    area = jnp.floor(rows * columns * jax.random.uniform(keys[0])).astype(jnp.int32)
    most = jnp.clip(area, 1, rows)
    height = jax.random.randint(keys[1], (), 1, most + 1)
    width = area // height
    height, width = (
        jnp.where(width > columns, area // columns, height),
        jnp.minimum(width, columns),
    )
    top = jax.random.randint(keys[2], (), 0, rows - height + 1)
    left = jax.random.randint(keys[3], (), 0, columns - width + 1)
    row, column = jnp.arange(rows)[:, None], jnp.arange(columns)
    inside = (row >= top) & (row < top + height)
    return inside & (column >= left) & (column < left + width)
