"""Mixtures: weights kept, epochs of each data set whole, exact after a restart and when shared."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
import tyro

from tests.data.numbered import Numbers, number_processor, records, same, take
from zoo.models.core.codec import decode, encode
from zoo.models.core.errors import UsageError, ZooError
from zoo.train.data.mixture import Mixture
from zoo.train.data.order import BLOCK, shares, stream
from zoo.train.data.pipeline import Pipeline, Questions
from zoo.train.data.sources import DigitsVQA, LlavaJson

LOW, HIGH = Numbers(15), Numbers(7, first=100)
BOTH = Mixture((LOW, 3), (HIGH, 1))


@pytest.fixture(scope="module")
def processor():
    return number_processor()


def test_every_block_has_the_weights_exactly_and_an_order_of_its_own():
    counts = shares([3, 1, 0.5])
    assert counts == [667, 222, 111]
    order = stream([5000, 2000, 900], counts, seed=4)
    blocks = [[order[b * BLOCK + i].source for i in range(BLOCK)] for b in (0, 1, 10**9)]
    assert all(Counter(block) == {0: 667, 1: 222, 2: 111} for block in blocks)
    assert blocks[0] != blocks[1] != blocks[2]


def test_every_epoch_of_every_data_set_is_whole():
    lengths = (500, 200, 90)
    order = stream(lengths, shares([3, 1, 0.5]), seed=4)
    places = [order[i] for i in range(3 * BLOCK)]
    for k, length in enumerate(lengths):
        seen = [place.index for place in places if place.source == k]
        epochs = [seen[i : i + length] for i in range(0, len(seen) - length + 1, length)]
        assert len(epochs) >= 3
        assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
        assert epochs[0] != epochs[1]


@pytest.mark.parametrize("weights", [[1], [1, 1, 1], [5e-4, 1], [1e-3] * 900 + [1], [7, 11, 13]])
def test_shares_are_whole_and_nearest(weights):
    counts = shares(weights)
    exact = np.array(weights) / sum(weights) * BLOCK
    assert sum(counts) == BLOCK
    assert min(counts) >= 1
    assert abs(counts - exact)[exact >= 1].max() < 1 + (exact < 1).sum()


def test_a_mixture_of_one_is_that_one(processor):
    alone = take(iter(Pipeline(LOW, processor, batch_size=4, seed=2)), 9)
    assert same(take(iter(Pipeline(Mixture((LOW, 5)), processor, 4, seed=2)), 9), alone)


def test_batches_mix_the_data_sets(processor):
    seen = records(iter(Pipeline(BOTH, processor, batch_size=10)), 100)
    high = [number for number in seen if number >= 100]
    assert len(high) == 250
    assert all(sorted(high[i : i + 7]) == list(range(100, 107)) for i in range(0, 245, 7))


@pytest.mark.parametrize("done", [0, 3, 11])
def test_a_restart_goes_on_with_the_same_bits(processor, done):
    config = Mixture((Numbers(15, (2,)), 3), (Numbers(7, (1, 5), first=100), 1))
    pipeline = Pipeline(config, processor, batch_size=3, max_bad_share=0.5)
    whole = iter(pipeline)
    take(whole, done)
    state = json.loads(json.dumps(whole.get_state()))
    expected, counted = take(whole, 30), whole.bad
    again = iter(pipeline)
    take(again, 5)  # wherever it stands
    again.set_state(state)
    assert same(take(again, 30), expected)
    assert again.bad == counted
    assert again.get_state() == whole.get_state()


@pytest.mark.parametrize("processes", [2, 5])
def test_processes_share_a_mixture_without_overlap(processor, processes):
    single = iter(Pipeline(BOTH, processor, batch_size=processes, seed=1))
    expected = records(single, 60)
    pipelines = [
        Pipeline(BOTH, processor, processes, 1, process_index=i, process_count=processes)
        for i in range(processes)
    ]
    each = [records(iter(pipeline), 60) for pipeline in pipelines]
    assert [number for step in zip(*each, strict=True) for number in step] == expected


def test_other_weights_are_other_data(processor):
    state = iter(Pipeline(BOTH, processor, batch_size=4)).get_state()
    other = Pipeline(Mixture((LOW, 2), (HIGH, 1)), processor, batch_size=4)
    with pytest.raises(ZooError, match=r"other data: shares was \[750, 250\] and is \[667, 333\]"):
        iter(other).set_state(state)


def test_a_small_data_set_that_is_bad_stops_the_run(processor):
    """Bad records count against their own data set: 3 of 7 are too many, although 3 of 1007 not."""
    config = Mixture((Numbers(200), 9), (Numbers(7, (1, 2, 3), first=100), 1))
    pipeline = Pipeline(config, processor, batch_size=10, max_bad_share=0.2)
    with pytest.raises(ZooError, match=r"2 of \d records are bad.*\n.*\n.*\n.*allows of 7"):
        take(iter(pipeline), 100)


def test_validation_leaves_out_those_that_have_none(processor):
    none = dataclasses.replace(HIGH, validation=False)
    pipeline = Pipeline(Mixture((none, 3), (LOW, 1)), processor, batch_size=5)
    assert max(records(iter(pipeline), 6)) >= 100
    held_out = dataclasses.replace(pipeline, split="validation")
    assert max(records(iter(held_out), 6)) < 15
    with pytest.raises(ZooError, match="no validation"):
        iter(dataclasses.replace(held_out, config=Mixture((none, 1), (none, 1))))


def test_questions_of_a_mixture_come_one_data_set_after_the_other(processor):
    asked = [name for batch in Questions(BOTH, processor, batch_size=8) for name in batch.names]
    numbers = [int(name[1:]) for name in asked if name]
    assert list(dict.fromkeys(numbers)) == [*range(15), *range(100, 107)]
    assert set(BOTH.texts()) == set(map(str, range(15)))


def test_mixtures_of_mixtures_are_dissolved():
    nested = Mixture((BOTH, 1), (Numbers(3), 3))
    assert nested.weighted() == ((LOW, 0.75), (HIGH, 0.25), (Numbers(3), 3.0))


def test_a_mixture_is_a_configuration_like_any_other():
    config = Mixture((LlavaJson("a.json", "a"), 3), (DigitsVQA(), 1))
    assert decode(json.loads(json.dumps(encode(config)))) == config
    assert dataclasses.replace(config) == config
    assert tyro.cli(Mixture, default=config, args=[]) == config


def test_wrong_mixtures_are_refused():
    with pytest.raises(UsageError, match="no data sets"):
        Mixture()
    with pytest.raises(UsageError, match=r"weight of .* is 0"):
        Mixture((LOW, 0))
    with pytest.raises(UsageError, match=r"weight of .* is inf"):
        Mixture((LOW, float("inf")))
    with pytest.raises(UsageError, match="got 'low'"):
        Mixture(("low", 1))
    with pytest.raises(UsageError, match=r"is 0\.0001 of all: want 1/2000"):
        Mixture((LOW, 1), (HIGH, 1e-4))
