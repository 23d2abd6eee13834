"""Real weights on real pictures: `python benchmarks/espcn_set5.py FOLDER [--json]`.

FOLDER holds community-trained ESPCN weights and Set5 as the repository
github.com/Nhat-Thanh/ESPCN-Pytorch has them:

    ESPCN-x{2,3,4}.npz          conv_{1,2,3}.{weight,bias}
    set5/x{2,3,4}/{LR,HR}/*.png
    reference_psnr.json         what that repository's functions give
    ref_x3_img003.npz           input and output of the x3 network for one picture

Every figure of the JSON is computed anew with our network; the exit status is 1 if one is off by
0.01 dB or more. None of these files belongs to this project.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from zoo.evaluate.dense import psnr
from zoo.models.generators.espcn import ESPCN, VARIANTS, layout_of, table
from zoo.processors.colour import rgb_to_ycbcr

FACTORS = (2, 3, 4)
SIGMAS = {2: 0.3, 3: 0.2, 4: 0.2}
"""Of the blur with which that repository prepares the small pictures."""
TOLERANCE = 0.01


def to_ycbcr(rgb: np.ndarray) -> np.ndarray:
    """RGB bytes as that repository's Y, Cb and Cr in [0, 1]: full range, clipped to studio range,
    cut off to bytes and not rounded.
    """
    found = np.clip(rgb_to_ycbcr(rgb), 16, [235, 240, 240])
    return (found.astype(np.uint8) / 255).astype(np.float32)


def blurred(rgb: np.ndarray, sigma: float) -> np.ndarray:
    """RGB bytes under a Gaussian of 3 x 3 pixels, rounded; the edge is mirrored."""
    tap = np.exp(-0.5 / sigma**2)
    near = np.array([tap, 1, tap]) / (1 + 2 * tap)
    x = np.pad(rgb.astype(np.float64), ((1, 1), (1, 1), (0, 0)), mode="reflect")
    x = sum(w * x[i : i + rgb.shape[0]] for i, w in enumerate(near))
    x = sum(w * x[:, i : i + rgb.shape[1]] for i, w in enumerate(near))
    return np.rint(x).astype(np.uint8)


def network(folder: Path, factor: int) -> Any:
    """The function [H, W, 3] -> [r H, r W, 3] of the weights for a factor."""
    config = VARIANTS[f"espcn_x{factor}.ycbcr"]
    model: ESPCN = config.build()
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), config.inputs(1)))["params"]
    with np.load(folder / f"ESPCN-x{factor}.npz") as stored:
        state = dict(stored)
    params = table(config, layout_of(state)).load(state, shapes)
    return lambda x: np.asarray(
        model.apply({"params": params}, jnp.asarray(x)[None], method="upscale")[0]
    )


def pairs(folder: Path, factor: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The small and the large picture of every image, RGB bytes, by name."""
    small = sorted((folder / f"set5/x{factor}/LR").glob("*.png"))
    large = sorted((folder / f"set5/x{factor}/HR").glob("*.png"))
    for low, high in zip(small, large, strict=True):
        lr, hr = (np.asarray(Image.open(file).convert("RGB")) for file in (low, high))
        yield lr, hr[: lr.shape[0] * factor, : lr.shape[1] * factor]


def resized(rgb: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """RGB bytes at another height and width, by Pillow's bicubic, which averages to shrink."""
    return np.asarray(Image.fromarray(rgb).resize(size[::-1], Image.Resampling.BICUBIC))


def judge(folder: Path, factor: int) -> dict[str, Any]:
    """The figures of one factor, under the names of `reference_psnr.json`."""
    upscale, rows = network(folder, factor), []
    for lr, hr in pairs(folder, factor):
        target = to_ycbcr(hr)
        made = upscale(to_ycbcr(blurred(lr, SIGMAS[factor])))
        plain = upscale(to_ycbcr(lr))
        bicubic = to_ycbcr(resized(lr, hr.shape[:2]))
        inside = {"border": factor}
        rows.append(
            (
                psnr(made, target),
                psnr(plain, target),
                psnr(plain[..., :1], target[..., :1], **inside),
                psnr(bicubic[..., :1], target[..., :1], **inside),
            )
        )
    whole, unblurred, luma, bicubic = (list(map(float, each)) for each in zip(*rows, strict=True))
    return {
        "repo_protocol_ycbcr3_psnr": float(np.mean(whole)),
        "no_blur_ycbcr3_psnr": float(np.mean(unblurred)),
        "y_psnr_border_crop": float(np.mean(luma)),
        "bicubic_y_psnr": float(np.mean(bicubic)),
        "per_image_repo": whole,
        "per_image_y": luma,
        "per_image_bicubic_y": bicubic,
    }


def farthest(found: Mapping[str, Any], reference: Mapping[str, Any]) -> float:
    """The largest difference in decibels between two sets of figures of one factor."""
    return max(float(np.abs(np.subtract(found[name], reference[name])).max()) for name in reference)


def array_error(folder: Path) -> float:
    """The largest difference from the recorded output of the x3 network."""
    with np.load(folder / "ref_x3_img003.npz") as stored:
        arrays = {len(stored[key].shape): stored[key] for key in stored}
    made = network(folder, 3)(arrays[4][0].transpose(1, 2, 0))
    return float(np.abs(made - arrays[3].transpose(1, 2, 0)).max())


def main() -> int:
    """Print both sets of figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    reference = json.loads((args.folder / "reference_psnr.json").read_text("utf-8"))
    found = {f"x{factor}": judge(args.folder, factor) for factor in FACTORS}
    off = {name: farthest(found[name], reference[name]) for name in found}
    error = array_error(args.folder)
    if args.json:
        print(json.dumps({"found": found, "farthest": off, "array_error": error}, indent=2))
    else:
        for name, figures in found.items():
            for key, value in figures.items():
                if isinstance(value, float):
                    print(f"{name}  {key:28}  {value:8.4f}  reference {reference[name][key]:8.4f}")
            print(f"{name}  farthest of all figures       {off[name]:8.5f} dB")
        print(f"x3  recorded output               {error:8.1e}")
    return int(max(off.values()) >= TOLERANCE or error > 1e-4)


if __name__ == "__main__":
    sys.exit(main())
