"""FastVLM in the layout of Hugging Face: timm's FastViTHD, two linear layers and Qwen2.

Checkpoints in the layout of the official files (`llava_qwen2`) are read too: their keys are others,
the model is the same. Norms that released towers keep stay what they are, running statistics among
them, so that a checkpoint goes back as it was. The systems of `zoo.models.vlm.fastvlm` have them
folded.

Follows: arXiv:2412.13303.
"""

import dataclasses
import math
import re

from zoo.models.core.errors import UsageError
from zoo.models.core.hf import Fields
from zoo.models.core.keytable import Ignored, Table
from zoo.models.core.registry import Base, read_hf, register_base
from zoo.models.parts.assemblies.llava import LlavaConfig
from zoo.models.parts.assemblies.llava_hub import ACTIVATIONS, projector_rows, read_decoder
from zoo.models.parts.connect.mlp import MLPConnector
from zoo.models.parts.decoders.gqa import DecoderConfig, decoder_table
from zoo.models.parts.layers.rope import RopeConfig
from zoo.models.parts.towers.fastvit import FastViTConfig
from zoo.models.parts.towers.fastvit_keys import TIMM, tower_table

ARCHITECTURE = "fastvit_mci3"
"""What timm calls FastViTHD."""

TOWERS = {"mobileclip_l": FastViTConfig()}
"""The towers that official files name, each followed by the side of its pictures."""

IMAGE_ID = 151_646
"""The placeholder of a picture: the first id that the tokenizer of Qwen2 does not use."""


def read(fields: Fields) -> LlavaConfig:
    """The configuration that a `config.json` of FastVLM describes.

    Raises:
      UsageError: another tower, or a field that means what is not computed here.
    """
    fields.take("text_config")  # what transformers has where there is none is no class's default
    tower = read_tower(fields.sub("vision_config"))
    # No field has the side of the pictures; the tower, which takes any, makes so many tokens.
    tokens = fields.take("image_seq_length", 576)
    side = math.isqrt(max(tokens, 0))
    if side**2 != tokens or not side:
        raise UsageError(
            f"{fields.name}: image_seq_length is {tokens}; want the tokens of a square"
        )
    fields.want("vision_feature_select_strategy", "full")
    fields.want("vision_feature_layer", -1)
    act = fields.want("projector_hidden_act", *ACTIVATIONS)
    bias = fields.take("multimodal_projector_bias", True)
    image_id = fields.take("image_token_index", IMAGE_ID)
    tied = fields.take("tie_word_embeddings", False)
    config = LlavaConfig(
        tower=dataclasses.replace(tower, image_size=side * tower.stride),  # type: ignore[arg-type]
        connector=MLPConnector(activation=ACTIVATIONS[act], bias=bias),
        decoder=read_decoder(fields, default="qwen2", tied=True if tied else None),
        vision_layer=None,
        image_id=fields.take("image_token_id", image_id),
    )
    fields.done()
    return config


def read_tower(fields: Fields) -> FastViTConfig:
    """The tower of a `vision_config`, which names a model of timm and its arguments.

    Raises:
      UsageError: it is no FastViTHD, or an argument changes more than its sizes.
    """
    fields.want("model_type", "timm_wrapper")
    name = fields.take("architecture").partition(".")[0]
    if name != ARCHITECTURE:
        raise UsageError(
            f"{fields.name}: architecture is {name!r}; of timm's this zoo reads {ARCHITECTURE} here"
        )
    args, sizes = fields.sub("model_args"), FastViTConfig()
    tower = FastViTConfig(
        depths=args.take("layers", sizes.depths),
        widths=args.take("embed_dims", sizes.widths),
        mlp_ratios=args.take("mlp_ratios", sizes.mlp_ratios),
        form="released" if args.want("inference_mode", False, True) else "branches",
    )
    args.done()
    fields.want("hidden_size", tower.width)
    # Of the head, which is left out, and of timm's weights.
    fields.ignore("do_pooling", "global_pool", "num_classes", "label_names", "label_descriptions")
    fields.ignore("num_features", "pretrained_cfg")
    fields.done()
    return tower


def read_official(fields: Fields) -> LlavaConfig:
    """The configuration that an official `config.json` describes: the fields of Qwen2, and beside
    them those of LLaVA's own code.

    None of its fields is the id of a picture's placeholder: the official code cuts prompts there
    before it looks for words. Here it is `IMAGE_ID`, whose row nothing reads.

    Raises:
      UsageError: another tower or connector, or a field that means what is not computed here.
    """
    name = fields.take("mm_vision_tower")
    kind, _, side = name.rpartition("_")
    if kind not in TOWERS or not re.fullmatch("[1-9][0-9]*", side):
        raise UsageError(
            f"{fields.name}: mm_vision_tower is {name!r}; of these this zoo reads "
            + ", ".join(f"{known}_<side in pixels>" for known in TOWERS)
        )
    tower = dataclasses.replace(TOWERS[kind], image_size=int(side))
    for key, only in (("mm_projector_type", "mlp2x_gelu"), ("image_aspect_ratio", "pad")):
        fields.take(key)  # a file without it means something else
        fields.want(key, only)
    fields.want("mm_hidden_size", tower.width)
    fields.want("mm_patch_merge_type", "flat")
    fields.want("mm_use_im_start_end", False)
    fields.want("mm_use_im_patch_token", False)
    # This tower gives its last map whatever they say.
    fields.ignore("mm_vision_select_layer", "mm_vision_select_feature")
    # Of pictures in tiles, of the tokenizer, of training.
    fields.ignore("image_grid_pinpoints", "tokenizer_model_max_length", "tokenizer_padding_side")
    fields.ignore("freeze_mm_mlp_adapter", "tune_mm_mlp_adapter", "unfreeze_mm_vision_tower")
    fields.ignore("mm_projector_lr", "mm_vision_tower_lr", "use_mm_proj")
    image_id = fields.take("image_token_index", IMAGE_ID)
    return LlavaConfig(
        tower=tower,  # type: ignore[arg-type]
        connector=MLPConnector(activation="gelu", bias=True),
        decoder=read_hf(fields.rest(model_type="qwen2")).decoder,  # type: ignore[attr-defined]
        vision_layer=None,
        image_id=IMAGE_ID if image_id < 0 else image_id,
    )


_TOWER = "model.vision_tower.timm_model."
# The official modules of a tower are numbered throughout.
_PLACES = (
    "stages.0.blocks",
    *(f"stages.{stage}.{part}" for stage in (1, 2) for part in ("downsample", "blocks")),
    *(f"stages.{stage}.{part}" for stage in (3, 4) for part in ("downsample", "pos_emb", "blocks")),
)
_PARTS = {
    "patch_embed": "stem",
    "convffn": "mlp",
    "lkb_reparam": "reparam_conv",
    r"conv_exp\.se\.reduce": "final_conv.se.fc1",
    r"conv_exp\.se\.expand": "final_conv.se.fc2",
    "conv_exp": "final_conv",
}
_WITHIN = rf"^({re.escape(_TOWER)}(?:.*\.)?)"
RENAMES = (
    (r"^model\.vision_tower\.vision_tower\.model\.", _TOWER),
    *((rf"{_WITHIN}network\.{place}\.", rf"\1{part}.") for place, part in enumerate(_PLACES)),
    *((rf"{_WITHIN}{theirs}\.", rf"\1{ours}.") for theirs, ours in _PARTS.items()),
    (rf"{_WITHIN}(layer_scale(?:_[12])?)$", r"\1\2.gamma"),
    (r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
)
"""From the names in official files, whose towers are folded, to those that transformers writes."""


def table(config: LlavaConfig) -> Table:
    """Keys of transformers' checkpoints; running statistics stand below `stats/`. The CLIP head of
    official files is passed over: nothing reads it.
    """
    tower = tower_table(config.tower, TIMM)  # type: ignore[arg-type]
    tower += Table((Ignored(r"head\.proj"),))
    projector = projector_rows(bias=config.connector.bias)
    return (
        tower.under("tower", "model.vision_tower.timm_model.")
        + projector.under("connector", "model.multi_modal_projector.")
        + decoder_table(config.decoder, "model.language_model.").under("decoder")
    )


def _size(width: int, depth: int, num_heads: int, mlp_dim: int, **options: int) -> LlavaConfig:
    decoder = DecoderConfig(
        width=width,
        depth=depth,
        num_heads=num_heads,
        mlp_dim=mlp_dim,
        context=32_768,
        rope=RopeConfig(theta=1e6),
        norm_eps=1e-6,
        qkv_bias=True,
        **options,  # type: ignore[arg-type]
    )
    return LlavaConfig(
        tower=FastViTConfig(),  # type: ignore[arg-type]
        decoder=decoder,
        vision_layer=None,
        image_id=IMAGE_ID,
    )


_TIED = {"vocab_size": 152_000, "tie_embeddings": True}

# Qwen2's sizes, with as many more rows of the vocabulary as make a multiple of 64.
VARIANTS = {
    "hub_fastvlm_0_5b": _size(896, 24, 14, 4864, num_kv_heads=2, **_TIED),
    "hub_fastvlm_1_5b": _size(1536, 28, 12, 8960, num_kv_heads=2, **_TIED),
    "hub_fastvlm_7b": _size(3584, 28, 28, 18_944, num_kv_heads=4, vocab_size=152_128),
    "hub_fastvlm_tiny": LlavaConfig(
        tower=FastViTConfig(  # type: ignore[arg-type]
            image_size=64,
            depths=(1, 1, 1),
            widths=(8, 16, 48),
            mlp_ratios=(2, 2, 2),
            attention_from=2,
            head_dim=8,
            layer_scale=0.5,
        ),
        decoder=DecoderConfig(
            vocab_size=320, width=24, depth=2, num_heads=4, num_kv_heads=2, mlp_dim=32
        ),
        vision_layer=None,
        image_id=3,
        text_tokens=12,
    ),
}

register_base(
    Base(
        slug="hub_fastvlm",
        title="FastVLM, as the Hugging Face hub has it",
        paper="arXiv:2412.13303",
        variants=VARIANTS,
        table=table,
        hf={"fast_vlm": read, "llava_qwen2": read_official},
        renames=RENAMES,
    )
)
