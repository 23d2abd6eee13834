"""What a larger model would have said, learned by a smaller one."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.errors import FlaxError
from jax.sharding import Mesh

from zoo.convert.place import abstract_variables, apart, as_float, cast_to, together
from zoo.loading import config_of, load
from zoo.models.core.config import ModelConfig
from zoo.models.core.errors import UsageError
from zoo.models.core.types import IGNORE, Array, Batch, Output, take
from zoo.train.objectives.base import (
    Carried,
    Mean,
    Means,
    Objective,
    Variables,
    Variant,
    applied,
)
from zoo.train.objectives.chunks import chunk_of, in_chunks
from zoo.train.objectives.lm import head_of, reported

Divergence = Literal["forward", "reverse", "jsd"]


@dataclass(frozen=True)
class Distill(Objective):
    """The divergence of a model's distribution from its teacher's, over the labelled tokens.

    Both read the same batches, and must have the same vocabulary. They may see pictures with
    different numbers of tokens: the labelled tokens of a row are compared in their order. Follows:
    arXiv:1503.02531, section 2; the generalised form of Jensen and Shannon: arXiv:2306.13649.

    Attributes:
      teacher: all that `zoo.load` takes: the folder of a run or of a checkpoint, or a name on the
        hub.
      divergence: "forward", KL(teacher || student); "reverse", KL(student || teacher); "jsd",
        mix KL(teacher || m) + (1 - mix) KL(student || m), m = mix teacher + (1 - mix) student.
      temperature: the logits of both are divided by it; the divergence is multiplied by its square,
        so that its gradient keeps its size.
      mix: between teacher and student, for "jsd".
      labels: weight of the cross-entropy with the labels, which is added.
      dtype: of the teacher, "float32" or "bfloat16".
      chunk: as in `NextToken`.
    """

    teacher: str
    divergence: Divergence = "forward"
    temperature: float = 1.0
    mix: float = 0.5
    labels: float = 0.0
    dtype: str = "float32"
    chunk: int | None = None

    fixed: ClassVar[tuple[str, ...]] = ("teacher",)

    def __post_init__(self) -> None:
        if self.divergence not in get_args(Divergence):
            known = ", ".join(get_args(Divergence))
            raise UsageError(f"objective.divergence is {self.divergence!r}: want one of {known}")
        if self.temperature <= 0:
            raise UsageError(f"objective.temperature is {self.temperature}: want more than 0")
        if not 0 < self.mix < 1:
            raise UsageError(f"objective.mix is {self.mix}: want a share between 0 and 1")
        if self.labels < 0:
            raise UsageError(f"objective.labels is {self.labels}: want 0 or more")
        if self.chunk is not None and self.chunk < 1:
            raise UsageError(f"objective.chunk is {self.chunk}: want 1 or more tokens, or None")
        as_float(self.dtype)

    def init(self, model: nn.Module, variables: Variables, inputs: Batch) -> dict[str, Any]:
        """A place for the teacher's parameters, and its running statistics if it keeps some.

        Raises:
          UsageError: it cannot read the model's batches, or has another vocabulary.
        """
        config = _config(self.teacher, self.dtype)
        target = as_float(self.dtype)

        def zeros(leaf: Any) -> Array:
            return jnp.zeros(leaf.shape, cast_to(leaf.dtype, target))

        params, stats = apart(abstract_variables(config))
        places = together(jax.tree.map(zeros, params), jax.tree.map(jnp.zeros_like, stats))
        self._check(config, _variables(nn.unbox(places)), model, variables, inputs)
        return {"teacher": places}

    def load(self, mesh: Mesh) -> dict[str, Any]:
        """The teacher's variables, divided among the devices as its axes say."""
        teacher = load(self.teacher, mesh=mesh, dtype=self.dtype)
        return {"teacher": together(teacher.params, teacher.stats)}

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
        """The loss; the divergence alone, the cross-entropy with the labels, and the accuracy."""
        out, carried = applied(model, variables, batch, train=train, key=key)
        teacher = _config(self.teacher, self.dtype).build()
        known = _variables(jax.lax.stop_gradient(aux["teacher"]))
        shown = teacher.apply(known, batch)
        count = min(batch["labels"].shape[1], out.hidden.shape[1], shown.hidden.shape[1])
        hidden, label = labelled(out, count)
        theirs, _ = labelled(shown, count)

        head, their_head = head_of(model), head_of(teacher)

        def sums(both: tuple[Any, Any], hidden: Array, theirs: Array, label: Array) -> _Sums:
            logits, wanted = head(both[0], hidden), their_head(both[1], theirs)
            learned = label != IGNORE
            safe = jnp.where(learned, label, 0)
            each = divergence(
                wanted, logits, self.divergence, temperature=self.temperature, mix=self.mix
            )
            entropy = optax.softmax_cross_entropy_with_integer_labels(logits, safe)
            right = learned & (logits.argmax(-1) == label)
            return _Sums(
                jnp.where(learned, each, 0).sum(),
                jnp.where(learned, entropy, 0).sum(),
                right.sum(dtype=jnp.float32),
            )

        chunk = chunk_of(head, variables, hidden, self.chunk)
        found = in_chunks(sums, (variables, known), (hidden, theirs, label), (0, 0, IGNORE), chunk)
        weight = (label != IGNORE).sum(dtype=jnp.float32)
        total = found.divergence + self.labels * found.cross_entropy
        metrics = {
            "divergence": Mean(found.divergence, weight),
            "cross_entropy": Mean(found.cross_entropy, weight),
            "accuracy": Mean(found.right, weight),
        }
        return {"loss": Mean(total, weight), **reported(out)}, metrics, carried

    def _check(
        self, config: ModelConfig, teacher: Any, model: nn.Module, variables: Any, inputs: Batch
    ) -> None:
        """Raise UsageError unless teacher and model read the same batches and vocabulary."""

        def logits(model: nn.Module, variables: Any, batch: Batch) -> Array:
            hidden = model.apply(variables, batch).hidden
            return model.apply(variables, hidden[:, :1], method="head")

        try:
            theirs = jax.eval_shape(functools.partial(logits, config.build()), teacher, inputs)
        except (ValueError, KeyError, AttributeError, FlaxError) as error:
            raise UsageError(
                f"the teacher {self.teacher} cannot read the batches of the model: {error}"
            ) from error
        ours = jax.eval_shape(functools.partial(logits, model), dict(variables), inputs)
        if theirs.shape[-1] != ours.shape[-1]:
            raise UsageError(
                f"the teacher {self.teacher} knows {theirs.shape[-1]} tokens and the model "
                f"{ours.shape[-1]}: want one vocabulary"
            )


@struct.dataclass
class _Sums:
    """Sums over the labelled tokens of a batch, float32 []."""

    divergence: Array
    cross_entropy: Array
    right: Array


def divergence(
    teacher: Array, student: Array, kind: Divergence, *, temperature: float, mix: float
) -> Array:
    """How far two distributions are apart, in nats times the square of the temperature.

    Args:
      teacher: logits [..., V].
      student: logits [..., V].
      kind: which divergence, see `Distill`.
      temperature: divides the logits.
      mix: of "jsd".

    Returns:
      float32 [...].
    """
    t, s = (jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in (teacher, student))

    def kl(p: Array, q: Array) -> Array:
        return (jnp.exp(p) * (p - q)).sum(-1)

    match kind:
        case "forward":
            found = kl(t, s)
        case "reverse":
            found = kl(s, t)
        case "jsd":
            middle = jnp.logaddexp(jnp.log(mix) + t, jnp.log(1 - mix) + s)
            found = mix * kl(t, middle) + (1 - mix) * kl(s, middle)
    return temperature**2 * found


def labelled(out: Output, count: int) -> tuple[Array, Array]:
    """The first `count` tokens of each row, those with labels before the others.

    Returns:
      hidden states [B, count, D] and labels [B, count].
    """
    label = out.tokens.tags["label"]
    order = jnp.argsort(label == IGNORE, axis=1, stable=True)[:, :count]
    return take((out.hidden, label), order)


def _variables(teacher: Any) -> Variables:
    """What a module is applied to, from the tree that `zoo.convert.place.together` makes."""
    params, stats = apart(teacher)
    return {"params": params, "stats": stats} if stats else {"params": params}


@functools.lru_cache(maxsize=4)
def _config(source: str, dtype: str) -> ModelConfig:
    return config_of(source, dtype)
