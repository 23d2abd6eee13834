"""Ahead of need: the same batches in the same order, exact states, and no waiting uncounted."""

import dataclasses
import json
import threading
import time

import numpy as np
import pytest

from tests.data.numbered import Numbers, number_processor, same, take
from zoo.models.core.errors import ZooError
from zoo.train.data.feed import Feed
from zoo.train.data.mixture import Mixture
from zoo.train.data.pipeline import Pipeline

MIXED = Mixture((Numbers(15, (2,)), 3), (Numbers(7, (1, 5), first=100), 1))


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline(MIXED, number_processor(num_images=4), 3, max_bad_share=0.5)


def plainly(batch):
    return batch


@pytest.mark.parametrize("pack", [False, True])
def test_worker_processes_give_the_same_batches(pipeline, pack):
    pipeline = dataclasses.replace(pipeline, pack=pack)
    whole = iter(pipeline)
    take(whole, 2)
    state, expected = json.loads(json.dumps(whole.get_state())), take(whole, 8)
    workers = iter(dataclasses.replace(pipeline, workers=2))
    workers.set_state(state)
    try:
        assert same(take(workers, 8), expected)
        assert workers.get_state() == whole.get_state()
        assert workers.bad == whole.bad
        assert workers.bad.bad > 0
    finally:
        workers.close()


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_a_feed_gives_the_same_batches_and_resumes_exactly(pipeline, depth):
    expected = take(iter(pipeline), 12)
    feed = Feed(iter(pipeline), plainly, depth)
    assert same(take(feed, 5), expected[:5])
    time.sleep(0.1)  # so that some are ahead
    state, bad = json.loads(json.dumps(feed.get_state())), feed.bad
    alone = iter(pipeline)
    take(alone, 5)
    assert state == alone.get_state()
    assert bad == alone.bad
    assert same(take(feed, 3), expected[5:8])
    feed.set_state(state)
    assert feed.bad == bad
    assert same(take(feed, 7), expected[5:])
    feed.close()
    assert not [t for t in threading.enumerate() if t.name == "feed"]


@pytest.mark.parametrize("depth", [0, 2])
def test_errors_come_in_their_turn_and_again(pipeline, depth):
    all_bad = dataclasses.replace(pipeline, config=Numbers(9, tuple(range(9))), max_bad_share=1.0)
    feed = Feed(iter(all_bad), plainly, depth)
    for _ in range(2):
        with pytest.raises(ZooError, match=r"\d+ of \d+ records are bad"):
            next(feed)
    feed.close()


def test_waiting_is_counted_and_reading_ahead_saves_it(pipeline):
    def slowly(batch):
        time.sleep(0.1)
        return batch

    waited = {}
    for depth in (0, 2):
        feed = Feed(iter(pipeline), slowly, depth)
        for _ in range(4):
            next(feed)
            time.sleep(0.3)  # a step
        waited[depth] = feed.waited
        feed.close()
    assert waited[0] >= 0.4
    assert waited[2] < waited[0] - 0.1


def test_a_feed_is_stored_by_grain(pipeline, tmp_path):
    import grain

    feed = Feed(iter(pipeline), plainly, 2)
    take(feed, 4)
    handler = grain.checkpoint.CheckpointHandler()
    handler.save(tmp_path, feed)
    expected = take(feed, 3)
    again = handler.restore(tmp_path, Feed(iter(pipeline), plainly, 2))
    assert same(take(again, 3), expected)
    assert np.all(again.bad.seen == feed.bad.seen)
    feed.close()
    again.close()
