"""`Loaded`: one question or many, whole or in pieces, and what a model cannot do."""

import dataclasses

import jax
import numpy as np
import pytest

import zoo
from tests.models.draw import draw
from zoo.generate.sampling import Sampling
from zoo.loaded import Loaded
from zoo.models.core.errors import UsageError
from zoo.processors import ImageProcessor, Processor, Tokenizer

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
