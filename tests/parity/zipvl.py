"""The rounding of the mixed-precision cache against the official functions of ZipCache."""

import jax.numpy as jnp
import numpy as np

from tests.parity.case import Case
from zoo.models.core.types import Tokens
from zoo.models.parts.layers.mixed_kv import MixedKV, channel_scale


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our cache of the recorded keys and values."""
    k, v = (jnp.asarray(case.inputs[name]) for name in ("key", "value"))
    important = case.inputs["important_ids"]
    batch, _, length, _ = k.shape
    chosen = jnp.zeros((batch, length), bool).at[:, important].set(True)
    tokens = Tokens.sequence(jnp.ones(chosen.shape, bool))
    options = {
        "capacity": len(important),
        "bits": (case.kwargs["bits_important"], case.kwargs["bits_unimportant"]),
        "room": 0,
    }
    state = MixedKV.start(k.swapaxes(1, 2), v.swapaxes(1, 2), tokens, chosen, **options)
    place = np.argsort(np.asarray(state.tokens.order), -1)[:, None, :, None]
    key, value = (np.asarray(x.swapaxes(1, 2)) for x in state.read())
    scale = channel_scale(v, jnp.ones(chosen.shape, bool))
    return {
        "key_dequant": np.take_along_axis(key, place, 2),
        "value_dequant": np.take_along_axis(value, place, 2),
        "value_channel_scale": np.asarray(scale).reshape(batch, 1, -1),
    }
