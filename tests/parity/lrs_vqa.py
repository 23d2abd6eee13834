"""The region focus module, the choice of tokens and of tiles against the official LRS-VQA."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.parity.case import Case
from zoo.models.base.llama import read
from zoo.models.core.hf import Fields
from zoo.models.core.types import Stream, Tokens
from zoo.models.reduction.lrs_vqa.focus import RegionFocus, above, focus_table, selected, tile_at


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from the recorded inputs and weights."""
    if "inputs_embeds" in case.inputs:
        return _focus(case)
    return _select(case) if "scores" in case.inputs else _tiles(case)


def _focus(case: Case) -> dict[str, np.ndarray]:
    settings, sizes = case.kwargs, case.meta["sizes"]
    own = "select_stu_state_layer"  # which hidden states are handed on to nobody
    fields = {name: value for name, value in settings["llama"].items() if name != own}
    decoder = read(Fields("case", fields)).decoder
    depth = settings["num_layers"]
    module = RegionFocus(decoder, depth)
    hidden = jnp.asarray(case.inputs["inputs_embeds"])
    stream = Stream(hidden, Tokens.sequence(jnp.ones(hidden.shape[:2], bool)))
    first = sizes["pre_text"] + sizes["global_tokens"]
    place = np.arange(hidden.shape[1])
    local = (place >= first) & (place < first + sizes["local_tokens"])
    given = jnp.broadcast_to(local, hidden.shape[:2])
    shapes = jax.eval_shape(module.init, jax.random.key(0), stream, given)["params"]
    params = focus_table(decoder, depth).load(case.params, {"focus": nn.unbox(shapes)})["focus"]
    score, scored = jax.jit(module.apply)({"params": params}, stream, given)
    return {
        "local_attention": np.asarray(score)[:, local],
        "hidden_before_score": np.asarray(scored),
    }


def _select(case: Case) -> dict[str, np.ndarray]:
    score = jnp.asarray(case.inputs["scores"])
    real = jnp.asarray(case.inputs.get("valid_mask", np.ones(score.shape)) > 0)
    row = case.kwargs["tokens_per_row"]
    newline = jnp.arange(score.size) % row == row - 1
    kept = selected(score, real, newline, case.kwargs["pruning_ratio"])
    return {
        "ratio_indices": np.flatnonzero(kept),
        "threshold_indices": np.flatnonzero(above(score, real, case.kwargs["threshold"])),
    }


def _tiles(case: Case) -> dict[str, np.ndarray]:
    size, blocks = (
        jnp.array(case.kwargs[name]) for name in ("now_lvl_token_num_hw", "next_block_num_hw")
    )
    tokens = jnp.asarray(case.inputs["selected_token_indices"])
    down, across = tile_at(tokens // size[1], tokens % size[1], size, blocks)
    found = np.unique(np.stack([down, across], -1), axis=0)
    return {
        "tile_positions_hw": found,
        "padded_feature_grid_shape": np.array(blocks) * case.kwargs["pool_patch_len"],
    }
