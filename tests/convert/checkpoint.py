"""Tiny checkpoints in the Hugging Face layout, made by hand: no PyTorch is needed."""

import json
from pathlib import Path

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np

from zoo.convert.place import abstract_params
from zoo.convert.safetensors import write_header
from zoo.models.core.hf import Fields
from zoo.models.core.registry import base_of, read_hf

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def config_of(fields=LLAMA):
    return read_hf(Fields(fields["model_type"], fields))


def state_of(fields=LLAMA, dtype=ml_dtypes.bfloat16, seed=0):
    """{name: array} of a whole checkpoint, drawn at random."""
    config = config_of(fields)
    table = base_of(fields["model_type"]).table(config)
    shapes = table.shapes(nn.unbox(abstract_params(config)))
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write_safetensors(file, state):
    """One file; returns the number of its bytes."""
    with open(file, "wb") as out:
        places = write_header(out, {name: (a.dtype, a.shape) for name, a in state.items()})
        for name, array in state.items():
            assert out.tell() == places[name]
            out.write(np.ascontiguousarray(array).tobytes())
        return out.tell()


def write_checkpoint(folder, state=None, fields=LLAMA, shards=1):
    """A folder with `config.json`, a tokenizer nobody can read, a card, and weights."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = state_of(fields) if state is None else state
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "README.md").write_text("a card\n")
    (folder / "modeling.py").write_text("raise SystemExit\n")
    if shards == 1:
        write_safetensors(folder / "model.safetensors", state)
        return folder
    names = np.array_split(sorted(state), shards)
    home = {}
    for number, group in enumerate(names, 1):
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        write_safetensors(folder / file, {str(name): state[str(name)] for name in group})
        home |= dict.fromkeys(map(str, group), file)
    index = {"metadata": {}, "weight_map": home}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def nbytes_per_device(arrays):
    """Bytes of all arrays of a tree on every device."""
    out = {}
    for leaf in jax.tree.leaves(arrays):
        for part in leaf.addressable_shards:
            out[part.device] = out.get(part.device, 0) + part.data.size * leaf.itemsize
    return out
