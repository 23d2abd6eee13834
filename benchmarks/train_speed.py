"""How fast the zoo trains against PyTorch, in one run: `python benchmarks/train_speed.py`.

A step of `zoo train` (loss, gradient, clipping, AdamW) of a Llama of some 130 M parameters against
the same step of transformers, eager and through torch.compile, in float32 on the CPU: same weights,
same batch, same optimizer. They take turns on the same machine, with as many threads as there are
cores; a ratio above 1 says that ours is faster. Attention is transformers' default, sdpa. Needs
what the tests need: `./run test --version` installs it.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.timing import Runs, compare, machine, report, timed
from tests.live.reference import state_of, torch, transformers
from zoo.models.core.config import ModelConfig
from zoo.models.core.hf import Fields
from zoo.models.core.registry import base, read_hf
from zoo.train.config import Experiment
from zoo.train.data.sources import DataConfig
from zoo.train.host import keep_freed_memory
from zoo.train.mesh import MeshConfig, batch_sharding, placed, put_batch
from zoo.train.optim import OptimConfig
from zoo.train.setup import Setup

LR, CLIP_NORM = 1e-4, 1.0

SIZES = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 32_000,
    "max_position_embeddings": 2048,
}
TINY = {
    **SIZES,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 320,
}

Step = Callable[[], Any]
"""Moves a model by one step and returns the loss before it."""


def our_step(config: ModelConfig, start: Any, batch: dict[str, np.ndarray], mesh: Any) -> Step:
    """The step that `zoo train` makes.

    Args:
      config: of the model.
      start: its parameters, as NumPy arrays.
      batch: `ids`, `labels` and `text_mask` [B, L].
      mesh: where all lie.
    """
    optim = OptimConfig(lr=LR, schedule="constant", warmup=0, clip_norm=CLIP_NORM)
    rows = len(batch["ids"])
    setup = Setup.of(
        Experiment("speed", config, DataConfig(), steps=1_000, batch_size=rows, optim=optim)
    )
    abstract = setup.state(mesh)
    start = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), start, abstract.params)
    state = setup.begin(abstract, start)
    train_step, placed_batch = setup.train_step(abstract), put_batch(batch, batch_sharding(mesh))

    def step() -> Any:
        nonlocal state
        state, metrics = train_step(state, placed_batch, None)
        return metrics["loss"]

    return step


def their_step(model: Any, batch: dict[str, np.ndarray], *, compiled: bool) -> Step:
    """The same with PyTorch; `model` is what moves."""
    ids = torch.from_numpy(batch["ids"].astype(np.int64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    forward = torch.compile(model) if compiled else model

    def step() -> float:
        loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def compete(sizes: dict[str, int], rows: int, length: int, rounds: int) -> dict[str, Any]:
    """What each takes for a step of `rows` x `length` tokens, and that all lower the same loss."""
    torch.manual_seed(0)
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).train()
    settings = read_hf(Fields("llama", hf.config.to_dict()))
    ids = np.random.default_rng(0).integers(3, sizes["vocab_size"], (rows, length)).astype(np.int32)
    batch = {"ids": ids, "labels": ids, "text_mask": np.ones(ids.shape, bool)}
    shapes = jax.eval_shape(settings.build().init, jax.random.key(0), settings.inputs(1))["params"]
    # Copies, made before theirs moves: arrays of JAX on a CPU may be the very memory of torch's.
    start = base("llama").table(settings).load(state_of(hf), nn.unbox(shapes))
    start = jax.tree.map(np.array, start)
    keep_freed_memory()
    with placed(MeshConfig()) as mesh:
        steps: dict[str, Step] = {
            "zoo": our_step(settings, start, batch, mesh),
            "transformers, eager": their_step(hf, batch, compiled=False),
        }
        losses = {name: [float(step()) for _ in range(2)] for name, step in steps.items()}
        failure = None
        try:
            compiled = their_step(hf, batch, compiled=True)
            compiled()
            steps["transformers, torch.compile"] = compiled
        except Exception as error:  # whatever is missing here: a compiler, headers, support
            failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        runs: Runs = {name: timed(step) for name, step in steps.items()}
        found = compare(runs, rounds)
    tokens = rows * length
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(start)),
        "batch": [rows, length],
        "first_losses": losses,
        "torch_compile_failed": failure,
        **found,
        "tokens_per_second": {
            name: round(tokens / seconds, 1) for name, seconds in found["seconds"].items()
        },
    }


def main(args: Sequence[str] | None = None) -> None:
    """Run it and write what came out, with machine and versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2, help="of the batch")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a model that says nothing about speed")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(args)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    sizes = TINY if options.tiny else SIZES
    found = compete(sizes, options.rows, options.length, options.rounds)
    report({**machine(jax, torch, transformers), "dtype": "float32", **found}, options.out)


if __name__ == "__main__":
    main()
