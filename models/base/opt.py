"""OPT: a decoder with learned positions, LayerNorms, biases and plain MLPs.

Follows: arXiv:2205.01068.
"""

from zoo.models.core.hf import Fields
from zoo.models.core.keytable import AnyRow, Row, Table, flat, linear
from zoo.models.core.registry import Base, register_base
from zoo.models.parts.assemblies.language import CausalLMConfig
from zoo.models.parts.decoders.gqa import DecoderConfig, head_row

_OFFSET = 2
"""The first two rows of the table of positions are not used."""

_ACTIVATIONS = {"relu": "relu", "gelu": "gelu"}


def _decoder(
    width: int,
    depth: int,
    num_heads: int,
    *,
    vocab_size: int = 50_272,
    mlp_dim: int | None = None,
    context: int = 2048,
    embed_width: int | None = None,
    pre_norm: bool = True,
    final_norm: bool = True,
    activation: str = "relu",
    bias: bool = True,
    tied: bool = True,
) -> DecoderConfig:
    """What all OPT models share."""
    return DecoderConfig(
        vocab_size=vocab_size,
        width=width,
        depth=depth,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        mlp_dim=4 * width if mlp_dim is None else mlp_dim,
        context=context,
        rope=None,
        norm="layer",
        norm_eps=1e-5,
        norm_place="pre" if pre_norm else "post",
        final_norm=pre_norm and final_norm,
        activation=activation,
        gated=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        embed_width=embed_width,
        learned_positions=context + _OFFSET,
        first_position=_OFFSET,
        tie_embeddings=tied,
    )


def read(fields: Fields) -> CausalLMConfig:
    """The model of a `config.json` with `model_type` "opt"."""
    fields.want("layer_norm_elementwise_affine", True)
    fields.ignore("init_std")
    width = fields.take("hidden_size", 768)
    outer = fields.take("word_embed_proj_dim", width)
    decoder = _decoder(
        width,
        fields.take("num_hidden_layers", 12),
        fields.take("num_attention_heads", 12),
        vocab_size=fields.take("vocab_size", 50_272),
        mlp_dim=fields.take("ffn_dim", 3072),
        context=fields.take("max_position_embeddings", 2048),
        embed_width=None if outer == width else outer,
        pre_norm=fields.take("do_layer_norm_before", True),
        final_norm=not fields.take("_remove_final_layer_norm", False),
        activation=_ACTIVATIONS[fields.want("activation_function", *_ACTIVATIONS)],
        bias=fields.take("enable_bias", True),
        tied=fields.take("tie_word_embeddings", True),
    )
    fields.done()
    return CausalLMConfig(decoder)


def decoder_rows(config: DecoderConfig) -> Table:
    """The keys of the decoder: `model.decoder.…` and `lm_head.weight`."""
    top, at = "model.decoder.", "stack/layers/"
    layer, steps = f"{top}layers.{{}}.", tuple(range(config.depth))
    rows: list[AnyRow] = [
        Row("embedding/embedding", f"{top}embed_tokens.weight"),
        Row("position", f"{top}embed_positions.weight"),
        head_row(config, f"{top}embed_tokens.weight"),
    ]
    if config.embed_width is not None:
        rows.append(Row("embed_in/kernel", f"{top}project_in.weight", linear()))
        rows.append(Row("embed_out/kernel", f"{top}project_out.weight", linear()))
    if config.final_norm:
        rows.append(Row("final_norm/scale", f"{top}final_layer_norm.weight"))
        rows.append(Row("final_norm/bias", f"{top}final_layer_norm.bias"))
    for name, key in {"attn_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm"}.items():
        rows.append(Row(f"{at}{name}/scale", f"{layer}{key}.weight", steps=steps))
        rows.append(Row(f"{at}{name}/bias", f"{layer}{key}.bias", steps=steps))
    maps = {f"self_attn.{name}_proj": name for name in ("q", "k", "v", "out")}
    for key, name in {**maps, "fc1": "up", "fc2": "down"}.items():
        transform = linear(2 if name == "out" else 1)
        rows.append(Row(f"{at}{name}/kernel", f"{layer}{key}.weight", transform, steps))
        if config.qkv_bias:
            rows.append(Row(f"{at}{name}/bias", f"{layer}{key}.bias", flat, steps))
    return Table(tuple(rows))


def table(config: CausalLMConfig) -> Table:
    """The keys of an OPT checkpoint."""
    return decoder_rows(config.decoder).under("decoder")


VARIANTS = {
    # The config.json of facebook/opt-125m, -350m, -1.3b, -2.7b and -6.7b.
    "opt_125m": CausalLMConfig(_decoder(768, 12, 12)),
    "opt_350m": CausalLMConfig(_decoder(1024, 24, 16, embed_width=512, pre_norm=False)),
    "opt_1_3b": CausalLMConfig(_decoder(2048, 24, 32)),
    "opt_2_7b": CausalLMConfig(_decoder(2560, 32, 32)),
    "opt_6_7b": CausalLMConfig(_decoder(4096, 32, 32)),
    "opt_tiny": CausalLMConfig(
        _decoder(32, 2, 4, vocab_size=320, mlp_dim=48, context=64), text_tokens=12
    ),
}

register_base(
    Base(
        "opt",
        "OPT: decoder with learned positions and LayerNorms",
        "arXiv:2205.01068",
        VARIANTS,
        table=table,
        hf={"opt": read},
        renames=((r"^decoder\.", "model.decoder."),),
    )
)
