"""The recipes of the package: that they fit together at full size, and that the tiny ones train."""

import re
import shutil
from dataclasses import replace

import flax.linen as nn
import numpy as np
import pytest

import zoo
from zoo.convert.place import abstract_params, flat_paths
from zoo.models.core.codec import decode, encode
from zoo.models.core.registry import base
from zoo.train.cli import find
from zoo.train.config import Recipe
from zoo.train.optim import OptimConfig
from zoo.train.parts import assigned
from zoo.train.recipe import train_recipe

LARGE = ("mqt_llava", "p_mod_llava", "gamma_mod_llava", "deepstack_llava")
TINY = ("mqt_tiny", "p_mod_tiny", "gamma_mod_tiny", "deepstack_tiny")


def shapes(config):
    return {
        path: leaf.shape for path, leaf in flat_paths(nn.unbox(abstract_params(config))).items()
    }


def matched(patterns, paths):
    return {path for path in paths if any(re.fullmatch(pattern, path) for pattern in patterns)}


@pytest.fixture(scope="module")
def sources():
    """The shapes of the checkpoints that recipes start from, by their names on the hub."""
    return {
        "lmsys/vicuna-7b-v1.5": shapes(base("vicuna_7b").variants["vicuna_7b"]),
        "openai/clip-vit-large-patch14-336": shapes(base("clip").variants["clip_vit_l14_336"]),
    }


@pytest.mark.parametrize("name", LARGE)
def test_the_stages_of_llava_fit_together(name, sources):
    recipe = find(name)
    assert isinstance(recipe, Recipe)
    assert decode(encode(recipe)) == recipe
    align, instruct = recipe.stages
    first, second = shapes(align.model), shapes(instruct.model)
    # Whatever is not drawn anew comes from a checkpoint, in the same shape.
    given = {}
    for start in align.start:
        given |= {start.place(path): shape for path, shape in sources[start.source].items()}
    assert all(given[path] == first[path] for path in first.keys() - matched(align.fresh, first))
    # What the second stage has beyond the first is what it draws.
    assert second.keys() - first.keys() == matched(instruct.fresh, second)
    assert all(second[path] == first[path] for path in first.keys() & second.keys())
    for stage, frozen in ((align, {"tower", "decoder"}), (instruct, {"tower"})):
        owner = assigned(stage.parts, abstract_params(stage.model))
        found = {path.split("/")[0] for path, i in owner.items() if stage.parts[i].frozen}
        assert found == frozen
        slots = stage.model.slots
        assert stage.model.inputs(1)["ids"].shape[1] + slots - 1 == 2048
        assert stage.model.decoder.dtype == stage.model.tower.dtype == "bfloat16"
        assert stage.model.decoder.remat == "full"


def test_hyperparameters_are_those_of_the_papers():
    for name in LARGE:
        align, instruct = find(name).stages
        assert (align.optim.lr, align.batch_size, align.steps) == (1e-3, 256, 2180)
        epochs = 2 if name == "mqt_llava" else 1
        steps = epochs * 665_298 // 128
        assert (instruct.optim.lr, instruct.batch_size, instruct.steps) == (2e-5, 128, steps)
        for stage in (align, instruct):
            assert stage.optim.schedule == "cosine"
            assert stage.optim.weight_decay == 0
            assert abs(stage.optim.warmup / stage.steps - 0.03) < 1e-3
    align, instruct = find("mqt_llava").stages
    assert align.objective.budgets == ()
    assert instruct.objective.budgets == tuple(range(2, 257, 2))


def short(name):
    """The tiny recipe, of two steps a stage; without what takes longest to compile."""
    recipe = find(name)
    stages = tuple(
        replace(
            stage,
            data=replace(stage.data, pictures=24, validation_pictures=8),
            steps=2,
            batch_size=8,
            eval_examples=0,
            log_every=1,
            optim=OptimConfig(warmup=0),
        )
        for stage in recipe.stages
    )
    return replace(recipe, stages=stages)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The folder of the first stage, which is the same for all tiny recipes."""
    folder = tmp_path_factory.mktemp("dense")
    recipes = [short(name) for name in TINY]
    assert len({recipe.stages[0] for recipe in recipes}) == 1
    first = replace(recipes[0], stages=recipes[0].stages[:1])
    assert train_recipe(first, folder / "run", data_dir=folder / "data").complete
    return folder


@pytest.mark.slow  # to compile, not to run
@pytest.mark.parametrize("name", TINY)
def test_the_tiny_recipes_train(name, dense, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(dense / "run" / "1_dense", out / "1_dense")
    result = train_recipe(short(name), out, data_dir=dense / "data")
    assert result.complete
    assert np.isfinite(result.metrics["loss"])
    assert ("router_loss" in result.metrics) == (name == "gamma_mod_tiny")
    before, after = zoo.load(out / "1_dense"), zoo.load(out)
    np.testing.assert_array_equal(
        np.asarray(after.params["tower"]["patch"]["kernel"]),
        np.asarray(before.params["tower"]["patch"]["kernel"]),
    )
    assert not np.array_equal(
        after.params["decoder"]["embedding"]["embedding"],
        before.params["decoder"]["embedding"]["embedding"],
    )
