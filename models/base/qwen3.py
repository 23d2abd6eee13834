"""Qwen3: the Llama decoder with norms over every head of queries and keys.

Follows: arXiv:2505.09388.
"""

from zoo.models.core.hf import Fields
from zoo.models.core.registry import Base, register_base
from zoo.models.parts.assemblies.language import CausalLMConfig, causal_lm_table
from zoo.models.parts.decoders.gqa import DecoderConfig
from zoo.models.parts.decoders.reading import read_last_windows, read_qk_normed
from zoo.models.parts.layers.rope import RopeConfig


def read(fields: Fields) -> CausalLMConfig:
    """The model of a `config.json` with `model_type` "qwen3"."""
    windows = read_last_windows(fields, depth=fields.take("num_hidden_layers", 32))
    decoder = read_qk_normed(fields, context=32_768, windows=windows)
    fields.done()
    return CausalLMConfig(decoder)


def _sized(
    width: int, depth: int, num_heads: int, mlp_dim: int, *, tied: bool = True
) -> DecoderConfig:
    """What all dense Qwen3 models share."""
    return DecoderConfig(
        vocab_size=151_936,
        width=width,
        depth=depth,
        num_heads=num_heads,
        num_kv_heads=8,
        mlp_dim=mlp_dim,
        head_dim=128,
        context=40_960,
        rope=RopeConfig(1_000_000.0),
        norm_eps=1e-6,
        qk_norm=True,
        tie_embeddings=tied,
    )


VARIANTS = {
    # The config.json of Qwen/Qwen3-0.6B, -1.7B, -4B and -8B.
    "qwen3_0_6b": CausalLMConfig(_sized(1024, 28, 16, 3072)),
    "qwen3_1_7b": CausalLMConfig(_sized(2048, 28, 16, 6144)),
    "qwen3_4b": CausalLMConfig(_sized(2560, 36, 32, 9728)),
    "qwen3_8b": CausalLMConfig(_sized(4096, 36, 32, 12_288, tied=False)),
    "qwen3_tiny": CausalLMConfig(
        DecoderConfig(
            vocab_size=320,
            width=32,
            depth=2,
            num_heads=4,
            num_kv_heads=2,
            mlp_dim=48,
            head_dim=12,
            context=64,
            norm_eps=1e-6,
            qk_norm=True,
        ),
        text_tokens=12,
    ),
}

register_base(
    Base(
        "qwen3",
        "Qwen3: decoder with norms over the heads of queries and keys",
        "arXiv:2505.09388",
        VARIANTS,
        table=causal_lm_table,
        hf={"qwen3": read},
    )
)
