"""The recipes of the package: that they fit together at full size, and that the tiny ones train."""

import re
import shutil
from dataclasses import replace

import flax.linen as nn
import jax
import numpy as np
import pytest

import zoo
from tests.models.draw import draw
from zoo.convert.place import abstract_params, flat_paths
from zoo.models.core.codec import decode, encode
from zoo.models.core.registry import base
from zoo.models.decoders.gamma_mod import GammaMoD
from zoo.saving import save_model
from zoo.train.cli import find
from zoo.train.config import Recipe
from zoo.train.data.pipeline import Pipeline
from zoo.train.data.preferences import REJECTED, WrongAnswers
from zoo.train.mesh import placed
from zoo.train.optim import OptimConfig
from zoo.train.parts import assigned
from zoo.train.recipe import train_recipe
from zoo.train.setup import Setup

LARGE = ("mqt_llava", "p_mod_llava", "p_mod_llava_next", "gamma_mod_llava", "deepstack_llava")
TINY = ("mqt_tiny", "p_mod_tiny", "gamma_mod_tiny", "deepstack_tiny")
OBJECTIVES = ("lora_tiny", "distill_tiny", "prefer_tiny")


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


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.thorough] * ("next" in name)) for name in LARGE],
)
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
        assert stage.model.inputs(1)["ids"].shape[1] + slots - 1 == (2048 if slots < 2048 else 4096)
        assert stage.model.decoder.dtype == stage.model.tower.dtype == "bfloat16"
        assert stage.model.decoder.remat == "full"


def test_hyperparameters_are_those_of_the_papers():
    for name in LARGE:
        align, instruct = find(name).stages
        assert (align.optim.lr, align.batch_size, align.steps) == (1e-3, 256, 2180)
        epochs = 2 if name == "mqt_llava" else 1
        steps = epochs * (779_289 if "next" in name else 665_298) // 128
        assert (instruct.optim.lr, instruct.batch_size, instruct.steps) == (2e-5, 128, steps)
        for stage in (align, instruct):
            assert stage.optim.schedule == "cosine"
            assert stage.optim.weight_decay == 0
            assert abs(stage.optim.warmup / stage.steps - 0.03) < 1e-3
    align, instruct = find("mqt_llava").stages
    assert align.objective.budgets == ()
    assert instruct.objective.budgets == tuple(range(2, 257, 2))


def test_all_before_the_picture_is_the_prefix_of_gamma_mod():
    """`USER: <image>` by the tokenizer of Vicuna; with its system prompt there would be 35."""
    ids = [1, 3148, 1001, 29901, 29871, 32_000]
    [policy] = find("gamma_mod_llava").stages[1].model.policies
    assert policy.text_prefix == ids.index(32_000) and GammaMoD().text_prefix == 1059 - 1024


def short(name):
    """The tiny recipe, of two steps a stage; without what takes longest to compile."""
    recipe = find(name)

    def few(data):
        if isinstance(data, WrongAnswers):
            return WrongAnswers(few(data.data))
        return replace(data, pictures=24, validation_pictures=8)

    stages = tuple(
        replace(
            stage,
            data=few(stage.data),
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
    recipes = [short(name) for name in TINY + OBJECTIVES]
    assert len({recipe.stages[0] for recipe in recipes}) == 1
    first = replace(recipes[0], stages=recipes[0].stages[:1])
    assert train_recipe(first, folder / "run", data_dir=folder / "data").complete
    return folder


@pytest.mark.slow  # to compile, not to run
@pytest.mark.parametrize(
    "name",
    [
        "p_mod_tiny",
        "gamma_mod_tiny",
        pytest.param("mqt_tiny", marks=pytest.mark.thorough),
        pytest.param("deepstack_tiny", marks=pytest.mark.thorough),
    ],
)
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


def with_teacher(recipe, teacher):
    """The recipe, taught by another model."""
    *before, last = recipe.stages
    last = replace(last, objective=replace(last.objective, teacher=str(teacher)))
    return replace(recipe, stages=(*before, last))


@pytest.mark.thorough
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_recipes_of_objectives_train(name, dense, tmp_path):
    out, recipe = tmp_path / "run", short(name)
    shutil.copytree(dense / "run" / "1_dense", out / "1_dense")
    if name == "distill_tiny":
        recipe = with_teacher(recipe, out / "1_dense")
    result = train_recipe(recipe, out, data_dir=dense / "data")
    assert result.complete
    assert np.isfinite(result.metrics["loss"])


def traced(experiment, batch=()):
    """Shapes of the metrics of a step; nothing is computed or compiled."""
    inputs = {**experiment.model.inputs(experiment.batch_size), **dict(batch)}
    with placed(experiment.mesh) as mesh:
        setup = Setup.of(experiment)
        state = setup.state(mesh)
        step = setup.train_step(state)
        return jax.eval_shape(lambda s, b: step(s, b, None)[1], state, inputs)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a model as the first stage leaves it, untrained."""
    stage = find("distill_tiny").stages[0]
    params = draw(abstract_params(stage.model))
    processor = stage.processor.build(stage.model, stage.data)
    return save_model(tmp_path_factory.mktemp("teacher") / "model", stage.model, params,
                      processor, {})  # fmt: skip


@pytest.mark.parametrize("name", [*OBJECTIVES, "contrastive_tiny"])
def test_the_steps_of_objectives_fit_together(name, teacher):
    found = find(name)
    assert decode(encode(found)) == found
    if name == "distill_tiny":
        assert found.stages[1].objective.teacher == "runs/distill_tiny/" + found.folders[0]
        found = with_teacher(found, teacher)
    last = found.stages[1] if isinstance(found, Recipe) else found
    text = {n: x for n, x in last.model.inputs(last.batch_size).items() if n != "pixels"}
    pairs = {f"{REJECTED}{n}": x for n, x in text.items()} if name == "prefer_tiny" else {}
    metrics = traced(last, pairs)
    wanted = {
        "lora_tiny": "accuracy",
        "distill_tiny": "divergence",
        "prefer_tiny": "chosen_reward",
        "contrastive_tiny": "scale",
    }
    assert {"loss", "grad_norm", wanted[name]} <= set(metrics)


def test_wrong_answers_are_of_the_same_kind(tmp_path):
    [_, stage] = short("prefer_tiny").stages
    stage.data.prepare(tmp_path)
    known = set()
    for record in map(stage.data.data.source("train", tmp_path).__getitem__, range(24)):
        said = zip(record["conversations"], record["kinds"], strict=True)
        known |= {(kind, answer) for (_, answer), kind in said}
    source = stage.data.source("train", tmp_path)
    assert len(source) == 24
    for index in range(24):
        record = source[index]
        [(_, answer)], [kind] = record["conversations"], record["kinds"]
        assert record["rejected"] != answer
        assert (kind, record["rejected"]) in known
    processor = stage.processor.build(stage.model, stage.data)
    batch = next(iter(Pipeline(stage.data, processor, 8, 0, tmp_path)))
    assert (batch["ids"] != batch[f"{REJECTED}ids"]).any(1).all()
    assert not (batch["labels"] == batch[f"{REJECTED}labels"]).all(1).any()
