"""Which vision tokens a model keeps of a prompt, layer by layer, and which it merges.

    batch = model.encode([picture], ["What is it?"])
    kept = kept_tokens(model.with_(reducer="fastv", keep=64), batch)
    kept_patches_figure(picture, model.config.tower.grid, kept.layers[:, 0], title="FastV")

`zoo.plot` draws both.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from zoo.loaded import Loaded
from zoo.models.core.types import Aux, Batch, Reserve, Tokens, TokenSet
from zoo.models.parts.reduce.report import kept_by_cell, seen_cells


@dataclass(frozen=True)
class Kept:
    """What is left of the N vision tokens that each row of a batch has without a method.

    Attributes:
      layers: bool [layers, B, N], which of them every layer of the decoder runs. The tokens of the
        first picture, or of the first tile, come first.
      groups: int [B, M, N'], for methods that merge tokens before the decoder: which token each of
        those of a tile has become a part of, -1 for none. None for other methods.
    """

    layers: np.ndarray
    groups: np.ndarray | None


def kept_tokens(model: Loaded, batch: Batch) -> Kept:
    """What a model with a method for fewer vision tokens keeps of a batch of prompts.

    Args:
      model: of which nothing but the vision tokens is looked at.
      batch: with pictures, as `Loaded.encode` makes it.
    """

    def look(module: Any, batch: Batch) -> tuple[Tokens, list[Aux]]:
        stream, memory = module.stream(batch, None)
        return stream.tokens, module.decoder.run(stream, Reserve(), memory)[2]

    @jax.jit
    def run(params: Any, batch: Batch) -> tuple[Tokens, list[Aux], TokenSet | None]:
        (tokens, aux), state = model.model.apply(
            {"params": params},
            batch,
            method=look,
            mutable=["intermediates"],
            capture_intermediates=lambda module, _: module.name == "reducer",
        )
        seen = state.get("intermediates", {}).get("reducer", {}).get("__call__", (None,))
        return tokens, aux, seen[0]

    tokens, aux, reduced = run(model.params, batch)
    layers = kept_by_cell(aux, _all_tokens(model.config, batch), first=seen_cells(tokens))
    groups = None if reduced is None else reduced.groups
    return Kept(layers, None if groups is None else np.asarray(groups))


def _all_tokens(config: Any, batch: Batch) -> int:
    """The numbers that vision tokens have, newlines included."""
    if "blend" in batch:
        return int(batch["layout"].shape[1])
    if "pixels" in batch:
        return int(batch["pixels"].shape[1] * config.tile_tokens + config.newline)
    return int(batch["patches"].shape[1] // config.tower.block)
