"""Classes of images: cross-entropy with smoothed labels, mixed images, and a teacher."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from zoo.loading import config_of, load
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

Distillation = Literal["soft", "hard"]


@dataclass(frozen=True)
class Classify(Objective):
    """Cross-entropy of the logits of a classifier with `classes`, in nats.

    What mixes images and smooths labels is for training alone: evaluation is plain.

    Attributes:
      smoothing: the share of a label that is spread over all classes (arXiv:1512.00567).
      mixup: alpha of Beta(alpha, alpha), the law of the share of an image when it is blended with
        another one (arXiv:1710.09412); 0 for never.
      cutmix: the same for a rectangle of an image that another one fills (arXiv:1905.04899). Where
        both are given, each is chosen for half of the batches.
      mixed: the share of batches that are mixed at all.
      teacher: all that `zoo.load` takes, a classifier that reads the same images (arXiv:1503.02531,
        arXiv:2012.12877); None for none.
      distillation: the teacher's distribution is learned ("soft"), or its choice ("hard").
      temperature: of a soft distillation; the term is multiplied by its square.
      weight: of the teacher's term; that of the labels' is 1 less it.
    """

    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mixed: float = 1.0
    teacher: str | None = None
    distillation: Distillation = "soft"
    temperature: float = 1.0
    weight: float = 0.5

    fixed: ClassVar[tuple[str, ...]] = ("teacher",)

    def __post_init__(self) -> None:
        for name in ("smoothing", "mixed", "weight"):
            if not 0 <= getattr(self, name) <= 1:
                value = getattr(self, name)
                raise UsageError(f"objective.{name} is {value}: want a share from 0 to 1")
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise UsageError(f"objective.{name} is {getattr(self, name)}: want 0 or more")
        if self.distillation not in get_args(Distillation):
            known = " or ".join(get_args(Distillation))
            raise UsageError(f"objective.distillation is {self.distillation!r}: want {known}")
        if self.temperature <= 0:
            raise UsageError(f"objective.temperature is {self.temperature}: want more than 0")

    def targets(self, model: nn.Module, inputs: Batch) -> Batch:
        """One class for each picture."""
        return classes_of(inputs["pixels"].shape[:1])

    def init(self, model: nn.Module, variables: Variables, inputs: Batch) -> dict[str, Any]:
        """A place for the teacher's variables, if there is one."""
        del model, variables
        if self.teacher is None:
            return {}
        config = config_of(self.teacher)
        if config.inputs(1)["pixels"].shape != inputs["pixels"].shape:
            raise UsageError(
                f"{self.teacher} reads images of {config.inputs(1)['pixels'].shape[1:]}, this "
                f"model those of {inputs['pixels'].shape[1:]}: want a teacher for the same"
            )
        shapes = dict(jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1)))
        return {"teacher": jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)}

    def load(self, mesh: Mesh) -> dict[str, Any]:
        """The teacher's variables."""
        return {} if self.teacher is None else {"teacher": load(self.teacher, mesh=mesh).variables}

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
        """The loss; how often the class is the likeliest, and among the five likeliest."""
        del variant
        drawn, own = jax.random.split(key)
        classes, pixels, mix = batch["classes"], batch["pixels"], None
        if train and (self.mixup or self.cutmix):
            mix = draw_mix(drawn, pixels.shape, self.mixup, self.cutmix, self.mixed)
            batch = {**batch, "pixels": mix.images(pixels)}
        out, carried = applied(model, variables, batch, train=train, key=own)
        wanted = smoothed(classes, out.logits.shape[-1], self.smoothing if train else 0.0)
        each = cross_entropy(out.logits, wanted if mix is None else mix.labels(wanted))
        if train and self.teacher is not None:
            teacher = config_of(self.teacher).build()
            theirs = teacher.apply(jax.lax.stop_gradient(aux["teacher"]), batch).logits
            learned = distilled(out.logits, theirs, self.distillation, self.temperature)
            each = (1 - self.weight) * each + self.weight * learned
        count = jnp.float32(each.size)
        terms = {"loss": Mean(each.sum(), count)}
        return terms, {n: Mean(v, count) for n, v in hits(out.logits, classes).items()}, carried


def smoothed(classes: Array, number: int, smoothing: float) -> Array:
    """Labels [B] as distributions [B, number], `smoothing` of each spread over all."""
    return jax.nn.one_hot(classes, number) * (1 - smoothing) + smoothing / number


def cross_entropy(logits: Array, wanted: Array) -> Array:
    """[B] nats, of logits and distributions [B, K]."""
    return -(wanted * jax.nn.log_softmax(logits.astype(jnp.float32), -1)).sum(-1)


def distilled(logits: Array, teacher: Array, form: Distillation, temperature: float = 1.0) -> Array:
    """[B]: the cross-entropy with a teacher's choice, or the divergence from its distribution."""
    if form == "hard":
        return cross_entropy(logits, smoothed(teacher.argmax(-1), teacher.shape[-1], 0.0))
    ours = jax.nn.log_softmax(logits / temperature, -1)
    theirs = jax.nn.log_softmax(teacher / temperature, -1)
    return (jnp.exp(theirs) * (theirs - ours)).sum(-1) * temperature**2


def hits(logits: Array, classes: Array) -> dict[str, Array]:
    """How many of [B] classes are the likeliest (`accuracy`) and, of more than five classes, among
    the five likeliest (`top5`).
    """
    own = jnp.take_along_axis(logits, classes[:, None], -1)
    rank = (logits > own).sum(-1)
    found = {"accuracy": rank < 1}
    if logits.shape[-1] > 5:
        found["top5"] = rank < 5
    return {name: right.sum(dtype=jnp.float32) for name, right in found.items()}


@struct.dataclass
class Mix:
    """How each image of a batch is mixed with another one: the batch in reverse order.

    Attributes:
      share: float32 [], of itself that is left.
      inside: bool [H, W], where the other image stands instead.
      blended: bool [], whether the two are blended, and `inside` is not used.
    """

    share: Array
    inside: Array
    blended: Array

    def images(self, pixels: Array) -> Array:
        """Mixed [B, H, W, C]."""
        other = pixels[::-1]
        blend = pixels * self.share + other * (1 - self.share)
        return jnp.where(
            self.blended, blend, jnp.where(self.inside[..., None], other, pixels)
        ).astype(pixels.dtype)

    def labels(self, wanted: Array) -> Array:
        """Mixed distributions [B, K]."""
        return wanted * self.share + wanted[::-1] * (1 - self.share)


def draw_mix(
    key: Array, shape: tuple[int, ...], mixup: float, cutmix: float, mixed: float = 1.0
) -> Mix:
    """Draw how a batch of images [B, H, W, C] is mixed; the settings are those of `Classify`."""
    height, width = shape[-3:-1]
    keys = jax.random.split(key, 5)
    blended = jax.random.bernoulli(keys[0]) if mixup and cutmix else jnp.bool_(mixup > 0)
    alpha = jnp.where(blended, mixup or cutmix, cutmix or mixup)
    share = jax.random.beta(keys[1], alpha, alpha)
    share = jnp.where(jax.random.bernoulli(keys[2], mixed), share, 1.0)
    side = jnp.sqrt(1 - share)

    def band(key: Array, length: int) -> Array:
        """Rows or columns of the rectangle, whose centre is anywhere: bool [length]."""
        half = jnp.floor(length * side).astype(jnp.int32) // 2
        centre = jax.random.randint(key, (), 0, length)
        place = jnp.arange(length)
        return (place >= centre - half) & (place < centre + half)

    inside = band(keys[3], height)[:, None] & band(keys[4], width)
    share = jnp.where(blended, share, 1 - inside.mean())
    return Mix(share, inside, blended)
