"""Reading the `config.json` of BERT and its kin from the hub."""

import dataclasses
from collections.abc import Collection
from typing import Any

from zoo.models.core.errors import UsageError
from zoo.models.core.hf import Fields
from zoo.models.parts.text.bert import BertConfig

_HEADS = {
    "ForPreTraining": {"pooler": True, "lm_head": True, "match_head": True},
    "ForMaskedLM": {"pooler": False, "lm_head": True, "match_head": False},
    "ForCausalLM": {"pooler": False, "lm_head": True, "match_head": False},
    "LMHeadModel": {"pooler": False, "lm_head": True, "match_head": False},
    "Model": {"pooler": True, "lm_head": False, "match_head": False},
}
"""What the classes of the original have at least, by the ends of their names; the first counts."""

_KEYS = {
    "pooler": "pooler.dense.weight",
    "lm_head": ("cls.predictions.bias", "lm_head.bias"),
    "match_head": "cls.seq_relationship.weight",
}
"""How the keys end by which a checkpoint shows that it has a head."""


def read_bert(fields: Fields, *, vocab_size: int, default: str, **fixed: Any) -> BertConfig:
    """The configuration that a `config.json` describes.

    Args:
      fields: its fields.
      vocab_size: where the file does not say.
      default: the class of the original where the file names none.
      **fixed: fields of the configuration that the architecture decides.

    Raises:
      UsageError: a field that is not understood, or a class with another head.
    """
    depth, width = fields.take("num_hidden_layers", 12), fields.take("hidden_size", 768)
    fields.want("position_embedding_type", "absolute")
    fields.want("tie_word_embeddings", True)
    fields.want("pruned_heads", {})
    crossed = fields.take("add_cross_attention", False)
    names = fields.take("architectures", (default,))
    heads = next((has for end, has in _HEADS.items() if names[0].endswith(end)), None)
    if heads is None:
        raise UsageError(
            f"{fields.name}: a checkpoint of {names[0]}; this zoo has those whose names end with "
            + ", ".join(_HEADS)
        )
    config = BertConfig(
        vocab_size=fields.take("vocab_size", vocab_size),
        max_length=fields.take("max_position_embeddings", 512),
        num_types=fields.take("type_vocab_size", 2),
        width=width,
        depth=depth,
        num_heads=fields.take("num_attention_heads", 12),
        mlp_dim=fields.take("intermediate_size", 3072),
        activation=fields.want("hidden_act", "gelu"),
        norm_eps=fields.take("layer_norm_eps", 1e-12),
        causal=fields.take("is_decoder", False),
        cross_layers=tuple(range(depth)) if crossed else (),
        context_width=width,
        **heads,
        **fixed,
    )
    fields.done()
    return config


def with_heads(config: BertConfig, keys: Collection[str]) -> BertConfig:
    """The configuration with all the heads that a checkpoint of these keys has.

    Google's own files name `BertForMaskedLM` and have the pooler and the second head as well.
    """
    found = {name: True for name, ends in _KEYS.items() if any(key.endswith(ends) for key in keys)}
    return dataclasses.replace(config, **found)
