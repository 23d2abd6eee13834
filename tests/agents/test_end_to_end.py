"""Agents around a model: all calls reach it, whatever it makes of them."""

import jax
import numpy as np
import pytest

import zoo
from tests.models.draw import draw
from zoo.agents.wording import DivideWording, SearchWording
from zoo.evaluate.model import ModelSubject
from zoo.evaluate.subject import Query
from zoo.loaded import Loaded
from zoo.processors import ImageProcessor, Processor, Tokenizer

SEARCH = SearchWording("Look for: {}", "", "{}?", "Can you? {}", "Is it? {}", "Could it? {}")
DIVIDE = DivideWording(
    "Say.", "All? {}", '["cat"] {}', "About {}", "NONE", "{information} {question}"
)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    config = zoo.config("llava_tiny")
    shapes = jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))["params"]
    processor = Processor(ImageProcessor(16), Tokenizer.train(["Yes", "No", "cat"], 300), 100)
    folder = tmp_path_factory.mktemp("x")
    loaded = Loaded(folder, config, config.build(), draw(shapes), processor, {})
    return ModelSubject(loaded, batch_size=4)


def test_agents_ask_a_model(subject):
    """The random model answers nonsense, so that only calls and their forms are tested."""
    picture = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    settings = {"wording": SEARCH, "max_cues": 1, "max_new_tokens": 4}
    zoomeye = zoo.create("zoomeye_tiny", **settings).wrap(subject)
    boxes = zoomeye.search(picture, "cat")
    assert len(zoomeye.trace) == 1 and len(boxes) <= 1
    assert zoomeye.subject.asked > 1
    dc2 = zoo.create("dc2_tiny", max_depth=1, max_new_tokens=3, wording=DIVIDE).wrap(subject)
    [answer] = dc2.generate([Query("cat", (picture,))], max_new_tokens=3)
    assert isinstance(answer, str) and dc2.subject.asked > 8
