"""YOPO against the official layers: a prompt with a picture, and a new token after it."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from tests.parity.case import Case
from tests.parity.decoder_layers import config_of, final_norm, load_layers, new_token, stream_of
from zoo.models.core.types import Reserve
from zoo.models.parts.layers.stack import Stack
from zoo.models.reduction.yopo import Yopo

SLOTS = 576  # vision tokens in every case of the official code


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our layers and the recorded weights."""
    config = config_of(case.kwargs["llama"])
    policy = Yopo.read(case.kwargs, case.inputs["headmask"])
    stack = Stack(policy.apply(config.plan(), slots=SLOTS))
    params = load_layers(case, config, stack)
    first, hidden = case.kwargs["sprompt_len"], case.inputs["inputs_embeds"]
    stream = stream_of(hidden, slice(first, first + SLOTS))

    @jax.jit
    def layers(params: Any, stream: Any, state: Any) -> Any:
        return stack.apply({"params": params}, stream, state)[:2]

    prompt, cache = layers(params, stream, Reserve(1))
    length = hidden.shape[1]
    token, _ = layers(params, new_token(case.inputs["decode_embed"], length, length), cache)
    case = replace(case, kwargs=case.kwargs["llama"])
    found = {"last_hidden_state": prompt.hidden, "decode_last_hidden_state": token.hidden}
    return {name: np.asarray(final_norm(case, x)) for name, x in found.items()}
