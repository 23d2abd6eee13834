"""DeepStack against the official code: the decoder, the tower, and how crops become groups."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import qwen3_vl_cases
from tests.parity.case import Case
from zoo.models.connectors.deepstack import DeepStack, DeepStackV, _by_level
from zoo.models.core.types import Reserve, Stream, Tokens, TokenSet, take
from zoo.models.parts.assemblies.splice import number_taps, splice
from zoo.models.parts.connect.crops import deal
from zoo.models.parts.decoders.gqa import Decoder, DecoderConfig, decoder_table
from zoo.models.parts.towers.vit import ViTConfig, clip_table
from zoo.processors import tiling


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our modules and the recorded weights."""
    if "local_features" in case.inputs:
        return _decoder(case)
    if "local_crops" in case.inputs:
        return _tower(case)
    if "local_stack" in case.outputs:
        return _sampling(case)
    if "image_newline" in case.inputs:
        return _layout(case)
    if "visual_mask" in case.inputs:
        return qwen3_vl_cases.text(case)
    return qwen3_vl_cases.vision(case)


def _decoder(case: Case) -> dict[str, np.ndarray]:
    """The decoder with given groups: its layers' inputs, its output, and one decoded token."""
    k, inputs = case.kwargs, case.inputs
    config = DecoderConfig(
        vocab_size=1,  # the case starts from embeddings
        width=k["hidden_size"],
        depth=k["num_hidden_layers"],
        num_heads=k["num_attention_heads"],
        num_kv_heads=k["num_attention_heads"],
        mlp_dim=k["intermediate_size"],
        norm_eps=k["rms_norm_eps"],
        tie_embeddings=True,
    )
    policy = DeepStack(k["local_features_start"], k["local_features_interval"], k["num_stacks"])
    decoder = Decoder(config, policy.apply(config.plan(), slots=0))

    groups, first = inputs["local_features"], inputs["image_start"]
    hidden = jnp.asarray(inputs["inputs_embeds"])
    length = hidden.shape[1]
    cell = np.arange(length) - first[:, None]
    cell = np.where((cell >= 0) & (cell < groups.shape[2]), cell, -1)
    tokens = Tokens.sequence(jnp.asarray(inputs["attention_mask"] > 0), cell=jnp.asarray(cell))
    # The original counts the padding on, which decides what its rows hold.
    tokens = tokens.replace(position=tokens.order.astype(jnp.float32))
    stream = Stream(hidden, tokens, groups.shape[2])

    shapes = jax.eval_shape(lambda key: decoder.init(key, stream, method="run"), jax.random.key(0))
    state = {f"model.{key}": value for key, value in case.params.items()}
    state["model.embed_tokens.weight"] = np.zeros((1, config.width), np.float32)
    vocabulary = {"embedding": jax.ShapeDtypeStruct((1, config.width), jnp.float32)}
    shapes = {**nn.unbox(shapes["params"]), "embedding": vocabulary}
    params = decoder_table(config).load(state, shapes)
    memory = {"taps": jnp.asarray(groups)}

    @jax.jit
    def layer_inputs(params: dict) -> jax.Array:
        """The stream before each layer, with what is added to it there."""
        bound, now, found = decoder.bind({"params": params}), stream, []
        for layer, step in enumerate(bound.stack.steps):
            entered = now.hidden
            for added in step.policies:
                _, entered, _ = added(None, None, _seen, now, None, memory)
            found.append(entered)
            now, _, _ = bound.stack(now, None, memory, start=layer, stop=layer + 1)
        return jnp.stack(found)

    @jax.jit
    def both(params: dict) -> tuple[jax.Array, jax.Array]:
        """The hidden states of the prompt, and those of one token more."""
        run = functools.partial(decoder.apply, {"params": params}, method="run")
        prompt, states, _ = run(stream, Reserve(1), memory)
        position = jnp.asarray(inputs["decode_position_ids"], jnp.int32)
        text = Tokens(
            position.astype(jnp.float32),
            jnp.full_like(position, length),
            jnp.zeros_like(position),
            jnp.ones(position.shape, bool),
            {"cell": jnp.full_like(position, -1)},
        )
        after, _, _ = run(Stream(jnp.asarray(inputs["decode_embeds"]), text), states)
        return prompt.hidden, after.hidden

    prompt, after = both(params)
    return {
        "last_hidden_state": np.asarray(prompt),
        "layer_inputs": np.asarray(layer_inputs(params)),
        "decode_hidden": np.asarray(after),
    }


def _seen(stream: Stream, state: object) -> tuple:
    """In place of a layer: hands back what it is given."""
    return stream, stream.hidden, {}


def _tower(case: Case) -> dict[str, np.ndarray]:
    """The tower that adds groups within itself."""
    k = case.kwargs
    sizes = {
        "image_size": k["image_size"],
        "patch_size": k["patch_size"],
        "width": k["hidden_size"],
        "depth": k["num_hidden_layers"],
        "num_heads": k["num_attention_heads"],
        "mlp_dim": k["intermediate_size"],
        "activation": k["hidden_act"],
    }
    config = DeepStackV(**sizes, start=k["start_layer"])
    whole, crops = (
        jnp.asarray(case.inputs[name].transpose(0, 2, 3, 1))
        for name in ("global_images", "local_crops")
    )
    views = jnp.concatenate([whole[:, None], crops.reshape(len(whole), -1, *crops.shape[1:])], 1)
    tower = config.build()
    shapes = nn.unbox(jax.eval_shape(tower.init, jax.random.key(0), views)["params"])
    state = {k.removeprefix("vision_model."): v for k, v in case.params.items()}
    variables = {"params": clip_table(config).load(state, shapes)}
    read = (config.depth - 1, config.depth)
    features = tower.apply(variables, views, taps=read)
    plain = ViTConfig(**sizes).build()
    everything = jnp.concatenate([whole, crops])
    embedded = plain.apply(variables, everything, taps=(0,), stop_after=0).taps[0]
    return {
        "features": np.asarray(features.taps[read[0]][:, 1:]),
        "last_hidden_state": np.asarray(features.taps[read[1]]),
        "patch_embed_out": np.asarray(embedded),
    }


def _sampling(case: Case) -> dict[str, np.ndarray]:
    """Projected views to the tokens of the whole and the groups."""
    kind = re.search(r"deepstack_sampling='(\w+)'", case.meta["function"])[1]
    groups = int(re.search(r"num_crops=(\d+)", case.meta["function"])[1])
    whole, found = [], []
    for i, (w, h) in enumerate(case.inputs["grids_wh"]):
        first, *crops = case.inputs[f"features_{i}"]
        whole.append(first)
        crops = jnp.stack(crops)
        side = (round(crops.shape[1] ** 0.5),) * 2
        grid = jnp.array([h, w])
        found.append(deal(crops, grid, side=side, groups=groups, sampling=kind))
    return {"global_features": np.stack(whole), "local_stack": np.stack(found, 1)}


def _layout(case: Case) -> dict[str, np.ndarray]:
    """The HD form: views and the groups of each, laid out row by row with newlines."""
    out = {}
    newline = jnp.asarray(case.inputs["image_newline"])[None]
    for i, (w, h) in enumerate(case.inputs["grids_wh"]):
        views = jnp.asarray(case.inputs[f"input_features_{i}"])  # [1 + w h, N, D]
        crops = jnp.asarray(case.inputs[f"stack_features_{i}"])  # [4 (1 + w h), N, D]
        side = round(views.shape[1] ** 0.5)
        groups = crops.reshape(len(views), -1, *crops.shape[1:])
        groups = deal(groups, jnp.array([2, 2]), side=(side, side), groups=4, sampling="2d")
        taps = _by_level(groups[None])
        size = (int(h), int(w))
        reading = tiling.anyres(size, [size], tile=1, grid=(side, side))
        places = tiling.pack([[reading]], tokens=side**2)
        stream = splice(
            jnp.array([[9]]),
            jnp.zeros((1, 1, views.shape[-1])),
            TokenSet(views[None]),
            image_id=9,
            extra=newline,
            sizes=places["sizes"],
            layout=places["layout"],
        )
        cell = stream.tokens.tags["cell"]
        levels = [take(level, cell)[0] for level in number_taps(taps, places, newline)]
        out[f"sequence_{i}"] = np.asarray(stream.hidden[0])
        out[f"stack_{i}"] = np.stack(levels)
    return out
