"""DeepSpeed-Ulysses: training on long sequences, each of which is divided over several devices.

Every token-wise part of a model works on the device that has the token. Only attention needs all
tokens: an all-to-all turns (a part of the sequence, all heads) into (all of the sequence, a part of
the heads), any attention runs as it is, and a second all-to-all leads back. What a device sends
does not grow when sequence and devices grow alike.

Follows: arXiv:2309.14509. The exchange itself is `zoo.models.parts.layers.sequence`, which every
model of the zoo runs on a mesh with `seq` > 1; here are the recipe, and the loss of logits that are
divided like the sequence.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from zoo.models.core.card import Card
from zoo.models.core.config import SystemConfig
from zoo.models.core.errors import UsageError
from zoo.models.core.registry import register
from zoo.models.core.types import IGNORE, Array, Tokens
from zoo.models.parts.layers.attention import Attend, Rule, attend, causal
from zoo.models.parts.layers.sequence import AXIS, check_length, elements_sent, exchanged
from zoo.train.config import Experiment, Recipe
from zoo.train.mesh import ALONG_SEQUENCE

CARD = Card(
    slug="ulysses",
    paper="arXiv:2309.14509",
    code="https://github.com/microsoft/DeepSpeed",
    differs=(
        "Where the devices do not divide the heads, the smaller blocks are filled up with heads of "
        "zeros, which are sent too.",
        "The official sequence-first layout comes back in a wrong shape; here it is [L, B, H, E].",
    ),
)


@dataclass(frozen=True)
class Ulysses(SystemConfig):
    """The recipe.

    Attributes:
      ranks: P, devices that share a sequence; a divisor of its length, at most the query heads.
      divide_params: whether the parameters are divided over them too, as ZeRO-3 does over all
        devices.
    """

    ranks: int = 8
    divide_params: bool = True

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ValueError(f"ranks = {self.ranks}: want 1 device or more for a sequence")

    def build(self) -> "SequenceParallel":
        """What turns an experiment into one with divided sequences, and its parts."""
        return SequenceParallel(self)


class SequenceParallel:
    """Training with divided sequences.

        recipe = zoo.create("ulysses", ranks=4)
        train(recipe(experiment), "runs/long")

    Args:
      config: how many devices share a sequence.
    """

    def __init__(self, config: Ulysses):
        self.config = config

    def __call__(self, experiment: Experiment | Recipe) -> Experiment | Recipe:
        """The same training with sequences that are divided; its numbers are the same.

        Raises:
          UsageError: the decoder has fewer heads than there are ranks.
        """
        if isinstance(experiment, Recipe):
            return replace(experiment, stages=tuple(map(self, experiment.stages)))
        decoder = getattr(experiment.model, "decoder", experiment.model)
        heads = getattr(decoder, "num_heads", self.config.ranks)
        if heads < self.config.ranks:
            raise UsageError(
                f"ranks = {self.config.ranks} and the decoder of {experiment.name} has {heads} "
                f"heads: want at most {heads} ranks"
            )
        rules = ALONG_SEQUENCE if self.config.divide_params else ()
        return replace(
            experiment, mesh=replace(experiment.mesh, seq=self.config.ranks, rules=rules)
        )

    def attend(
        self,
        q: Array,
        k: Array,
        v: Array,
        rule: Rule = causal,
        query: Tokens | None = None,
        key: Tokens | None = None,
        *,
        inner: Attend = attend,
        **options: Any,
    ) -> Array:
        """Attention on the current mesh, whose axis `seq` has `ranks` devices.

        Args:
          q: [B, L, H, E].
          k: [B, S, K, E].
          v: [B, S, K, E].
          rule: who sees whom.
          query: tokens of q; by default text in reading order.
          key: tokens of k and v; likewise.
          inner: the attention of whole sequences.
          **options: of it.

        Returns:
          [B, L, H, E], divided over the sequence.
        """
        self._check_mesh()
        for x in (q, k):
            check_length(x.shape[1])
        query = _reading_order(q) if query is None else query
        key = _reading_order(k) if key is None else key
        return exchanged(inner, q, k, v, rule, query, key, **options)

    def loss(self, logits: Array, labels: Array) -> Array:
        """The mean cross-entropy of logits [B, L, V] that are divided over the sequence.

        No device has more of them than of its own tokens: sums and counts are added up.

        Args:
          logits: float32 [B, L, V].
          labels: int [B, L], `IGNORE` where nothing is learned.
        """
        self._check_mesh()
        check_length(labels.shape[1])

        def local(logits: Array, labels: Array) -> Array:
            learned = labels != IGNORE
            safe = jnp.where(learned, labels, 0)
            each = optax.softmax_cross_entropy_with_integer_labels(logits, safe)
            total, count = jnp.where(learned, each, 0).sum(), learned.sum()
            total, count = jax.lax.psum((total, count), AXIS)
            return total / jnp.maximum(count, 1)

        part = PartitionSpec(None, AXIS)
        run = jax.shard_map(
            local, in_specs=(part, part), out_specs=PartitionSpec(), axis_names={AXIS}
        )
        return run(logits, labels)

    def elements_sent(
        self, batch: int, length: int, num_heads: int, num_kv_heads: int, head_dim: int
    ) -> list[int]:
        """Numbers that each rank sends in the forward pass of a layer; see the shared function."""
        return elements_sent(batch, length, num_heads, num_kv_heads, head_dim, self.config.ranks)

    def _check_mesh(self) -> None:
        mesh = jax.sharding.get_abstract_mesh()
        found = 1 if mesh.empty else mesh.shape.get(AXIS, 1)
        if found != self.config.ranks:
            raise UsageError(
                f"the current mesh has seq={found}: want {self.config.ranks}, as ranks says; enter "
                "`jax.set_mesh(make_mesh(MeshConfig(seq=...)))`"
            )


def _reading_order(x: Array) -> Tokens:
    return Tokens.sequence(jnp.ones(x.shape[:2], bool))


VARIANTS = {"ulysses_8": Ulysses(8), "ulysses_tiny": Ulysses(2)}

register(CARD, VARIANTS)
