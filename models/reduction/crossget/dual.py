"""CLIP with cross tokens in both encoders."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from zoo.models.core.keytable import Row, Table, conv, norm_rows
from zoo.models.core.types import Array
from zoo.models.parts.assemblies.dual import DualConfig, DualEncoder, Pairs
from zoo.models.parts.layers.detach import detached
from zoo.models.parts.text.clip import TextConfig
from zoo.models.parts.towers.vit import ViTConfig, fused_layer_rows, ones
from zoo.models.reduction.crossget.encoder import CrossTokens
from zoo.models.reduction.crossget.guidance import divergence


@dataclass(frozen=True)
class CrossCLIP(DualConfig):
    """A dual encoder whose towers have cross tokens; where they are told to, they merge.

    Attributes:
      weight: of the loss that makes cross tokens alike, beside that of the comparison.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        towers: tuple[Any, ...] = (self.vision, self.text)
        for tower in towers:
            if not any(isinstance(policy, CrossTokens) for policy in tower.policies):
                raise ValueError(f"{tower}: want CrossTokens among its policies")
        if not (self.project_image and self.vision.input_norm) or self.text_bias:
            raise ValueError("CrossCLIP: want towers with projections, as CLIP has them")
        if self.vision.depth != self.text.depth:
            raise ValueError(
                f"depths {self.vision.depth} and {self.text.depth}: their cross tokens are "
                "compared layer by layer; want equal depths"
            )

    def build(self) -> "CrossDual":
        """The module."""
        return CrossDual(self)


class CrossDual(DualEncoder):
    """The dual encoder. With as many texts as images, it reports `guidance_loss`."""

    config: CrossCLIP

    def __call__(self, batch: Mapping[str, Array]) -> Pairs:
        """See `DualEncoder`."""
        image = self.vision(batch["pixels"])
        text = self.text(batch["ids"], mask=batch.get("text_mask"))
        vectors = self.image_of(image), self.text_of(text)
        pairs = Pairs(*vectors, self.compare(*vectors))
        if len(vectors[0]) != len(vectors[1]):
            return pairs
        parts = (
            (image, self.vision.input_norm, self.image_projection),
            (text, self.text.final_norm, self.text_projection),
        )
        cross = []
        for features, norm, projection in parts:
            tokens = jnp.stack([each["cross"] for each in features.aux])  # [layers, B, D]
            cross.append(detached(projection, detached(norm, tokens)))
        loss = self.config.weight * divergence(*cross).mean()
        return pairs.replace(aux={"guidance_loss": loss})


def with_cross_tokens(config: DualConfig, r: int = 16, text_r: int = 0) -> CrossCLIP:
    """The dual encoder with cross tokens, whose layers merge `r` tokens of pictures, `text_r` of
    texts.
    """
    vision = replace(config.vision, policies=(CrossTokens(r, config.vision.prefix),))
    text = replace(config.text, policies=(CrossTokens(text_r),))
    fields = {name: getattr(config, name) for name in DualConfig.__dataclass_fields__}
    return CrossCLIP(**{**fields, "vision": vision, "text": text})


def vision_rows(config: ViTConfig) -> Table:
    """Keys of `visual.` in OpenAI's layout, with those of the cross tokens."""
    rows = [
        Row("patch/kernel", "conv1.weight", conv),
        Row("cls", "class_embedding"),
        Row("position", "positional_embedding"),
        *norm_rows("input_norm", "ln_pre"),
        *norm_rows("final_norm", "ln_post"),
        *fused_layer_rows("stack/layers", "transformer.resblocks.{}.", config.depth),
        Row("stack/layers/cross/token", "transformer.cross_image", ones(1)),
    ]
    return Table(tuple(rows))


def text_rows(config: TextConfig) -> Table:
    """Keys of the text encoder in OpenAI's layout, with those of the cross tokens."""
    rows = [
        Row("token/embedding", "token_embedding.weight"),
        Row("position", "positional_embedding"),
        *norm_rows("final_norm", "ln_final"),
        *fused_layer_rows("stack/layers", "transformer.resblocks.{}.", config.depth),
        Row("stack/layers/cross/token", "transformer.cross_text", ones(1)),
    ]
    return Table(tuple(rows))


def dual_table(config: CrossCLIP) -> Table:
    """Keys of the official model."""
    own = (
        Row("logit_scale", "logit_scale"),
        Row("image_projection/kernel", "visual.proj"),
        Row("text_projection/kernel", "text_projection"),
    )
    vision = vision_rows(config.vision).under("vision", "visual.")
    return vision + text_rows(config.text).under("text", "") + Table(own)
