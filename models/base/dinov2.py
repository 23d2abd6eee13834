"""DINOv2, with registers and without: image encoders that learned without labels.

Follows: arXiv:2304.07193, arXiv:2309.16588. The classifiers of the hub are linear in the class
token beside the mean of the patches.
"""

from typing import Any

from zoo.models.core.hf import Fields
from zoo.models.core.keytable import Table
from zoo.models.core.registry import Base, register_base
from zoo.models.parts.assemblies.classifier import ClassifierConfig, head_table, read_classes
from zoo.models.parts.towers.hub import read_sizes
from zoo.models.parts.towers.vit import ViTConfig, embeddings_table

_LAYER = {
    "attn_norm": "norm1",
    "q": "attention.attention.query",
    "k": "attention.attention.key",
    "v": "attention.attention.value",
    "out": "attention.output.dense",
    "attn_gain": "layer_scale1.lambda1",
    "mlp_norm": "norm2",
    "mlp_gain": "layer_scale2.lambda1",
}
_MLP = {"up": "mlp.fc1", "down": "mlp.fc2"}
_GATED_MLP = {("gate", "up"): "mlp.weights_in", "down": "mlp.weights_out"}


def read(fields: Fields) -> ClassifierConfig:
    """The configuration that a `config.json` of DINOv2 without registers describes."""
    mask_token = fields.take("use_mask_token", True)
    return _read(fields, patch_size=14, registers=0, mask_token=mask_token)


def read_with_registers(fields: Fields) -> ClassifierConfig:
    """The configuration that a `config.json` of DINOv2 with registers describes."""
    registers = fields.take("num_register_tokens", 4)
    fields.want("interpolate_antialias", True)  # of early files
    fields.want("interpolate_offset", 0.0)
    return _read(fields, patch_size=16, registers=registers, mask_token=True)


def _read(fields: Fields, *, patch_size: int, registers: int, mask_token: bool) -> ClassifierConfig:
    sizes = read_sizes(fields, patch_size=patch_size, norm_eps=1e-6)
    sizes["mlp_dim"] = int(sizes["width"] * fields.take("mlp_ratio", 4))
    if fields.take("use_swiglu_ffn", False):
        sizes |= {"mlp_dim": gated_mlp_dim(sizes["mlp_dim"]), "activation": "silu", "gated": True}
    tower = _tower(
        registers=registers,
        mask_token=mask_token,
        layer_scale=fields.take("layerscale_value", 1.0),
        **sizes,
    )
    num_classes = read_classes(fields)
    # Of training, and of what the original's `Backbone` classes make of the hidden states.
    fields.ignore("drop_path_rate", "apply_layernorm", "reshape_hidden_states", "stage_names")
    fields.ignore("out_features", "out_indices", "_out_features", "_out_indices")
    fields.done()
    return ClassifierConfig(tower, "cls_mean" if num_classes else "cls", num_classes=num_classes)


def gated_mlp_dim(mlp_dim: int) -> int:
    """Hidden width of the gated MLP: two thirds of the plain one's, rounded up to eights."""
    return (int(mlp_dim * 2 / 3) + 7) // 8 * 8


def table(config: ClassifierConfig) -> Table:
    """Keys of the hub's checkpoints."""
    tower = config.tower
    names = _LAYER | (_GATED_MLP if tower.gated else _MLP)
    body = embeddings_table(tower, names, mask_axes=1)
    model = "dinov2_with_registers." if tower.registers else "dinov2."
    body = body.under("tower", model if config.num_classes else "")
    return body + head_table(config, head="classifier")


def _tower(registers: int = 0, **sizes: Any) -> ViTConfig:
    sizes = {"activation": "gelu", "norm_eps": 1e-6, "layer_scale": 1.0, "mask_token": True} | sizes
    resize = "bicubic_antialias" if registers else "bicubic"
    return ViTConfig(registers=registers, input_norm=False, position_resize=resize, **sizes)


def _size(
    width: int, depth: int, num_heads: int, *, registers: int = 0, gated: bool = False
) -> ClassifierConfig:
    """A published size: patches of 14, positions for 518 pixels."""
    tower = _tower(
        image_size=518,
        patch_size=14,
        width=width,
        depth=depth,
        num_heads=num_heads,
        mlp_dim=gated_mlp_dim(4 * width) if gated else 4 * width,
        activation="silu" if gated else "gelu",
        registers=registers,
        gated=gated,
    )
    return ClassifierConfig(tower)


# Sizes: config.json of facebook/dinov2-* and facebook/dinov2-with-registers-*.
VARIANTS = {
    "dinov2_b14": _size(768, 12, 12),
    "dinov2_s14": _size(384, 12, 6),
    "dinov2_l14": _size(1024, 24, 16),
    "dinov2_g14": _size(1536, 40, 24, gated=True),
    "dinov2_b14_reg4": _size(768, 12, 12, registers=4),
    "dinov2_s14_reg4": _size(384, 12, 6, registers=4),
    "dinov2_l14_reg4": _size(1024, 24, 16, registers=4),
    "dinov2_g14_reg4": _size(1536, 40, 24, registers=4, gated=True),
    "dinov2_tiny": ClassifierConfig(
        _tower(
            image_size=16, patch_size=4, width=16, depth=2, num_heads=2, mlp_dim=32, registers=2
        ),
        "cls_mean",
        num_classes=5,
    ),
}

register_base(
    Base(
        slug="dinov2",
        title="DINOv2: image encoders that learned without labels",
        paper="arXiv:2304.07193",
        variants=VARIANTS,
        table=table,
        hf={"dinov2": read, "dinov2_with_registers": read_with_registers},
    )
)
