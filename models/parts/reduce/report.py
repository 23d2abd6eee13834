"""Which vision tokens are left, for figures and counts: from reducers, and from decoder layers.

A policy of the decoder reports in the aux of its layer `kept_cells`, the tokens that this layer
alone runs, or `left_cells`, those that it and all later ones see: int32 [B, C], the tokens' tag
`cell`, with -1 for everything else.
"""

from collections.abc import Sequence

import numpy as np

from zoo.models.core.types import IMAGE, Aux, Tokens, TokenSet


def kept_of(kept: TokenSet, tokens: int) -> np.ndarray:
    """Which of the `tokens` of every tile a reducer has kept, or merged others into: bool [B, M,
    tokens].
    """
    if kept.index is None:
        raise ValueError("this set has no index: nothing was left out of it")
    index = np.asarray(kept.index)
    if kept.mask is not None:
        index = np.where(np.asarray(kept.mask), index, -1)
    return _found(index, tokens)


def seen_cells(tokens: Tokens) -> np.ndarray:
    """The vision tokens in a sequence, int32 [B, L], -1 for text."""
    vision = np.asarray(tokens.valid) & (np.asarray(tokens.modality) == IMAGE)
    return np.where(vision, np.asarray(tokens.tags["cell"]), -1)


def kept_by_cell(
    aux: Sequence[Aux], num_cells: int, *, first: np.ndarray | None = None
) -> np.ndarray:
    """Which vision tokens each layer has run: bool [layers, B, N].

    Args:
      aux: of all layers, as `Output.aux`.
      num_cells: N, vision tokens before any method.
      first: int [B, L], those that the first layer gets, as `seen_cells` has them; all by default.
    """
    reports = [r.get("kept_cells", r.get("left_cells")) for r in aux]
    batch = next((len(cells) for cells in (first, *reports) if cells is not None), 1)
    here = np.ones((batch, num_cells), bool) if first is None else _found(first, num_cells)
    layers = []
    for report, cells in zip(aux, reports, strict=True):
        kept = here if cells is None else _found(np.asarray(cells), num_cells)
        layers.append(kept)
        if "left_cells" in report:
            here = kept
    return np.stack(layers)


def vision_flops(tokens: Sequence[int], *, width: int, mlp_dim: int) -> int:
    """What papers on fewer vision tokens count of a decoder: products of the vision tokens alone,
    with each other and with the weights, a multiply and an add as one, no grouped queries.

    Args:
      tokens: how many there are, for every layer.
      width: D.
      mlp_dim: F, of a gated MLP.
    """
    return sum(4 * n * width**2 + 2 * n**2 * width + 3 * n * width * mlp_dim for n in tokens)


def _found(index: np.ndarray, number: int) -> np.ndarray:
    """Which of 0 to `number` - 1 are in the last axis."""
    found = np.zeros((*index.shape[:-1], number + 1), bool)
    np.put_along_axis(found, np.where(index < 0, number, np.minimum(index, number)), True, -1)
    return found[..., :number]
