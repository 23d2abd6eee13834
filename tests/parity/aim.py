"""AIM's merging, importance and pruned decoder against the official functions and `Qwen2Model`."""

import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity.case import Case
from tests.parity.decoder_layers import config_of, final_norm, load_layers, stream_of
from zoo.models.parts.layers.stack import Stack
from zoo.models.reduction.aim import AIMPrune, Merging, importance


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our functions and modules."""
    if "x" in case.inputs:
        return _merged(case)
    return _importance(case) if "attn_logits_causal" in case.inputs else _decoder(case)


def _merged(case: Case) -> dict[str, np.ndarray]:
    x = jnp.asarray(case.inputs["x"])
    group = jnp.zeros(x.shape[:2], jnp.int32)
    merging, found, left = Merging.start(x, group, 1), {}, x.shape[1]
    for number, r in enumerate(case.kwargs["r_per_step"]):
        left -= min(r, left // 2)
        merging = merging.step(jnp.full(group.shape, r), jnp.ones(group.shape, int))
        found[f"after_step{number}"] = np.asarray(merging.tokens[:, :left])
    return found


def _importance(case: Case) -> dict[str, np.ndarray]:
    logits = jnp.asarray(case.inputs["attn_logits_causal"])
    sizes, number = case.kwargs, logits.shape[-1]
    assert sizes["d"] == 0
    votes = jnp.full((len(logits), number), 1 / number)
    return {"importance": np.asarray(importance(logits, votes, sizes["tau_imp"], sizes["iters"]))}


def _decoder(case: Case) -> dict[str, np.ndarray]:
    first, end, _ = case.meta["boundaries"]
    [start] = map(int, re.findall(r"for l\s*<\s*(\d+)", case.meta["schedule"]))
    config = config_of(case.kwargs, qkv_bias=True)
    policy = AIMPrune(start=start, form="mask")
    stack = Stack(policy.apply(config.plan(), slots=end - first))
    params = load_layers(case, config, stack)
    stream = stream_of(case.inputs["inputs_embeds"], slice(first, end))
    bounds = [0, *range(min(start, config.depth), config.depth + 1)]

    @jax.jit
    def staged(params: Any, stream: Any) -> Any:
        masks = [stream.tokens.valid] * (bounds[1] + 1)
        for begin, stop in itertools.pairwise(bounds):
            span = {"start": begin, "stop": stop}
            stream, _, _ = stack.apply({"params": params}, stream, None, **span)
            masks += [stream.tokens.valid] * (begin > 0)
        return stream.hidden, jnp.stack(masks)

    hidden, masks = staged(params, stream)
    return {
        "last_hidden_state": np.asarray(final_norm(case, hidden)),
        "mask_used_by_layer": np.asarray(masks)[:, 0],
    }
