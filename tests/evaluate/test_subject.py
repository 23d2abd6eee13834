"""Subjects: a model asked in batches, the same with memory, a script."""

import dataclasses

import jax
import numpy as np
import pytest

import zoo
from tests.models.draw import draw
from zoo.evaluate.model import ModelSubject
from zoo.evaluate.scripted import Scripted
from zoo.evaluate.subject import Agent, Prepared, Query, Remembered
from zoo.loaded import Loaded
from zoo.models.core.errors import UsageError
from zoo.processors import ImageProcessor, Processor, Tokenizer

WORDS = ("yes", "no")


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    config = zoo.config("mqt_tiny")
    shapes = jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))["params"]
    tokenizer = Tokenizer.train(["yes or no?", "a red car", *WORDS], 300)
    processor = Processor(ImageProcessor(16), tokenizer, 20)
    folder = tmp_path_factory.mktemp("x")
    loaded = Loaded(folder, config, config.build(), draw(shapes), processor, {})
    return ModelSubject(loaded, batch_size=2)


@pytest.fixture(scope="module")
def queries():
    pictures = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), np.uint8)
    asked = [Query("yes or no?", (picture,)) for picture in pictures]
    return [asked[0], Query("a red car"), *asked[1:]]


LENGTH = 28


def after(subject, query, more=()):
    """Log-probabilities [len(more) + 1, V] of what comes after a prompt and each of `more` tokens,
    from the whole sequence at once.
    """
    loaded = subject.loaded
    batch = loaded.encode([query.images or None], [query.prompt])
    end = int(np.flatnonzero(batch["text_mask"][0])[-1]) + 1
    ids = np.zeros((1, LENGTH), np.int32)
    ids[0, :end], ids[0, end : end + len(more)] = batch["ids"][0, :end], more
    mask = np.zeros(ids.shape, bool)
    mask[0, :end], mask[0, end : end + len(more)] = batch["text_mask"][0, :end], True
    logits = np.asarray(loaded.logits({**batch, "ids": ids, "text_mask": mask}))[0]
    first = end - 1 + loaded.config.tile_tokens - 1  # one id is the place of a picture
    return np.asarray(jax.nn.log_softmax(logits[first : first + len(more) + 1], -1))


def test_answers_are_those_of_the_model(subject, queries):
    answers = subject.generate(queries, max_new_tokens=3)
    asked = [[queries[0], queries[2]], [queries[3]] * 2, [queries[1]]]
    found = [
        subject.loaded.generate(
            [query.images or None for query in part],
            [query.prompt for query in part],
            max_new_tokens=3,
        )
        for part in asked
    ]
    assert answers == [found[0][0], found[2][0], found[0][1], found[1][0]]


def test_next_token(subject, queries):
    found = subject.next_token(queries, WORDS)
    ids = [subject.loaded.speaker.tokenizer.encode(" " + word)[0] for word in WORDS]
    for query, row in zip(queries, found, strict=True):
        np.testing.assert_allclose(row, after(subject, query)[0, np.array(ids)], atol=1e-4)
    with pytest.raises(UsageError, match="begin with the tokens"):
        subject.next_token(queries, ("yes", "yes"))


def test_option_loss_is_that_of_the_whole_sequence(subject, queries):
    options = [["a red car", "no"], ["yes"], [], ["no", "yes", "a car"]]
    found = subject.option_loss(queries, options)
    assert [len(row) for row in found] == [2, 1, 0, 3]
    tokenizer = subject.loaded.speaker.tokenizer
    for number, option in ((0, 0), (1, 0), (3, 2)):
        ids = [*tokenizer.encode(" " + options[number][option]), tokenizer.eos]
        logs = after(subject, queries[number], ids)
        want = -np.mean(logs[np.arange(len(ids)), ids])
        np.testing.assert_allclose(found[number][option], want, rtol=1e-4)
    with pytest.raises(UsageError, match="has no token"):
        subject.option_loss(queries[:1], [[" "]])
    with pytest.raises(UsageError, match="2 lists of options for 4"):
        subject.option_loss(queries, options[:2])


def test_vectors(subject, queries):
    images = [query.images[0] for query in queries if query.images]
    found = subject.embed(images=images)
    assert found.shape == (3, subject.loaded.config.tower.width)
    np.testing.assert_allclose(found[1:], subject.embed(images=images[1:]), atol=1e-5)
    texts = subject.embed(texts=["a red car", "no"])
    assert texts.shape == (2, subject.loaded.config.decoder.width)
    assert np.abs(texts[0] - texts[1]).max() > 1e-3
    for wrong in ({}, {"images": images, "texts": ["a"]}, {"texts": "a"}, {"texts": []}):
        with pytest.raises(UsageError, match="want a list of images, or one of texts"):
            subject.embed(**wrong)


def test_bad_input(subject):
    with pytest.raises(UsageError, match="batch_size is 0"):
        dataclasses.replace(subject, batch_size=0)
    with pytest.raises(UsageError, match="want a tuple"):
        Query("what?", [1])


def test_what_is_known_is_not_asked_again(queries):
    script = Scripted(
        answer=lambda query: query.prompt.upper(),
        loss=lambda query, option: len(option),
        chance=lambda query, word: -len(word),
        vector=lambda item: np.array([np.mean(item) if len(np.shape(item)) else len(item), 1.0]),
    )
    memory = Remembered(script)
    assert memory.generate([queries[1], queries[0], queries[1]])[0] == "A RED CAR"
    again = Query("yes or no?", (queries[0].images[0].copy(),))
    assert memory.generate([again, queries[2]]) == ["YES OR NO?"] * 2
    assert [len(asked) for _, asked in script.log] == [2, 1]
    memory.generate([again], max_new_tokens=5)
    assert memory.asked == 4
    for _ in range(2):
        assert memory.next_token(queries[:2], WORDS).tolist() == [[-3, -2]] * 2
        assert [list(r) for r in memory.option_loss(queries[:1], [["no", "yes"]])] == [[2, 3]]
        assert memory.embed(texts=["a", "bb"]).tolist() == [[1, 1], [2, 1]]
    assert len(script.log) == 6
    with pytest.raises(UsageError, match="says nothing for generate"):
        Scripted().generate(queries)


def test_a_prepared_subject_asks_other_queries(queries):
    class Loud(Prepared):
        def prepare(self, query):
            return Query(query.question.upper(), query.images)

    inner = Scripted(answer=lambda q: q.prompt, loss=lambda q, o: q.prompt == o)
    outer = Loud(inner)
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a b"}]}]
    assert outer.generate([Query(talk), Query("x y", about="x")]) == ["A B", "X"]
    assert outer.option_loss([Query("a")], [["a", "A"]])[0].tolist() == [0, 1]
    with pytest.raises(NotImplementedError):
        Agent().wrap(inner)
