"""Gemma 2: norms before and after both halves of a layer, bounded logits, every other layer with a
sliding window. Follows: arXiv:2408.00118.
"""

from zoo.models.core.hf import Fields
from zoo.models.core.registry import Base, register_base
from zoo.models.parts.assemblies.language import CausalLMConfig, causal_lm_table
from zoo.models.parts.decoders.gqa import DecoderConfig
from zoo.models.parts.decoders.reading import FULL, read_decoder, read_layer_types, read_window


def read(fields: Fields) -> CausalLMConfig:
    """The model of a `config.json` with `model_type` "gemma2"."""
    fields.want("hidden_activation", "gelu_pytorch_tanh")
    fields.want("use_bidirectional_attention", False)
    # The activation is told by hidden_activation; how its cache is kept is a matter of generation.
    fields.ignore("hidden_act", "cache_implementation")
    depth, width = fields.take("num_hidden_layers", 26), fields.take("hidden_size", 2304)
    types = tuple(FULL if layer % 2 else "sliding_attention" for layer in range(depth))
    bias = fields.take("attention_bias", False)
    decoder = read_decoder(
        fields,
        vocab_size=256_000,
        width=2304,
        depth=26,
        num_heads=8,
        num_kv_heads=4,
        mlp_dim=9216,
        head_dim=256,
        context=8192,
        tied=True,
        windows=read_layer_types(fields, types, read_window(fields, 4096)),
        norm="rms_plus_one",
        norm_place="sandwich",
        activation="gelu_tanh",
        qkv_bias=bias,
        out_bias=bias,
        attention_scale=fields.take("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=_cap(fields, "attn_logit_softcapping", 50.0),
        logit_softcap=_cap(fields, "final_logit_softcapping", 30.0),
        embed_scale=width**0.5,
    )
    fields.done()
    return CausalLMConfig(decoder)


def _cap(fields: Fields, key: str, default: float) -> float | None:
    """A bound of logits, null for none."""
    cap = float(fields.take(key, default))
    return None if fields.is_null(key) else cap


def _sized(
    width: int,
    depth: int,
    num_heads: int,
    mlp_dim: int,
    *,
    vocab_size: int = 256_000,
    head_dim: int = 256,
    context: int = 8192,
    window: int = 4096,
) -> DecoderConfig:
    """What Gemma 2 models up to 9B share."""
    return DecoderConfig(
        vocab_size=vocab_size,
        width=width,
        depth=depth,
        num_heads=num_heads,
        num_kv_heads=num_heads // 2,
        mlp_dim=mlp_dim,
        head_dim=head_dim,
        context=context,
        windows=(window, None),
        norm="rms_plus_one",
        norm_eps=1e-6,
        norm_place="sandwich",
        activation="gelu_tanh",
        attention_scale=head_dim**-0.5,
        attention_softcap=50.0,
        logit_softcap=30.0,
        embed_scale=width**0.5,
        tie_embeddings=True,
    )


VARIANTS = {
    # The config.json of google/gemma-2-2b and google/gemma-2-9b.
    "gemma_2_2b": CausalLMConfig(_sized(2304, 26, 8, 9216)),
    "gemma_2_9b": CausalLMConfig(_sized(3584, 42, 16, 14_336)),
    "gemma2_tiny": CausalLMConfig(
        _sized(32, 4, 4, 48, vocab_size=320, head_dim=12, context=64, window=6), text_tokens=12
    ),
}

register_base(
    Base(
        "gemma2",
        "Gemma 2: decoder with norms around both halves and bounded logits",
        "arXiv:2408.00118",
        VARIANTS,
        table=causal_lm_table,
        hf={"gemma2": read},
    )
)
