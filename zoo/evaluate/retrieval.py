"""Retrieval by embeddings: exact search, the funnel over nested embeddings, and its metrics."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from zoo.models.core.errors import UsageError

_QUERIES_AT_ONCE = 256


def unit(x: np.ndarray, size: int | None = None) -> np.ndarray:
    """The first `size` features of embeddings [N, D], all by default, brought to unit length; zeros
    stay zeros.
    """
    x = x[:, :size]
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(length > 0, length, 1)


def nearest(queries: np.ndarray, database: np.ndarray, number: int) -> np.ndarray:
    """Rows of the database nearest to each query by Euclidean distance, the nearest first.

    Args:
      queries: [Q, D].
      database: [N, D].
      number: how many, at most N.

    Returns:
      int64 [Q, number]. Of rows equally near, which come first is not defined.

    Raises:
      UsageError: other widths, or fewer rows than asked for.
    """
    if queries.shape[1:] != database.shape[1:] or not 1 <= number <= len(database):
        raise UsageError(
            f"queries {queries.shape}, database {database.shape}, number = {number}: want one "
            "width, and 1 to as many as there are"
        )
    squared = (database**2).sum(1)
    found = np.empty((len(queries), number), np.int64)
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        rows = slice(start, start + _QUERIES_AT_ONCE)
        distance = squared - 2 * queries[rows] @ database.T  # less the query's own square
        some = np.argpartition(distance, number - 1, 1)[:, :number]
        order = np.take_along_axis(distance, some, 1).argsort(1, kind="stable")
        found[rows] = np.take_along_axis(some, order, 1)
    return found


@dataclass(frozen=True)
class Stage:
    """One step of a funnel.

    Attributes:
      size: how many of the first features are compared.
      keep: how many rows are handed on.
    """

    size: int
    keep: int


def funnel(queries: np.ndarray, database: np.ndarray, stages: Sequence[Stage]) -> np.ndarray:
    """Adaptive retrieval: a short prefix finds candidates among all rows, and longer prefixes rank
    ever fewer of them again.

    Prefixes are brought to unit length, so that the order is that of the cosine.

    Args:
      queries: [Q, D], nested embeddings.
      database: [N, D].
      stages: the first one searches all rows; sizes grow and candidates become fewer.

    Returns:
      int64 [Q, keep of the last stage], the nearest first by the last stage's prefix. A funnel of a
      single stage is `nearest` on unit prefixes.

    Raises:
      UsageError: stages that do not narrow.
    """
    narrowing = all(a.size <= b.size and a.keep >= b.keep for a, b in pairwise(stages))
    if not stages or not narrowing:
        raise UsageError(f"stages = {list(stages)}: want sizes that grow and fewer rows each time")
    first, *others = stages
    found = nearest(unit(queries, first.size), unit(database, first.size), first.keep)
    for stage in others:
        q, d = unit(queries, stage.size), unit(database, stage.size)
        ranked = np.empty((len(q), stage.keep), np.int64)
        for row, candidates in enumerate(found):
            score = d[candidates] @ q[row]
            ranked[row] = candidates[np.argsort(-score, kind="stable")[: stage.keep]]
        found = ranked
    return found


def search_flops(rows: int, stages: Sequence[Stage]) -> int:
    """Multiply-adds of one query of a funnel over so many rows: the shortest prefix against all of
    them, every longer one against what was kept.
    """
    seen = (rows, *(stage.keep for stage in stages[:-1]))
    return sum(stage.size * number for stage, number in zip(stages, seen, strict=True))


@dataclass(frozen=True)
class Ranking:
    """How good ranked rows are, means over the queries.

    Attributes:
      mean_average_precision: of the first k: the sum of the precision at every hit, over k (not
        over the hits, as the released code of arXiv:2205.13147 has it).
      precision: share of hits among the first k.
      recall: hits over `relevant`.
      top1: share of queries whose first row is a hit.
    """

    mean_average_precision: float
    precision: float
    recall: float
    top1: float


def judge(
    ranked: np.ndarray, queries: np.ndarray, database: np.ndarray, *, relevant: float | None = None
) -> Ranking:
    """Judge rows by their classes.

    Args:
      ranked: int [Q, k], rows of the database, the nearest first.
      queries: [Q], classes.
      database: [N], classes.
      relevant: what recall divides by, such as 1,300 for ImageNet; None for how many rows of the
        database have the query's own class.
    """
    hits = database[ranked] == queries[:, None]  # [Q, k]
    k = ranked.shape[1]
    precision = np.cumsum(hits, 1) / np.arange(1, k + 1)
    names, counts = np.unique(database, return_counts=True)
    total = dict(zip(names.tolist(), counts.tolist(), strict=True))
    own = np.array([total.get(name, 0) for name in queries.tolist()], float)
    wanted = own if relevant is None else np.full(len(queries), float(relevant))
    share = hits.sum(1) / np.where(wanted > 0, wanted, 1)
    return Ranking(
        mean_average_precision=float(((precision * hits).sum(1) / k).mean()),
        precision=float(hits.mean()),
        recall=float(share.mean()),
        top1=float(hits[:, 0].mean()),
    )
