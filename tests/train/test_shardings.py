"""The recorded shardings are those of the code."""

import json

import pytest

from zoo.models.core import registry
from zoo.models.core.config import ModelConfig
from zoo.models.core.errors import UsageError
from zoo.train.shardings import FOLDER, MESHES, main, render, shardings, slugs


@pytest.mark.thorough  # all of them together; the next but one looks at one
@pytest.mark.parametrize("slug", slugs())
def test_the_record_is_up_to_date(slug, repo):
    file = repo / FOLDER / f"{slug}.json"
    assert file.is_file(), f"run python -m zoo.train.shardings {slug}"
    assert file.read_text("utf-8") == render(slug), f"run python -m zoo.train.shardings {slug}"


def test_there_is_no_record_of_anything_else(repo):
    assert {file.stem for file in (repo / FOLDER).glob("*.json")} == set(slugs())


def test_a_record_says_where_a_parameter_lies():
    found = shardings(registry.config("llava_1_5_7b"))
    assert found["params"]["decoder/stack/layers/q/kernel"] == [
        "32 x 4096 x 32 x 128", ". fsdp . .", ". fsdp . .", ". fsdp tensor ."
    ]  # fmt: skip
    assert found["params"]["decoder/embedding/embedding"][-1] == "tensor+fsdp ."
    assert list(found["divided"]) == list(MESHES)
    assert min(found["divided"].values()) > 0.99


def test_a_record_is_json_and_can_be_checked(repo, capsys):
    record = json.loads(render("mqt"))
    assert all(isinstance(registry.config(name), ModelConfig) for name in record)
    assert main(["mqt", "--check"]) == 0
    assert capsys.readouterr().err == ""
    with pytest.raises(UsageError, match="mqqt is no model"):
        render("mqqt")
