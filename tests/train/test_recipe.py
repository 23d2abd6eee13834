import json
import os
import random
import subprocess
import time
from dataclasses import replace

import flax.linen as nn
import jax
import numpy as np
import pytest

from tests.train.runs import kill_at, start
from tests.train.tiny import TinyConfig, find_here, tiny, tiny_recipe
from zoo.loading import load
from zoo.models.core.errors import UsageError
from zoo.saving import read_description
from zoo.train.config import Recipe
from zoo.train.metrics import read_metrics
from zoo.train.recipe import train_recipe

STAGES = ("1_align", "2_instruct")


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr("zoo.models.core.codec._find", find_here)


def lines(out):
    """Number of logged steps of all stages."""
    return sum(len(read_metrics(out / stage / "metrics.jsonl")) for stage in STAGES)


def losses(out):
    found = {}
    for stage in STAGES:
        records = read_metrics(out / stage / "metrics.jsonl")
        assert [r["step"] for r in records] == list(range(1, len(records) + 1))
        found |= {(stage, r["step"]): (r["loss"], r["grad_norm"]) for r in records}
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a recipe that ran through in one go."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run = start(out, "recipe")
    assert run.wait() == 0, run.stderr.read()
    return out


def test_stages_follow_one_another(whole):
    assert sorted(p.name for p in whole.iterdir()) == [
        ".lock", *STAGES, "config.json", "model"
    ]  # fmt: skip
    assert len(losses(whole)) == 6 + 8
    last, first = load(whole), load(whole / "1_align")
    assert last.about["experiment"] == "instruct"
    assert last.about["start"] == [str(whole / "1_align")]
    assert os.readlink(whole / "model") == "2_instruct/model"  # so that the folder may be moved
    assert json.loads((whole / "config.json").read_text())["stages"][1]["name"] == "instruct"
    # The second stage goes on with the tokenizer of the first, and with what was frozen there.
    assert (whole / "model" / "tokenizer.json").read_bytes() == (
        whole / "1_align" / "model" / "tokenizer.json"
    ).read_bytes()
    config = TinyConfig()
    batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), config.inputs(1))
    drawn = nn.unbox(config.build().init(jax.random.split(jax.random.key(0))[0], batch)["params"])
    np.testing.assert_array_equal(first.params["embedding"], drawn["embedding"])
    assert not np.array_equal(last.params["embedding"], first.params["embedding"])


@pytest.mark.slow  # starts the program four times
def test_killed_at_any_moment_it_continues_with_the_same_losses(whole, tmp_path):
    wanted, rng, kills = losses(whole), random.Random(time.time_ns()), 0
    for target in (3, 6, 9):  # within the first stage, between the two, within the second
        run = start(tmp_path, "recipe", seconds_per_record=0.01)
        kills += kill_at(run, lambda: lines(tmp_path), target, rng.uniform(0, 0.3))
        found = losses(tmp_path)
        assert all(wanted[step] == numbers for step, numbers in found.items())
    assert kills
    run = start(tmp_path, "recipe")
    assert run.wait() == 0, run.stderr.read()
    assert losses(tmp_path) == wanted
    for stage in STAGES:
        jax.tree.map(np.testing.assert_array_equal, load(tmp_path / stage).params,
                     load(whole / stage).params)  # fmt: skip


def test_a_complete_recipe_is_not_run_again_and_may_be_moved(whole, tmp_path):
    moved = tmp_path / "moved"
    subprocess.run(["cp", "-r", str(whole), str(moved)], check=True)
    before = (moved / "2_instruct" / "metrics.jsonl").read_bytes()
    result = train_recipe(tiny_recipe(), moved)
    assert result.complete
    assert result.folder == moved / "2_instruct"
    assert (moved / "2_instruct" / "metrics.jsonl").read_bytes() == before
    assert read_description(moved / "model").about["step"] == 8

    changed = tiny_recipe()
    stages = (replace(changed.stages[0], seed=7), changed.stages[1])
    with pytest.raises(UsageError, match="seed: 0 → 7"):
        train_recipe(replace(changed, stages=stages), moved)
    other = Recipe("other", (tiny(name="pretrain"),))
    with pytest.raises(UsageError, match=r"1_align, 2_instruct of another recipe.* 1_pretrain"):
        train_recipe(other, moved)


def test_a_signal_ends_the_stage_and_the_recipe_which_then_goes_on(whole, tmp_path):
    def interrupt(model, params, step):
        os.kill(os.getpid(), 15)
        return {}

    recipe = tiny_recipe(eval_every=4)
    result = train_recipe(recipe, tmp_path, on_eval=interrupt)
    assert (result.step, result.complete, result.folder) == (4, False, tmp_path / "1_align")
    assert not (tmp_path / "2_instruct").exists()
    assert not (tmp_path / "model").exists()
    assert train_recipe(tiny_recipe(), tmp_path).complete
    for step, numbers in losses(whole).items():
        np.testing.assert_allclose(losses(tmp_path)[step], numbers, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), "no stages"),
        ((tiny(), tiny()), "names of their own"),
        ((tiny(name="../a"),), "a name for a folder"),
    ],
)
def test_impossible_recipes_are_refused(stages, message):
    with pytest.raises(UsageError, match=message):
        Recipe("mine", stages)
