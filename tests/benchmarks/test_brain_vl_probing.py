"""Encoding models: ridge regression, projections, resampling and comparisons."""

import jax
import numpy as np
import pytest

from tests.models.draw import draw
from zoo.benchmarks.brain_vl_probing import ProbingConfig, beats, layer_features
from zoo.evaluate.ridge import pearson, ridge, with_ones
from zoo.models.core.errors import UsageError
from zoo.models.core.registry import config

PROBE = ProbingConfig(folds=5, samples=50).build()


def test_ridge_is_the_closed_form():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 20)), rng.normal(size=(12, 3))
    ones = with_ones(x)
    for weights, alpha in zip(ridge(x, y, [0.1, 10.0]), [0.1, 10.0], strict=True):
        want = np.linalg.solve(ones.T @ ones + alpha * np.eye(21), ones.T @ y)
        np.testing.assert_allclose(weights, want, atol=1e-8)


@pytest.mark.parametrize(
    ("x", "y", "alphas", "message"),
    [
        (np.zeros((3, 2)), np.zeros((4, 1)), [1.0], "want .n, d. and .n, e."),
        (np.full((3, 2), np.nan), np.zeros((3, 1)), [1.0], "finite numbers only"),
        (np.zeros((3, 2)), np.zeros((3, 1)), [0.0], "penalties above 0"),
    ],
)
def test_wrong_regressions_are_refused(x, y, alphas, message):
    with pytest.raises(UsageError, match=message):
        ridge(x, y, alphas)


def test_constant_columns_correlate_with_nothing():
    a = np.random.default_rng(0).normal(size=(9, 3))
    b = a * [[2.0, -3.0, 0.0]]
    np.testing.assert_allclose(pearson(a, b), [1, -1, 0])


@pytest.mark.parametrize(("events", "width"), [(1000, 5920), (5000, 7300), (10_000, 7894)])
def test_the_width_of_projections(events, width):
    assert PROBE.width(events) == width


def test_projections_keep_distances():
    probe = ProbingConfig(epsilon=0.5).build()
    x = np.random.default_rng(0).normal(size=(20, 4000))
    narrow = probe.narrow(x)
    assert narrow.shape == (20, probe.width(20))
    pairs = np.triu_indices(20, 1)
    ratio = [np.linalg.norm(z[pairs[0]] - z[pairs[1]], axis=1) for z in (narrow, x)]
    assert np.abs(ratio[0] / ratio[1] - 1).max() < 0.35
    np.testing.assert_array_equal(narrow, probe.narrow(x))
    assert probe.narrow(x[:, :7]) is not narrow


@pytest.fixture(scope="module")
def events():
    """Features of two senses [400, 6] each, and noise [400, 8, 12]: sites x time bins."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(400, 6)), rng.normal(size=(400, 6)), rng.normal(size=(400, 8, 12))


def probed(features, responses):
    found = PROBE(features, responses.reshape(len(responses), -1))
    return found, found.best_test.reshape(responses.shape[1:])


def test_an_interaction_is_found_where_it_is(events):
    """Half of the sites respond to the product of what both senses say, half to their sum."""
    text, image, noise = events
    parts = [np.repeat(x.sum(1)[:, None], 4, 1) for x in (text * image, text + image)]
    responses = np.concatenate(parts, 1)[..., None] + noise
    joint = np.concatenate([text, image, text * image], 1)
    linear = np.concatenate([text, image], 1)
    both, ours = probed(joint, responses)
    _, theirs = probed(linear, responses)
    kept = (both.interval[0] > 0).reshape(8, 12)
    assert kept.all()
    passed = beats(ours, theirs, kept)
    assert passed[:4].all()
    np.testing.assert_allclose(ours[4:], theirs[4:], atol=0.02)


def test_noise_passes_nothing(events):
    text, image, noise = events
    found, ours = probed(np.concatenate([text, image], 1), noise)
    kept = (found.interval[0] > 0).reshape(8, 12)
    assert kept.mean() < 0.2
    assert not beats(ours, ours - 1, kept, least=12).any()


def test_few_bins_pass_nothing():
    scores = np.random.default_rng(0).uniform(size=(3, 12))
    kept = np.ones((3, 12), bool)
    kept[0, 9:] = False
    assert beats(scores + 1, scores + 0.1 * scores**2, kept).tolist() == [False, True, True]


def test_resampled_scores_belong_together(events):
    """The same events are drawn for all features: equal predictions have equal scores."""
    text, _, noise = events
    a, _ = probed(text, noise[:, :1])
    b, _ = probed(2 * text, noise[:, :1])
    assert a.drawn.shape == (50, 12)
    np.testing.assert_allclose(a.drawn, b.drawn, atol=1e-8)


def test_too_few_events_are_refused():
    with pytest.raises(UsageError, match="19 events: want 20 for 5 folds"):
        PROBE(np.zeros((19, 3)), np.zeros((19, 2)))
    with pytest.raises(ValueError, match="want 2 folds or more"):
        ProbingConfig(folds=1)


def test_features_of_a_registered_model():
    """Those after one of its layers, flattened by the probe."""
    chosen = config("timm_vit_tiny")
    model = chosen.build()
    shapes = jax.eval_shape(model.init, jax.random.key(0), chosen.inputs(1))
    rng = np.random.default_rng(0)
    batches = [{"pixels": rng.normal(size=(20, 16, 16, 3)).astype(np.float32)} for _ in range(2)]
    read = lambda out: out.features.taps[1]
    found = layer_features(model, draw(shapes), batches, read, taps=(1,))
    assert found.shape == (40, 17, 16)
    targets = found.mean(1)[:, :2]
    probe = ProbingConfig(folds=2, samples=2).build()
    assert (probe(found, targets).best_validation > 0.5).all()
