"""DAMRO around a model: which models it suits, and when it changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import zoo
from tests.models.draw import draw
from zoo.agents.damro import Damro, outliers
from zoo.cli import main
from zoo.evaluate.model import ModelSubject
from zoo.evaluate.scripted import Scripted
from zoo.evaluate.subject import Query
from zoo.generate.autoregressive import Reader
from zoo.loaded import Loaded
from zoo.models.core.errors import UsageError
from zoo.processors import ImageProcessor, Processor, Tokenizer


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    config = zoo.config("llava_tiny")
    shapes = jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))["params"]
    processor = Processor(ImageProcessor(16), Tokenizer.train(["what is this?"], 300), 20)
    folder = tmp_path_factory.mktemp("x")
    return ModelSubject(Loaded(folder, config, config.build(), draw(shapes), processor, {}))


PICTURE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
QUERIES = [Query("what is this?", (PICTURE,)), Query("what is this?")]


def test_it_changes_what_a_picture_is_answered_to(subject):
    plain = subject.generate(QUERIES, max_new_tokens=6)
    damro = zoo.create("damro_tiny").wrap(subject)
    found = damro.generate(QUERIES, max_new_tokens=6)
    assert found[0] != plain[0] and found[1] == plain[1]
    assert damro.loaded.generate(PICTURE, QUERIES[0].prompt, max_new_tokens=6) == found[0]
    neutral = zoo.create("damro_tiny", alpha=0.0, beta=0.0).wrap(subject)
    chance = [each.next_token(QUERIES[:1], ("what", "this")) for each in (neutral, subject)]
    np.testing.assert_allclose(*chance, rtol=1e-4)


def test_the_command_line(subject, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("zoo.loading.load", lambda *_, **__: subject.loaded)
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    asked = ["--image", str(tmp_path / "a.png"), "--prompt", "what is this?"]
    assert main(["generate", "x", *asked, "--agent", "damro_tiny", "--max-new-tokens", "6"]) == 0
    said = capsys.readouterr().out
    [answer] = zoo.create("damro_tiny").wrap(subject).generate(QUERIES[:1], max_new_tokens=6)
    assert said == f"{answer}\n"


def test_outliers():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 2, 5, 3, 4)).astype(np.float32)
    whole = np.exp(np.einsum("bd,bnd->bn", q[:, 0].reshape(2, 12), k.reshape(2, 5, 12)) / 12**0.5)
    heads = np.exp(np.einsum("bhe,bnhe->bhn", q[:, 0], k) / 2)
    for split, want in ((False, whole[:, None]), (True, heads)):
        want = (want / want.sum(-1, keepdims=True)).mean(1)[:, 1:]
        index, attention = outliers(jnp.array(q), jnp.array(k), 3, split_heads=split)
        np.testing.assert_array_equal(index, np.argsort(-want)[:, :3])
        np.testing.assert_allclose(attention, -np.sort(-want)[:, :3], rtol=1e-5)


def test_models_that_do_not_fit(subject):
    def refused(match, **fields):
        config = dataclasses.replace(subject.loaded.config, **fields)
        with pytest.raises(UsageError, match=match):
            Damro(top_k=3)(Reader(config.build()))

    tower = subject.loaded.config.tower
    refused("class token", tower=dataclasses.replace(tower, class_token=False))
    refused("one hidden state", vision_layer=(-2, -1))
    refused("a token for every patch", connector=zoo.config("mqt_tiny").connector)
    with pytest.raises(UsageError, match="at least top_k = 17 patches"):
        zoo.create("damro", top_k=17).wrap(subject)
    with pytest.raises(UsageError, match="not around a Scripted"):
        zoo.create("damro").wrap(Scripted())
    text = zoo.models.core.registry.base("llama").variants
    with pytest.raises(UsageError, match="not of the LLaVA form"):
        Damro()(Reader(next(iter(text.values())).build()))
    for wrong in ({"top_k": 0}, {"alpha": -1.0}, {"beta": 2.0}):
        with pytest.raises(ValueError, match="want"):
            Damro(**wrong)


def test_published_settings():
    assert zoo.create("damro") == Damro(2.0, 0.1, 10)
    assert zoo.create("damro_instructblip_chair") == Damro(1.5, 0.1, 4, True)
