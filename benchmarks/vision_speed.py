"""How fast image classifiers are against timm, in one run: `python benchmarks/vision_speed.py`.

The forward pass of eight pictures in float32 on the CPU, with the same weights: a plain ViT,
windows (Swin), a network in the manner of ConvNeXt (InceptionNeXt), a hybrid of convolution and
attention (ViTamin), and two branches (CrossViT). Ours and timm's eager modules take turns on the
same machine, with as many threads as there are cores; a ratio above 1 says that ours is faster.
Beside it stands how long XLA takes to compile the program, and with `--compile` the same of every
backbone, in a large size. Needs what the tests need: `./run test --version` installs it.
"""

import argparse
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

from benchmarks.timing import compare, machine, report, timed
from tests.live.reference import state_of, timm, torch
from tests.live.test_vision import SIZES, drawn, variables_of
from zoo.models.core.compiled import compiler_options
from zoo.models.core.names import tree_names
from zoo.models.core.registry import base, config
from zoo.models.parts.layers.stack import unstack

MODELS = {
    "vit_base_patch16_224": ("vit_b16_augreg", base("timm_vit").table),
    **{
        name: SIZES[name]
        for name in (
            "swin_tiny_patch4_window7_224",
            "inception_next_tiny",
            "vitamin_base_224",
            "crossvit_small_240",
        )
    },
}

LARGE = (
    "swin_l",
    "t2t_vit_24",
    "crossvit_18_dagger_408",
    "vit_resnas_m",
    "vir_l16",
    "smt_l",
    "illama_l",
    "vitamin_l",
    "inceptionnext_b",
    "deepmad_89m",
    "regnetz_4gf_h",
    "fastvlm_encoder",
    "lm4visual_b16",
    "meta_transformer_l14",
)
"""A large model of every backbone."""


def compilation(name: str, batch: int) -> dict[str, float]:
    """Seconds until XLA has the program of a model's forward pass, and those that it takes then."""
    settings = config(name)
    model, inputs = settings.build(), settings.inputs(batch)
    variables = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), inputs))
    forward = jax.jit(
        lambda *args: jax.tree.leaves(model.apply(*args)), compiler_options=compiler_options()
    )
    start = time.perf_counter()
    lowered = forward.lower(variables, inputs)
    traced = time.perf_counter()
    lowered.compile()
    return {
        "trace_seconds": round(traced - start, 2),
        "compile_seconds": round(time.perf_counter() - traced, 2),
    }


def contest(original: str, side: int | None, batch: int, rounds: int) -> dict[str, Any]:
    """Seconds of a batch and of compilation, ratios, and how far the outputs are apart.

    Args:
      original: timm's name of a model.
      side: of the pictures; what the model is made for by default.
      batch: pictures.
      rounds: how often each takes its turn.
    """
    name, table = MODELS[original]
    settings = config(name)
    height = settings.inputs(1)["pixels"].shape[1] if side is None else side
    theirs = drawn(timm.create_model(original, pretrained=False)).eval()
    shapes = variables_of(settings)
    loaded = table(settings).load(state_of(theirs), shapes)
    variables = loaded if "stats" in shapes else {"params": loaded}
    model = settings.build()
    boxed = jax.eval_shape(model.init, jax.random.key(0), settings.inputs(1))["params"]
    params = unstack(jax.tree.map(jnp.asarray, variables["params"]), tree_names(boxed))
    variables = {**variables, "params": params}
    pixels = np.random.default_rng(0).normal(size=(batch, height, height, 3)).astype(np.float32)
    image = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    forward = jax.jit(
        lambda variables, x: model.apply(variables, {"pixels": x}).logits,
        compiler_options=compiler_options(),
    )
    lowered = forward.lower(variables, pixels)
    start = time.perf_counter()
    program = lowered.compile()
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        want = theirs(image).numpy()
        error = np.abs(np.asarray(program(variables, pixels)) - want).max() / np.abs(want).max()
        runs = {
            "zoo": timed(lambda: program(variables, pixels)),
            "timm": timed(lambda: theirs(image)),
        }
        found = compare(runs, rounds)
    return {
        "zoo_name": name,
        "side": height,
        "largest_relative_error": float(error),
        "compile_seconds": round(seconds, 2),
        **found,
    }


def main() -> None:
    """Run everything and write what came out, with machine and versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(MODELS), help="names of timm")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, help="of the pictures; by default the model's own")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="every backbone, too")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    found: dict[str, Any] = {**machine(jax, torch, timm), "dtype": "float32", "batch": args.batch}
    for name in args.names:
        found[name] = contest(name, args.side, args.batch, args.rounds)
    if args.compile:
        found["backbones"] = {name: compilation(name, args.batch) for name in LARGE}
    report(found, args.out)


if __name__ == "__main__":
    main()
