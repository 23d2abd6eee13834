"""Mistral: the Llama decoder with sliding windows. Follows: arXiv:2310.06825."""

from zoo.models.core.hf import Fields
from zoo.models.core.registry import Base, register_base
from zoo.models.parts.assemblies.language import CausalLMConfig, causal_lm_table
from zoo.models.parts.decoders.gqa import DecoderConfig
from zoo.models.parts.decoders.reading import read_decoder, read_window
from zoo.models.parts.layers.rope import RopeConfig


def read(fields: Fields) -> CausalLMConfig:
    """The model of a `config.json` with `model_type` "mistral"."""
    fields.want("hidden_act", "silu")
    window = read_window(fields, 4096)
    decoder = read_decoder(
        fields,
        mlp_dim=14_336,
        num_kv_heads=8,
        context=131_072,
        windows=() if window is None else (window,),
    )
    fields.done()
    return CausalLMConfig(decoder)


VARIANTS = {
    # The config.json of mistralai/Mistral-7B-v0.1.
    "mistral_7b": CausalLMConfig(
        DecoderConfig(num_kv_heads=8, mlp_dim=14_336, context=32_768, windows=(4096,))
    ),
    # mistralai/Mistral-7B-Instruct-v0.2: no windows, a slower rotation.
    "mistral_7b_v0_2": CausalLMConfig(
        DecoderConfig(num_kv_heads=8, mlp_dim=14_336, context=32_768, rope=RopeConfig(1_000_000.0))
    ),
    "mistral_tiny": CausalLMConfig(
        DecoderConfig(
            vocab_size=320,
            width=32,
            depth=2,
            num_heads=4,
            num_kv_heads=2,
            mlp_dim=48,
            context=64,
            windows=(6,),
        ),
        text_tokens=12,
    ),
}

register_base(
    Base(
        "mistral",
        "Mistral: decoder with sliding windows",
        "arXiv:2310.06825",
        VARIANTS,
        table=causal_lm_table,
        hf={"mistral": read},
    )
)
