"""The page on training: every command is understood as written, every configuration is made."""

import re
import shlex
from pathlib import Path

import pytest

from zoo.cli import main
from zoo.train.config import Faults, Recipe
from zoo.train.loop import Result

PAGE = "docs/training.md"


def blocks(repo, language):
    return re.findall(rf"```{language}\n(.*?)```", (repo / PAGE).read_text("utf-8"), re.DOTALL)


@pytest.fixture
def page(repo, tmp_path, monkeypatch):
    """The configurations of the page as files of the working directory, and the runs asked for."""
    calls = []

    def train(config, out, *, data_dir):
        calls.append((config, out))
        return Result(Path(out), 1, 1, {}, None, None, None)

    monkeypatch.setattr("zoo.train.loop.train", train)
    monkeypatch.setattr("zoo.train.recipe.train_recipe", train)
    monkeypatch.chdir(tmp_path)
    for number, code in enumerate(blocks(repo, "python")):
        name = re.match(r"# (\S+\.py)\n", code)
        (tmp_path / (name[1] if name else f"page_{number}.py")).write_text(code)
    return repo, tmp_path, calls


def test_every_command_is_understood(page):
    repo, _, calls = page
    commands = [line for block in blocks(repo, "sh") for line in block.splitlines() if line]
    assert len(commands) >= 4
    for line in commands:
        program, *argv = shlex.split(line)
        assert program == "zoo"
        assert main(argv) == 0, line
    by_name = {config.name: config for config, _ in calls}
    assert by_name["mine"].parts[1].lr == 2e-4
    assert by_name["mine"].model.decoder.remat == "full"
    assert by_name["p_mod_tiny"].stages[0].start[0].source == "runs/other"
    assert by_name["p_mod_tiny"].stages[0].steps == 50
    assert by_name["mqt_tiny"].stages[1].faults == Faults(do="rewind", spike=3)
    assert by_name["mqt_tiny"].stages[1].best.number == 2
    assert by_name["p_mod_llava"].stages[1].data.json == "conversations.json"


def test_every_configuration_is_made(page):
    _, folder, _ = page
    made = []
    for file in sorted(folder.glob("*.py")):
        found: dict = {}
        exec(compile(file.read_text(), file, "exec"), found)
        if "config" in found:
            made.append(found["config"]())
    assert sorted(type(config).__name__ for config in made) == ["Experiment"] * 3 + ["Recipe"]


def test_the_table_names_recipes_that_there_are(page):
    from zoo.train.cli import find

    repo, _, _ = page
    rows = re.findall(r"^\| ((?:`\w+_(?:llava|tiny)`(?:, )?)+) \|", (repo / PAGE).read_text(), re.M)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(names) == 8
    assert all(isinstance(find(name), Recipe) for name in names)
