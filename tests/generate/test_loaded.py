"""`Loaded`: one question or many, whole or in pieces, and what a model cannot do."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import zoo
from tests.models.draw import draw
from zoo.convert.place import abstract_params, shardings_of
from zoo.generate.autoregressive import Answers
from zoo.generate.sampling import Sampling
from zoo.loaded import Loaded
from zoo.models.connectors.mqt import MQT
from zoo.models.core.errors import UsageError
from zoo.models.core.tree import nested
from zoo.processors import ImageProcessor, Processor, Tokenizer
from zoo.train.mesh import MeshConfig, make_mesh

PROMPT = "which digit?"
SHORT = {"max_new_tokens": 4}
DRAWN = Sampling(2.0, seed=3)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    config = zoo.config("mqt_tiny")
    shapes = jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))["params"]
    processor = Processor(ImageProcessor(16), Tokenizer.train([PROMPT], 300), 20)
    return Loaded(tmp_path_factory.mktemp("x"), config, config.build(), draw(shapes), processor, {})


@pytest.fixture(scope="module")
def pictures():
    return list(np.random.default_rng(0).integers(0, 256, (2, 30, 30, 3), np.uint8))


def test_a_list_of_prompts_has_a_list_of_answers(loaded, pictures):
    answers = loaded.generate(pictures, [PROMPT, "no?"], sampling=DRAWN, **SHORT)
    first = loaded.generate(pictures[0], PROMPT, sampling=DRAWN, **SHORT)
    second = dataclasses.replace(DRAWN, seed=4)
    assert answers == [first, loaded.generate(pictures[1], "no?", sampling=second, **SHORT)]
    batch = loaded.processor.encode_prompt(pictures, [PROMPT, "no?"])
    assert loaded.answers(batch, sampling=DRAWN, **SHORT) == answers


def test_pieces_make_up_the_answer(loaded, pictures):
    for every in (1, 3):
        pieces = loaded.stream(pictures[0], PROMPT, sampling=DRAWN, every=every, **SHORT)
        whole = loaded.generate(pictures[0], PROMPT, sampling=DRAWN, **SHORT)
        assert "".join(pieces) == whole
    assert len(whole) > 1


def test_an_answer_is_cut_off_where_a_stop_string_begins(loaded, pictures):
    whole = loaded.generate(pictures[0], PROMPT, sampling=DRAWN, **SHORT)
    cut = loaded.generate(pictures[0], PROMPT, sampling=DRAWN, stop=[whole[1:]], **SHORT)
    assert cut == whole[0].strip()


def test_logits_are_those_of_the_model(loaded, pictures):
    batch = loaded.processor.encode_prompt(pictures[0], PROMPT)
    apply = jax.jit(loaded.model.apply, static_argnames=("method", "budget"))
    for budget in (None, 2):
        found = loaded.logits({**batch, "labels": batch["ids"]}, budget=budget)
        hidden = apply({"params": loaded.params}, batch, budget=budget).hidden
        expected = apply({"params": loaded.params}, hidden, method="head")
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_on_a_mesh_the_answers_are_the_same(loaded, pictures):
    """The cache lies there as parameters do: rows along fsdp, heads along tensor."""
    config = loaded.config
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    places = nested(shardings_of(abstract_params(config), mesh))
    spread = dataclasses.replace(loaded, params=jax.device_put(loaded.params, places))
    prompts = [PROMPT, "no?"]
    assert spread.generate(pictures, prompts, **SHORT) == loaded.generate(
        pictures, prompts, **SHORT
    )
    batch = loaded.processor.encode_prompt(pictures, prompts)
    answers = Answers(spread.reader()[0], spread.variables, batch, max_new_tokens=4, eos_id=())
    keys = next(leaf for leaf in jax.tree.leaves(answers._state.cache) if leaf.ndim == 4)
    assert keys.sharding.spec == PartitionSpec("fsdp", "tensor")


def test_what_a_model_cannot_do_is_said(loaded, pictures):
    with pytest.raises(UsageError, match="has learned no system text"):
        loaded.generate(pictures[0], PROMPT, system="Be brief.")
    with pytest.raises(UsageError, match="want 1 to num_queries = 4"):
        loaded.generate(pictures[0], PROMPT, budget=9)
    with pytest.raises(UsageError, match="every is 0"):
        next(loaded.stream(pictures[0], PROMPT, every=0, **SHORT))
    silent = dataclasses.replace(loaded, processor=None)
    with pytest.raises(UsageError, match="has no tokenizer"):
        silent.generate(None, PROMPT)
    tower = dataclasses.replace(loaded, model=zoo.config("mqt_tiny").tower.build())
    with pytest.raises(UsageError, match="writes no text"):
        tower.stream(None, PROMPT)


def test_other_settings_with_the_same_parameters(tmp_path):
    """A reducer comes and goes without a copy; what a part adds is named."""
    config = zoo.config("llava_tiny")
    shapes = jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))["params"]
    params = jax.tree.map(jax.numpy.asarray, draw(shapes))
    whole = Loaded(tmp_path, config, config.build(), params, None, {"source": "x"})
    fewer = whole.with_(reducer="fastervlm", keep=4)
    assert fewer.config == zoo.config("llava_tiny", reducer="fastervlm", keep=4)
    kept, want = (dict(jax.tree_util.tree_leaves_with_path(x.params)) for x in (fewer, whole))
    assert kept.keys() == want.keys()
    assert all(kept[path] is want[path] for path in want)
    assert fewer.about == {"source": "x"}
    assert fewer.with_(keep=2).config.slots == 2
    assert fewer.with_(reducer=None).config == config
    other = whole.with_(connector=MQT(4, 2))
    assert "connector/queries" in other.about["new"]
    assert "connector/up/kernel" in other.about["unused"]
    with pytest.raises(UsageError, match="there are 16 tokens"):
        whole.with_(reducer="fastervlm", keep=17)
    with pytest.raises(UsageError, match="does not fit"):
        whole.with_(**{"decoder.depth": 3})
