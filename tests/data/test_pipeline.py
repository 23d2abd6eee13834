"""Batches: every record once an epoch, the same after a restart, bad ones left out and counted."""

import dataclasses
import json

import grain
import numpy as np
import pytest

from tests.data.numbered import SIZE, Numbers, number_processor, numbers, records, same, take
from zoo.models.core.errors import UsageError, ZooError
from zoo.processors import ImageProcessor, Processor, Tokenizer
from zoo.train.data.pipeline import Pipeline, Questions, check_bad, merged
from zoo.train.data.sources import DigitsVQA


@pytest.fixture(scope="module")
def processor():
    return number_processor()


def test_batches_have_the_promised_shapes(processor):
    batch = next(iter(Pipeline(Numbers(), processor, batch_size=8)))
    described = {name: (array.shape, array.dtype.name) for name, array in batch.items()}
    assert described == {
        "pixels": ((8, 1, SIZE, SIZE, 3), "float32"),
        "ids": ((8, 64), "int32"),
        "labels": ((8, 64), "int32"),
        "text_mask": ((8, 64), "bool"),
        "segments": ((8, 64), "int32"),
    }


def test_every_epoch_has_all_records_in_an_order_of_its_own(processor):
    batches = iter(Pipeline(Numbers(20), processor, batch_size=5))
    epochs = [records(batches, 4) for _ in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3


def test_the_order_is_decided_by_the_seed_alone(processor):
    pipeline = Pipeline(Numbers(20), processor, batch_size=5, seed=3)
    first = take(iter(pipeline), 9)
    for threads in (0, 1, 4):
        assert same(take(iter(dataclasses.replace(pipeline, num_threads=threads)), 9), first)
    for seed in (0, 4, 2**40):
        assert not same(take(iter(dataclasses.replace(pipeline, seed=seed)), 9), first)


@pytest.mark.parametrize(("keep_mib", "reads"), [(512, 20), (0, 60)])
def test_examples_stay_in_memory_as_long_as_there_is_room(processor, monkeypatch, keep_mib, reads):
    pipeline = Pipeline(Numbers(20), processor, batch_size=5, num_threads=0)
    expected, done = take(iter(pipeline), 12), []
    encode = type(processor).encode
    monkeypatch.setattr(
        type(processor), "encode", lambda self, record: done.append(1) or encode(self, record)
    )
    assert same(take(iter(dataclasses.replace(pipeline, keep_mib=keep_mib)), 12), expected)
    assert len(done) == reads


@pytest.mark.parametrize("bad", [(), (2, 11)])
@pytest.mark.parametrize("done", [0, 1, 3, 7])
def test_a_restart_goes_on_with_the_same_bits(processor, done, bad):
    pipeline = Pipeline(Numbers(20, bad), processor, batch_size=3, max_bad_share=0.5)
    whole = iter(pipeline)
    take(whole, done)
    state = json.loads(json.dumps(whole.get_state()))
    expected, counted = take(whole, 12), whole.bad
    again = iter(pipeline)
    take(again, 5)  # wherever it stands
    again.set_state(state)
    assert same(take(again, 12), expected)
    assert again.bad == counted
    assert again.get_state() == whole.get_state()


def test_grain_and_orbax_store_the_place(processor, tmp_path):
    pipeline = Pipeline(Numbers(20), processor, batch_size=3)
    batches = iter(pipeline)
    take(batches, 4)
    handler = grain.checkpoint.CheckpointHandler()
    handler.save(tmp_path, batches)
    expected = take(batches, 3)
    again = handler.restore(tmp_path, iter(pipeline))
    assert same(take(again, 3), expected)


def test_a_place_in_other_data_is_refused(processor):
    pipeline = Pipeline(Numbers(20), processor, batch_size=4)
    state = iter(pipeline).get_state()
    others = [
        dataclasses.replace(pipeline, config=Numbers(21)),
        dataclasses.replace(pipeline, seed=1),
        dataclasses.replace(pipeline, pack=True),
    ]
    for other in others:
        with pytest.raises(ZooError, match="other data"):
            iter(other).set_state(state)


def alike(one, other):
    """Whether two counts differ in nothing but the order of the reasons."""
    return (one.seen, one.bad, set(one.reasons)) == (other.seen, other.bad, set(other.reasons))


@pytest.mark.parametrize("bad", [(), (3, 8, 9)])
@pytest.mark.parametrize("rows", [((0, 1), (2, 3), (4, 5)), ((0, 5), (1, 4), (2, 3))])
def test_the_batch_of_several_processes_is_that_of_one(processor, bad, rows):
    pipeline = Pipeline(Numbers(20, bad), processor, batch_size=6, seed=1, max_bad_share=0.2)
    whole = iter(pipeline)
    expected = [numbers(batch) for batch in take(whole, 8)]
    shares = [
        iter(dataclasses.replace(pipeline, process_index=i, process_count=3, rows=own))
        for i, own in enumerate(rows)
    ]

    def together(count):
        found = []
        for _ in range(count):
            batch = [0] * 6
            for own, share in zip(rows, shares, strict=True):
                for row, number in zip(own, numbers(next(share)), strict=True):
                    batch[row] = number
            found.append(batch)
        return found

    assert together(4) == expected[:4]
    state = json.loads(json.dumps(merged([share.get_state() for share in shares])))
    assert together(4) == expected[4:]
    assert alike(check_bad([share.get_state() for share in shares], 0.2), whole.bad)
    # One process goes on where three have stopped, and three where one has.
    again = iter(pipeline)
    again.set_state(state)
    assert [numbers(batch) for batch in take(again, 4)] == expected[4:]
    assert alike(again.bad, whole.bad)
    middle = iter(pipeline)
    take(middle, 4)
    for share in shares:
        share.set_state(middle.get_state())
    assert together(4) == expected[4:]
    assert alike(check_bad([share.get_state() for share in shares], 0.2), whole.bad)


def test_processes_with_the_same_rows_count_once(processor):
    batches = iter(Pipeline(Numbers(20, (3,)), processor, batch_size=4, max_bad_share=0.1))
    take(batches, 10)
    states = [batches.get_state(), batches.get_state()]
    assert merged(states) == states[0]
    with pytest.raises(ZooError, match=r"2 of 40 records are bad"):
        check_bad(states, 0.01)


def test_packed_rows_stay_with_their_processes(processor):
    pipeline = Pipeline(Numbers(20), processor, batch_size=4, pack=True)
    shares = [
        iter(dataclasses.replace(pipeline, process_index=i, process_count=2)) for i in range(2)
    ]
    for share in shares:
        take(share, 3)
    state = json.loads(json.dumps(merged([share.get_state() for share in shares])))
    expected = [take(share, 3) for share in shares]
    for share in shares:
        share.set_state(state)
    assert all(same(take(s, 3), wanted) for s, wanted in zip(shares, expected, strict=True))
    with pytest.raises(ZooError, match="number of processes was 2 and is 1"):
        iter(pipeline).set_state(state)


@pytest.mark.parametrize(("count", "processes"), [(24, 3), (20, 3), (7, 4)])
def test_processes_share_the_records_without_overlap(processor, count, processes):
    single = iter(Pipeline(Numbers(count), processor, batch_size=processes, seed=1))
    epochs = 3
    expected = records(single, epochs * count)
    shares = [
        iter(
            Pipeline(
                Numbers(count),
                processor,
                batch_size=processes,
                seed=1,
                process_index=index,
                process_count=processes,
            )
        )
        for index in range(processes)
    ]
    seen = [numbers(next(share))[0] for _ in range(epochs * count) for share in shares]
    assert seen == expected


def test_impossible_shares_are_refused(processor):
    with pytest.raises(UsageError, match="multiple of the 3 processes"):
        Pipeline(Numbers(), processor, batch_size=4, process_count=3)
    with pytest.raises(UsageError, match="process_index is 2"):
        Pipeline(Numbers(), processor, batch_size=4, process_count=2, process_index=2)
    with pytest.raises(UsageError, match="want 2, as each process has"):
        Pipeline(Numbers(), processor, batch_size=4, process_count=2, rows=(0, 1, 2))


def test_bad_records_are_left_out_counted_and_named(processor):
    bad = (3, 8)
    batches = iter(Pipeline(Numbers(20, bad), processor, batch_size=6, max_bad_share=0.1))
    seen = records(batches, 10)  # three epochs
    good = sorted(set(range(20)) - set(bad))
    assert set(seen) == set(good)
    others = list(seen)
    for number in good * 3:
        others.remove(number)
    assert len(others) == 6  # stand in for the bad ones, two an epoch
    assert len(set(others)) <= 2  # always the same
    assert (batches.bad.seen, batches.bad.bad) == (60, 6)
    assert sorted(batches.bad.reasons) == ["record 3 is bad", "record 8 is bad"]
    assert "record 3 is bad" in str(batches.bad)


def test_what_cannot_be_encoded_is_a_bad_record_too(processor):
    short = dataclasses.replace(processor, max_length=16)  # holds one turn, not two
    batches = iter(Pipeline(Numbers(20), short, batch_size=4, max_bad_share=0.9))
    seen = set(records(batches, 20))
    assert seen == {i for i in range(20) if i % 3 == 0}
    assert all("max_length is 16" in reason for reason in batches.bad.reasons)
    assert all(reason.startswith("n") for reason in batches.bad.reasons)


def test_too_many_bad_records_stop_the_run(processor):
    pipeline = Pipeline(Numbers(40, (1, 2, 3)), processor, batch_size=4, max_bad_share=0.05)
    with pytest.raises(
        ZooError, match=r"(?s)3 of \d+ records are bad.*record 2.*0\.05 allows of 40"
    ):
        take(iter(pipeline), 30)


@pytest.mark.parametrize("seed", range(5))
def test_just_the_allowed_share_never_stops_the_run(processor, seed):
    pipeline = Pipeline(Numbers(40, (1, 2)), processor, batch_size=4, seed=seed, max_bad_share=0.05)
    assert len(take(iter(pipeline), 60)) == 60


@pytest.mark.parametrize("share", [0.01, 1.0])
def test_nothing_but_bad_records_stops_instead_of_searching_forever(processor, share):
    pipeline = Pipeline(Numbers(20, tuple(range(20))), processor, batch_size=4, max_bad_share=share)
    with pytest.raises(ZooError, match=r"(\d+) of \1 records are bad"):
        next(iter(pipeline))


@pytest.mark.parametrize("threads", [0, 2])
def test_mistakes_in_the_program_surface(processor, threads):
    pipeline = Pipeline(
        Numbers(20, (7,), LookupError), processor, batch_size=4, num_threads=threads
    )
    with pytest.raises(LookupError, match="record 7 is bad"):
        take(iter(pipeline), 10)


def test_questions_come_once_in_order_each_by_itself(processor):
    short = dataclasses.replace(processor, max_length=12)
    batches = list(Questions(Numbers(7), short, batch_size=4))
    assert len(batches) == 4  # 1 + 2 + 3 + 1 + 2 + 3 + 1 questions
    expected = [i for i in range(7) for _ in range(i % 3 + 1)]
    rows = [
        (name, question, answer, kind)
        for b in batches
        for name, question, answer, kind, good in zip(
            b.names, b.questions, b.answers, b.kinds, b.valid, strict=True
        )
        if good
    ]
    assert rows == [(f"n{i}", f"what {i}?", str(i), "number") for i in expected]
    assert [b.valid.sum() for b in batches] == [4, 4, 4, 1]
    for batch in batches:
        assert batch.batch["ids"].shape == (4, 12)
        assert set(batch.batch) == {"pixels", "ids", "text_mask"}
        assert batch.batch["text_mask"].any(-1).all()
        ends = batch.batch["ids"][np.arange(4), batch.batch["text_mask"].sum(-1) - 1]
        assert (ends == processor.tokenizer.assistant).all()


@pytest.mark.parametrize(("limit", "processes"), [(None, 3), (5, 2), (1, 4)])
def test_all_processes_ask_the_same_number_of_batches(processor, limit, processes):
    asked, lengths = [], set()
    for index in range(processes):
        share = Questions(
            Numbers(7),
            processor,
            batch_size=2 * processes,
            process_index=index,
            process_count=processes,
            limit=limit,
        )
        batches = list(share)
        lengths.add(len(batches))
        assert all(len(batch.valid) == 2 for batch in batches)
        asked += [q for b in batches for q, good in zip(b.names, b.valid, strict=True) if good]
    assert len(lengths) == 1
    assert len(asked) == (13 if limit is None else limit)


def test_questions_that_cannot_be_asked_are_not_valid_or_stop(processor):
    few = Questions(Numbers(40, (4,)), processor, batch_size=8, max_bad_share=0.05)
    names = [name for batch in few for name in batch.names if name]
    assert "n4" not in names
    assert len(names) == sum(i % 3 + 1 for i in range(40) if i != 4)
    with pytest.raises(ZooError, match="record 4 is bad"):
        list(dataclasses.replace(few, max_bad_share=0.0))
    with pytest.raises(ZooError, match="nothing to ask"):
        list(Questions(Numbers(2, (0, 1)), processor, batch_size=2))


def test_digits_fit_into_40_tokens(tmp_path):
    data = DigitsVQA(pictures=200, validation_pictures=20)
    data.prepare(tmp_path)
    processor = Processor(ImageProcessor(64), Tokenizer.train(data.texts()), max_length=40)
    batches = iter(Pipeline(data, processor, batch_size=50, data_dir=tmp_path, max_bad_share=0))
    rows = np.concatenate([batch["text_mask"].sum(-1) for batch in take(batches, 4)])
    assert 30 < rows.mean() < 40
    questions = Questions(
        data, dataclasses.replace(processor, max_length=8), batch_size=20, data_dir=tmp_path
    )
    assert sum(batch.valid.sum() for batch in questions) == 100
