"""FastVLM: a LLaVA whose tower has a stride of 64, so that a large picture is few tokens.

FastViTHD filters in three stages and attends in two; a picture of 1024 x 1024 pixels is 256 tokens,
none of which is left out afterwards. Its convolutions are sums of branches in training and single
ones afterwards: `zoo.models.parts.towers.fastvit.fuse`.

The same models in the layout of transformers are in `zoo.models.base.hub_fastvlm`.

Follows: arXiv:2412.13303.
"""

from dataclasses import replace

from zoo.models.base.hub_fastvlm import IMAGE_ID
from zoo.models.base.qwen2 import VARIANTS as QWEN
from zoo.models.core.card import Card
from zoo.models.core.keytable import Ignored, Table
from zoo.models.core.registry import register
from zoo.models.parts.assemblies.classifier import ClassifierConfig, head_table
from zoo.models.parts.assemblies.llava import LlavaConfig
from zoo.models.parts.assemblies.llava_hub import projector_rows
from zoo.models.parts.decoders.gqa import DecoderConfig, decoder_table
from zoo.models.parts.towers.fastvit import FastViTConfig
from zoo.models.parts.towers.fastvit_keys import OFFICIAL, TIMM, Keys, tower_table

CARD = Card(
    slug="fastvlm",
    paper="arXiv:2412.13303",
    code="https://github.com/apple/ml-fastvlm",
    differs=(
        "The language models' towers have no running statistics: the norms within the MLPs, which "
        "released checkpoints keep, are folded too, as they are loaded.",
        "The CLIP head that released language models carry, and never use, is passed over.",
    ),
)

_TINY = FastViTConfig(
    image_size=64,
    depths=(1, 1, 1),
    widths=(8, 16, 48),
    mlp_ratios=(2, 2, 2),
    attention_from=2,
    head_dim=8,
    layer_scale=0.5,
    form="branches",
)


def _vlm(tower: FastViTConfig, decoder: DecoderConfig, image_id: int, tokens: int) -> LlavaConfig:
    return LlavaConfig(
        tower=replace(tower, form="folded"),  # type: ignore[arg-type]
        decoder=decoder,
        vision_layer=None,
        image_id=image_id,
        text_tokens=tokens,
    )


# The language models have the sizes of Qwen2.5's.
VARIANTS = {
    "fastvlm_0_5b": _vlm(FastViTConfig(), QWEN["qwen2_5_0_5b"].decoder, IMAGE_ID, 64),
    "fastvlm_1_5b": _vlm(FastViTConfig(), QWEN["qwen2_5_1_5b"].decoder, IMAGE_ID, 64),
    "fastvlm_7b": _vlm(FastViTConfig(), QWEN["qwen2_5_7b"].decoder, IMAGE_ID, 64),
    # The encoder alone, folded as released, by the side of its pictures; and with branches.
    "fastvlm_encoder": ClassifierConfig(FastViTConfig(), "mean"),
    **{
        f"fastvlm_encoder.{side}": ClassifierConfig(FastViTConfig(image_size=side), "mean")
        for side in (256, 512, 768, 1536)
    },
    "fastvlm_encoder.clip": ClassifierConfig(FastViTConfig(head_width=768), "cls"),
    "fastvlm_encoder.branches": ClassifierConfig(FastViTConfig(form="branches"), "mean"),
    "fastvlm_encoder_tiny": ClassifierConfig(_TINY, "mean", num_classes=5),
    "fastvlm_tiny": _vlm(
        _TINY,
        DecoderConfig(vocab_size=320, width=24, depth=2, num_heads=4, num_kv_heads=2, mlp_dim=32),
        3,
        12,
    ),
}


def encoder_table(config: ClassifierConfig, keys: Keys = OFFICIAL) -> Table:
    """Keys of an encoder alone."""
    whole = tower_table(config.tower, keys).under("tower") + head_table(config, head="head.fc")
    return whole if config.tower.form == "folded" else whole.with_stats()


def timm_table(config: ClassifierConfig) -> Table:
    """Keys of timm's encoder with classes (`fastvit_mci3`)."""
    return encoder_table(config, TIMM)


def table(config: ClassifierConfig | LlavaConfig) -> Table:
    """Keys of the official files; those of encoders stand in the language models' below
    `model.vision_tower.vision_tower.model`.
    """
    if isinstance(config, ClassifierConfig):
        return encoder_table(config)
    prefix = "model.vision_tower.vision_tower.model."
    tower = tower_table(config.tower) + Table((Ignored(r"head\.proj"),))  # type: ignore[arg-type]
    projector = projector_rows(bias=config.connector.bias, keys=("0", "2"))
    return (
        tower.under("tower", prefix)
        + projector.under("connector", "model.mm_projector.")
        + decoder_table(config.decoder).under("decoder")
    )


register(CARD, VARIANTS, table=table)
