"""ESPCN from scratch on 91 real pictures: `python benchmarks/espcn_t91.py FOLDER [--steps N]`.

FOLDER is that of `espcn_set5.py`, with the training pictures in `t91/`. The network for a factor of
3 learns luma from random crops, and is judged on Set5 after every tenth of the steps: PSNR without
the border, beside that of bicubic resizing.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.espcn_set5 import pairs, resized
from zoo.evaluate.dense import psnr
from zoo.models.generators.espcn import VARIANTS
from zoo.processors.colour import rgb_to_ycbcr
from zoo.train.objectives.restore import Restore

FACTOR, SIDE, BATCH = 3, 17, 16
SEED = 0


def luma(rgb: np.ndarray) -> np.ndarray:
    """RGB bytes as full-range luma [H, W, 1] in [0, 1]."""
    return (rgb_to_ycbcr(rgb)[..., :1] / 255).astype(np.float32)


def training_pairs(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Luma of the small and of the large training pictures."""
    found = []
    for file in sorted(p for p in (folder / "t91").rglob("*") if p.suffix in (".png", ".bmp")):
        rgb = np.asarray(Image.open(file).convert("RGB"))
        height, width = (side // FACTOR * FACTOR for side in rgb.shape[:2])
        rgb = rgb[:height, :width]
        if min(height, width) >= SIDE * FACTOR:
            small = resized(rgb, (height // FACTOR, width // FACTOR))
            found.append((luma(small), luma(rgb)))
    return found


def crops(
    pictures: list[tuple[np.ndarray, np.ndarray]], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """A batch of crops, turned and mirrored at random."""
    small, large = [], []
    for picture in rng.integers(len(pictures), size=BATCH):
        lr, hr = pictures[picture]
        y, x = (rng.integers(side - SIDE + 1) for side in lr.shape[:2])
        a = lr[y : y + SIDE, x : x + SIDE]
        b = hr[y * FACTOR : (y + SIDE) * FACTOR, x * FACTOR : (x + SIDE) * FACTOR]
        turns, mirror = rng.integers(4), rng.integers(2)
        for crop, into in ((a, small), (b, large)):
            crop = np.rot90(crop, turns)
            into.append(crop[:, ::-1] if mirror else crop)
    return {"pixels": np.stack(small), "target": np.stack(large)}


def main() -> int:
    """Train and print; the exit status is 1 unless the network ends above bicubic."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    began, config = time.monotonic(), VARIANTS[f"espcn_x{FACTOR}"]
    model, objective = config.build(), Restore()
    rate = optax.cosine_decay_schedule(1e-3, args.steps)
    optimizer = optax.adam(rate)

    def step(params, state, batch):
        def error(params):
            arguments = (model, {"params": params}, {}, batch, jax.random.key(0), None)
            return objective.loss(*arguments)[0]["loss"].value

        updates, state = optimizer.update(jax.grad(error)(params), state)
        return optax.apply_updates(params, updates), state

    zeros = jax.tree.map(lambda spec: jnp.zeros(spec.shape), config.inputs(1))
    params = nn.unbox(model.init(jax.random.key(SEED), zeros))["params"]
    state, step = optimizer.init(params), jax.jit(step, donate_argnums=(0, 1))
    pictures, rng = training_pairs(args.folder), np.random.default_rng(SEED)
    judged = [(luma(lr), luma(hr), lr, hr) for lr, hr in pairs(args.folder, FACTOR)]
    border = {"border": FACTOR}
    bicubic = np.mean(
        [psnr(luma(resized(lr, hr.shape[:2])), y, **border) for _, y, lr, hr in judged]
    )
    curve = {}
    for number in range(1, args.steps + 1):
        params, state = step(params, state, crops(pictures, rng))
        if number % max(1, args.steps // 10) == 0 or number == args.steps:
            made = [model.apply({"params": params}, x[None], method="upscale") for x, *_ in judged]
            each = [
                psnr(np.asarray(m)[0], y, **border)
                for m, (_, y, *_) in zip(made, judged, strict=True)
            ]
            curve[number] = float(np.mean(each))
            if not args.json:
                print(f"{number:7d}  {curve[number]:.3f} dB  bicubic {bicubic:.3f} dB", flush=True)
    if args.json:
        seconds = round(time.monotonic() - began)
        facts = {"seed": SEED, "bicubic": float(bicubic), "psnr": curve, "seconds": seconds}
        print(json.dumps(facts, indent=2))
    return int(curve[args.steps] <= bicubic)


if __name__ == "__main__":
    sys.exit(main())
