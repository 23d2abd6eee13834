"""The heads of VWFormer against the official classes."""

import flax.linen as nn
import jax
import numpy as np

from tests.parity.case import Case
from zoo.models.dense.vwformer import LEVELS, VWFormerConfig, table


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our module and the recorded weights."""
    sizes = case.kwargs
    batch = {name: case.inputs[name].transpose(0, 2, 3, 1) for name in LEVELS}
    config = VWFormerConfig(
        widths=tuple(sizes["in_channels"]),
        width=sizes["channels"],
        num_classes=sizes["num_classes"],
        form="city" if case.meta["cls"] == "VWCityHead" else "mixed",
        num_heads=sizes["nheads"],
        skip=sizes["short_cut"],
        detail=case.params["low_level_fuse.conv.weight"].shape[1] - sizes["channels"],
    )
    model = config.build()
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), batch))
    variables = table(config).load(case.params, dict(shapes))

    @jax.jit
    def every(variables):
        out = model.apply(variables, batch)
        found = {"fused_c": out.fused, "vwformer": out.decoded, "logits": out.logits}
        for number, ratio in enumerate(config.ratios):

            def inside(module, x, number=number):
                branch = module.branches[number]
                return branch.reduced(x), branch.contexts(x)

            reduced, contexts = model.apply(variables, out.fused, method=inside)
            found[f"dope_r{ratio}"] = reduced
            found[f"context_windows_r{ratio}"] = contexts.reshape(-1, *contexts.shape[-3:])
        return found

    found = every(variables)
    return {name: _recorded(name, np.asarray(found[name])) for name in case.outputs}


def _recorded(name: str, x: np.ndarray) -> np.ndarray:
    """Channels first; of large maps the first eight channels, of windows the first four."""
    x = np.moveaxis(x, -1, 1)
    if name.startswith("context_windows"):
        return x[:4]
    return x[:, :8] if x.size > 8000 else x
