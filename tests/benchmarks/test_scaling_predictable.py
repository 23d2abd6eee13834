"""Learning curves: shards, the search for the best capacity, laws, and the command."""

import json

import numpy as np
import pytest

from zoo import cli
from zoo.benchmarks.scaling_predictable import Point, StudyConfig, best_of, nested
from zoo.models.core.errors import UsageError
from zoo.models.core.registry import create


def test_shards_double_up_to_everything():
    assert create("scaling_predictable_tiny").shards(1000) == (31, 62, 125, 250, 500, 1000)
    assert create("scaling_predictable").shards(5) == (1, 2, 5)


def test_shards_are_nested_and_stable():
    names = [f"picture {i}" for i in range(50)]
    order = nested(names)
    assert sorted(order) == sorted(names)
    assert order == nested(names[::-1])
    assert order != nested(names, seed=1)
    more = nested([*names, "one more"])
    assert [name for name in more if name != "one more"] == order


@pytest.mark.parametrize("start", [0, 3, 9])
def test_the_best_capacity_is_bracketed(start):
    asked = []

    def train(examples, capacity):
        asked.append(capacity)
        return (capacity - 6) ** 2 + 1.0, 10 * capacity

    point = best_of(100, 10, train, start)
    assert point == Point(100, 1.0, 60, 6, bracketed=True)
    assert len(asked) == len(set(asked))


def test_the_largest_capacity_is_not_bracketed():
    assert not best_of(100, 4, lambda n, k: (1 / (k + 1), k + 1)).bracketed


def histogram(examples, capacity):
    """Piecewise constant regression of a smooth curve from noisy points: with k = 2^capacity pieces
    the squared error is a bias of 1 / k² and a variance of k / n, so that the best k grows as n^1/3
    and its error falls as n^-2/3.
    """
    pieces, errors = round(2 ** (capacity / 2 + 1)), []
    centres = (np.arange(4000) + 0.5) / 4000
    for seed in range(12):
        rng = np.random.default_rng(seed)
        x = rng.uniform(size=examples)
        y = 2 * x + rng.normal(size=examples)
        piece = np.minimum((x * pieces).astype(int), pieces - 1)
        count = np.bincount(piece, minlength=pieces)
        mean = np.bincount(piece, y, minlength=pieces) / np.maximum(count, 1)
        made = np.where(count > 0, mean, y.mean())[(centres * pieces).astype(int)]
        errors.append(np.mean((made - 2 * centres) ** 2))
    return float(np.mean(errors)), pieces


def test_a_study_from_end_to_end():
    study = StudyConfig(factor=4, least=1 / 300).build()
    found = study.run(64_000, 16, histogram)
    assert all(point.bracketed for point in found.points)
    assert found.error.beta == pytest.approx(-2 / 3, abs=0.08)
    assert found.growth.beta == pytest.approx(1 / 3, abs=0.1)


def test_shards_that_only_guess_are_not_fitted():
    study = StudyConfig(guess=1.0, plateau=0.9).build()
    sizes = [1, 2, 4, 8, 16, 32]
    errors = [1.0, 1.0, 0.95, 0.8, 0.4, 0.2]
    points = [Point(n, e, 7, 0, True) for n, e in zip(sizes, errors, strict=True)]
    found = study.fit(points)
    assert found.error.points == 3
    assert found.error.beta == pytest.approx(-1)
    assert found.growth is None
    with pytest.raises(UsageError, match="1 of 4 shards are better than guessing"):
        study.fit(points[:4])


@pytest.fixture
def table(tmp_path):
    rng, lines = np.random.default_rng(0), ["arch,share,score,seed"]
    for arch, beta in (("small", -0.1), ("large", -0.2)):
        for share in (0.001, 0.01, 0.1, 1.0):
            for seed in range(3):
                score = 100 - 20 * share**beta * np.exp(0.02 * rng.normal())
                lines.append(f"{arch},{share},{score},{seed}")
    (tmp_path / "runs.csv").write_text("\n".join(lines))
    (tmp_path / "others.csv").write_text("log,loss\na,1\n")
    return tmp_path


def test_the_command_fits_groups(table, capsys):
    picture = table / "fit.png"
    arguments = ["--x", "share", "--y", "score", "--by", "arch", "--best", "100", "--json"]
    assert cli.main(["scaling", str(table), *arguments, "--figure", str(picture)]) == 0
    small, large = json.loads(capsys.readouterr().out)
    assert (small["group"], small["points"]) == ("small", 12)
    assert small["beta"] == pytest.approx(-0.1, abs=0.01)
    assert small["beta_interval"][0] < -0.1 < small["beta_interval"][1]
    assert large["beta_resampled"][0] < large["beta"] < large["beta_resampled"][1]
    assert large["beta"] == pytest.approx(-0.2, abs=0.01)
    assert picture.stat().st_size > 10_000


def test_the_command_prints_a_table(table, capsys):
    arguments = ["--x", "share", "--y", "score", "--best", "100"]
    assert cli.main(["scaling", str(table), *arguments]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["group", "points", "alpha", "beta"]
    assert line.split()[:2] == ["runs", "24"]


def test_a_column_that_is_not_there(table, capsys):
    assert cli.main(["scaling", str(table), "--x", "shares", "--y", "score"]) == 2
    assert "did you mean share" in capsys.readouterr().err


@pytest.mark.parametrize("setting", [{"factor": 1.0}, {"least": 0.0}, {"plateau": 2.0}])
def test_wrong_settings_are_refused(setting):
    with pytest.raises(ValueError, match="want more than 1"):
        StudyConfig(**setting)
