"""Greedy decoding: equal to recomputing everything for each token, for any batch and budget."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.models.draw import draw
from zoo.generate.autoregressive import generate
from zoo.models.core.errors import UsageError

LENGTH, PAD, IMAGE = 6, 0, 3
PROMPTS = (9, 4, 7)
NEVER = 1000
"""No token of the model: answers go on to their full length."""


@pytest.fixture(scope="module")
def model():
    return zoo.create("mqt_tiny")


@pytest.fixture(scope="module")
def params(model):
    inputs = zoo.config("mqt_tiny").inputs(1)
    return draw(jax.eval_shape(model.init, jax.random.key(0), inputs)["params"])


@pytest.fixture(scope="module")
def prompts():
    """Three questions of different length, padded on the right."""
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 320, (3, 12)).astype(np.int32)
    ids[:, 1] = IMAGE
    mask = np.arange(12) < np.array(PROMPTS)[:, None]
    pixels = rng.normal(size=(3, 1, 16, 16, 3)).astype(np.float32)
    return {"pixels": pixels, "ids": np.where(mask, ids, PAD), "text_mask": mask}


def recomputed(model, params, prompts, row, budget) -> list[int]:
    """One answer without cache and padding: the whole sequence again for each token."""
    ids = list(prompts["ids"][row, : PROMPTS[row]])
    # One length for all, so that this is one program; causality hides what comes after.
    width = max(PROMPTS) + LENGTH
    for _ in range(LENGTH):
        padded = np.array([ids + [PAD] * (width - len(ids))], np.int32)
        mask = np.arange(width)[None] < len(ids)
        batch = {"pixels": prompts["pixels"][row : row + 1], "ids": padded, "text_mask": mask}
        ids.append(int(whole(model, params, batch, budget, len(ids) + budget - 2)))
    return ids[-LENGTH:]


@jax.jit(static_argnames=("model", "budget"))
def whole(model, params, batch, budget, last):
    hidden = model.apply({"params": params}, batch, budget=budget).hidden
    return model.apply({"params": params}, hidden[:, last], method="head").argmax(-1)[0]


@pytest.fixture(scope="module")
def answers(model, params, prompts):
    """Answers of the whole batch by budget."""
    options = {"max_new_tokens": LENGTH, "eos_id": NEVER}
    return {m: np.asarray(generate(model, params, prompts, budget=m, **options)) for m in (1, 4)}


@pytest.mark.parametrize("budget", [1, 4])
def test_equals_recomputation_token_by_token(model, params, prompts, answers, budget):
    for row in range(3):
        expected = recomputed(model, params, prompts, row, budget)
        assert answers[budget][row].tolist() == expected
    assert len(np.unique(answers[budget])) > 3  # no model that always says the same


def test_one_by_one_is_the_same_as_a_batch(model, params, prompts, answers):
    for row in range(3):
        alone = {name: array[row : row + 1] for name, array in prompts.items()}
        found = generate(model, params, alone, max_new_tokens=LENGTH, eos_id=NEVER, budget=4)
        assert (np.asarray(found)[0] == answers[4][row]).all()


def test_budgets(model, params, prompts, answers):
    options = {"max_new_tokens": LENGTH, "eos_id": NEVER}
    assert (answers[1] != answers[4]).any()
    all_tokens = generate(model, params, prompts, **options)
    assert (np.asarray(all_tokens) == answers[4]).all()
    for m in (1, 4):
        masked = generate(model, params, prompts, budget=jnp.int32(m), **options)
        assert (np.asarray(masked) == answers[m]).all()
    mixed = generate(model, params, prompts, budget=jnp.array([1, 4, 1]), **options)
    assert np.asarray(mixed).tolist() == [answers[m][i].tolist() for i, m in enumerate((1, 4, 1))]
    with pytest.raises(ValueError, match="want 1 to num_queries = 4"):
        generate(model, params, prompts, budget=5, **options)


def test_an_answer_ends_with_eos(model, params, prompts, answers):
    eos = int(answers[4][0, 2])
    found = generate(model, params, prompts, max_new_tokens=LENGTH, eos_id=eos)
    for row, full in zip(np.asarray(found), answers[4], strict=True):
        end = [*full.tolist(), eos].index(eos)
        assert row.tolist() == full.tolist()[:end] + [eos] * (LENGTH - end)


def test_text_alone(model, params, prompts):
    text = {"ids": np.where(prompts["ids"] == IMAGE, 5, prompts["ids"])}
    text["text_mask"] = prompts["text_mask"]
    assert generate(model, params, text, max_new_tokens=1, eos_id=NEVER).shape == (3, 1)


def test_programs_are_compiled_once(model, params, prompts):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )

    def ask(model, budget, *, eos=7, length=LENGTH):
        before = len(compiled)
        batch = {**prompts, "labels": prompts["ids"]}
        generate(model, params, batch, max_new_tokens=length, eos_id=eos, budget=budget)
        return len(compiled) - before

    ask(model, 1)
    ask(model, jnp.int32(1))
    same = zoo.create("mqt_tiny")  # another object, equal
    assert same is not model
    assert ask(same, 1, eos=9) == 0
    assert ask(same, jnp.int32(3)) == 0
    assert ask(model, 1, length=LENGTH + 1) == 0  # room for both
    assert ask(model, 1, length=40) > 0


def test_no_room_for_an_answer_is_refused(model, params, prompts):
    with pytest.raises(UsageError, match="max_new_tokens is 0"):
        generate(model, params, prompts, max_new_tokens=0, eos_id=1)
