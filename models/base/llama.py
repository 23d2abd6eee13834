"""Llama 1 to 3, and what has their architecture: Vicuna, Yi and many others.

Follows: arXiv:2302.13971, arXiv:2307.09288, arXiv:2407.21783, arXiv:2403.04652 (Yi).
"""

from zoo.models.core.hf import Fields
from zoo.models.core.registry import Base, register_base
from zoo.models.parts.assemblies.language import CausalLMConfig, causal_lm_table
from zoo.models.parts.decoders.gqa import DecoderConfig
from zoo.models.parts.decoders.reading import read_decoder
from zoo.models.parts.layers.rope import Llama3, RopeConfig


def read(fields: Fields) -> CausalLMConfig:
    """The model of a `config.json` with `model_type` "llama"."""
    fields.want("hidden_act", "silu")
    fields.ignore("max_sequence_length")  # of old Vicunas; repeats max_position_embeddings
    bias = fields.take("attention_bias", False)
    mlp_bias = fields.take("mlp_bias", False)
    decoder = read_decoder(fields, qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias)
    fields.done()
    return CausalLMConfig(decoder)


LLAMA_3_1_8B = DecoderConfig(
    vocab_size=128_256,
    num_kv_heads=8,
    mlp_dim=14_336,
    context=131_072,
    rope=RopeConfig(500_000.0, Llama3(8.0, 8192)),
)

VARIANTS = {
    # The config.json of meta-llama/Llama-2-7b-hf.
    "llama_2_7b": CausalLMConfig(DecoderConfig()),
    # huggyllama/llama-7b.
    "llama_1_7b": CausalLMConfig(DecoderConfig(context=2048, norm_eps=1e-6)),
    # meta-llama/Llama-2-13b-hf.
    "llama_2_13b": CausalLMConfig(
        DecoderConfig(width=5120, depth=40, num_heads=40, num_kv_heads=40, mlp_dim=13_824)
    ),
    # meta-llama/Meta-Llama-3-8B.
    "llama_3_8b": CausalLMConfig(
        DecoderConfig(
            vocab_size=128_256,
            num_kv_heads=8,
            mlp_dim=14_336,
            context=8192,
            rope=RopeConfig(500_000.0),
        )
    ),
    # meta-llama/Llama-3.1-8B.
    "llama_3_1_8b": CausalLMConfig(LLAMA_3_1_8B),
    # meta-llama/Llama-3.2-1B.
    "llama_3_2_1b": CausalLMConfig(
        DecoderConfig(
            vocab_size=128_256,
            width=2048,
            depth=16,
            num_kv_heads=8,
            mlp_dim=8192,
            head_dim=64,
            context=131_072,
            rope=RopeConfig(500_000.0, Llama3(32.0, 8192)),
            tie_embeddings=True,
        )
    ),
    # lmsys/vicuna-7b-v1.5 and lmsys/vicuna-13b-v1.5: Llama 2 in other words.
    "vicuna_7b": CausalLMConfig(DecoderConfig()),
    "vicuna_13b": CausalLMConfig(
        DecoderConfig(width=5120, depth=40, num_heads=40, num_kv_heads=40, mlp_dim=13_824)
    ),
    # 01-ai/Yi-6B.
    "yi_6b": CausalLMConfig(
        DecoderConfig(vocab_size=64_000, num_kv_heads=4, rope=RopeConfig(5_000_000.0))
    ),
    "llama_tiny": CausalLMConfig(
        DecoderConfig(
            vocab_size=320, width=32, depth=2, num_heads=4, num_kv_heads=2, mlp_dim=48, context=64
        ),
        text_tokens=12,
    ),
}

register_base(
    Base(
        "llama",
        "Llama 1 to 3, Vicuna, Yi: decoder with rotary positions and gated MLPs",
        "arXiv:2307.09288",
        VARIANTS,
        table=causal_lm_table,
        hf={"llama": read},
    )
)
