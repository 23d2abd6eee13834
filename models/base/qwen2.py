"""Qwen2 and Qwen2.5: the Llama decoder with biases on queries, keys and values.

Follows: arXiv:2407.10671, arXiv:2412.15115.
"""

import dataclasses

from zoo.models.core.hf import Fields
from zoo.models.core.registry import Base, register_base
from zoo.models.parts.assemblies.language import CausalLMConfig, causal_lm_table
from zoo.models.parts.decoders.gqa import DecoderConfig
from zoo.models.parts.decoders.reading import read_decoder, read_last_windows
from zoo.models.parts.layers.rope import RopeConfig


def read(fields: Fields) -> CausalLMConfig:
    """The model of a `config.json` with `model_type` "qwen2"."""
    fields.want("hidden_act", "silu")
    decoder = read_decoder(
        fields,
        vocab_size=151_936,
        mlp_dim=22_016,
        num_kv_heads=32,
        context=32_768,
        windows=read_last_windows(fields, depth=fields.take("num_hidden_layers", 32)),
        qkv_bias=True,
    )
    fields.done()
    return CausalLMConfig(decoder)


def _sized(
    width: int, depth: int, num_heads: int, num_kv_heads: int, mlp_dim: int, *, context: int
) -> DecoderConfig:
    """Qwen2.5 up to 3B."""
    return DecoderConfig(
        vocab_size=151_936,
        width=width,
        depth=depth,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        mlp_dim=mlp_dim,
        context=context,
        rope=RopeConfig(1_000_000.0),
        norm_eps=1e-6,
        qkv_bias=True,
        tie_embeddings=True,
    )


VARIANTS = {
    # The config.json of Qwen/Qwen2.5-0.5B, -1.5B, -3B and -7B.
    "qwen2_5_0_5b": CausalLMConfig(_sized(896, 24, 14, 2, 4864, context=32_768)),
    "qwen2_5_1_5b": CausalLMConfig(_sized(1536, 28, 12, 2, 8960, context=131_072)),
    "qwen2_5_3b": CausalLMConfig(_sized(2048, 36, 16, 2, 11_008, context=32_768)),
    "qwen2_5_7b": CausalLMConfig(
        dataclasses.replace(
            _sized(3584, 28, 28, 4, 18_944, context=131_072),
            vocab_size=152_064,
            tie_embeddings=False,
        )
    ),
    "qwen2_tiny": CausalLMConfig(
        DecoderConfig(
            vocab_size=320,
            width=32,
            depth=3,
            num_heads=4,
            num_kv_heads=2,
            mlp_dim=48,
            context=64,
            windows=(None, 6, 6),
            norm_eps=1e-6,
            qkv_bias=True,
            tie_embeddings=True,
        ),
        text_tokens=12,
    ),
}

register_base(
    Base(
        "qwen2",
        "Qwen2 and Qwen2.5: decoder with biases on queries, keys and values",
        "arXiv:2407.10671",
        VARIANTS,
        table=causal_lm_table,
        hf={"qwen2": read},
    )
)
