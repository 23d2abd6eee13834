"""γ-MoD against the official decoder layer, and ARank against the official analysis."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.parity.case import Case
from zoo.compress.arank import numerical_rank
from zoo.models.core.keytable import Row, Table
from zoo.models.core.types import IMAGE, KV, Reserve, Stream, Tokens
from zoo.models.decoders.gamma_mod import GammaMoD, router_rows, routing_loss
from zoo.models.parts.decoders.gqa import DecoderConfig, decoder_table
from zoo.models.parts.layers.rope import RopeConfig
from zoo.models.parts.layers.stack import Stack


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our module and the recorded weights."""
    if "attention" in case.inputs:
        ranks = numerical_rank(jnp.asarray(case.inputs["attention"]))  # [layers, heads]
        return {"avg_rank": np.asarray(ranks, np.float32).mean(-1)}
    return _generated(case) if "decode_hidden" in case.inputs else _trained(case)


def _trained(case: Case) -> dict[str, np.ndarray]:
    """One layer in training: its output, what it selected, and gradients."""
    hidden = jnp.asarray(case.inputs["hidden_states"])
    prefix, length = case.kwargs["image_and_instruction_prefix"], hidden.shape[1]
    text = min(35, prefix - 1)
    slots = prefix - text if length > prefix else 0
    tokens = Tokens.sequence(jnp.asarray(case.inputs["attention_mask"]))
    image = jnp.broadcast_to(jnp.arange(length) < slots, tokens.valid.shape)
    tokens = tokens.replace(modality=jnp.where(image, IMAGE, tokens.modality))
    stream = Stream(hidden, tokens, slots)
    stack, table, params = _layer(case, GammaMoD(layers=(0,), text_prefix=text))

    def forward(params: Any) -> tuple[jax.Array, Any]:
        out, _, _ = stack.apply({"params": params["stack"]}, stream)
        logits, selected = _routed(stack, params, stream)
        # Ours counts real tokens only, the official mean padding too.
        loss = routing_loss(logits, selected, jnp.ones_like(selected))
        value = (out.hidden * case.inputs["cotangent"]).sum() + 10 * loss
        return value, (out.hidden, loss, selected, jax.nn.softmax(logits, -1)[..., 1])

    grads, found = jax.jit(jax.grad(forward, has_aux=True))(params)
    out, loss, selected, probability = map(np.asarray, found)
    gradient = table.save(grads)
    return {
        "hidden_states": out,
        "aux_loss": loss,
        "selected_mask": selected,
        "top_k": selected[0].sum(),
        "ranking_score": probability + (np.arange(length) >= prefix),
        "grad_router": gradient["model.layers.0.router.weight"],
        "grad_gate_proj": gradient["model.layers.0.mlp.gate_proj.weight"],
        "grad_q_proj": gradient["model.layers.0.self_attn.q_proj.weight"],
    }


def _generated(case: Case) -> dict[str, np.ndarray]:
    """One layer reading a prompt, then token by token."""
    hidden, new = (jnp.asarray(case.inputs[k]) for k in ("hidden_states", "decode_hidden"))
    policy = GammaMoD(
        layers=(0,),
        threshold=case.kwargs["prefill_threshold"],
        decode_threshold=case.kwargs["decode_threshold"],
    )
    stack, _, params = _layer(case, policy)
    length, steps = hidden.shape[1], len(new)
    tokens = Tokens.sequence(jnp.ones((1, length + steps), bool))

    def some(start: int, stop: int) -> Tokens:
        return jax.tree.map(lambda leaf: leaf[:, start:stop], tokens)

    def probability(hidden: jax.Array) -> np.ndarray:
        logits, _ = _routed(stack, params, Stream(hidden, some(0, hidden.shape[1])))
        return np.asarray(jax.nn.softmax(logits, -1)[..., 1])

    call = jax.jit(stack.apply)
    variables = {"params": params["stack"]}
    out, states, _ = call(variables, Stream(hidden, some(0, length)), Reserve(steps))
    cache_k, cache_v = _cached(states[0])
    hiddens, lengths = [], []
    for i, row in enumerate(new):
        token = some(length + i, length + i + 1)
        step, states, _ = call(variables, Stream(row[None], token), states)
        hiddens.append(np.asarray(step.hidden[0]))
        lengths.append(int(states[0].tokens.valid.sum()))
    return {
        "hidden_states": np.asarray(out.hidden),
        "route_probability": probability(hidden),
        "cache_k": cache_k,
        "cache_v": cache_v,
        "decode_hidden": np.stack(hiddens),
        "decode_route_probability": probability(new[:, 0][None])[0],
        "cache_len_after_step": np.array(lengths),
    }


def _layer(case: Case, policy: GammaMoD) -> tuple[Stack, Table, Any]:
    """A stack of one layer, its rows of the key table, and its parameters below "stack"."""
    sizes = case.kwargs
    config = DecoderConfig(
        width=sizes["hidden_size"],
        depth=1,
        num_heads=sizes["num_attention_heads"],
        num_kv_heads=sizes["num_attention_heads"],
        mlp_dim=sizes["intermediate_size"],
        norm_eps=sizes["rms_norm_eps"],
        rope=RopeConfig(theta=sizes.get("rope_theta", 10_000.0)),
    )
    stack = Stack(policy.apply(config.plan(), slots=0))
    rows = [row for row in decoder_table(config).rows if isinstance(row, Row) and row.steps]
    table = Table(tuple(rows)) + router_rows(policy.chosen(1))
    stream = Stream(jnp.zeros((1, 2, config.width)), Tokens.sequence(jnp.ones((1, 2), bool)))
    shapes = nn.unbox(jax.eval_shape(stack.init, jax.random.key(0), stream)["params"])
    state = {
        f"model.layers.0.{key}": array
        for key, array in case.params.items()
        if not key.endswith("inv_freq")
    }
    return stack, table, table.load(state, {"stack": shapes})


def _routed(stack: Stack, params: Any, stream: Stream) -> tuple[jax.Array, jax.Array]:
    """The router's logits [B, L, 2] and what training selects, bool [B, L]."""
    [step] = stack.steps
    [policy] = step.policies
    leaves = jax.tree.map(lambda leaf: leaf[0], params["stack"]["layers"])
    own = policy.module(step.block).bind({"params": leaves[policy.name]})
    layer = step.block.bind({"params": leaves})
    logits = policy.route(layer, own, stream.hidden)
    index, runs = policy.choose(jax.nn.softmax(logits, -1)[..., 1], stream, None)
    if index is not None:
        nothing = jnp.zeros(stream.hidden.shape[:2], bool)
        runs = jax.vmap(lambda row, at, ok: row.at[at].max(ok))(nothing, index, runs)
    return logits, runs


def _cached(state: KV) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of the tokens that count, [1, K, n, E]."""
    kept = np.asarray(state.tokens.valid[0])
    return np.asarray(state.k)[:, :, kept], np.asarray(state.v)[:, :, kept]
