"""How fast the zoo is against PyTorch, in one run: `python benchmarks/speed.py [--out FILE]`.

ViT-B/16 forward against timm and transformers (eager), and prefill and decoding of a decoder of
some 200 M parameters against transformers (eager and sdpa attention, static cache), in float32 on
the CPU. Ours and theirs take turns on the same machine, with as many threads as there are cores; a
ratio above 1 says that ours is faster. Needs what the tests need: `./run test --version` installs
it.
"""

import argparse
import functools
import os
import sys
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.timing import Runs, compare, machine, report, timed
from tests.live.reference import state_of, timm, torch, transformers
from zoo.models.core.compiled import jit
from zoo.models.core.config import ModelConfig
from zoo.models.core.hf import Fields
from zoo.models.core.keytable import Table
from zoo.models.core.names import tree_names
from zoo.models.core.registry import base, config, read_hf
from zoo.models.parts.layers.stack import unstack

PROMPT, NEW = 512, 32


def ours(config: ModelConfig, table: Table, original: torch.nn.Module) -> tuple[nn.Module, Any]:
    """The module of `config` and the parameters of `original`, laid out for inference."""
    model = config.build()
    shapes = jax.eval_shape(model.init, jax.random.key(0), config.inputs(1))["params"]
    params = table.load(state_of(original), nn.unbox(shapes))
    return model, unstack(jax.tree.map(jnp.asarray, params), tree_names(shapes))


def vit(rounds: int, batch: int = 8) -> dict[str, Any]:
    """ViT-B/16 at 224 x 224: the forward pass of a classifier."""
    pixels = np.random.default_rng(0).normal(size=(batch, 224, 224, 3)).astype(np.float32)
    theirs = timm.create_model("vit_base_patch16_224").eval()
    hf = transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000)).eval()
    settings = config("vit_b16_augreg")
    model, params = ours(settings, base("timm_vit").table(settings), theirs)
    forward = jit(lambda params, x: model.apply({"params": params}, {"pixels": x}).logits)
    image = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    with torch.inference_mode():
        error = np.abs(np.asarray(forward(params, pixels)) - theirs(image).numpy()).max()
        runs = {
            "zoo": timed(lambda: forward(params, pixels)),
            "timm": timed(lambda: theirs(image)),
            "transformers": timed(lambda: hf(pixel_values=image)),
        }
        return {"batch": batch, "largest_error": float(error), **compare(runs, rounds)}


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
    model, params = ours(settings, base("llama").table(settings), hf)
    ids = np.random.default_rng(0).integers(3, 32_000, (1, PROMPT)).astype(np.int32)
    prompt = torch.from_numpy(ids.astype(np.int64))

    @jit
    def prefill(params: Any, ids: jax.Array) -> Any:
        batch = {"ids": ids, "text_mask": jnp.ones(ids.shape, bool)}
        return model.apply({"params": params}, batch, room=NEW, method="prefill")

    @jit(donate_argnums=2)
    def decode(params: Any, token: jax.Array, cache: Any) -> Any:
        def turn(carry: Any, _: None) -> Any:
            token, cache = carry
            logits, cache = model.apply({"params": params}, token, cache, method="decode")
            return (logits.argmax(-1)[:, None].astype(jnp.int32), cache), None

        return jax.lax.scan(turn, (token, cache), None, length=NEW)[0]

    def their_prefill(attention: str) -> Any:
        hf.set_attn_implementation(attention)
        cache = transformers.StaticCache(config=hf.config, max_cache_len=PROMPT + NEW)
        return hf(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1), cache

    def our_decode() -> float:
        cache = jax.block_until_ready(prefill(params, ids)[1])
        return timed(lambda: decode(params, ids[:, -1:], cache))()

    def their_decode(attention: str) -> float:
        cache = their_prefill(attention)[1]
        token, start = prompt[:, -1:], time.perf_counter()
        for step in range(NEW):
            place = torch.tensor([[PROMPT + step]])
            out = hf(token, past_key_values=cache, use_cache=True, position_ids=place)
            token = out.logits[:, -1:].argmax(-1)
        return time.perf_counter() - start

    kinds = ("eager", "sdpa")
    with torch.inference_mode():
        logits = np.asarray(prefill(params, ids)[0])
        error = np.abs(logits - their_prefill("eager")[0].logits[:, -1].numpy()).max()
        first: Runs = {"zoo": timed(lambda: prefill(params, ids))}
        then: Runs = {"zoo": our_decode}
        for kind in kinds:
            first[f"transformers, {kind}"] = timed(functools.partial(their_prefill, kind))
            then[f"transformers, {kind}"] = functools.partial(their_decode, kind)
        return {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "prompt": PROMPT,
            "new_tokens": NEW,
            "largest_error": float(error),
            "prefill": compare(first, rounds),
            "decode": compare(then, rounds),
        }


def main() -> None:
    """Run everything and write what came out, with machine and versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("vit_b16", "decoder"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    parts = {"vit_b16": vit, "decoder": decoder}
    found: dict[str, Any] = {
        **machine(jax, torch, transformers, timm),
        "dtype": "float32",
    }
    for name, run in parts.items():
        if args.only in (None, name):
            found[name] = run(args.rounds)
    report(found, args.out)


if __name__ == "__main__":
    main()
