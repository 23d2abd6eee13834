"""MAE: the masked autoencoder of images. Follows: arXiv:2111.06377."""

from typing import Any

from zoo.models.core.errors import UsageError
from zoo.models.core.hf import Fields
from zoo.models.core.keytable import Row, Table, linear, norm_rows
from zoo.models.core.registry import Base, register_base
from zoo.models.parts.assemblies.masked import MaskedConfig
from zoo.models.parts.towers.hub import read_sizes
from zoo.models.parts.towers.vit import (
    HF_LAYER,
    ViTConfig,
    embeddings_table,
    layer_rows,
    ones,
)


def read(fields: Fields) -> MaskedConfig:
    """The configuration that a `config.json` of MAE describes.

    Raises:
      UsageError: the checkpoint is of the encoder alone.
    """
    if "ViTMAEModel" in fields.take("architectures", ()):
        raise UsageError(f"{fields.name}: this is an encoder alone; want a ViTMAEForPreTraining")
    sizes = read_sizes(fields, norm_eps=1e-12)
    decoder = {
        "width": fields.take("decoder_hidden_size", 512),
        "depth": fields.take("decoder_num_hidden_layers", 8),
        "num_heads": fields.take("decoder_num_attention_heads", 16),
        "mlp_dim": fields.take("decoder_intermediate_size", 2048),
    }
    fields.ignore("norm_pix_loss")  # of the loss
    config = MaskedConfig(
        _tower(mlp_dim=fields.take("intermediate_size", 3072), **sizes),
        _tower(**{**sizes, **decoder}),
        fields.take("mask_ratio", 0.75),
    )
    fields.done()
    return config


def table(config: MaskedConfig) -> Table:
    """Keys of the hub's checkpoints."""
    rows = [
        Row("mask_token", "mask_token", ones(2)),
        Row("position", "decoder_pos_embed", ones(1)),
        *norm_rows("final_norm", "decoder_norm"),
        *layer_rows(config.decoder, "decoder_layers.{}.", HF_LAYER),
    ]
    for name, key in (("embed", "decoder_embed"), ("head", "decoder_pred")):
        rows.append(Row(f"{name}/kernel", f"{key}.weight", linear()))
        rows.append(Row(f"{name}/bias", f"{key}.bias"))
    tower = embeddings_table(config.tower, HF_LAYER).under("tower", "vit.")
    return tower + Table(tuple(rows)).under("decoder", "decoder.")


def _tower(**sizes: Any) -> ViTConfig:
    sizes = {"activation": "gelu", "norm_eps": 1e-12} | sizes
    return ViTConfig(input_norm=False, fixed_positions=True, position_resize="bicubic", **sizes)


def _size(width: int, depth: int, num_heads: int, patch_size: int = 16) -> MaskedConfig:
    """A published size; the decoders are all alike."""
    sizes = {"image_size": 224, "patch_size": patch_size}
    return MaskedConfig(
        _tower(width=width, depth=depth, num_heads=num_heads, mlp_dim=4 * width, **sizes),
        _tower(width=512, depth=8, num_heads=16, mlp_dim=2048, **sizes),
    )


_TINY = {"image_size": 16, "patch_size": 4, "depth": 2, "num_heads": 2}

# Sizes: config.json of facebook/vit-mae-*.
VARIANTS = {
    "vit_mae_b16": _size(768, 12, 12),
    "vit_mae_l16": _size(1024, 24, 16),
    "vit_mae_h14": _size(1280, 32, 16, 14),
    "vit_mae_tiny": MaskedConfig(
        _tower(width=16, mlp_dim=32, **_TINY), _tower(width=24, mlp_dim=40, **_TINY)
    ),
}

# What transformers 5 writes; the hub's files, and what it reads, have the other name.
RENAMES = ((r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),)

register_base(
    Base(
        slug="vit_mae",
        title="MAE: the masked autoencoder of images",
        paper="arXiv:2111.06377",
        variants=VARIANTS,
        table=table,
        hf={"vit_mae": read},
        renames=RENAMES,
    )
)
