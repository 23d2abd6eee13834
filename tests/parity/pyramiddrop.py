"""PyramidDrop against the official `pdrop_forward`: a prompt, and a new token after it."""

import itertools
from typing import Any

import jax
import numpy as np

from tests.parity.case import Case
from tests.parity.decoder_layers import (
    cached_lengths,
    config_of,
    final_norm,
    load_layers,
    new_token,
    stream_of,
)
from zoo.models.core.types import Reserve
from zoo.models.parts.layers.stack import Stack
from zoo.models.reduction.pyramiddrop import PyramidDrop


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our layers and the recorded weights."""
    plan, facts = case.meta["schedule"], case.meta["attributes"]
    keep = tuple(float(share) for share in plan["image_token_ratio_list"][1:])
    policy = PyramidDrop(keep, layers=tuple(plan["layer_list"]))
    first, number = facts["image_token_posi"], facts["image_tokens"]
    config = config_of(case.kwargs)
    plain, stack = Stack(config.plan()), Stack(policy.apply(config.plan(), slots=number))
    params = load_layers(case, config, stack)
    guide = facts["prompt_len"] + number
    hidden = case.inputs["inputs_embeds"]
    stream = stream_of(hidden, slice(first, first + number), guide=guide)
    bounds = [0, *plan["layer_list"], config.depth]

    @jax.jit
    def staged(params: Any, stream: Any, states: Any) -> Any:
        """The stack in its stages: what comes out of each, and their states."""
        outs, kept = [], []
        for start, stop, state in zip(bounds, bounds[1:], states, strict=False):
            span = {"start": start, "stop": stop}
            stream, state, _ = stack.apply({"params": params}, stream, state, **span)
            outs, kept = [*outs, stream], [*kept, state]
        return outs, kept

    outs, states = staged(params, stream, [Reserve(1)] * (len(bounds) - 1))
    found = {
        "last_hidden_state": final_norm(case, outs[-1].hidden),
        "kv_len_per_layer": cached_lengths(sum(states, ())),
        "plain_llama_last_hidden_state": final_norm(
            case, jax.jit(plain.apply)({"params": params}, stream)[0].hidden
        ),
    }
    for stage, (before, after) in enumerate(itertools.pairwise(outs)):
        rows = zip(before.tokens.order, after.tokens.order, strict=True)
        found[f"stage{stage}_kept_rows"] = np.stack([np.searchsorted(a, b) for a, b in rows])
        found[f"stage{stage}_position_ids"] = np.asarray(after.tokens.position).astype(np.int32)
    token = new_token(
        case.inputs["decode_embed"], hidden.shape[1], int(case.inputs["decode_position"][0, 0])
    )
    outs, _ = staged(params, token, states)
    found["decode_last_hidden_state"] = final_norm(case, outs[-1].hidden)
    return {name: np.asarray(found[name]) for name in case.outputs}
