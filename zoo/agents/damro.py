"""DAMRO: decoding against the patches that a vision tower gives too much attention.

The patches that the class token attends to most are taken for background that language models read
objects into. A second reading of the prompt sees nothing else of the picture, and its logits count
against those of the first at every step.

Follows: arXiv:2410.04514. Both readings are rows of one batch: the second one has as many image
slots as the first, all but k of them masked, so that a step reads the weights once.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from zoo.evaluate.model import ModelSubject
from zoo.evaluate.subject import Agent, Subject
from zoo.generate.autoregressive import Reader, variables_of
from zoo.generate.branches import Combined, Contrast
from zoo.models.core.card import Card
from zoo.models.core.errors import UsageError
from zoo.models.core.registry import register
from zoo.models.core.types import Array, Batch, Features
from zoo.models.parts.assemblies.llava import LlavaConfig
from zoo.models.parts.reduce.scores import class_attention

CARD = Card(
    slug="damro",
    paper="arXiv:2410.04514",
    code="https://github.com/coder-gx/DAMRO",
    differs=(
        "Both readings are one batch with one cache; the official code keeps two.",
        "Temperature, top-k, top-p and the repetition penalty apply where they are asked for; the "
        "official code passes over them.",
        "InstructBLIP is not among the models of this zoo: of its form there is the selection, "
        "`split_heads`.",
    ),
)


def outliers(
    q: Array, k: Array, top_k: int, *, prefix: int = 1, split_heads: bool = False
) -> tuple[Array, Array]:
    """The patches that the class token attends to most.

    Args:
      q: queries [..., P + N, H, E] of one layer of the tower, not scaled.
      k: its keys.
      top_k: how many patches.
      prefix: P, tokens before the patches, the class token first.
      split_heads: attention is the mean over heads, as the layer itself attends (official for
        InstructBLIP); by default queries and keys of all heads are one long vector (for LLaVA).

    Returns:
      their numbers int32 [..., k], the one that is attended to most first, and the attention that
      they get, float32 [..., k].
    """
    if not split_heads:
        q, k = (x.reshape(*x.shape[:-2], 1, -1) for x in (q, k))
    attention, index = jax.lax.top_k(class_attention(q, k, prefix=prefix), top_k)
    return index.astype(jnp.int32), attention


@dataclass(frozen=True)
class OutlierBranch:
    """The plain reading, and one that sees the outliers of every picture alone.

    Of a picture in tiles only the first one counts, which is the whole picture made small, with the
    newline after its outliers.

    Attributes:
      top_k: outliers of a picture.
      split_heads: see `outliers`.
    """

    top_k: int
    split_heads: bool = False

    def __call__(
        self, reader: Reader, params: Any, prompts: Batch, budget: Array | None
    ) -> tuple[Batch, Batch]:
        """The two prompts; twice the same without pictures."""
        del budget
        if "pixels" not in prompts:
            return prompts, prompts
        config, pixels = reader.model.config, prompts["pixels"]
        rows, tiles = pixels.shape[:2]
        tokens, [layer] = config.tile_tokens, config.layers

        def look(model: Any) -> Features:
            return model.tower(pixels, qk=(layer,), stop_after=layer)

        features = reader.model.apply(variables_of(params), method=look)
        index, _ = outliers(
            *features.qk[layer],
            self.top_k,
            prefix=config.tower.prefix,
            split_heads=self.split_heads,
        )
        index += config.keep_class  # [B, M, k]

        plain = dict(prompts)
        if "layout" not in plain:
            every = jnp.arange(tiles * tokens, dtype=jnp.int32)
            plain["layout"] = jnp.broadcast_to(every, (rows, tiles * tokens))
            plain["sizes"] = jnp.full((rows, tiles), tokens, jnp.int32)
        # The first slot of a picture holds a token of its first tile.
        layout, sizes = plain["layout"], plain["sizes"]  # [B, S] or [B, S, 4], [B, I]
        flat = layout if layout.ndim == 2 else layout[..., 0]
        start = jnp.minimum(jnp.cumsum(sizes, -1) - sizes, flat.shape[1] - 1)
        tile = jnp.clip(jnp.take_along_axis(flat, start, 1) // tokens, 0, tiles - 1)  # [B, I]
        kept = jnp.take_along_axis(index, tile[..., None], 1) + tile[..., None] * tokens
        if config.newline:
            newline = jnp.full_like(kept[..., :1], tiles * tokens)
            kept = jnp.concatenate([kept, newline], -1)  # [B, I, k + 1]
        kept = kept.reshape(rows, -1)

        length = max(kept.shape[1], flat.shape[1])
        other = {**plain, "layout": _fill(kept, length)}
        plain["layout"] = _fill(layout, length)
        if "blend" in plain:
            alone = jnp.zeros((rows, length, 4)).at[..., 0].set(1)
            other |= {
                "layout": jnp.repeat(other["layout"][..., None], 4, -1),
                "blend": alone.astype(plain["blend"].dtype),
            }
            plain["blend"] = _fill(plain["blend"], length)
        other["sizes"] = jnp.where(sizes > 0, self.top_k + config.newline, 0)
        return plain, other


def _fill(slots: Array, length: int) -> Array:
    """Slots [B, S, ...] and surplus ones up to `length`."""
    more = [(0, 0), (0, length - slots.shape[1])] + [(0, 0)] * (slots.ndim - 2)
    return jnp.pad(slots, more)


@dataclass(frozen=True)
class Damro(Agent):
    """Contrastive decoding against the outliers of a picture, for models of the LLaVA form.

    The defaults are those of the official evaluation of LLaVA-1.5, where tokens are drawn at
    temperature 1.

    Attributes:
      alpha: how much the reading of the outliers counts against a token.
      beta: only tokens at least so much as probable as the likeliest may be chosen.
      top_k: k, the outliers of a picture.
      split_heads: see `outliers`.

    Raises:
      ValueError: a number is out of its range.
    """

    alpha: float = 2.0
    beta: float = 0.1
    top_k: int = 10
    split_heads: bool = False

    def __post_init__(self) -> None:
        Contrast(self.alpha, self.beta)
        if self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k}: want 1 or more outliers")

    def __call__(self, reader: Reader) -> Combined:
        """The reader of a model as one that decodes in this way: the `decoding` of a `Loaded`.

        Raises:
          UsageError: the model has no class token, no token for every patch, or too few of them.
        """
        config = reader.model.config
        if not isinstance(config, LlavaConfig):
            raise UsageError(
                f"damro: {type(config).__name__} is not of the LLaVA form, whose vision tower "
                "tells which patches are outliers"
            )
        patches = math.prod(config.tower.grid)
        wrong = {
            "a vision tower with a class token": not config.tower.class_token,
            "one hidden state of the tower to read": len(config.layers) != 1,
            "a connector with a token for every patch": (
                config.connector.num_tokens(config.tower.grid) != patches
            ),
            "no crops beside the picture": config.crops is not None,
            "no reducer": config.reducer is not None,
            f"at least top_k = {self.top_k} patches": patches < self.top_k,
        }
        if missing := [what for what, is_wrong in wrong.items() if is_wrong]:
            raise UsageError(f"damro: this model does not fit: want {', '.join(missing)}")
        return Combined(
            reader.model,
            reader.budget,
            branches=OutlierBranch(self.top_k, self.split_heads),
            combine=Contrast(self.alpha, self.beta),
        )

    def wrap(self, subject: Subject) -> ModelSubject:
        """A model that decodes in this way; `embed` is as it was.

        Raises:
          UsageError: the subject is no model, or none that fits.
        """
        if not isinstance(subject, ModelSubject):
            raise UsageError(
                f"damro changes how a model decodes and stands around a ModelSubject, not around a "
                f"{type(subject).__name__}: put it inside the other agents"
            )
        loaded = dataclasses.replace(subject.loaded, decoding=self)
        loaded.reader(subject.budget)
        return dataclasses.replace(subject, loaded=loaded)


VARIANTS = {
    # Settings of the official scripts.
    "damro_llava_1_5": Damro(),
    "damro_instructblip_pope": Damro(alpha=0.5, top_k=4, split_heads=True),
    "damro_instructblip_chair": Damro(alpha=1.5, top_k=4, split_heads=True),
    "damro_tiny": Damro(alpha=5.0, top_k=3),
}

register(CARD, VARIANTS)
