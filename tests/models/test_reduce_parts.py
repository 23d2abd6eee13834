"""The functions that methods for fewer vision tokens share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.models.core.types import Features, TokenSet
from zoo.models.parts.reduce.arrange import Places, mosaic, subset, tile_by_tile
from zoo.models.parts.reduce.base import Seen
from zoo.models.parts.reduce.choose import choose, rank_in_group, top
from zoo.models.parts.reduce.cluster import density_peaks
from zoo.models.parts.reduce.greedy import cover, max_min
from zoo.models.parts.reduce.merge import match, mean_by_group
from zoo.models.parts.reduce.report import kept_by_cell, kept_of
from zoo.models.parts.reduce.scores import class_attention, received_attention


def rng(seed=0):
    return np.random.default_rng(seed)


def test_attention_is_that_of_the_whole_map():
    q, k = rng().normal(size=(2, 2, 7, 3, 4)).astype(np.float32)
    weights = jax.nn.softmax(np.einsum("bmhe,bnhe->bhmn", q, k) / 2, -1)
    want = weights[:, :, 0, 1:]
    np.testing.assert_allclose(class_attention(q, k, heads="none"), want, rtol=1e-5)
    np.testing.assert_allclose(class_attention(q, k, heads="sum"), want.sum(1), rtol=1e-5)
    received = weights[:, :, 2:, 2:].mean((1, 2))
    np.testing.assert_allclose(received_attention(q, k, prefix=2), received, rtol=1e-5)


def test_of_equal_scores_the_first_is_kept():
    score = jnp.array([[[1.0, 3.0, 3.0, 2.0, 3.0, 0.0]]])
    np.testing.assert_array_equal(top(score, 2), [[[1, 2]]])
    tokens = jnp.arange(6.0).reshape(1, 1, 6, 1)
    seen = Seen(tokens, Features(tokens, (2, 3)))
    kept = choose(seen, score, 4, count=jnp.array([[3]]))
    np.testing.assert_array_equal(kept.index[0, 0, :3], [1, 2, 4])
    np.testing.assert_array_equal(kept.mask, [[[True, True, True, False]]])
    masked = choose(seen.replace(mask=score != 3), score, 3)
    assert kept_of(masked, 6).tolist() == [[[True, False, False, True, False, True]]]


def test_ranks_within_groups():
    score = jnp.array([[5.0, 1.0, 5.0, 7.0, 2.0, 2.0]])
    group = jnp.array([[1, 0, 1, 1, 0, 0]])
    np.testing.assert_array_equal(rank_in_group(score, group), [[1, 2, 2, 0, 0, 1]])


@pytest.mark.parametrize(("n", "r", "protect"), [(8, 3, 0), (9, 4, 0), (9, 3, 1), (6, 9, 0)])
def test_bipartite_matching(n, r, protect):
    """Against the definition, pair by pair."""
    x = rng(n).normal(size=(n, 5)).astype(np.float32)
    found = match(jnp.asarray(x), r, protect=protect)
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    even = [i for i in range(0, n, 2) if i >= protect]
    odd = [i for i in range(1, n, 2) if i >= protect]
    best = {i: max(odd, key=lambda j, i=i: unit[i] @ unit[j]) for i in even}
    merged = sorted(even, key=lambda i: -(unit[i] @ unit[best[i]]))[: min(r, (n - protect) // 2)]
    groups, index = np.asarray(found.groups), np.asarray(found.index)
    assert sorted(index) == sorted(set(range(n)) - set(merged))
    for i in range(n):
        assert index[groups[i]] == (best[i] if i in merged else i)
    means = mean_by_group(jnp.asarray(x), found.groups, len(index))
    for g in range(len(index)):
        np.testing.assert_allclose(means[g], x[groups == g].mean(0), rtol=1e-5, atol=1e-6)


def test_clusters_of_well_separated_points():
    centres = np.array([[0, 0], [10, 0], [0, 10]], np.float32)
    x = np.repeat(centres, 5, 0) + 0.3 * rng().normal(size=(15, 2)).astype(np.float32)
    middle, cluster = density_peaks(jnp.asarray(x), 3, neighbours=4)
    assert sorted(np.asarray(middle) // 5) == [0, 1, 2]
    for part in np.asarray(cluster).reshape(3, 5):
        assert len(set(part.tolist())) == 1


def test_greedy_subsets():
    x = jnp.array([0.0, 1.0, 2.0, 10.0, 11.0, 30.0])
    far = jnp.abs(x[:, None] - x)
    # 30 is farthest from its neighbour; then 0, then what is farthest from both.
    assert max_min(far, 4).tolist() == [5, 0, 4, 2]
    assert 5 not in max_min(far, 3, mask=jnp.arange(6) < 5).tolist()
    gain = jnp.array([[3.0, 2.0, 0.0], [0.0, 2.0, 1.0], [0.0, 0.0, 1.5]])
    assert cover(gain, 3).tolist() == [1, 2, 0]
    assert cover(gain, 2, mask=jnp.array([True, False, True])).tolist() == [0, 2]


def test_a_mosaic_is_read_row_by_row():
    """Two pictures: two tiles beside each other behind a thumbnail, and one tile."""
    tiles = jnp.array([[[3, 1, 2], [1, 0, 0]]])
    places = mosaic(tiles, 5, (2, 2))
    assert places.sizes.tolist() == [[12, 4]]
    row = [0, 1, 2, 3, 4, 5, 8, 9, 6, 7, 10, 11, 12, 13, 14, 15]
    assert places.layout[0, :16].tolist() == row

    index = jnp.array([[[0, 3], [1, 2], [0, 1], [2, 3], [0, 1]]])
    kept = TokenSet(jnp.zeros((1, 5, 2, 1)), index=index)
    left, order = subset(kept, places, 4, slots=8, newlines=False)
    # numbers of kept tokens, two a tile: tile 2 has its upper row, tile 1 one of each
    assert left.layout.tolist() == [[0, 1, 2, 4, 5, 3, 6, 7]]
    assert left.sizes.tolist() == [[6, 2]]
    assert order.tolist() == [[0, 3, 5, 6, 7, 8, 14, 15]]
    each = tile_by_tile(kept.replace(mask=index > 0), tiles)
    assert each.sizes.tolist() == [[4, 2]]
    assert each.layout[0, :6].tolist() == [1, 2, 3, 5, 6, 7]


def test_newlines_stay_where_they_are_asked_to():
    layout = jnp.array([[0, 1, 4, 2, 3, 4, 0, 0]])  # two rows of two, a newline after each
    places = Places(jnp.array([[6]]), layout)
    kept = TokenSet(jnp.zeros((1, 1, 2, 1)), index=jnp.array([[[1, 2]]]))
    left, _ = subset(kept, places, 4, slots=6, newlines=True)
    assert left.layout[0, :4].tolist() == [0, 2, 1, 2]
    assert left.sizes.tolist() == [[4]]


def test_what_layers_report():
    aux = ({}, {"kept_cells": jnp.array([[0, 2, -1]])}, {}, {"left_cells": jnp.array([[1]])}, {})
    kept = kept_by_cell(aux, 4, first=np.array([[0, 1, 2, -1]]))
    want = [[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0], [0, 1, 0, 0], [0, 1, 0, 0]]
    np.testing.assert_array_equal(kept[:, 0], np.array(want, bool))
