"""MMTok's greedy selection against the official functions."""

import jax.numpy as jnp
import numpy as np

from tests.parity.case import Case
from zoo.models.core.types import Features
from zoo.models.parts.reduce.base import Seen, Text
from zoo.models.reduction.mmtok import MMTok, coverage, pick


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our functions and the recorded tokens."""
    kwargs = case.kwargs
    tokens, features, text = (
        jnp.asarray(case.inputs[name])[None, None]
        for name in ("vision_tokens", "vision_tokens_clip", "text_tokens")
    )
    number, words = tokens.shape[2], text.shape[2]
    excluded = kwargs["padding_patch_indices"] or []
    facts = {
        "alpha": kwargs["alpha"],
        "text_temperature": kwargs["tv_temp"],
        "vision_temperature": kwargs["vv_temp"],
    }
    keep = min(kwargs["target_vision_tokens"], number)
    read, real = jnp.ones((1, 1, words), bool), jnp.ones((1, 1, number), bool)
    gain = coverage(text, tokens, features, read=read, real=real, **facts)
    allowed = np.ones((1, 1, number), bool)
    allowed[..., excluded] = False
    order = np.asarray(pick(gain, keep, jnp.asarray(allowed)))[0, 0]
    index = np.sort(order)
    if not excluded:  # what the method itself returns
        seen = Seen(tokens, Features(features, (1, number)), grid=(1, number))
        said = Text(jnp.zeros((1, words), jnp.int32), text[:, 0], read[:, 0])
        index = np.asarray(MMTok(keep, **facts).reduce(seen, said, keep=keep).index)[0, 0]
    return {
        "selected_indices_sorted": index.astype(np.int32),
        "greedy_order": order.astype(np.int32),
        "selected_tokens": np.asarray(tokens)[0, 0, index],
    }
