"""Phi-3 and Phi-4-mini: the Llama decoder, with fused projections in its checkpoints and divisors
for every rotary frequency in long contexts. Follows: arXiv:2404.14219, arXiv:2402.13753.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from zoo.models.core.hf import Fields
from zoo.models.core.keytable import AnyRow, Row, Shape, Table, Transform, linear
from zoo.models.core.registry import Base, register_base
from zoo.models.parts.assemblies.language import CausalLMConfig
from zoo.models.parts.decoders.gqa import DecoderConfig, decoder_table
from zoo.models.parts.decoders.reading import read_decoder, read_rope, read_window
from zoo.models.parts.layers.rope import LongRope, RopeConfig


def read(fields: Fields) -> CausalLMConfig:
    """The model of a `config.json` with `model_type` "phi3"."""
    fields.want("hidden_act", "silu")
    fields.want("attention_bias", False)
    window = read_window(fields, None)
    rope = read_rope(
        fields,
        context=fields.take("max_position_embeddings", 4096),
        original=fields.take("original_max_position_embeddings", 4096),
        kinds=("default", "longrope", "su"),
        partial=True,
    )
    decoder = read_decoder(
        fields,
        vocab_size=32_064,
        width=3072,
        mlp_dim=8192,
        context=4096,
        norm_eps=1e-5,
        rope=rope,
        windows=() if window is None else (window,),
    )
    fields.done()
    return CausalLMConfig(decoder)


def _fused() -> Transform:
    """Their one `nn.Linear` weight [out, in] is several of ours, one below the other."""
    each = linear()

    def load(theirs: Sequence[np.ndarray], shapes: Sequence[Shape]) -> Sequence[np.ndarray]:
        ends = np.cumsum([math.prod(shape[1:]) for shape in shapes])[:-1]
        pieces = np.split(theirs[0], ends)
        return [each.load([p], [s])[0] for p, s in zip(pieces, shapes, strict=True)]

    def save(ours: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        return [np.concatenate([each.save([leaf])[0] for leaf in ours])]

    return Transform("fused", load, save)


_FUSED = {
    "self_attn.qkv_proj": ("q", "k", "v"),
    "mlp.gate_up_proj": ("gate", "up"),
}


def table(config: CausalLMConfig) -> Table:
    """The keys of Llama, but for two fused tensors in every layer."""
    at, steps = "stack/layers/", tuple(range(config.decoder.depth))
    fused = {f"{at}{name}/kernel" for names in _FUSED.values() for name in names}
    rows: list[AnyRow] = [
        row
        for row in decoder_table(config.decoder).rows
        if not (isinstance(row, Row) and row.paths in fused)
    ]
    for key, names in _FUSED.items():
        paths = tuple(f"{at}{name}/kernel" for name in names)
        rows.append(Row(paths, f"model.layers.{{}}.{key}.weight", _fused(), steps))
    return Table(tuple(rows)).under("decoder")


_MINI = DecoderConfig(vocab_size=32_064, width=3072, mlp_dim=8192, context=4096, windows=(2047,))

# fmt: off
_SHORT = (
    1.05, 1.05, 1.05, 1.1, 1.1, 1.1, 1.25, 1.25, 1.4, 1.45, 1.55, 1.85, 1.9,
    *(2.0,) * 19, 2.1, 2.1, 2.2, 2.35, 2.35, 2.35, 2.35, 2.4, 2.4, 2.65, 2.7, 2.9, 2.95,
    3.05, 3.05, 3.05,
)
_LONG = (
    1.03, 1.05, 1.05, 1.08, 1.23, 1.23, 1.3, 1.45, 1.6, 1.65, 1.9, 2.86, 3.69, 5.42, 5.49, 5.49,
    9.09, 11.58, 15.66, 15.77, 15.79, 18.36, 21.99, 23.08, 30.01, 32.35, 32.59, 35.56, 39.95,
    53.84, 56.2, 57.95, 59.29, 59.77, 59.92, 61.19, 61.96, 62.5, 63.37, 63.48, 63.48, 63.66,
    63.85, 64.08, 64.76, 64.8, 64.81, 64.81,
)
# fmt: on

VARIANTS = {
    # The config.json of microsoft/Phi-3-mini-4k-instruct.
    "phi_3_mini_4k": CausalLMConfig(_MINI),
    # microsoft/Phi-3-mini-128k-instruct as of April 2024; the divisors are those that the decoder
    # of microsoft/Phi-3-vision-128k-instruct has, to two digits. Its window exceeds the context.
    "phi_3_mini_128k": CausalLMConfig(
        dataclasses.replace(
            _MINI,
            context=131_072,
            rope=RopeConfig(scaling=LongRope(_SHORT, _LONG, 4096, 32.0)),
            windows=(),
        )
    ),
    "phi3_tiny": CausalLMConfig(
        DecoderConfig(
            vocab_size=320,
            width=32,
            depth=2,
            num_heads=4,
            num_kv_heads=2,
            mlp_dim=48,
            context=64,
            rope=RopeConfig(
                scaling=LongRope((1.0, 1.2, 1.4), (1.5, 2.5, 4.0), 8, 8.0), fraction=0.75
            ),
        ),
        text_tokens=12,
    ),
}

register_base(
    Base(
        "phi3",
        "Phi-3: decoder with long rotary embeddings and fused projections",
        "arXiv:2404.14219",
        VARIANTS,
        table=table,
        hf={"phi3": read},
    )
)
