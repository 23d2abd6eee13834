"""HiRED's budgets, masks and packing against the official functions."""

import jax.numpy as jnp
import numpy as np

from tests.parity.case import Case
from zoo.models.core.types import Features
from zoo.models.parts.reduce import station
from zoo.models.parts.reduce.base import Seen
from zoo.models.parts.reduce.choose import choose
from zoo.models.parts.reduce.report import kept_of
from zoo.models.reduction.hired import HiRED
from zoo.processors import tiling


def run(case: Case) -> dict[str, np.ndarray]:
    """Every recorded output, from our functions and the recorded attention."""
    if "num_partitions" not in case.inputs:
        return _single(case)
    reducer = HiRED(case.kwargs["token_budget_rate"], case.kwargs["alpha"])
    sides, start, found = case.inputs["image_sizes_hw"], 0, []
    for number, size in zip(case.inputs["num_partitions"], sides, strict=True):
        part = {
            name: jnp.asarray(array[start : start + number])[None]
            for name, array in case.inputs.items()
            if name in ("cls_attn_first_layer", "cls_attn_penultimate", "features")
        }
        found.append(_picture(case, reducer, tuple(map(int, size)), **part))
        start += number
    masks, budgets, packed = zip(*found, strict=True)
    return {
        "keep_mask": np.concatenate(masks),
        "budget_per_partition": np.concatenate(budgets).astype(np.int32),
        "packed_features": np.concatenate(packed),
        "packed_lens": np.array([len(rows) for rows in packed], np.int32),
    }


def _single(case: Case) -> dict[str, np.ndarray]:
    """A picture that is one tile."""
    score = jnp.asarray(case.inputs["cls_attn_penultimate"]).sum(1)[:, None]
    keep = HiRED(case.kwargs["token_budget_rate"]).num_kept(score.shape[-1])
    empty = Features(score[..., None], (1, score.shape[-1]))
    kept = choose(Seen(empty.tokens, empty), score, keep)
    return {"keep_mask": kept_of(kept, score.shape[-1])[:, 0].reshape(-1)}


def _picture(case, reducer, size, cls_attn_first_layer, cls_attn_penultimate, features):
    """Masks, budgets and packed features of one picture."""
    _, number, tokens, _ = features.shape
    side, patch = case.kwargs["vision_image_size"], case.kwargs["patch_size"]
    grid = (side // patch, side // patch)
    resolutions = [tuple(pair) for pair in case.kwargs["image_grid_pinpoints"]]
    best = tiling.select_best_resolution(size, resolutions)
    # The official code takes the rows of the grid of tiles for its columns.
    reading = tiling.anyres(size, [best[::-1]], tile=side, grid=grid)
    places = tiling.pack([[reading]], tokens=tokens)
    batch = {name: jnp.asarray(array) for name, array in places.items()}
    whole = Features(features, grid)
    facts = {"grid": grid, "per_tile": reducer.num_kept(tokens)}
    seen = Seen(features, whole, tiles=batch["tiles"], **facts)
    budget = reducer.budgets(cls_attn_first_layer.sum(2), batch["tiles"], grid)
    score = cls_attn_penultimate.sum(2)
    kept = choose(seen, score, reducer.capacity(number, tokens), count=budget)
    left = station.remaining(reducer, kept, batch, seen, tokens)
    rows = np.asarray(kept.tokens).reshape(-1, features.shape[-1])
    length = int(left.places.sizes.sum())
    packed = rows[np.asarray(left.places.layout)[0, :length]]
    return kept_of(kept, tokens)[0], np.asarray(budget)[0], packed
