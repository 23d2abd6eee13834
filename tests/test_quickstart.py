"""The quickstart from beginning to end, too small to learn anything, and its folder."""

import json
import shutil
from dataclasses import replace
from signal import SIGTERM

import numpy as np
import pytest
from PIL import Image

from zoo.cli import main
from zoo.configs import digits_vqa, digits_vqa_tiny
from zoo.images import read_image
from zoo.models.connectors.deepstack import DeepStack, Levels
from zoo.models.decoders.p_mod import PMoD
from zoo.train import quickstart
from zoo.train.data.digits_vqa import KINDS
from zoo.train.data.sources import DigitsVQA
from zoo.train.objectives import NextToken
from zoo.train.quickstart import BUDGETS, Answered, accuracies, with_steps

QUESTIONS = 5 * 12
FULL = digits_vqa.config()  # before the tests make it small


def tiny():
    experiment = digits_vqa_tiny.config()
    data = DigitsVQA(pictures=24, validation_pictures=12)
    once = {"log_every": 2, "eval_every": 0, "eval_examples": 0, "save_every": 2}
    model = experiment.model
    taps = DeepStack(groups=1, source=Levels((1,), model.connector))
    model = replace(model, policies=(PMoD(), taps))
    objective = NextToken((2, 4), masked=True)
    return replace(experiment, model=model, data=data, objective=objective, **once)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """`zoo quickstart` is small, and prepares its data in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits_vqa, "config", tiny)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield patch


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    assert main(["quickstart", "--steps", "4", "--seed", "3", "--out", str(folder)]) == 0
    return folder


def again(capsys, *argv):
    status = main(["quickstart", *map(str, argv)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_results(run):
    results = json.loads((run / "results.json").read_text())
    assert list(results["accuracy"]) == ["1", "2", "4"]  # the tiny model has no more
    assert results["by_kind"].keys() == set(KINDS)
    assert all(list(shares) == ["1", "2", "4"] for shares in results["by_kind"].values())
    assert all(0 <= share <= 1 for share in results["accuracy"].values())
    assert (results["seed"], results["steps"], results["questions"]) == (3, 4, QUESTIONS)
    assert results["seconds"] > 0
    cost = results["cost"]
    assert list(cost) == ["dense", "1", "4"]
    for key in ("flops", "kv_bytes"):
        assert 0 < cost["1"][key] < cost["4"][key] < cost["dense"][key]
    assert results["model"]
    assert results["parameters"] > 10_000


def test_files(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]
    assert (run / "checkpoints" / "4" / "manifest.json").exists()
    for name in ("accuracy.png", "answers.png"):
        assert Image.open(run / name).width > 800
    assert read_image(run / "sample.png").shape == (64, 64, 3)


def test_a_second_time_it_says_that_it_is_complete(capsys, run, monkeypatch):
    monkeypatch.setattr(quickstart, "ask", None)  # nothing is done again
    written = (run / "results.json").read_bytes()
    status, out, err = again(capsys, "--steps", "4", "--seed", "3", "--out", run)
    assert status == 0
    assert "step 4 of 4 restored, complete" in err
    assert "was complete already" in out
    rows = [line.split() for line in out.splitlines() if "%" in line]
    assert rows[0][0] == "all"
    assert [row[0] for row in rows[1:]] == [*sorted(KINDS), "decoder", "key-value"]
    assert all(len(row) >= 4 for row in rows)
    assert f"zoo generate {run} --image {run}/sample.png --prompt" in out
    assert (run / "results.json").read_bytes() == written


def test_what_is_missing_is_made_again(capsys, run, small):
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").unlink()
    shutil.rmtree(run / "model")
    status, out, _ = again(capsys, "--steps", "4", "--seed", "3", "--out", run, "--json")
    assert status == 0
    found = json.loads(out)
    assert found["complete"]
    assert found["out"] == str(run)
    assert found["accuracy"] == results["accuracy"]
    assert found["by_kind"] == results["by_kind"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "4"], "seed: 3 → 0"),
        (["--seed", "3", "--steps", "6"], "steps: 4 → 6"),
    ],
)
def test_another_configuration_is_refused(capsys, run, flags, message):
    status, _, err = again(capsys, *flags, "--out", run)
    assert status == 2
    assert message in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "steps is 0: want 1 or more"),
        (["--steps", "some"], "invalid int value"),
        (["--seed", "-1"], "seed is -1: want 0 or more"),
        (["--stpes", "3"], "unrecognized arguments: --stpes"),
    ],
)
def test_bad_flags(capsys, small, tmp_path, flags, message):
    try:
        status = main(["quickstart", *flags, "--out", str(tmp_path / "out")])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_interrupted_training_is_no_success(capsys, small, tmp_path, monkeypatch):
    class Stopped:
        folder, step, complete, stopped = tmp_path, 2, False, SIGTERM

    monkeypatch.setattr(quickstart, "train", lambda *args, **kwargs: Stopped)
    status, out, _ = again(capsys, "--out", tmp_path, "--json")
    assert status == 128 + SIGTERM
    assert json.loads(out) == {"out": str(tmp_path), "complete": False, "step": 2}


def test_the_folder_alone_answers_questions(capsys, run, tmp_path, monkeypatch):
    moved = shutil.copytree(run, tmp_path / "elsewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no data here"))
    monkeypatch.chdir(moved)
    Image.fromarray(np.zeros((30, 90), np.uint16)).save("deep.png")
    for image in ("sample.png", "deep.png"):
        flags = ["--image", image, "--prompt", "how many digits?", "--budget", "2", "--json"]
        assert main(["generate", ".", *flags]) == 0
        assert json.loads(capsys.readouterr().out)["budget"] == 2


def test_shares_of_right_answers():
    rows = [("a", "1", {1: "1", 2: "1"}), ("a", "2", {1: "1", 2: "2"}), ("b", "", {1: "x", 2: ""})]
    answered = [Answered("n", None, kind, "?", right, given) for kind, right, given in rows]
    assert accuracies(answered) == {
        "accuracy": {"1": 1 / 3, "2": 1.0},
        "by_kind": {"a": {"1": 0.5, "2": 1.0}, "b": {"1": 0.0, "2": 1.0}},
    }


def test_the_experiment_judges_all_budgets():
    assert FULL.model.connector.num_queries == max(BUDGETS)
    assert FULL.data.scene.canvas == FULL.model.tower.image_size
    short = with_steps(FULL, 20)
    assert (short.steps, short.optim.warmup) == (20, 2)
