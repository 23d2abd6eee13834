import json

import pytest

from zoo.cli import main
from zoo.train import cli
from zoo.train.loop import Result

TINY = "digits_vqa_tiny"


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Calls of the loop, which does nothing."""
    calls = []

    def train(experiment, out, *, data_dir):
        calls.append((experiment, out, data_dir))
        return Result(tmp_path, 12, 12, {"loss": 0.5}, None, None, None)

    monkeypatch.setattr("zoo.train.loop.train", train)
    return calls


def test_fields_are_overridden_by_dotted_flags(trained, capsys, tmp_path):
    flags = "--steps 30 --optim.lr 0.5 --model.connector.num-queries 9 --objective.budgets 1 9"
    status = main(["train", TINY, *flags.split(), "--out", str(tmp_path), "--data-dir", "d"])
    assert status == 0
    ((experiment, out, data_dir),) = trained
    assert (experiment.steps, experiment.optim.lr, experiment.model.connector.num_queries) == (
        30,
        0.5,
        9,
    )
    assert experiment.objective.budgets == (1, 9)
    assert (out, str(data_dir)) == (tmp_path, "d")
    printed = capsys.readouterr().out
    assert '"lr": 0.5' in printed
    assert "step 12 of 12  loss 0.5" in printed


def test_without_flags_it_is_the_configuration(trained):
    assert main(["train", TINY]) == 0
    ((experiment, out, data_dir),) = trained
    assert experiment == cli.find(TINY)
    assert str(out) == f"runs/{TINY}"
    assert data_dir is None


def test_a_file_of_ones_own_is_a_configuration(trained, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import replace\n"
        "from zoo.configs import digits_vqa_tiny\n"
        "from zoo.train.data.sources import LlavaJson\n\n"
        "def config():\n"
        "    data = LlavaJson(json='a.json', images='pictures')\n"
        "    return replace(digits_vqa_tiny.config(), data=data)\n"
    )
    assert main(["train", str(file), "--data.images", "others", "--steps", "3"]) == 0
    ((experiment, out, _),) = trained
    assert (experiment.data.json, experiment.data.images, experiment.steps) == (
        "a.json",
        "others",
        3,
    )
    assert str(out) == "runs/mine"
    file.write_text("config = 3\n")
    assert main(["train", str(file)]) == 2
    assert main(["train", str(tmp_path / "none.py")]) == 2
    assert "no function config()" in capsys.readouterr().err


def test_the_outcome_as_json(trained, capsys):
    assert main(["train", TINY, "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["complete"]
    assert outcome["metrics"] == {"loss": 0.5}
    assert outcome["config"]["name"] == TINY


def test_configurations_are_listed(capsys):
    assert main(["train", "--list"]) == 0
    assert TINY in capsys.readouterr().out
    assert main(["train", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [item["name"] for item in listed] == cli.names()
    assert all(item["about"] for item in listed)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["digits_vqa_tyni"], f"nearest: {TINY}"),
        (["../evil"], "there is no configuration"),
        (["--steps", "3"], "usage: zoo train CONFIG"),
        ([], "usage: zoo train CONFIG"),
        ([TINY, "--steps", "0"], "steps is 0: want 1 or more"),
        ([TINY, "--optim.lr", "-1"], "optim.lr is -1"),
        ([TINY, "--optim.schedule", "cosin"], "cosine"),
        ([TINY, "--model.connector.num-queries", "8"], "square"),
        ([TINY, "--stps", "3"], "--steps"),
        ([TINY, "--model.decoder.with", "3"], "--model.decoder.width"),
    ],
)
def test_wrong_use_is_explained_with_status_2(trained, capsys, argv, message):
    try:
        status = main(["train", *argv])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not trained


def test_help_shows_the_fields(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", TINY, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "--model.connector.num-queries" in shown
    assert "--out" in shown
    assert main(["train", "--help"]) == 0
