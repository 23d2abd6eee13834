"""Classes by their names: zero-shot classification with a dual encoder.

    loaded = zoo.load("openai/clip-vit-base-patch32")
    classify(loaded, ["a.jpg", "b.jpg"], ["cat", "dog"])                    # [2, 2] probabilities
    head = class_head(loaded, names, templates=["a photo of a {}.", "a drawing of a {}."])
    judge(loaded, images, head)                                             # for many images

Follows: arXiv:2103.00020, section 3.1, and arXiv:2303.15343 for probabilities of single pairs.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from zoo.models.core.compiled import jit
from zoo.models.core.errors import UsageError
from zoo.models.core.types import Array
from zoo.models.parts.assemblies.dual import DualConfig

DEFAULT_TEMPLATES = ("a photo of a {}.",)
"""What stands around the name of a class by default."""


class PairProcessor(Protocol):
    """Makes arrays of pictures and of texts."""

    def encode(self, images: Any = None, texts: Any = None) -> Mapping[str, np.ndarray]:
        """`pixels` [B, H, W, 3] of the pictures; `ids` [T, L] and, where padding is not to be
        seen, `text_mask` [T, L] of the texts.
        """
        ...


class Ready(Protocol):
    """A dual encoder with what it needs, such as `zoo.load` returns."""

    @property
    def config(self) -> Any:
        """A `DualConfig`."""
        ...

    @property
    def model(self) -> nn.Module:
        """Its module."""
        ...

    @property
    def variables(self) -> Any:
        """Its parameters, and its running statistics if it keeps some."""
        ...

    @property
    def processor(self) -> Any:
        """A `PairProcessor`."""
        ...


def classify(
    loaded: Ready,
    images: Sequence[Any],
    names: Sequence[str],
    *,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    batch_size: int = 64,
) -> np.ndarray:
    """How probable it is that an image shows a class, by the names of the classes.

    Args:
      loaded: a dual encoder.
      images: what its processor takes.
      names: of the classes.
      templates: texts with a `{}` in the place of the name. The embedding of a class is the mean of
        those of its texts.
      batch_size: how many images or texts are encoded at once.

    Returns:
      float32 [images, classes]. Models that compare the texts of an image with one another (CLIP)
      give rows that add up to 1; those that judge every pair by itself (SigLIP) do not.

    Raises:
      UsageError: no images or no names, a template without a `{}`, or another kind of model.
    """
    head = class_head(loaded, names, templates=templates, batch_size=batch_size)
    return judge(loaded, images, head, batch_size=batch_size)


def class_head(
    loaded: Ready,
    names: Sequence[str],
    *,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    batch_size: int = 64,
) -> np.ndarray:
    """The embeddings of classes: float32 [classes, P], of unit length.

    Each is the mean of the unit-length embeddings of its texts, brought to unit length again.
    Arguments and errors are those of `classify`.
    """
    _check(loaded, "names", names)
    if not templates:
        raise UsageError("templates: got none, want at least one text with a {} in it")
    for template in templates:
        if "{}" not in template:
            raise UsageError(f"template {template!r}: want a {{}} in the place of the name")
    texts = [template.replace("{}", name) for name in names for template in templates]
    parts = []
    for chunk in _chunks(texts, batch_size):
        batch = loaded.processor.encode(texts=chunk)
        ids, mask = _filled(batch["ids"], len(texts), batch_size), batch.get("text_mask")
        mask = None if mask is None else _filled(mask, len(texts), batch_size)
        parts.append(np.asarray(_texts(loaded.model, loaded.variables, ids, mask))[: len(chunk)])
    embeddings = np.concatenate(parts).reshape(len(names), len(templates), -1)
    mean = embeddings.mean(1)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def judge(
    loaded: Ready, images: Sequence[Any], head: Array | np.ndarray, *, batch_size: int = 64
) -> np.ndarray:
    """Probabilities [images, classes] for the embeddings of classes that `class_head` has made.

    Arguments and errors are those of `classify`.
    """
    _check(loaded, "images", images)
    parts = []
    for chunk in _chunks(images, batch_size):
        pixels = _filled(loaded.processor.encode(images=chunk)["pixels"], len(images), batch_size)
        found = _probabilities(loaded.model, loaded.variables, pixels, jnp.asarray(head))
        parts.append(np.asarray(found)[: len(chunk)])
    return np.concatenate(parts)


@jit(static_argnames="model")
def _texts(model: nn.Module, variables: Any, ids: Array, mask: Array | None) -> Array:
    return model.apply(variables, ids, mask, method="encode_text")


@jit(static_argnames="model")
def _probabilities(model: nn.Module, variables: Any, pixels: Array, head: Array) -> Array:
    image = model.apply(variables, pixels, method="encode_image")
    return model.apply(variables, image, head, method="probabilities")


def _check(loaded: Ready, what: str, items: Sequence[Any]) -> None:
    if not isinstance(loaded.config, DualConfig):
        kind = type(loaded.config).__name__
        raise UsageError(
            f"a model of {kind} has no embeddings of texts and images: want CLIP or SigLIP"
        )
    if isinstance(items, str) or not len(items):
        raise UsageError(f"{what}: got {items!r}, want a list of at least one")


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _filled(rows: np.ndarray, total: int, batch_size: int) -> np.ndarray:
    """`rows` with copies of the last one up to one length for all chunks, so that few shapes are
    compiled: `batch_size`, or the power of two that holds all where there are fewer.
    """
    size = min(batch_size, 1 << (total - 1).bit_length())
    return np.pad(rows, [(0, size - len(rows))] + [(0, 0)] * (rows.ndim - 1), mode="edge")
