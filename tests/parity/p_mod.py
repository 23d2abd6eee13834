"""p-MoD's layer and decoder against the official `ModLayer` and `PmodLlavaLlamaModel`."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.parity.case import Case
from zoo.models.core.keytable import Row, Table
from zoo.models.core.types import IMAGE, KV, TEXT, Reserve, Stream, Tokens
from zoo.models.decoders.p_mod import PMoD, Router, with_routers
from zoo.models.parts.decoders.gqa import DecoderConfig, decoder_table
from zoo.models.parts.layers.stack import Stack
from zoo.models.parts.reduce.report import kept_by_cell


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our modules and the recorded weights."""
    return _decoder(case) if "num_hidden_layers" in case.kwargs else _layer(case)


def _layer(case: Case) -> dict[str, np.ndarray]:
    """One layer that chooses: its output, what happens inside, its cache or its gradients."""
    sizes, inputs = case.kwargs, case.inputs
    policy = PMoD.parse(
        "interleave", sizes["mod_weight_norm"], factor=float(inputs["ratio"]), layers=(0,)
    )
    config = _config(sizes, depth=1)
    stack, table = Stack(policy.apply(config.plan(), slots=0)), _table(config, policy)
    params = _load(table, stack, {f"model.layers.0.{k}": v for k, v in case.params.items()})
    stream = _stream(inputs["hidden_states"], inputs["mod_target_mask"], inputs)
    room = sum(name.startswith("decode_hidden") for name in inputs)

    @jax.jit
    def whole(params: Any, stream: Stream) -> tuple[Any, Any, dict[str, Any]]:
        seen: dict[str, Any] = {}

        def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            result = call(*args, **kwargs)
            if context.method_name in ("attention", "feed_forward"):
                seen[context.method_name] = result
            elif isinstance(context.module, Router) and context.method_name == "__call__":
                seen["router"] = result
            return result

        with nn.intercept_methods(watch):
            out, states, _ = stack.apply({"params": params}, stream, Reserve(room))
        target = (stream.tokens.modality == IMAGE) & stream.tokens.valid
        seen["weights"] = policy.weights(seen["router"], target)
        return out.hidden, states, seen

    hidden, states, seen = whole(params, stream)
    inner = seen["attention"][0]
    kept = np.asarray(inner.tokens.valid)
    found = {
        "hidden_states": hidden,
        "router_logits": seen["router"],
        "router_weights": seen["weights"],
        "kept_position_ids": _left(inner.tokens.position, kept).astype(np.int64),
    }
    if room:
        found["mlp_out"] = _left(seen["feed_forward"], kept)
        found["post_attn_residual"] = _left(inner.hidden, kept)
        found["cache_k"], found["cache_v"] = (_cached(states[0], leaf) for leaf in ("k", "v"))
        more = jax.jit(lambda p, s, c: stack.apply({"params": p}, s, c)[:2])
        for step in range(room):
            token = _token(inputs[f"decode_hidden_{step + 1}"], hidden.shape[1] + step)
            out, states = more(params, token, states)
            found[f"decode_{step + 1}"] = out.hidden
        found["cache_len_after"] = _lengths(states)[0]
    else:
        found |= _gradients(stack, table, params, stream, inputs["cotangent"])
    return {name: np.asarray(found[name]) for name in case.outputs}


def _gradients(
    stack: Stack, table: Table, params: Any, stream: Stream, cotangent: np.ndarray
) -> dict[str, Any]:
    """Of the input and of the weights, in their layout."""

    @jax.jit
    def backward(params: Any, stream: Stream, cotangent: Any) -> Any:
        def forward(params: Any, hidden: Any) -> Any:
            return stack.apply({"params": params}, stream.replace(hidden=hidden))[0].hidden

        return jax.vjp(forward, params, stream.hidden)[1](cotangent)

    grads, hidden = backward(params, stream, jnp.asarray(cotangent))
    theirs = table.save({"decoder": {"stack": grads}})
    at, layer = "model.layers.0.", "model.layers.0.decoder_layer."
    return {
        "grad_hidden_states": hidden,
        "grad_router_weight": theirs[f"{at}router.router.weight"],
        "grad_router_bias": theirs[f"{at}router.router.bias"],
        "grad_gate_proj": theirs[f"{layer}mlp.gate_proj.weight"],
        "grad_q_proj": theirs[f"{layer}self_attn.q_proj.weight"],
    }


def _decoder(case: Case) -> dict[str, np.ndarray]:
    """All layers and the final norm: a prompt, then some tokens one by one."""
    sizes, inputs = case.kwargs, case.inputs
    policy = PMoD.parse(
        sizes["mod_target_layers"], sizes["mod_weight_norm"], factor=sizes["mod_router_factor"]
    )
    depth = sizes["num_hidden_layers"]
    config = _config(sizes, depth=depth)
    stack, table = Stack(policy.apply(config.plan(), slots=0)), _table(config, policy)
    layers = {f"model.{k}": v for k, v in case.params.items() if k.startswith("layers.")}
    params = _load(table, stack, layers)
    stream = _stream(inputs["inputs_embeds"], inputs["mod_target_mask"], inputs)
    length = stream.hidden.shape[1]
    steps = inputs["decode_embeds"]

    def norm(hidden: Any) -> Any:
        scale = jnp.asarray(case.params["norm.weight"])
        return hidden * jax.lax.rsqrt((hidden**2).mean(-1, keepdims=True) + 1e-5) * scale

    after = {
        name: int(name.removeprefix("hidden_after_layer_")) + 1
        for name in case.outputs
        if name.startswith("hidden_after_layer_")
    }
    stops = sorted({*after.values(), depth})

    @jax.jit
    def run(params: Any, stream: Stream, states: Any) -> tuple[Any, Any, Any]:
        """The stack in pieces: what comes out of each, their states, and all aux."""
        hidden, out, aux = [], [], ()
        for start, stop, state in zip([0, *stops], stops, states, strict=False):
            bounds = {"start": start, "stop": stop}
            stream, state, more = stack.apply({"params": params}, stream, state, **bounds)
            hidden, out, aux = [*hidden, stream.hidden], [*out, state], aux + more
        return hidden, out, aux

    hidden, states, aux = run(params, stream, [Reserve(len(steps))] * len(stops))
    vision = np.asarray(stream.tokens.modality[0] == IMAGE)
    found = {
        "last_hidden_state": norm(hidden[-1]),
        "cache_lens_after_prefill": _lengths(sum(states, ())),
        "kept_mask": kept_by_cell(aux, length)[:, 0] | ~vision,
        **{name: hidden[stops.index(stop)] for name, stop in after.items()},
    }
    decoded = []
    for step, token in enumerate(steps):
        hidden, states, _ = run(params, _token(token[None], length + step), states)
        decoded.append(norm(hidden[-1])[0])
    found["decode_hidden"] = np.stack(decoded)
    found["cache_lens_after_decode"] = _lengths(sum(states, ()))
    return {name: np.asarray(found[name]) for name in case.outputs}


def _config(sizes: dict[str, Any], depth: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=1,
        width=sizes["hidden_size"],
        depth=depth,
        num_heads=sizes["num_attention_heads"],
        num_kv_heads=sizes["num_key_value_heads"],
        mlp_dim=sizes["intermediate_size"],
    )


def _table(config: DecoderConfig, policy: PMoD) -> Table:
    """Of the layers alone: the records have no vocabulary."""
    whole = with_routers(decoder_table(config).under("decoder"), policy, config.depth)
    return Table(tuple(row for row in whole.rows if isinstance(row, Row) and row.steps))


def _load(table: Table, stack: Stack, state: dict[str, np.ndarray]) -> Any:
    tokens = Tokens.sequence(jnp.ones((1, 2), bool))
    probe = Stream(jnp.zeros((1, 2, stack.steps[0].block.width)), tokens)
    shapes = nn.unbox(jax.eval_shape(stack.init, jax.random.key(0), probe))["params"]
    return table.load(state, {"decoder": {"stack": shapes}})["decoder"]["stack"]


def _stream(hidden: np.ndarray, target: np.ndarray, inputs: dict[str, np.ndarray]) -> Stream:
    """Positions count from 0 as in the records; the cell of a token is its place."""
    place = np.broadcast_to(np.arange(hidden.shape[1]), hidden.shape[:2])
    real = inputs.get("attention_mask", np.ones(place.shape, bool))
    slots = int(target.sum(-1).max())
    # Every row has as many image slots: padding takes the place of those that a row lacks.
    missing = slots - target.sum(-1, keepdims=True)
    padding = ~real & (np.cumsum(~real, -1) <= missing)
    image = target | padding
    tokens = Tokens(
        position=jnp.asarray(place, jnp.float32),
        order=jnp.asarray(place, jnp.int32),
        modality=jnp.asarray(np.where(image, IMAGE, TEXT), jnp.int32),
        valid=jnp.asarray(real),
        tags={"cell": jnp.asarray(np.where(target, place, -1), jnp.int32)},
    )
    return Stream(jnp.asarray(hidden), tokens, slots)


def _token(hidden: np.ndarray, place: int) -> Stream:
    order = jnp.full((1, 1), place, jnp.int32)
    tokens = Tokens(order.astype(jnp.float32), order, order * 0, jnp.ones((1, 1), bool))
    return Stream(jnp.asarray(hidden), tokens.replace(tags={"cell": order * 0 - 1}))


def _left(rows: Any, kept: np.ndarray) -> np.ndarray:
    """The kept rows of [B, L, ...] at the left, as many as the row with most of them has."""
    order = np.argsort(~kept, axis=-1, kind="stable")[:, : kept.sum(-1).max()]
    rows = np.where(kept.reshape(*kept.shape, *(1,) * (rows.ndim - 2)), np.asarray(rows), 0)
    return np.stack([row[index] for row, index in zip(rows, order, strict=True)])


def _cached(state: KV, leaf: str) -> np.ndarray:
    """What a cache of one row holds, [1, K, S, E]."""
    return np.asarray(getattr(state, leaf))[:, :, np.asarray(state.tokens.valid[0])]


def _lengths(states: Any) -> np.ndarray:
    """Tokens in the cache of every layer, of one row."""
    found: list[int] = []
    for state in states:
        each = [state] if isinstance(state, KV) else state
        counts = [np.asarray(kv.tokens.valid.sum((-2, -1))).reshape(-1) for kv in each]
        found += [int(n) for repeat in zip(*counts, strict=True) for n in repeat]
    return np.array(found)
