"""Exact search, funnels and rankings."""

import numpy as np
import pytest

from zoo.evaluate.retrieval import Stage, funnel, judge, nearest, search_flops, unit
from zoo.models.core.errors import UsageError


@pytest.fixture(scope="module")
def embeddings():
    """Queries [300, 16] and a database [400, 16]."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(300, 16)), rng.normal(size=(400, 16))


def test_nearest(embeddings):
    queries, database = embeddings
    distance = np.linalg.norm(queries[:, None] - database, axis=-1)
    np.testing.assert_array_equal(nearest(queries, database, 7), distance.argsort(1)[:, :7])
    with pytest.raises(UsageError, match="one width"):
        nearest(queries[:, :3], database, 7)
    with pytest.raises(UsageError, match="number = 401"):
        nearest(queries, database, 401)


def test_a_funnel_ranks_what_the_first_prefix_found(embeddings):
    queries, database = embeddings
    found = funnel(queries, database, (Stage(4, 50), Stage(8, 20), Stage(16, 5)))
    first = nearest(unit(queries, 4), unit(database, 4), 50)
    cosine = unit(queries) @ unit(database).T
    second = unit(queries, 8) @ unit(database, 8).T
    for row in range(3):
        kept = sorted(first[row], key=lambda i: -second[row, i])[:20]
        want = sorted(kept, key=lambda i: -cosine[row, i])[:5]
        assert found[row].tolist() == want


def test_a_wide_funnel_is_exact_search(embeddings):
    queries, database = embeddings
    exact = nearest(unit(queries), unit(database), 6)
    np.testing.assert_array_equal(funnel(queries, database, (Stage(16, 6),)), exact)
    stages = (Stage(2, len(database)), Stage(16, 6))
    np.testing.assert_array_equal(funnel(queries, database, stages), exact)
    with pytest.raises(UsageError, match="sizes that grow"):
        funnel(queries, database, (Stage(16, 6), Stage(2, 6)))


def test_what_adaptive_retrieval_saves():
    """A shortlist of 200 by 16 features, ranked by 2,048: 1/125 of the work over ImageNet."""
    stages = (Stage(16, 200), Stage(2048, 200))
    whole = search_flops(1_281_167, (Stage(2048, 200),))
    assert 124 < whole / search_flops(1_281_167, stages) < 126


def test_a_ranking():
    ranked = np.array([[0, 1, 2, 3], [3, 2, 1, 0]])
    found = judge(ranked, np.array([7, 8]), np.array([7, 9, 7, 8]))
    first = (1 + 0 + 2 / 3 + 0) / 4
    assert found.mean_average_precision == pytest.approx((first + 1 / 4) / 2)
    assert found.precision == pytest.approx(3 / 8)
    assert found.recall == pytest.approx(1)
    assert found.top1 == 1
    by_constant = judge(ranked, np.array([7, 8]), np.array([7, 9, 7, 8]), relevant=1300)
    assert by_constant.recall == pytest.approx(1.5 / 1300)
