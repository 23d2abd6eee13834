"""Pre-training of models that read a picture and a text apart, compare them, and fuse them."""

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


@dataclass(frozen=True)
class ImageText(Objective):
    """Five losses of equal weight, of images and the texts that belong to them.

    `loss`: of every image the right text of the batch, and of every text the right image.
    `match_loss`: whether a pair belongs together, of each pair and of two wrong ones, whose image
    and text are drawn as the comparison finds them alike. `mask_loss`: hidden words. `follow_loss`:
    the words after a prefix of drawn length. Follows: arXiv:2107.07651, arXiv:2205.12005.
    `patch_loss`: which patches belong to the name of an object, where the batch has `patch_labels`
    float32 [B, N] (1 and 0, negative where it is not known), and with them `object_ids` int [B, T]
    and `object_mask` bool [B, T], the texts that name them. Follows: arXiv:2307.08504.

    The batch is that of all devices together, so that it may not be cut into parts.

    Attributes:
      mask_id: the id that stands for a hidden word.
      special: ids that are never hidden: padding, and what begins and ends a text.
      share: of the words that are to be predicted: of these 8 of 10 are hidden, one is another.
    """

    mask_id: int = 103
    special: tuple[int, ...] = (0, 101, 102)
    share: float = 0.15

    whole_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UsageError(f"objective.share is {self.share}: want a share between 0 and 1")

    def init(self, model: nn.Module, variables: Variables, inputs: Batch) -> dict[str, Any]:
        """Nothing is carried.

        Raises:
          UsageError: the model does not fuse images and texts.
        """
        if missing := [part for part in _PARTS if not hasattr(model, part)]:
            raise UsageError(
                f"{type(model).__name__} has no {', '.join(missing)}: ImageText wants a model that "
                "fuses images and texts"
            )
        return {}

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
        del aux, variant, train

        def use(method: str, *args: Any) -> Any:
            return model.apply(variables, *args, method=method)

        pixels, ids = batch["pixels"], batch["ids"]
        mask = jnp.asarray(batch.get("text_mask", jnp.ones(ids.shape, bool)))
        size = len(ids)
        if size < 2:
            raise UsageError("a batch of one example: ImageText wants wrong pairs, 2 or more")
        keys = jax.random.split(key, 4)
        text = use("read", ids, mask)
        seen = use("see", pixels, text[:, 0])
        summary = use("summarise", seen)
        logits = use("compare", use("image_of", seen.cls), use("text_of", text[:, 0]))

        drawn_text, drawn_image = wrong_pairs(logits, keys[0])
        of_image, own_mask = (x[drawn_text] for x in (text, mask))
        texts = jnp.concatenate([text, text, of_image])
        images = jnp.concatenate([summary, summary[drawn_image], summary])
        fused = use("fuse", texts, jnp.concatenate([mask, mask, own_mask]), images)
        judged, together = use("match", fused), jnp.arange(3 * size) < size

        hidden, wanted = self.hide(ids, mask, keys[1], model.config.text.vocab_size)
        words = use("predict", use("fuse", use("read", hidden, mask), mask, summary))

        cut = prefix_lengths(mask, keys[2])[:, None]
        prefix = mask & (jnp.arange(ids.shape[1]) < cut)
        read = use("fuse", use("read", ids, prefix), prefix, summary)
        there = jnp.ones(summary.shape[:2], bool)
        context = jnp.concatenate([summary, read.astype(summary.dtype)], 1)
        written = use("write", ids, mask, context, jnp.concatenate([there, prefix], 1))
        follows = mask[:, 1:] & (jnp.arange(1, ids.shape[1]) >= cut)

        place, weight = jnp.arange(size), jnp.float32(size)
        terms = {
            "loss": Mean(symmetric_softmax(logits).sum(), weight),
            "match_loss": _mean(_cost(judged, together.astype(jnp.int32)), together >= 0),
            "mask_loss": _mean(_cost(words, ids), wanted),
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
        return terms, metrics, {}

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


def _cost(logits: Array, label: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def _mean(each: Array, counts: Array) -> Mean:
    return Mean(jnp.where(counts, each, 0).sum(), counts.sum(dtype=jnp.float32))
