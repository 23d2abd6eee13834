"""CLIP: images and texts in one space, learned from captions. Follows: arXiv:2103.00020."""

from zoo.models.core.hf import Fields
from zoo.models.core.registry import Base, register_base
from zoo.models.parts.assemblies.dual import DualConfig, dual_table
from zoo.models.parts.text.clip import TextConfig
from zoo.models.parts.towers.hub import read_clip_vision
from zoo.models.parts.towers.vit import ViTConfig


def read(fields: Fields) -> DualConfig:
    """The configuration that a `config.json` of CLIP describes."""
    config = DualConfig(
        vision=read_clip_vision(_part(fields, "vision_config")),
        text=read_text(_part(fields, "text_config")),
        embedding_dim=fields.take("projection_dim", 512),
    )
    fields.ignore("logit_scale_init_value")  # the checkpoint has the value
    fields.done()
    return config


def read_text(fields: Fields) -> TextConfig:
    """The text tower that a `text_config` describes."""
    # Files that say 2 are older than the tokenizer's number in them; the original then takes the
    # highest id of a text, which is its end in CLIP's own vocabulary.
    end = fields.take("eos_token_id", 49_407)
    config = TextConfig(
        vocab_size=fields.take("vocab_size", 49_408),
        max_length=fields.take("max_position_embeddings", 77),
        width=fields.take("hidden_size", 512),
        depth=fields.take("num_hidden_layers", 12),
        num_heads=fields.take("num_attention_heads", 8),
        mlp_dim=fields.take("intermediate_size", 2048),
        activation=fields.want("hidden_act", "quick_gelu", "gelu"),
        norm_eps=fields.take("layer_norm_eps", 1e-5),
        pool="highest" if end == 2 else "end",
        end_id=49_407 if end == 2 else end,
    )
    fields.ignore("projection_dim")  # the projection is that of the whole model
    fields.done()
    return config


def _part(fields: Fields, name: str) -> Fields:
    """The object `name`; old files have it a second time as `<name>_dict`, which then counts."""
    part, older = fields.sub(name), fields.sub(f"{name}_dict")
    part = older if f"{name}_dict" in fields else part
    for field in ("is_decoder", "add_cross_attention"):  # old files list them all
        part.want(field, False)
    part.want("pruned_heads", {})
    part.ignore("tie_word_embeddings")  # there is no head
    return part


def _size(vision: ViTConfig, text: TextConfig, embedding_dim: int) -> DualConfig:
    return DualConfig(vision=vision, text=text, embedding_dim=embedding_dim)


_TEXT_B = TextConfig(pool="highest")
_TEXT_L = TextConfig(width=768, num_heads=12, mlp_dim=3072, pool="highest")
_TEXT_H = TextConfig(width=1024, depth=24, num_heads=16, mlp_dim=4096, activation="gelu")
_VISION_B = {"width": 768, "depth": 12, "num_heads": 12, "mlp_dim": 3072}
_VISION_H = {"width": 1280, "depth": 32, "num_heads": 16, "mlp_dim": 5120, "activation": "gelu"}

# Sizes: config.json of openai/clip-vit-{base-patch32, base-patch16, large-patch14,
# large-patch14-336} and laion/CLIP-ViT-H-14-laion2B-s32B-b79K.
VARIANTS = {
    "clip_vit_b32": _size(ViTConfig(image_size=224, patch_size=32, **_VISION_B), _TEXT_B, 512),
    "clip_vit_b16": _size(ViTConfig(image_size=224, patch_size=16, **_VISION_B), _TEXT_B, 512),
    "clip_vit_l14": _size(ViTConfig(image_size=224), _TEXT_L, 768),
    "clip_vit_l14_336": _size(ViTConfig(image_size=336), _TEXT_L, 768),
    "clip_vit_h14": _size(ViTConfig(image_size=224, **_VISION_H), _TEXT_H, 1024),
    "clip_tiny": _size(
        ViTConfig(image_size=16, patch_size=8, width=32, depth=2, num_heads=2, mlp_dim=48),
        TextConfig(
            vocab_size=64, max_length=12, width=24, depth=2, num_heads=2, mlp_dim=40, end_id=63
        ),
        embedding_dim=20,
    ),
}

register_base(
    Base(
        slug="clip",
        title="CLIP: images and texts in one space",
        paper="arXiv:2103.00020",
        variants=VARIANTS,
        table=dual_table,
        hf={"clip": read},
    )
)
