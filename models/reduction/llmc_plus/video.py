"""Which tokens of a video the methods of the toolkit keep, and what they merge: DyCoke, PruneVid,
FastVID and HoliTom.

How many tokens remain depends on the video, so these are functions of arrays on the host, and no
parts of a compiled model.
"""

import itertools
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from zoo.models.core.types import Array
from zoo.models.parts.reduce.choose import top
from zoo.models.parts.reduce.cluster import density_peaks, distances
from zoo.models.parts.reduce.merge import cosine, mean_by_group, unit

_SMALL = 14  # sets of so many tokens are not clustered
_NEIGHBOURS = 7


def dycoke(frames: Array, ratio: float) -> list[np.ndarray]:
    """The places of the tokens that DyCoke keeps of every frame. Follows: arXiv:2411.15024.

    Of frames 2i and 2i + 1, then of frames 4i and 4i + 2 (while a frame follows these four), the
    later one loses the share `ratio` that is most like the earlier; a last frame without a partner
    is left out.

    Args:
      frames: [F, N, D].
      ratio: of the tokens that are merged away.

    Returns:
      for each frame int [n]; where some are left out, the least alike come first.
    """
    count, tokens = frames.shape[:2]
    vectors, number = unit(frames), int((1 - ratio) * tokens)
    every = np.arange(tokens)

    def unlike(first: int, second: int) -> np.ndarray:
        alike = jnp.sum(vectors[first] * vectors[second], -1)
        return np.asarray(jnp.argsort(alike, stable=True)[:number])

    kept: list[np.ndarray] = []
    for i in range(0, count - 1, 2):
        kept += [every, unlike(i, i + 1)]
    for i in range(0, count - 4, 4):
        kept[i], kept[i + 2] = every, unlike(i, i + 2)
    return kept


# ------------------------------------------------------------------ PruneVid


def prunevid(frames: Array, *, threshold: float, segments: float, ratio: float) -> Array:
    """The tokens that PruneVid makes of a video, [n, D]. Follows: arXiv:2412.16117.

    Frames are cut into scenes. Places where a scene does not change become their mean over it, and
    both these and the changing tokens of each frame are clustered where they are many.

    Args:
      frames: [F, N, D].
      threshold: of the mean cosine between the frames of a scene at a place that does not change.
      segments: scenes per frame, at most.
      ratio: clusters per token.
    """
    found = scenes(frames.mean(1), max(1, int(len(frames) * segments)))
    kept, start = [], 0
    for size in found:
        scene = frames[start : start + size]
        start += size
        vectors = unit(scene)
        alike = jnp.einsum("wnd,tnd->n", vectors, vectors) - size
        still = np.asarray(alike / max(size * (size - 1), 1) > threshold) & (size > 1)
        kept.append(_merged(scene[:, still].mean(0), ratio))
        kept += [_merged(frame[~still], ratio) for frame in scene]
    return jnp.concatenate(kept)


def _merged(tokens: Array, ratio: float) -> Array:
    """The means of clusters of tokens [n, D]; a few tokens as they are."""
    if len(tokens) <= _SMALL:
        return tokens
    number = int(len(tokens) * ratio)
    _, cluster = density_peaks(tokens, number, neighbours=_NEIGHBOURS)
    return mean_by_group(tokens, cluster, number)


def scenes(frames: Array, number: int) -> list[int]:
    """The lengths of the scenes that frames [F, D] fall into: clusters, in one piece each.

    Of every cluster the longest runs stay; frames of other runs, and of clusters of single frames,
    go to the longer one of the runs beside them, the one before if they are alike.
    """
    _, cluster = density_peaks(frames, number, neighbours=min(_NEIGHBOURS, len(frames)))
    label = np.asarray(cluster).copy()
    runs = _runs(label)
    longest: dict[int, int] = {}
    for start, stop in runs:
        own = int(label[start])
        longest[own] = max(longest.get(own, 0), stop - start)
    lost = [(a, b) for a, b in runs if b - a < longest[int(label[a])] or b - a == 1]
    for start, stop in lost:
        label[start:stop] = -1
    for start, stop in _runs(label):
        if label[start] >= 0:
            continue
        before, after = _run_around(label, start - 1), _run_around(label, stop)
        if before == after == 0:
            label[start:stop] = 0
        elif after > before:
            label[start:stop] = label[stop]
        else:
            label[start:stop] = label[start - 1]
    return [stop - start for start, stop in _runs(label)]


def _runs(label: np.ndarray) -> list[tuple[int, int]]:
    """Where runs of equal labels begin and end."""
    cuts = np.flatnonzero(np.diff(label)) + 1
    ends = [0, *cuts.tolist(), len(label)]
    return list(itertools.pairwise(ends))


def _run_around(label: np.ndarray, at: int) -> int:
    """The length of the run that the frame `at` is in; 0 where there is none."""
    if not 0 <= at < len(label):
        return 0
    return next(b - a for a, b in _runs(label) if a <= at < b)


# ------------------------------------------------------------------ FastVID


class Kept(NamedTuple):
    """Tokens [n, D] that remain, some of them means, and the places int [n] of each."""

    tokens: Array
    place: np.ndarray


def fastvid(
    frames: Array,
    whole: Array,
    attention: Array,
    *,
    keep: float,
    segments: int,
    threshold: float,
    context: float,
    every: int,
    alpha: float,
) -> Kept:
    """What FastVID keeps of a video, in reading order. Follows: arXiv:2503.11187.

    Args:
      frames: [F, N, D].
      whole: [F, C], a vector for each frame, by which the video is cut.
      attention: [F, N], how salient each token is.
      keep: share of the tokens that remain.
      segments: the video is cut into so many at least,
      threshold: and wherever the cosine of neighbours is below this.
      context: share of what remains that is merged from tokens that are not salient.
      every: how many frames share the merged tokens, counted from the end of a segment.
      alpha: weight of an anchor in its mean, at least.
    """
    count, tokens, width = frames.shape
    number = int(tokens * keep)
    merged = int(number * context)
    best = jnp.argsort(-attention, -1, stable=True)[:, : number - merged]
    salient = np.zeros((count, tokens), bool)
    np.put_along_axis(salient, np.asarray(best), True, 1)
    rest = np.argsort(salient, -1, kind="stable")[:, : tokens - number + merged]
    others = jnp.take_along_axis(frames, jnp.asarray(rest)[..., None], 1)
    density = _peak_score(others, neighbours=4)
    place = np.arange(count * tokens).reshape(count, tokens)

    found = [Kept(frames[salient], place[salient])]
    for start, stop in _segments(whole, segments, threshold):
        anchors = [f for f in range(start, stop) if (stop - 1 - f) % every == 0]
        each = merged * (stop - start) // len(anchors)
        # A frame whose anchors are its own merges its own tokens; others those of the segment.
        wide = each > merged
        pool = others[start:stop].reshape(-1, width)
        for frame in anchors:
            chosen = jnp.argsort(-density[frame], stable=True)[:each]
            near = pool if wide else others[frame]
            target = others[frame][chosen]
            nearest = cosine(near, target).argmax(-1)
            size = jnp.bincount(nearest, length=each)[:, None]
            weight = jnp.maximum(1 / (size + 1), alpha)
            mean = weight * target + (1 - weight) * mean_by_group(near, nearest, each)
            found.append(Kept(mean, place[frame][rest[frame][np.asarray(chosen)]]))
    every_place = np.concatenate([part.place for part in found])
    order = np.argsort(every_place, kind="stable")
    return Kept(jnp.concatenate([part.tokens for part in found])[order], every_place[order])


def _segments(whole: Array, number: int, threshold: float) -> list[tuple[int, int]]:
    """Where the segments of a video with vectors [F, C] for its frames begin and end."""
    vectors = unit(whole)
    alike = np.asarray(jnp.sum(vectors[:-1] * vectors[1:], -1))
    least = np.argsort(alike, kind="stable")[: number - 1]
    cuts = np.union1d(least, np.flatnonzero(alike < threshold)) + 1
    ends = [0, *cuts.tolist(), len(whole)]
    return list(itertools.pairwise(ends))


def _peak_score(x: Array, *, neighbours: int) -> Array:
    """Density times the distance to what is denser, [..., N], of tokens [..., N, D]; see
    `zoo.models.parts.reduce.cluster.density_peaks`.
    """
    far = distances(x)
    near = jnp.sort(far, -1)[..., :neighbours]
    density = jnp.exp(-jnp.mean(near**2, -1))
    denser = density[..., None, :] > density[..., :, None]
    return jnp.where(denser, far, far.max((-2, -1), keepdims=True)).min(-1) * density


# ------------------------------------------------------------------ HoliTom


def static_windows(
    alike: Array, *, threshold: float, longest: int
) -> tuple[list[tuple[int, int]], float]:
    """The windows of frames over which the most tokens need to be kept only once.

    Args:
      alike: [F - 1, N], the cosine of each token with the one at its place in the next frame.
      threshold: a token does not change within a window where all of these are above it.
      longest: frames of a window, at most.

    Returns:
      first and last frame of each window, and how many tokens they save.
    """
    still = np.asarray(alike) > threshold
    count = len(still) + 1
    saved = np.zeros((count, count), np.float32)
    for first in range(count):
        for last in range(first + 1, count):
            saved[first, last] = still[first:last].all(0).sum() * (last - first)
    best, start = np.zeros(count, np.float32), np.zeros(count, int)
    for last in range(count):
        best[last], start[last] = (best[last - 1] if last else 0), last
        for size in range(2, min(last + 1, longest) + 1):
            first = last - size + 1
            value = (best[first - 1] if first else 0) + saved[first, last]
            if value > best[last]:
                best[last], start[last] = value, first
    windows, last = [], count - 1
    while last >= 0:
        windows.append((int(start[last]), last))
        last = int(start[last]) - 1
    return windows[::-1], float(best[-1])


def by_attention(frames: Array, attention: Array, keep: float) -> Kept:
    """The tokens that get the most attention, [F, n, D], and their places, in their order."""
    number = math.ceil(frames.shape[1] * keep)
    index = top(attention, number)
    return Kept(jnp.take_along_axis(frames, index[..., None], 1), np.asarray(index))


def by_density(frames: Array, keep: float, *, beta: float, neighbours: int) -> Kept:
    """Anchors of dense places, each with the mean of the tokens nearest to it, [F, n, D], and the
    anchors' places, in their order.

    Args:
      frames: [F, N, D].
      keep: share of the tokens that are anchors.
      beta: weight of an anchor beside that mean.
      neighbours: that say how dense a place is, at most.
    """
    count, tokens, _ = frames.shape
    number = round(tokens * keep)
    if not number:
        return Kept(frames[:, :0], np.zeros((count, 0), int))
    score = _peak_score(frames, neighbours=min(neighbours, number))
    anchor = top(score, number)  # [F, n]
    far = jnp.take_along_axis(distances(frames), anchor[:, None], -1)  # [F, N, n]
    own = (jnp.arange(tokens)[:, None] == anchor[:, None]).any(-1)  # anchors are in no mean
    nearest = jnp.where(own, -1, far.argmin(-1))
    target = jnp.take_along_axis(frames, anchor[..., None], 1)
    mean = mean_by_group(frames, nearest, number)
    some = (nearest[:, None] == jnp.arange(number)[:, None]).any(-1, keepdims=True)
    return Kept(jnp.where(some, beta * target + (1 - beta) * mean, target), np.asarray(anchor))
