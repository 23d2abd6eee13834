"""What the hub's checkpoints of the LLaVA family have in common: their `config.json` and keys."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from zoo.models.core.errors import UsageError
from zoo.models.core.hf import Fields
from zoo.models.core.keytable import Row, Table, linear
from zoo.models.core.registry import read_hf
from zoo.models.parts.assemblies.llava import LlavaConfig
from zoo.models.parts.connect.mlp import MLPConnector
from zoo.models.parts.decoders.gqa import DecoderConfig, decoder_table
from zoo.models.parts.towers.hub import read_vision
from zoo.models.parts.towers.vit import clip_table

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
}
"""`projector_hidden_act` and our names."""

CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
"""The `vision_config` of a file without one: CLIP ViT-L/14 at 336 pixels."""

RENAMES = (
    (r"^model\.(language_model|vision_tower|multi_modal_projector|image_newline)", r"\1"),
    (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
)
"""From the modules of transformers 5 and from the files of transformers 4 to what transformers 5
writes."""

MODULES = (
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
)
"""From what transformers 5 writes to its modules."""


def read_decoder(fields: Fields, *, default: str, tied: bool | None = None) -> DecoderConfig:
    """The decoder of a `text_config`.

    Args:
      fields: of the whole model.
      default: `model_type` of a `text_config` that has none.
      tied: whether the head is the transposed vocabulary table; by default as the text says.

    Raises:
      UsageError: a text model that is none of the decoders of this zoo.
    """
    text = fields.sub("text_config", model_type=default)
    decoder = getattr(read_hf(text), "decoder", None)
    if not isinstance(decoder, DecoderConfig):
        raise UsageError(f"{text.name}: model_type {text.model_type!r} is no decoder")
    return decoder if tied is None else dataclasses.replace(decoder, tie_embeddings=tied)


def read_llava(
    fields: Fields,
    *,
    decoder: DecoderConfig,
    vision: Mapping[str, Any],
    strategy: str = "default",
    **defaults: Any,
) -> LlavaConfig:
    """The configuration of tower, two-layer connector and decoder.

    Args:
      fields: of the whole model; `done` is left to the caller.
      decoder: see `read_decoder`.
      vision: the whole `vision_config` where there is none; its `model_type` also counts where one
        lacks it.
      strategy: `vision_feature_select_strategy` by default.
      **defaults: `vision_layer` and `image_id` by default, and further fields of the result.

    Raises:
      UsageError: fields that mean what is not computed here.
    """
    known = "vision_config" in fields
    absent = {"model_type": vision["model_type"]} if known else vision
    tower = read_vision(fields.sub("vision_config", **absent))
    keep_all = fields.want("vision_feature_select_strategy", strategy, "default", "full") == "full"
    if not keep_all and not tower.class_token:
        raise UsageError(
            f"{fields.name}: vision_feature_select_strategy 'default' drops the first token of "
            "every image, which is a patch with this tower; want 'full'"
        )
    keep_class = keep_all and tower.class_token
    if keep_class and defaults.get("newline"):
        raise UsageError(
            f"{fields.name}: vision_feature_select_strategy 'full' keeps class tokens, which have "
            "no place in a grid of tiles; want 'default'"
        )
    act = fields.want("projector_hidden_act", *ACTIVATIONS)
    bias = fields.take("multimodal_projector_bias", True)
    layer = fields.take("vision_feature_layer", defaults.pop("vision_layer"))
    image_id = fields.take("image_token_index", defaults.pop("image_id"))
    # The processor counts tokens; the second vocabulary size is that of `text_config`.
    fields.ignore("image_seq_length", "vocab_size")
    return LlavaConfig(
        tower=tower,
        connector=MLPConnector(activation=ACTIVATIONS[act], bias=bias),
        decoder=decoder,
        vision_layer=layer,
        keep_class=keep_class,
        image_id=fields.take("image_token_id", image_id),
        **defaults,
    )


def with_tiles(
    config: LlavaConfig, resolutions: Sequence[Sequence[int]], most: int | None = None
) -> LlavaConfig:
    """The configuration whose `inputs` describe a picture at the largest of the resolutions.

    Args:
      config: of a model that sees a picture whole and in tiles, with a newline after every row.
      resolutions: height and width in pixels, `image_grid_pinpoints` on the hub.
      most: leave out resolutions of more tiles than that.
    """
    side, (rows, columns) = config.tower.image_size, config.tower.grid
    grids = [(height // side, width // side) for height, width in resolutions]
    down, across = max((g for g in grids if not most or math.prod(g) <= most), key=math.prod)
    slots = rows * columns + down * rows * (across * columns + 1)
    return dataclasses.replace(config, num_images=1 + down * across, num_slots=slots)


def projector_rows(*, bias: bool, keys: tuple[str, str] = ("linear_1", "linear_2")) -> Table:
    """Keys of the two linear layers of a `multi_modal_projector`, which are called `keys`."""
    rows = []
    for path, key in zip(("up", "down"), keys, strict=True):
        rows.append(Row(f"{path}/kernel", f"{key}.weight", linear()))
        if bias:
            rows.append(Row(f"{path}/bias", f"{key}.bias"))
    return Table(tuple(rows))


def hub_table(config: LlavaConfig) -> Table:
    """Keys of the hub's LLaVA checkpoints, as transformers 5 writes them."""
    projector = projector_rows(bias=config.connector.bias)
    table = (
        clip_table(config.tower).under("tower", "vision_tower.")
        + projector.under("connector", "multi_modal_projector.")
        + decoder_table(config.decoder).under("decoder", "language_model.")
    )
    if config.newline:
        table += Table((Row("newline", "image_newline"),))
    return table
