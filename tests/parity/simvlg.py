"""SimVLG against the official merging BERT, and against its attention over frames."""

import flax.linen as nn
import jax
import numpy as np

from tests.parity.case import Case
from zoo.models.core.keytable import Table
from zoo.models.vlm.simvlg import (
    FRAME_ROWS,
    FrameAttention,
    MergeEncoder,
    TomeFormer,
    encoder_rows,
)


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our modules and the recorded weights."""
    return _encoder(case) if "bert" in case.kwargs else _frames(case)


def _encoder(case: Case) -> dict[str, np.ndarray]:
    sizes = case.kwargs["bert"]
    config = TomeFormer(
        width=sizes["hidden_size"],
        depth=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        mlp_dim=sizes["intermediate_size"],
        r=case.kwargs["r"],
        max_length=sizes["max_position_embeddings"],
        norm_eps=sizes["layer_norm_eps"],
    )
    states = _run(case, MergeEncoder(config), encoder_rows(config), case.inputs["inputs_embeds"])
    found = {f"hidden_{depth}": state for depth, state in enumerate(states)}
    found["last_hidden_state"] = states[-1]
    return {name: np.asarray(found[name]) for name in case.outputs}


def _frames(case: Case) -> dict[str, np.ndarray]:
    x = case.inputs["x"]
    module = FrameAttention(case.kwargs["hidden_dim"], case.kwargs["num_heads"])
    videos = x.reshape(-1, case.meta["num_frames"], *x.shape[1:])
    return {"x": np.asarray(_run(case, module, Table(FRAME_ROWS), videos)).reshape(x.shape)}


def _run(case: Case, module: nn.Module, table: Table, x: np.ndarray):
    """What a module makes of `x` with the recorded weights."""
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x))["params"]
    params = table.load(case.params, shapes)
    return jax.jit(module.apply)({"params": params}, x)
