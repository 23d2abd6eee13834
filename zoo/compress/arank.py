"""Which layers of a model attend to much, by the rank of their attention maps (ARank).

A layer of low rank mixes tokens in few ways, so that many of them can skip it. The layers below a
threshold are those that `zoo.models.decoders.gamma_mod` turns into mixture-of-depths layers. The
command `zoo arank` does both.

Follows: arXiv:2410.13859. Of the attention probabilities of a prompt the lower triangle is kept,
without the diagonal; its numerical rank is averaged over heads and prompts.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from zoo.models.core.errors import UsageError
from zoo.models.core.types import Array, Aux, Batch, Memory, Reserve, Stream
from zoo.models.parts.assemblies.language import LanguageModel
from zoo.models.parts.decoders.gqa import Decoder
from zoo.models.parts.layers.plan import LayerPolicy, Run, Step


def numerical_rank(attention: Array, length: Array | None = None) -> Array:
    """The rank of attention maps below their diagonal.

    A singular value counts if it is greater than the greatest of them, times the number of tokens,
    times the spacing of float32 at 1.

    Args:
      attention: [..., S, S], probabilities after the softmax; rows are queries.
      length: int [...], how many of the S tokens are real, the others' rows and columns being zero;
        by default all.

    Returns:
      int32 [...], at most S - 1.
    """
    size = attention.shape[-1]
    below = jnp.tril(attention.astype(jnp.float32), -1)
    sigma = jnp.linalg.svd(below, compute_uv=False)  # [..., S], descending
    real = jnp.asarray(size if length is None else length, jnp.float32)
    least = sigma[..., 0] * real * jnp.finfo(jnp.float32).eps
    return (sigma > least[..., None]).sum(-1)


def low_layers(
    ranks: Sequence[float], *, threshold: float | None = None, keep: int | None = None
) -> tuple[int, ...]:
    """The layers that attend to little.

    Args:
      ranks: of all layers.
      threshold: those of a rank below it, 110 as published.
      keep: instead, all but so many of the greatest rank.

    Raises:
      UsageError: both or neither of the two; or more kept than there are layers.
    """
    if (threshold is None) == (keep is None):
        raise UsageError("want either a threshold of the rank or how many layers to keep")
    if threshold is not None:
        return tuple(i for i, rank in enumerate(ranks) if rank < threshold)
    if not 0 <= keep <= len(ranks):
        raise UsageError(f"keep is {keep}: the model has {len(ranks)} layers")
    order = sorted(range(len(ranks)), key=lambda i: ranks[i])
    return tuple(sorted(order[: len(ranks) - keep]))


def attention_ranks(model: nn.Module, params: Any, batch: Batch) -> np.ndarray:
    """ARank of every layer of a model's decoder.

    Args:
      model: a `LanguageModel`.
      params: its parameters.
      batch: prompts, as `Loaded.processor.encode_prompt` makes them, padded on the right; labels
        are not read.

    Returns:
      float64 [layers], the mean over heads and prompts.

    Raises:
      UsageError: a model without a decoder.
    """
    if not isinstance(model, LanguageModel):
        raise UsageError(f"{type(model).__name__} has no decoder whose attention could be ranked")
    prompts = {name: leaf for name, leaf in batch.items() if name not in ("labels", "segments")}
    return np.asarray(_ranks(model, params, prompts), np.float64).mean((1, 2))


@functools.partial(jax.jit, static_argnames="model")
def _ranks(model: nn.Module, params: Any, batch: Batch) -> Array:
    """Int [layers, B, H]."""
    variables = {"params": params}
    stream, memory = model.apply(variables, batch, None, method="stream")
    decoder = model.bind(variables).decoder
    watched = Decoder(decoder.config, tuple(map(_watched, decoder.plan)))
    _, _, aux = watched.apply(
        {"params": params["decoder"]}, stream, Reserve(0), memory, method="run"
    )
    return jnp.stack([report[_Rank.name] for report in aux])


def _watched(step: Step) -> Step:
    """The step with a look at what enters its attention."""
    outside = len(step.policies) - any(policy.splits for policy in step.policies)
    policies = (*step.policies[:outside], _Rank(), *step.policies[outside:])
    return dataclasses.replace(step, policies=policies)


@struct.dataclass
class _Rank(LayerPolicy):
    """Reports the rank of a layer's attention map, int [B, H]; changes nothing."""

    name: ClassVar[str] = "attention_rank"

    def __call__(
        self,
        layer: nn.Module,
        own: nn.Module | None,
        run: Run,
        stream: Stream,
        state: Any,
        memory: Memory,
    ) -> tuple[Stream, Any, Aux]:
        tokens = stream.tokens
        weights = attention_map(layer, stream, memory)
        weights = jnp.where(tokens.valid[:, None, :, None], weights, 0)
        length = tokens.valid.sum(-1)[:, None]
        stream, state, _ = run(stream, state)
        return stream, state, {self.name: numerical_rank(weights, length)}


def attention_map(layer: nn.Module, stream: Stream, memory: Memory) -> Array:
    """Probabilities [B, H, L, L] with which a layer's tokens attend to one another."""
    q, k, _ = layer.qkv(stream, memory)
    k = jnp.repeat(k, q.shape[2] // k.shape[2], 2)
    scale = q.shape[-1] ** -0.5 if layer.scale is None else layer.scale
    exact = {"preferred_element_type": jnp.float32}
    logits = jnp.einsum("blhe,bshe->bhls", q, k, **exact) * scale
    if layer.softcap is not None:
        logits = layer.softcap * jnp.tanh(logits / layer.softcap)
    seen = layer.rule(stream.tokens, stream.tokens)
    if seen is not None and seen.dtype == jnp.bool_:
        logits = jnp.where(seen[:, None], logits, jnp.finfo(jnp.float32).min)
    elif seen is not None:
        logits = logits + seen[:, None]
    return jax.nn.softmax(logits, -1)
