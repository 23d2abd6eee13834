"""How fast the zoo is against PyTorch, in one run: `python benchmarks/speed.py [--out FILE]`.

ViT-B/16 forward against timm and transformers (eager), and prefill and decoding of a decoder of
some 150 M parameters against transformers (eager and sdpa attention, static cache). Float32 on a
CPU, bfloat16 where JAX and PyTorch both see a GPU. Ours and theirs take turns on the same machine,
with as many threads as there are cores; a ratio above 1 says that ours is faster. Needs torch,
transformers and timm (`pip install -e .[test]`, see CONTRIBUTING.md).
"""

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.live.reference import state_of, timm, torch, transformers
from zoo.models.core.hf import Fields
from zoo.models.core.names import tree_names
from zoo.models.core.registry import base, base_of, config, read_hf
from zoo.models.parts.layers.stack import unstack

PROMPT, NEW = 512, 32


def take_turns(
    ours: Callable[[], Any], theirs: dict[str, Callable[[], Any]], rounds: int
) -> dict[str, Any]:
    """Seconds of each, the fastest of `rounds` turns, and the ratios theirs / ours."""
    runs = {"zoo": ours, **theirs}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()  # compiles, warms up
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    best = {name: min(times) for name, times in seconds.items()}
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {name: round(best[name] / best["zoo"], 3) for name in theirs}
    return {"seconds": best, "median_seconds": middle, "ratio": ratios}


def vit(rounds: int, batch: int = 8) -> dict[str, Any]:
    """ViT-B/16 at 224 x 224: the forward pass of a classifier."""
    pixels = np.random.default_rng(0).normal(size=(batch, 224, 224, 3)).astype(np.float32)
    theirs = timm.create_model("vit_base_patch16_224").eval()
    hf = transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000)).eval()
    settings = config("timm_vit_b16_224") if False else config("vit_b16_augreg_224")
    model = settings.build()
    shapes = jax.eval_shape(model.init, jax.random.key(0), settings.inputs(1))["params"]
    table = base("timm_vit").table(settings)
    params = table.load(state_of(theirs), nn.unbox(shapes))
    params = unstack(jax.tree.map(jnp.asarray, params), tree_names(shapes))
    forward = jax.jit(lambda params, pixels: model.apply({"params": params}, {"pixels": pixels}))
    image = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())

    def run() -> None:
        jax.block_until_ready(forward(params, jnp.asarray(pixels)))

    with torch.inference_mode():
        return take_turns(
            run,
            {"timm": lambda: theirs(image), "transformers": lambda: hf(pixel_values=image)},
            rounds,
        )


def decoder(rounds: int) -> dict[str, Any]:
    """A Llama of 12 layers of width 1024: prefill of a prompt, and decoding after it."""
    sizes = transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32_000,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    hf = transformers.LlamaForCausalLM(sizes).eval()
    settings = read_hf(Fields("llama", hf.config.to_dict()))
    model = settings.build()
    shapes = jax.eval_shape(model.init, jax.random.key(0), settings.inputs(1))["params"]
    params = base_of("llama").table(settings).load(state_of(hf), nn.unbox(shapes))
    params = unstack(jax.tree.map(jnp.asarray, params), tree_names(shapes))
    ids = np.random.default_rng(0).integers(3, 32_000, (1, PROMPT)).astype(np.int32)

    @jax.jit
    def prefill(params: Any, ids: jax.Array) -> Any:
        batch = {"ids": ids, "text_mask": jnp.ones(ids.shape, bool)}
        return model.apply({"params": params}, batch, room=NEW, method="prefill")

    @functools.partial(jax.jit, donate_argnums=2)
    def decode(params: Any, token: jax.Array, cache: Any) -> Any:
        def turn(carry: Any, _: None) -> Any:
            token, cache = carry
            logits, cache = model.apply({"params": params}, token, cache, method="decode")
            return (logits.argmax(-1)[:, None].astype(jnp.int32), cache), None

        return jax.lax.scan(turn, (token, cache), None, length=NEW)[0][0]

    prompt = torch.from_numpy(ids.astype(np.int64))

    def their_cache(attention: str) -> Any:
        hf.set_attn_implementation(attention)
        return transformers.StaticCache(config=hf.config, max_cache_len=PROMPT + NEW)

    def their_prefill(attention: str) -> Any:
        cache = their_cache(attention)
        return hf(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1), cache

    def their_decode(attention: str) -> None:
        token = prompt[:, -1:]
        cache = prepared[attention]
        hf.set_attn_implementation(attention)
        for step in range(NEW):
            out = hf(
                token,
                past_key_values=cache,
                use_cache=True,
                cache_position=torch.tensor([PROMPT + step]),
                position_ids=torch.tensor([[PROMPT + step]]),
            )
            token = out.logits[:, -1:].argmax(-1)

    kinds = ("eager", "sdpa")
    with torch.inference_mode():
        prepared = {kind: their_prefill(kind)[1] for kind in kinds}
        first = take_turns(
            lambda: jax.block_until_ready(prefill(params, ids)),
            {f"transformers {kind}": functools.partial(their_prefill, kind) for kind in kinds},
            rounds,
        )
        token = jnp.asarray(ids[:, -1:])

        def ours() -> None:
            start = time.perf_counter()
            jax.block_until_ready(decode(params, token, jax.tree.map(jnp.copy, filled)))
            del start

        filled = prefill(params, ids)[1]
        then = take_turns(
            ours,
            {f"transformers {kind}": functools.partial(their_decode, kind) for kind in kinds},
            rounds,
        )
    number = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {"parameters": number, "prompt": PROMPT, "new": NEW, "prefill": first, "decode": then}


def main() -> None:
    """Run everything and write what came out, with machine and versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("vit", "decoder"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    parts = {"vit_b16": vit, "decoder": decoder}
    found = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "timm": timm.__version__,
        },
        "dtype": "float32",
        **{name: run(args.rounds) for name, run in parts.items() if args.only in (None, name[:3], name)},
    }
    text = json.dumps(found, indent=2) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
