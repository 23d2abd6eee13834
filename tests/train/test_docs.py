"""The page on training: its walk is taken as written; every other command is understood, and every
configuration made.
"""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import zoo
from tests.convert import checkpoint
from tests.processors import test_hub
from zoo.cli import main
from zoo.models.core.tree import flat_paths
from zoo.models.parts.layers.stack import restack
from zoo.train.config import Faults, Recipe
from zoo.train.loop import Result

PAGE = "docs/training.md"


WALK = r"## From pictures to a model of your own\n.*?(?=\n## )"
LLAVA = {
    "model_type": "llava",
    "image_token_index": 259,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "text_config": {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 8,
        "image_size": 28,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "patch_size": 14,
    },
}


def found(language, text):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def blocks(repo, language):
    """Those outside of the walk."""
    text = (repo / PAGE).read_text("utf-8")
    return found(language, re.sub(WALK, "", text, flags=re.DOTALL))


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


def test_the_walk_is_taken(repo, tmp_path, monkeypatch, capsys):
    walk = re.search(WALK, (repo / PAGE).read_text("utf-8"), re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    checkpoint.write_checkpoint("llava", checkpoint.state_of(LLAVA, np.float32), LLAVA)
    test_hub.write_checkpoint(Path("llava"))
    [conversations], [code, python] = found("json", walk), found("python", walk)
    Path("conversations.json").write_text(conversations)
    Path("own.py").write_text(code)
    Path("pictures").mkdir()
    for number, record in enumerate(json.loads(conversations)):
        shade = np.full((30, 40, 3), 90 * number, np.uint8)
        Image.fromarray(shade).save(Path("pictures", record["image"]))
    said = []
    for line in "".join(found("sh", walk)).splitlines():
        program, *argv = shlex.split(line)
        assert program == "zoo"
        assert main(argv) == 0, line
        said.append(capsys.readouterr().out)
    trained, _, exported = said[1:]
    exec(compile(python, "page", "exec"), {})
    assert trained == exported == capsys.readouterr().out
    before, run, after = (
        flat_paths(restack(zoo.load(source).params)) for source in ("llava", "runs/own", "exported")
    )
    for path, leaf in after.items():
        np.testing.assert_array_equal(leaf, run[path], err_msg=path)
        assert np.array_equal(leaf, before[path]) == path.startswith("tower/"), path


def test_the_table_names_recipes_that_there_are(page):
    from zoo.train.cli import find

    repo, _, _ = page
    rows = re.findall(r"^\| ((?:`\w+_(?:llava|tiny)`(?:, )?)+) \|", (repo / PAGE).read_text(), re.M)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(names) == 11
    assert all(isinstance(find(name), Recipe) for name in names)
