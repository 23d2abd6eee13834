"""The cases of Qwen3-VL among those of DeepStack: its tower and its decoder."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.parity.case import Case
from zoo.models.base.qwen3_vl import read, table
from zoo.models.core.hf import Fields
from zoo.models.core.keytable import Table
from zoo.models.core.tree import flatten_dict, unflatten_dict
from zoo.models.core.types import IMAGE, Array, Memory, Stream, Tokens
from zoo.models.parts.assemblies.qwen_vl import QwenVL, QwenVLConfig
from zoo.models.parts.layers.block import Block
from zoo.processors.native import NativeSpec, Picture

ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1]}
SMALL_TEXT = {"num_hidden_layers": 5, "head_dim": 8, "rope_parameters": ROPE}
SMALL_VISION = {"depth": 3, "hidden_size": 8, "num_heads": 1, "deepstack_visual_indexes": [0, 1, 2]}


def vision(case: Case) -> dict[str, np.ndarray]:
    """The patches of several pictures through the tower and all of its connectors."""
    width = case.kwargs["out_hidden_size"]
    config = _config({**SMALL_TEXT, "hidden_size": width}, case.kwargs)
    params = _params(config, case, "model.visual.")
    grids = [tuple(map(int, grid)) for grid in case.inputs["grid_thw"]]
    ends = np.cumsum([t * h * w for t, h, w in grids])[:-1]
    parts = np.split(case.inputs["pixel_patches"], ends)
    pictures = [Picture(*each) for each in zip(parts, grids, strict=True)]
    batch = NativeSpec.of(config).pack([pictures])

    def run(model: QwenVL, batch: dict[str, Array]) -> tuple[Array, ...]:
        names = ("grid", "segment", "frame")
        tower = model.tower(batch["patches"], **{name: batch[f"patch_{name}"] for name in names})
        visual = model.encode_image(batch)
        return tower.tokens[0], visual.tokens.tokens[0, 0], visual.memory["taps"][:, 0]

    hidden, merged, levels = jax.jit(partial(config.build().apply, method=run))(params, batch)
    patches = len(case.inputs["pixel_patches"])
    tokens = patches // config.tower.block
    return {
        "last_hidden_state": np.asarray(hidden[:patches]),
        "merged": np.asarray(merged[:tokens]),
        "deepstack_features": np.asarray(levels[:, :tokens]),
    }


def text(case: Case) -> dict[str, np.ndarray]:
    """Embedded text and levels for its image tokens through the decoder."""
    width = case.kwargs["hidden_size"]
    config = _config(case.kwargs, {**SMALL_VISION, "out_hidden_size": width})
    params = _params(config, case, "model.language_model.")
    seen, embedded = case.inputs["visual_mask"], case.inputs["inputs_embeds"]
    cell = np.where(seen, np.cumsum(seen, -1) - 1, -1).astype(np.int32)
    levels, slots = case.inputs["deepstack_embeds"], int(seen.sum(-1).max())
    taps = np.zeros((len(levels), len(seen), slots, width), np.float32)
    taps[:, np.nonzero(seen)[0], cell[seen]] = levels
    tokens = Tokens.sequence(jnp.ones(seen.shape, bool), cell=jnp.asarray(cell)).replace(
        position=jnp.asarray(case.inputs["position_ids_thw"].transpose(1, 2, 0), jnp.float32),
        modality=jnp.asarray(seen * IMAGE, jnp.int32),
    )
    stream = Stream(jnp.asarray(embedded), tokens, slots)

    def run(model: QwenVL, stream: Stream, memory: Memory) -> tuple[Array, list[Array]]:
        inputs = []

        def keep(call: Any, args: tuple, kwargs: dict, context: Any) -> Any:
            if isinstance(context.module, Block) and context.method_name == "__call__":
                inputs.append(args[0].hidden)
            return call(*args, **kwargs)

        hidden = model.decoder.run(stream, None, memory)[0].hidden
        with nn.intercept_methods(keep):  # layer by layer, because scanned ones have no inputs
            for layer in range(config.decoder.depth):
                stream, *_ = model.decoder.stack(stream, None, memory, start=layer, stop=layer + 1)
        return hidden, inputs

    memory = {"taps": jnp.asarray(taps)}
    hidden, inputs = jax.jit(partial(config.build().apply, method=run))(params, stream, memory)
    return {"last_hidden_state": np.asarray(hidden), "layer_inputs": np.stack(inputs)}


def _config(text: dict[str, Any], vision: dict[str, Any]) -> QwenVLConfig:
    return read(Fields("case", {"text_config": text, "vision_config": vision}))


def _params(config: QwenVLConfig, case: Case, prefix: str) -> dict[str, Any]:
    """The part of the model that the case has the weights of, through its rows of the key table."""
    state = {prefix + key: leaf for key, leaf in case.params.items()}
    shapes = jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))["params"]
    leaves = flatten_dict(nn.unbox(shapes))
    rows = tuple(
        row
        for row in table(config).rows
        if hasattr(row, "keys") and any(key.format(0) in state for key in row.keys)
    )
    paths = {path for row in rows for path in row.paths}
    kept = {path: leaf for path, leaf in leaves.items() if "/".join(path) in paths}
    return {"params": Table(rows).load(state, unflatten_dict(kept))}
