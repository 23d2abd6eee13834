"""The layers of recorded decoders without a vocabulary, on our stack: weights, streams, caches."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.parity.case import Case
from zoo.models.core.keytable import Row, Table
from zoo.models.core.types import IMAGE, KV, TEXT, Stream, Tokens
from zoo.models.parts.decoders.gqa import DecoderConfig, decoder_table
from zoo.models.parts.layers.rope import RopeConfig
from zoo.models.parts.layers.stack import Stack


def config_of(sizes: dict[str, Any], **more: Any) -> DecoderConfig:
    """The decoder of a recorded configuration of the Llama family."""
    return DecoderConfig(
        vocab_size=1,
        width=sizes["hidden_size"],
        depth=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        num_kv_heads=sizes["num_key_value_heads"],
        mlp_dim=sizes["intermediate_size"],
        norm_eps=sizes["rms_norm_eps"],
        rope=RopeConfig(theta=sizes["rope_theta"]),
        **more,
    )


def load_layers(case: Case, config: DecoderConfig, stack: Stack) -> Any:
    """The recorded weights of the layers, by the table of the family."""
    rows = decoder_table(config).under("decoder").rows
    table = Table(tuple(row for row in rows if isinstance(row, Row) and row.steps))
    tokens = Tokens.sequence(jnp.ones((1, 2), bool))
    probe = Stream(jnp.zeros((1, 2, config.width)), tokens)
    shapes = nn.unbox(jax.eval_shape(stack.init, jax.random.key(0), probe))["params"]
    state = {f"model.{k}": v for k, v in case.params.items() if k.startswith("layers.")}
    return table.load(state, {"decoder": {"stack": shapes}})["decoder"]["stack"]


def final_norm(case: Case, hidden: Any) -> Any:
    """The recorded norm after the last layer."""
    mean = (hidden**2).mean(-1, keepdims=True)
    return hidden * jax.lax.rsqrt(mean + case.kwargs["rms_norm_eps"]) * case.params["norm.weight"]


def stream_of(hidden: np.ndarray, image: slice, *, guide: int | None = None) -> Stream:
    """Embedded rows [B, L, D] whose vision tokens are `image`.

    Args:
      hidden: the rows.
      image: where vision tokens stand.
      guide: tokens that belong to the prompt, from the first; by default all.
    """
    place = np.broadcast_to(np.arange(hidden.shape[1]), hidden.shape[:2])
    vision = (place >= image.start) & (place < image.stop)
    tokens = Tokens(
        position=jnp.asarray(place, jnp.float32),
        order=jnp.asarray(place, jnp.int32),
        modality=jnp.asarray(np.where(vision, IMAGE, TEXT), jnp.int32),
        valid=jnp.ones(place.shape, bool),
        tags={
            "cell": jnp.asarray(np.where(vision, place - image.start, -1), jnp.int32),
            "guide": jnp.asarray(place < (place.shape[1] if guide is None else guide)),
        },
    )
    return Stream(jnp.asarray(hidden), tokens, image.stop - image.start)


def new_token(hidden: np.ndarray, order: int, position: int) -> Stream:
    """The next token of every row, [B, 1, D]."""
    place = jnp.full(hidden.shape[:2], order, jnp.int32)
    tokens = Tokens(
        jnp.full(place.shape, float(position)), place, place * 0, jnp.ones(place.shape, bool)
    )
    return Stream(jnp.asarray(hidden), tokens.replace(tags={"cell": place * 0 - 1}))


def cached_lengths(states: Any) -> np.ndarray:
    """Tokens in the cache of every layer, of one row, int32; states as `Stack` has them."""
    found: list[int] = []
    for state in states:
        each = [state] if isinstance(state, KV) else state
        counts = [np.asarray(kv.tokens.valid.sum((-2, -1))).reshape(-1) for kv in each]
        found += [int(n) for repeat in zip(*counts, strict=True) for n in repeat]
    return np.array(found, np.int32)
