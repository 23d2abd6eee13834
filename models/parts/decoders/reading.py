"""What the `config.json` files of the decoders have in common."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from zoo.models.core.errors import UsageError
from zoo.models.core.hf import Fields
from zoo.models.parts.decoders.gqa import DecoderConfig
from zoo.models.parts.layers.rope import (
    DynamicNTK,
    Linear,
    Llama3,
    LongRope,
    RopeConfig,
    Yarn,
)


def read_decoder(
    fields: Fields,
    *,
    vocab_size: int = 32_000,
    width: int = 4096,
    mlp_dim: int = 11_008,
    depth: int = 32,
    num_heads: int = 32,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    context: int = 2048,
    norm_eps: float = 1e-6,
    tied: bool = False,
    **known: Any,
) -> DecoderConfig:
    """The decoder that `fields` describes by the names that Llama gave them.

    Args:
      fields: of a language model; the caller reads what it has beyond those names, and ends with
        `fields.done()`.
      vocab_size: this and the following: the defaults of the original's configuration class.
      width: see above.
      mlp_dim: see above.
      depth: see above.
      num_heads: see above.
      num_kv_heads: see above; None for as many as query heads, which null always means.
      head_dim: see above; None for width / num_heads.
      context: see above.
      norm_eps: see above.
      tied: see above.
      **known: further fields of the `DecoderConfig`.
    """
    heads = fields.take("num_attention_heads", num_heads)
    kv_heads = fields.take("num_key_value_heads", num_kv_heads or heads)
    context = fields.take("max_position_embeddings", context)
    width = fields.take("hidden_size", width)
    head_dim = fields.take("head_dim", head_dim)
    if "rope" not in known:
        known["rope"] = read_rope(fields, context=context)
    return DecoderConfig(
        vocab_size=fields.take("vocab_size", vocab_size),
        width=width,
        depth=fields.take("num_hidden_layers", depth),
        num_heads=heads,
        num_kv_heads=heads if fields.is_null("num_key_value_heads") else kv_heads,
        mlp_dim=fields.take("intermediate_size", mlp_dim),
        head_dim=None if head_dim == width / heads else head_dim,
        context=context,
        norm_eps=fields.take("rms_norm_eps", norm_eps),
        tie_embeddings=fields.take("tie_word_embeddings", tied),
        **known,
    )


def read_rope(
    fields: Fields,
    *,
    context: int,
    theta: float = 10_000.0,
    original: int | None = None,
    kinds: Sequence[str] = ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "su"),
    partial: bool = False,
    sections: tuple[int, ...] = (),
    interleaved: bool = False,
) -> RopeConfig:
    """The rotary embedding: `rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling`
    as they were before.

    Args:
      fields: of the language model.
      context: its `max_position_embeddings`.
      theta: the base of files that name none.
      original: the context before scaling, where the architecture has a field for it.
      kinds: the scalings that the architecture knows.
      partial: whether a part of the head may be rotated only.
      sections: for positions of several axes, the default of `mrope_section`.
      interleaved: whether the architecture lets these axes take turns.

    Raises:
      UsageError: another scaling, or fields that it does not have.
    """
    parts = () if partial else (1.0,)
    theta = fields.take("rope_theta", theta)
    fraction = fields.take("partial_rotary_factor", 1.0)
    scaled = fields.sub("rope_scaling" if "rope_scaling" in fields else "rope_parameters")
    fields.ignore("rope_scaling", "rope_parameters")
    theta = scaled.take("rope_theta", theta)
    fraction = scaled.take("partial_rotary_factor", fraction)
    if parts and fraction not in parts:
        raise UsageError(
            f"{fields.name}: partial_rotary_factor is {fraction}; this architecture rotates whole "
            "heads"
        )
    kind = scaled.take("type", "default")
    kind = scaled.take("rope_type", kind)
    if sections:
        sections = tuple(scaled.take("mrope_section", sections))
        kind = "default" if kind == "mrope" else kind  # what older files call it
    if interleaved:
        scaled.want("mrope_interleaved", True)
    if kind not in kinds:
        listed = ", ".join(map(repr, kinds))
        raise UsageError(f"{scaled.name}: rope_type is {kind!r}; this zoo computes {listed} only")
    read = _SCALINGS[kind]
    scaling = None if read is None else read(scaled, context, original)
    scaled.done()
    return RopeConfig(float(theta), scaling, float(fraction), sections, interleaved)


def _read_linear(fields: Fields, context: int, original: int | None) -> Linear:
    del context, original
    return Linear(float(fields.take("factor")))


def _read_dynamic(fields: Fields, context: int, original: int | None) -> DynamicNTK:
    del original
    fields.ignore("original_max_position_embeddings")  # the original's code does not read it either
    return DynamicNTK(float(fields.take("factor")), context)


def _original(fields: Fields, context: int, original: int | None) -> int:
    """The context before scaling: a field of the model goes before one of the scaling."""
    own = fields.take("original_max_position_embeddings", context)
    return own if original is None else original


def _read_yarn(fields: Fields, context: int, original: int | None) -> Yarn:
    original = _original(fields, context, original)
    factor = float(fields.take("factor", context / original))
    attention = fields.take("attention_factor", None)
    scale, scale_all = fields.take("mscale", 0.0), fields.take("mscale_all_dim", 0.0)
    if attention is None and scale and scale_all and factor > 1:
        grown = 0.1 * math.log(factor)
        attention = (scale * grown + 1) / (scale_all * grown + 1)
    return Yarn(
        factor,
        original,
        beta_fast=float(fields.take("beta_fast", 32.0)),
        beta_slow=float(fields.take("beta_slow", 1.0)),
        truncate=fields.take("truncate", True),
        attention_factor=attention,
    )


def _read_llama3(fields: Fields, context: int, original: int | None) -> Llama3:
    return Llama3(
        float(fields.take("factor")),
        _original(fields, context, original),
        low=float(fields.take("low_freq_factor")),
        high=float(fields.take("high_freq_factor")),
    )


def _read_longrope(fields: Fields, context: int, original: int | None) -> LongRope:
    original = _original(fields, context, original)
    return LongRope(
        tuple(map(float, fields.take("short_factor"))),
        tuple(map(float, fields.take("long_factor"))),
        original,
        float(fields.take("factor", context / original)),
        fields.take("attention_factor", None),
    )


_SCALINGS: Mapping[str, Callable[[Fields, int, int | None], Any] | None] = MappingProxyType(
    {
        "default": None,
        "linear": _read_linear,
        "dynamic": _read_dynamic,
        "yarn": _read_yarn,
        "llama3": _read_llama3,
        "longrope": _read_longrope,
        "su": _read_longrope,  # the name in the first files of Phi-3
    }
)


def read_qk_normed(fields: Fields, **known: Any) -> DecoderConfig:
    """A decoder whose queries and keys are normed head by head, alone or as the language model of
    another; arguments as of `read_decoder`.
    """
    fields.want("hidden_act", "silu")
    bias = fields.take("attention_bias", False)
    return read_decoder(
        fields,
        vocab_size=151_936,
        mlp_dim=22_016,
        num_kv_heads=32,
        head_dim=128,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        **known,
    )


def read_window(fields: Fields, default: int | None) -> int | None:
    """`sliding_window`, where null means full attention."""
    window: int | None = fields.take("sliding_window", default)
    return None if fields.is_null("sliding_window") else window


def read_last_windows(fields: Fields, *, depth: int) -> tuple[int | None, ...]:
    """The windows of Qwen's decoders: `use_sliding_window` gives one to the layers from
    `max_window_layers` on, unless `layer_types` says which.
    """
    window, used = read_window(fields, 4096), fields.take("use_sliding_window", False)
    first = fields.take("max_window_layers", 28)
    types = tuple("sliding_attention" if used and i >= first else FULL for i in range(depth))
    return read_layer_types(fields, types, window if used else None)


FULL = "full_attention"


def read_layer_types(
    fields: Fields, default: Sequence[str], window: int | None
) -> tuple[int | None, ...]:
    """The windows by layer that `layer_types` names, as `DecoderConfig.windows` wants them.

    Args:
      fields: of the language model.
      default: "full_attention" or "sliding_attention" for every layer.
      window: of the sliding ones.

    Raises:
      UsageError: not one of these words for every layer, or no window for a sliding one.
    """
    types = fields.take("layer_types", tuple(default))
    known = {FULL: None, "sliding_attention": window}
    if len(types) != len(default) or not set(types) <= set(known):
        raise UsageError(
            f"{fields.name}: layer_types is {types}; want {' or '.join(known)} for each of "
            f"{len(default)} layers"
        )
    if window is None and set(types) != {FULL}:
        raise UsageError(f"{fields.name}: layer_types has sliding layers, but there is no window")
    windows = tuple(known[kind] for kind in types)
    lengths = range(1, len(windows) + 1)
    period = next(n for n in lengths if windows == (windows[:n] * len(windows))[: len(windows)])
    return () if set(windows) == {None} else windows[:period]
