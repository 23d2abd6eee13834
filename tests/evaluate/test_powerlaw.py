"""Fits of power laws, and tables of logs."""

import numpy as np
import pytest

from zoo.evaluate.powerlaw import bootstrap, fit_power_law
from zoo.evaluate.tables import read_rows
from zoo.models.core.errors import UsageError

SIZES = np.geomspace(10, 1e6, 12)


def curve(alpha, beta, gamma=0.0, noise=0.0, seed=0):
    clean = alpha * SIZES**beta + gamma
    return clean * np.exp(noise * np.random.default_rng(seed).normal(size=SIZES.size))


def test_an_exact_curve_is_recovered():
    law = fit_power_law(SIZES, curve(3.0, -0.3))
    assert (law.alpha, law.beta, law.gamma) == pytest.approx((3.0, -0.3, 0.0))
    assert law.r2 == pytest.approx(1)
    law = fit_power_law(SIZES, curve(3.0, -0.3, 0.05), gamma=None)
    assert (law.alpha, law.beta, law.gamma) == pytest.approx((3.0, -0.3, 0.05), rel=1e-5)
    assert law.relative_error < 1e-6
    assert law.size_for(float(law(1234.0))) == pytest.approx(1234)


def test_the_interval_holds_the_exponent_as_often_as_it_says():
    inside = 0
    for seed in range(200):
        law = fit_power_law(SIZES, curve(2.0, -0.2, noise=0.1, seed=seed))
        low, high = law.interval(0.9)
        inside += low < -0.2 < high
    assert 165 <= inside <= 195


def test_resampled_intervals():
    errors = curve(2.0, -0.2, 0.01, noise=0.02)
    ends = bootstrap(SIZES, errors, gamma=None, samples=200)
    for name, value in {"alpha": 2.0, "beta": -0.2, "gamma": 0.01}.items():
        low, high = ends[name]
        assert low < value < high, name
    assert ends == bootstrap(SIZES, errors, gamma=None, samples=200)


@pytest.mark.parametrize(
    ("sizes", "errors", "options", "message"),
    [
        ([1, 2], [1], {}, "one of each per point"),
        ([1, 2], [1, 0], {}, "positive finite"),
        ([1, 1], [1, 2], {}, "1 different sizes"),
        ([1, 2], [1, 0.5], {"gamma": None}, "at least 3"),
        ([1, 2], [1, 0.5], {"gamma": 0.5}, "below every error"),
    ],
)
def test_what_cannot_be_fitted_is_refused(sizes, errors, options, message):
    with pytest.raises(UsageError, match=message):
        fit_power_law(sizes, errors, **options)


def test_an_error_below_the_curve_is_refused():
    law = fit_power_law(SIZES, curve(3.0, -0.3, 0.05), gamma=None)
    with pytest.raises(UsageError, match="stays above"):
        law.size_for(0.04)


def test_rows_of_logs(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    lines = ['{"step": 1, "loss": 2.0}', '{"step": 2, "loss": null}', '{"step": 3, "lo']
    (run / "metrics.jsonl").write_text("\n".join(lines))
    (tmp_path / "a.csv").write_text("step,loss,seed\n5,1.5,0\n6,,1\n")
    rows = read_rows([run, tmp_path], ("step", "loss"))
    assert [(row["file"], float(row["loss"])) for row in rows] == [("run", 2.0), ("a", 1.5)]
    with pytest.raises(UsageError, match="did you mean loss"):
        read_rows([run], ("step", "los"))
    with pytest.raises(UsageError, match="want a CSV or JSONL file"):
        read_rows([tmp_path / "b.csv"], ("step",))
