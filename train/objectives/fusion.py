"""Pre-training of models that read a picture and a text apart, compare them, and fuse them."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from zoo.models.core.errors import UsageError
from zoo.models.core.types import Array, Batch
from zoo.train.objectives.base import Carried, Mean, Means, Objective, Variables, Variant
from zoo.train.objectives.contrastive import symmetric_softmax

_PARTS = ("read", "see", "summarise", "fuse", "compare", "match", "predict", "write")
_QUEUES = ("images", "texts")


@dataclass(frozen=True)
class ImageText(Objective):
    """Five losses of equal weight, of images and the texts that belong to them.

    `loss`: of every image the right text, and of every text the right image, among those of the
    batch and of batches before. `match_loss`: whether a pair belongs together, of each pair and of
    two wrong ones, whose image and text are drawn as the comparison finds them alike. `mask_loss`:
    hidden words. `follow_loss`: the words after a prefix of drawn length. Follows:
    arXiv:2107.07651, arXiv:2205.12005. `patch_loss`: which patches belong to the name of an object,
    where the batch has `patch_labels` float32 [B, N] (1 and 0, negative where it is not known), and
    with them `object_ids` int [B, T] and `object_mask` bool [B, T], the texts that name them.
    Follows: arXiv:2307.08504.

    What comes of earlier batches, and soft targets, are made by a slow copy of the model, the mean
    of its past parameters. The copy is carried, and so are the images and texts that it has seen
    last.

    The batch is that of all devices together, so that it may not be cut into parts.

    Attributes:
      mask_id: the id that stands for a hidden word.
      special: ids that are never hidden: padding, and what begins and ends a text.
      share: of the words that are to be predicted: of these 8 of 10 are hidden, one is another.
      momentum: how much of the slow copy stays in a step.
      queue: images, and texts, of earlier batches that each is compared with.
      soft: weight of what the slow copy says beside what is right, in the comparison and of hidden
        words. With 0, and no queue, there is no copy.
    """

    mask_id: int = 103
    special: tuple[int, ...] = (0, 101, 102)
    share: float = 0.15
    momentum: float = 0.995
    queue: int = 65_536
    soft: float = 0.4

    whole_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UsageError(f"objective.share is {self.share}: want a share between 0 and 1")
        if not 0 <= self.momentum < 1:
            raise UsageError(f"objective.momentum is {self.momentum}: want 0 or more, below 1")
        if self.queue < 0:
            raise UsageError(f"objective.queue is {self.queue}: want 0 or more")
        if not 0 <= self.soft < 1:
            raise UsageError(f"objective.soft is {self.soft}: want a weight from 0 on, below 1")

    @property
    def slow(self) -> bool:
        """Whether there is a slow copy."""
        return self.queue > 0 or self.soft > 0

    def init(self, model: nn.Module, variables: Variables, inputs: Batch) -> dict[str, Any]:
        """The slow copy, `momentum`, and of earlier batches `images` and `texts` [queue, P], chance
        ones at first; {} where there is none.

        Raises:
          UsageError: the model does not fuse images and texts.
        """
        if missing := [part for part in _PARTS if not hasattr(model, part)]:
            raise UsageError(
                f"{type(model).__name__} has no {', '.join(missing)}: ImageText wants a model that "
                "fuses images and texts"
            )
        if not self.slow:
            return {}
        found: dict[str, Any] = {"momentum": variables["params"]}
        if self.queue:
            shape = (self.queue, model.config.embedding_dim)
            for name, key in zip(_QUEUES, jax.random.split(jax.random.key(0)), strict=True):
                drawn = jax.random.normal(key, shape)
                found[name] = drawn / jnp.linalg.norm(drawn, axis=-1, keepdims=True)
        return found

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
        """The losses; how often the most similar text and image are the right ones, and pairs are
        judged rightly.

        Raises:
          UsageError: a batch of one, which has no wrong pairs.
        """
        del variant

        def use(method: str, *args: Any, own: Any = variables) -> Any:
            return model.apply(own, *args, method=method)

        pixels, ids = batch["pixels"], batch["ids"]
        mask = jnp.asarray(batch.get("text_mask", jnp.ones(ids.shape, bool)))
        size = len(ids)
        if size < 2:
            raise UsageError("a batch of one example: ImageText wants wrong pairs, 2 or more")
        carried = self._moved(variables, aux) if train else dict(aux)
        keys = jax.random.split(key, 4)
        text = use("read", ids, mask)
        seen = use("see", pixels, text[:, 0])
        summary = use("summarise", seen)
        image, words = use("image_of", seen.cls), use("text_of", text[:, 0])
        logits = use("compare", image, words)
        compared = symmetric_softmax(logits)
        if self.slow:
            before = functools.partial(use, own={**variables, "params": carried["momentum"]})
            past_text = before("read", ids, mask)
            past_seen = before("see", pixels, past_text[:, 0])
            past = before("image_of", past_seen.cls), before("text_of", past_text[:, 0])
            queues = [jnp.concatenate([x, carried[n]]) for x, n in zip(past, _QUEUES) if self.queue]
            images, texts = queues or past
            of_images = self._cost(use("compare", image, texts), use("compare", past[0], texts))
            of_texts = self._cost(
                use("compare", images, words).T, use("compare", images, past[1]).T
            )
            compared = (of_images + of_texts) / 2
            if train:
                carried |= {n: x[: self.queue] for n, x in zip(_QUEUES, queues)}

        drawn_text, drawn_image = wrong_pairs(logits, keys[0])
        of_image, own_mask = (x[drawn_text] for x in (text, mask))
        texts = jnp.concatenate([text, text, of_image])
        images = jnp.concatenate([summary, summary[drawn_image], summary])
        fused = use("fuse", texts, jnp.concatenate([mask, mask, own_mask]), images)
        judged, together = use("match", fused), jnp.arange(3 * size) < size

        hidden, wanted = self.hide(ids, mask, keys[1], model.config.text.vocab_size)
        said = use("predict", use("fuse", use("read", hidden, mask), mask, summary))
        spelled = _cost(said, ids)
        if self.soft:
            summed = before("summarise", past_seen)
            past_said = before(
                "predict", before("fuse", before("read", hidden, mask), mask, summed)
            )
            alike = optax.softmax_cross_entropy(said, _chances(past_said))
            spelled = (1 - self.soft) * spelled + self.soft * alike

        cut = prefix_lengths(mask, keys[2])[:, None]
        prefix = mask & (jnp.arange(ids.shape[1]) < cut)
        read = use("fuse", use("read", ids, prefix), prefix, summary)
        there = jnp.ones(summary.shape[:2], bool)
        context = jnp.concatenate([summary, read.astype(summary.dtype)], 1)
        written = use("write", ids, mask, context, jnp.concatenate([there, prefix], 1))
        follows = mask[:, 1:] & (jnp.arange(1, ids.shape[1]) >= cut)

        place, weight = jnp.arange(size), jnp.float32(size)
        terms = {
            "loss": Mean(compared.sum(), weight),
            "match_loss": _mean(_cost(judged, together.astype(jnp.int32)), together >= 0),
            "mask_loss": _mean(spelled, wanted),
            "follow_loss": _mean(_cost(written[:, :-1], ids[:, 1:]), follows),
        }
        if "patch_labels" in batch:
            named = (batch[name] for name in ("object_ids", "object_mask"))
            relevance, label = use("relevance", pixels, *named), batch["patch_labels"]
            each = optax.sigmoid_binary_cross_entropy(relevance, jnp.maximum(label, 0))
            terms["patch_loss"] = _mean(each, label >= 0)
        right = {axis: (logits.argmax(axis) == place).sum(dtype=jnp.float32) for axis in (0, 1)}
        metrics = {
            "image_to_text": Mean(right[1], weight),
            "text_to_image": Mean(right[0], weight),
            "matched": _mean((judged.argmax(-1) == together).astype(jnp.float32), together >= 0),
        }
        return terms, metrics, {"aux": carried} if self.slow else {}

    def _moved(self, variables: Variables, aux: Mapping[str, Any]) -> dict[str, Any]:
        """What is carried, its slow copy a step on."""
        if not self.slow:
            return {}
        now = jax.lax.stop_gradient(variables["params"])
        moved = jax.tree.map(
            lambda slow, own: self.momentum * slow + (1 - self.momentum) * own,
            aux["momentum"],
            now,
        )
        return {**aux, "momentum": moved}

    def _cost(self, logits: Array, past: Array) -> Array:
        """What each of B pays that is compared with N, of which the first B belong to them.

        Args:
          logits: [B, N].
          past: [B, N], those of the slow copy.
        """
        right = jnp.eye(*logits.shape, dtype=jnp.float32)
        target = (1 - self.soft) * right + self.soft * _chances(past)
        return optax.softmax_cross_entropy(logits, target)

    def hide(self, ids: Array, mask: Array, key: Array, vocab_size: int) -> tuple[Array, Array]:
        """Texts with words hidden, and which words are to be predicted.

        Args:
          ids: int [B, T].
          mask: bool [B, T], False on padding.
          key: for the draws.
          vocab_size: of the words that others are replaced by.
        """
        first, second, third = jax.random.split(key, 3)
        word = mask & ~jnp.isin(ids, jnp.asarray(self.special))
        wanted = word & (jax.random.uniform(first, ids.shape) < self.share)
        chance = jax.random.uniform(second, ids.shape)
        other = jax.random.randint(third, ids.shape, 0, vocab_size)
        hidden = jnp.where(chance < 0.8, self.mask_id, jnp.where(chance < 0.9, other, ids))
        return jnp.where(wanted, hidden, ids), wanted


def wrong_pairs(logits: Array, key: Array) -> tuple[Array, Array]:
    """For every image the place of a text that is not its own, and for every text that of an image,
    int [B] each, drawn by the softmax of logits [B, B] of images and texts.
    """
    away = jnp.eye(len(logits), dtype=bool)
    logits = jnp.where(away, -jnp.inf, jax.lax.stop_gradient(logits))
    first, second = jax.random.split(key)
    return jax.random.categorical(first, logits), jax.random.categorical(second, logits.T)


def prefix_lengths(mask: Array, key: Array) -> Array:
    """How many tokens of each text [B, T] are given, at least one and all but one at most: int [B],
    drawn evenly.
    """
    most = jnp.maximum(mask.sum(-1) - 1, 1)
    return jax.random.randint(key, most.shape, 1, most + 1)


def _chances(logits: Array) -> Array:
    """The softmax of logits [..., N], without a gradient."""
    return jax.nn.softmax(jax.lax.stop_gradient(logits), -1)


def _cost(logits: Array, label: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def _mean(each: Array, counts: Array) -> Mean:
    return Mean(jnp.where(counts, each, 0).sum(), counts.sum(dtype=jnp.float32))
