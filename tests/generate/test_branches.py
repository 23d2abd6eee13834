"""Decoding from two readings: guidance and contrast, against two models asked apart."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.models.draw import draw
from zoo.generate.autoregressive import Answers, Reader, generate
from zoo.generate.branches import Combined, Contrast, Guidance

CONFIG = zoo.config("mqt_tiny")
STEPS = 5


@dataclass(frozen=True)
class Blind:
    """The prompt, and the same without its picture."""

    def __call__(self, reader, params, prompts, budget):
        hidden = prompts["text_mask"] & (prompts["ids"] != reader.model.config.image_id)
        return prompts, {**prompts, "text_mask": hidden}


@dataclass(frozen=True)
class Other:
    """The other reading alone."""

    def __call__(self, logits):
        return logits[1]


@pytest.fixture(scope="module")
def setting():
    model = CONFIG.build()
    shapes = jax.eval_shape(model.init, jax.random.key(0), CONFIG.inputs(1))["params"]
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 320, (2, 9)).astype(np.int32)
    ids[:, 1] = CONFIG.image_id
    mask = np.arange(9) < np.array([[9], [6]])
    pixels = rng.normal(size=(2, 1, 16, 16, 3)).astype(np.float32)
    return model, draw(shapes), {"ids": ids, "text_mask": mask, "pixels": pixels}


def written(model, params, batch, combine, budget=None):
    reader = Combined(model, branches=Blind(), combine=combine)
    options = {"max_new_tokens": STEPS, "eos_id": (), "budget": budget}
    answers = Answers(reader, params, batch, **options)
    answers.advance(STEPS)
    return answers.ids()


def test_a_budget_for_every_row(setting):
    """It goes to both readings."""
    model, params, batch = setting
    budgets, seen = jnp.array([2, 4]), []

    class Watched(Blind):
        def __call__(self, reader, params, prompts, budget):
            seen.append(budget.shape)
            return super().__call__(reader, params, prompts, budget)

    reader = Combined(model, branches=Watched(), combine=Guidance(1.0))
    logits, _ = jax.eval_shape(lambda p, b, n: reader.prefill(p, b, n, 0), params, batch, budgets)
    assert logits.shape == (2, 320) and seen == [(2,)]


def test_the_other_reading_is_the_prompt_without_its_picture(setting):
    model, params, batch = setting
    text = {"ids": np.delete(batch["ids"], 1, 1), "text_mask": np.delete(batch["text_mask"], 1, 1)}
    blind = generate(model, params, text, max_new_tokens=STEPS, eos_id=())
    assert written(model, params, batch, Other()).tolist() == blind.tolist()


def test_each_step_combines_what_both_say_after_the_same_words(setting):
    """Against whole sequences, read apart."""
    model, params, batch = setting
    combine, batch = Contrast(1.5, 0.2), {**batch, "text_mask": np.ones((2, 9), bool)}
    found = written(model, params, batch, combine)
    ids = np.concatenate([batch["ids"], found], 1)
    whole = {"ids": ids, "text_mask": np.ones(ids.shape, bool), "pixels": batch["pixels"]}
    text = {"ids": np.delete(ids, 1, 1), "text_mask": np.ones((2, ids.shape[1] - 1), bool)}
    apply = jax.jit(lambda p, b: Reader(model).logits(p, b, None))
    seen, blind = (np.asarray(apply(params, b))[:, -STEPS - 1 : -1] for b in (whole, text))
    together = np.stack([combine(pair) for pair in jnp.stack([seen, blind], 1)])
    assert together.argmax(-1).tolist() == found.tolist() != seen.argmax(-1).tolist()


def test_guidance():
    logits = jnp.array([[[4.0, 0.0]], [[1.0, 2.0]]])
    np.testing.assert_allclose(Guidance(1.0)(logits), logits[0])
    np.testing.assert_allclose(Guidance(3.0)(logits), [[10.0, -4.0]])


def test_contrast_keeps_to_likely_tokens():
    logits = jnp.array([[[4.0, 3.9, 0.0]], [[9.0, 1.0, -9.0]]])
    found = Contrast(1.0, 0.5)(logits)
    np.testing.assert_allclose(found, [[-1.0, 6.8, -np.inf]], rtol=1e-5)
    assert np.isfinite(Contrast(1.0, 0.0)(logits)).all()
    for alpha, beta in ((-1, 0.1), (1, 1.1), (np.inf, 0.1)):
        with pytest.raises(ValueError, match="want alpha from 0 on"):
            Contrast(alpha, beta)
