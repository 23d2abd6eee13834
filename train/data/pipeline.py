"""From a data set to batches: an endless one for training, a finite one for judging answers.

    pipeline = Pipeline(DigitsVQA(), processor, batch_size=64, seed=0, data_dir="data")
    batches = iter(pipeline)
    batch = next(batches)            # pixels [B, 1, H, W, 3], ids, labels, text_mask [B, T]
    state = batches.get_state()      # ... a restart later ...
    batches.set_state(state)         # goes on with the very batch that would have been next

The iterator is a `grain.DatasetIterator`, so `grain.checkpoint.CheckpointSave(batches)` stores it
with Orbax.

Bad records (a picture that cannot be read, a conversation without answer or beyond `max_length`)
are left out and counted, and another record of their source takes their place; more than a set
share of them stops the run. What is wrong with a source as a whole, such as an empty shard, is told
in `faults`.

So the record in row i of batch s follows from the seed and the place in the stream, s B + i, alone:
each of several processes reads its own rows, and the batch of all is that of one process.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from zoo.models.core.errors import UsageError, ZooError
from zoo.processors import Processor
from zoo.train.data.mixture import sources
from zoo.train.data.order import Place, others, rows_of, shares, stream
from zoo.train.data.packing import Packer
from zoo.train.data.preferences import encoded
from zoo.train.data.sources import DataConfig, Source

Arrays = dict[str, np.ndarray]

State = dict[str, Any]
"""The place in a stream, as plain JSON values."""

_REASONS_KEPT = 5


class Bad(NamedTuple):
    """Stands for a record that cannot be used; says which and why."""

    reason: str


@dataclass(frozen=True)
class BadRecords:
    """How many records seen so far were bad, and what was wrong with the first of them.

    Each process counts its own. A record counts anew in every epoch, so `bad / seen` is the share
    of the data set that is bad.
    """

    seen: int = 0
    bad: int = 0
    reasons: tuple[str, ...] = ()

    def plus(self, record: Any) -> "BadRecords":
        """These counts with one more record."""
        one = BadRecords(1, 1, (record.reason,)) if isinstance(record, Bad) else BadRecords(1)
        return self + one

    def __add__(self, other: "BadRecords") -> "BadRecords":
        reasons = tuple(dict.fromkeys((*self.reasons, *other.reasons)))[:_REASONS_KEPT]
        return BadRecords(self.seen + other.seen, self.bad + other.bad, reasons)

    def __str__(self) -> str:
        listed = "".join(f"\n  {reason}" for reason in self.reasons)
        return f"{self.bad} of {self.seen} records are bad, among them:{listed}"


@dataclass(frozen=True)
class Pipeline:
    """Endless shuffled batches of whole conversations, for training.

    Every epoch of a source has its own order, given by `seed`. Process p of n reads the p-th of n
    equal parts of every batch, or the `rows` that it is told. Records are read and processed ahead,
    by threads or by processes of their own; the result does not depend on their number.

    Attributes:
      config: the data set, which may be a `Mixture` of several.
      processor: turns a record into arrays of fixed shape.
      batch_size: rows of all processes together.
      seed: decides the order.
      data_dir: where the data set is prepared.
      split: "train" or "validation".
      process_index, process_count: which process this is, of how many.
      rows: the rows of each batch that it reads, as many as the others; None: they lie together.
      max_bad_share: the run stops as soon as it is certain that more than this share of a source
        is bad: 1 % of 12,000 records at the 121st bad one of an epoch. A source without a good
        record stops it in any case.
      pack: as many examples in a row as fit, see `zoo.train.data.packing`. How many those are
        decides what the next row has, so each process packs a part of the stream of its own, every
        n-th record, and the batches depend on the number of processes.
      num_threads: threads that process records; 0 does it when a batch is asked for.
      workers: processes that read and process records instead of the threads, for pictures that
        take longer to decode than one process has time; each takes some 0.3 GB of memory.
      keep_mib: examples stay in memory, so that later epochs cost nothing, until they take so much;
        those that do not fit are processed anew. Workers keep none.
    """

    config: DataConfig
    processor: Processor
    batch_size: int
    seed: int = 0
    data_dir: str | Path = "data"
    split: str = "train"
    process_index: int = 0
    process_count: int = 1
    rows: tuple[int, ...] | None = None
    max_bad_share: float = 0.01
    pack: bool = False
    num_threads: int = 2
    workers: int = 0
    keep_mib: int = 512

    def __post_init__(self) -> None:
        _check_processes(self.batch_size, self.process_index, self.process_count)
        local = self.batch_size // self.process_count
        if self.rows is not None and len(self.rows) != local:
            raise UsageError(f"rows are {self.rows}: want {local}, as each process has")

    def __iter__(self) -> "BatchIterator":
        """An iterator from the first batch on; each call gives an independent one."""
        found = sources(self.config, self.split, self.data_dir)
        lengths = [len(source) for source, _ in found]
        counts = shares([weight for _, weight in found])
        records = stream(lengths, counts, self.seed)
        process = _Process(self, [source for source, _ in found])
        local = self.batch_size // self.process_count
        if self.pack:
            mine = records[self.process_index :: self.process_count]
        else:
            rows = self.rows or range(self.process_index * local, (self.process_index + 1) * local)
            mine = rows_of(records, rows, self.batch_size)
        examples = mine.map(process)
        ahead = 2 * local

        def start(place: int) -> grain.DatasetIterator:
            """What is left of the stream of this process from its record `place` on."""
            rest = examples[place:] if place else examples
            if not self.workers:
                # Few: for every record that it hands out, grain asks all that are ahead of it.
                options = grain.ReadOptions(self.num_threads, 8 * self.num_threads)
                return iter(rest.to_iter_dataset(options))
            if not flags.FLAGS.is_parsed():  # grain reads some; whoever parsed none has none
                flags.FLAGS.mark_as_parsed()
            each = max(1, -(-ahead // self.workers))
            options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=each)
            workers = grain.MultiprocessingOptions(self.workers, each)
            return iter(rest.to_iter_dataset(options).mp_prefetch(workers))

        return BatchIterator(
            start,
            batch_size=local,
            share=(self.process_index, self.process_count),
            epochs=lengths,
            max_bad_share=self.max_bad_share,
            packer=self._packer if self.pack else None,
            faults=[fault for source, _ in found for fault in getattr(source, "faults", ())],
            identity={
                "records": lengths,
                "shares": counts,
                "seed": self.seed,
                "pack": self.pack,
                **({"number of processes": self.process_count} if self.pack else {}),
            },
        )

    def _packer(self) -> Packer:
        local = self.batch_size // self.process_count
        return Packer(local, self.processor.image_id, self.processor.pad_id)


class BatchIterator(grain.DatasetIterator):
    """Batches of the good records; see `Pipeline`.

    The state, plain JSON, is the place in the stream, and how many records of each source were seen
    and left out. Records that were read ahead are not part of it: they are read again. `merged`
    makes one of those of all processes, from which any of them goes on; unless rows are packed,
    also another number of processes.

    Attributes:
      faults: what is wrong with sources as a whole, such as empty shards.
    """

    def __init__(
        self,
        start: Callable[[int], grain.DatasetIterator],
        *,
        batch_size: int,
        share: tuple[int, int],
        epochs: Sequence[int],
        max_bad_share: float,
        packer: Callable[[], Packer] | None,
        faults: Sequence[str],
        identity: dict[str, Any],
    ):
        super().__init__()
        self.faults = tuple(faults)
        self._start = start
        self._records = start(0)
        self._used = 0  # of the records that are read here
        self._counts = [BadRecords() for _ in epochs]
        self._held: _Read | None = None  # was read, fitted into no row and is not counted yet
        self._batch_size = batch_size
        self._epochs = epochs
        self._index, self._processes = share
        self._max_bad_share = max_bad_share
        self._packer = packer
        self._identity = identity

    @property
    def bad(self) -> BadRecords:
        """What was left out so far, of all sources together."""
        return sum(self._counts, BadRecords())

    def __next__(self) -> Arrays:
        """The next batch of arrays [B / n, ...]. Raises ZooError if too many records are bad."""
        if self._packer is not None:
            return self._packed(self._packer())
        return _stack([self._use(self._read()) for _ in range(self._batch_size)])

    def _packed(self, rows: Packer) -> Arrays:
        while rows.add((read := self._read()).example):
            self._use(read)
        self._held = read
        return rows.batch()

    def _read(self) -> "_Read":
        """The next record, not yet counted."""
        if self._held is not None:
            read, self._held = self._held, None
            return read
        read = next(self._records)
        if read.example is None:
            tried = sum(map(BadRecords().plus, read.bad), self._counts[read.source])
            raise _too_many(tried, self._epochs[read.source], self._max_bad_share)
        return read

    def _use(self, read: "_Read") -> Arrays:
        """Count a record."""
        self._used += 1
        counts = self._counts[read.source]
        self._counts[read.source] = counts.plus(read.bad[0] if read.bad else None)
        if read.bad:
            _check(self._counts, self._epochs, self._max_bad_share, self._processes)
        return read.example

    def get_state(self) -> State:
        """Where the iterator stands, as plain JSON values."""
        place = self._used if self._packer is not None else self._used * self._processes
        return {
            "places": {str(self._index): place},
            "seen": [count.seen for count in self._counts],
            "bad": [count.bad for count in self._counts],
            "reasons": [list(count.reasons) for count in self._counts],
            "identity": self._identity,
        }

    def set_state(self, state: State) -> None:
        """Go to where `state` was taken. Raises ZooError if it was taken from other data."""
        if (saved := state["identity"]) != self._identity:
            differ = [
                f"{name} was {saved.get(name)} and is {self._identity.get(name)}"
                for name in {**saved, **self._identity}
                if saved.get(name) != self._identity.get(name)
            ]
            raise ZooError(f"the saved place is in other data: {', '.join(differ)}")
        places = state["places"]
        if self._packer is not None:
            self._used = places[str(self._index)]
        else:
            self._used = next(iter(places.values())) // self._processes
        # One of the processes remembers what all of them have counted.
        self._counts = counts_of(state) if not self._index else [BadRecords() for _ in self._epochs]
        self._held = None
        self._records.close()
        self._records = self._start(self._used)

    def close(self) -> None:
        """Stop reading ahead."""
        self._records.close()
        super().close()


def merged(states: Sequence[State]) -> State:
    """The state of an iterator that stands for those of several processes; all go on from it.

    Processes that read the same rows count once.
    """
    one, *more = {tuple(state.get("places", ())): state for state in states}.values()
    if not more:
        return one
    each = zip(*(counts_of(state) for state in (one, *more)), strict=True)
    counts = [sum(source, BadRecords()) for source in each]
    return {
        "places": {index: at for state in (one, *more) for index, at in state["places"].items()},
        "seen": [count.seen for count in counts],
        "bad": [count.bad for count in counts],
        "reasons": [list(count.reasons) for count in counts],
        "identity": one["identity"],
    }


def counts_of(state: State) -> list[BadRecords]:
    """What was left out of each source up to a state."""
    each = zip(state["seen"], state["bad"], map(tuple, state["reasons"]), strict=True)
    return [BadRecords(*count) for count in each]


def check_bad(states: Sequence[State], max_bad_share: float) -> BadRecords:
    """What all processes have left out, up to their states.

    Raises:
      ZooError: it is certain that more than `max_bad_share` of a source is bad.
    """
    state = merged(states)
    counts = counts_of(state)
    _check(counts, state["identity"]["records"], max_bad_share)
    return sum(counts, BadRecords())


def _check(
    counts: Sequence[BadRecords], epochs: Sequence[int], max_bad_share: float, processes: int = 1
) -> None:
    for bad, epoch in zip(counts, epochs, strict=True):
        epochs_begun = -(-bad.seen * processes // epoch)
        if bad.bad > max_bad_share * epoch * epochs_begun:
            raise _too_many(bad, epoch, max_bad_share)


def _too_many(bad: BadRecords, epoch: int, max_bad_share: float) -> ZooError:
    return ZooError(
        f"{bad}\nThat is more than max_bad_share={max_bad_share:g} allows of {epoch}: mend or "
        "remove them, or raise it"
    )


class Asked(NamedTuple):
    """A batch of single questions with the answers that are expected; lists have one entry per row.

    Attributes:
      batch: pixels [B, 1, H, W, 3], ids [B, T] and text_mask [B, T] of the prompts.
      valid: [B] bool, False for rows that only fill up the batch.
      images: what `read_image` takes, for showing the picture.
      questions, answers, kinds, names: as in the data set, "" where not valid.
    """

    batch: Arrays
    valid: np.ndarray
    images: list[Any]
    questions: list[str]
    answers: list[str]
    kinds: list[str]
    names: list[str]


@dataclass(frozen=True)
class Questions:
    """Every question of a split, once and in order, each as the first turn about its picture.

    All processes get the same number of batches, the last of which is filled up with rows that are
    not `valid`. Give it a processor whose `max_length` is that of a prompt:
    `dataclasses.replace(processor, max_length=24)`.

    Attributes:
      config, processor, batch_size, data_dir, split, process_index, process_count: as in
        `Pipeline`.
      limit: ask only so many questions, the first ones; None asks all.
      max_bad_share: reading stops when more than this share of the questions cannot be asked. Up to
        there, the row of such a question is not `valid`.
    """

    config: DataConfig
    processor: Processor
    batch_size: int
    data_dir: str | Path = "data"
    split: str = "validation"
    process_index: int = 0
    process_count: int = 1
    limit: int | None = None
    max_bad_share: float = 0.01

    def __post_init__(self) -> None:
        _check_processes(self.batch_size, self.process_index, self.process_count)

    def __iter__(self) -> Iterator[Asked]:
        """The batches of this process. Raises ZooError if too many records are bad, or all are."""
        source = self.config.source(self.split, self.data_dir)
        places, bad = _places(source, self.limit)
        total = bad.bad + len(places)
        filler = _Row("", "", "", "", None, self._encode(np.zeros((1, 1, 3), np.uint8), "?"))
        local = self.batch_size // self.process_count
        for start in range(0, len(places), self.batch_size):
            mine = places[start : start + self.batch_size][self.process_index :: self.process_count]
            rows = [self._row(source[index], turn) for index, turn in mine]
            for row in rows:
                bad = bad.plus(row.example)
            if bad.bad > self.max_bad_share * total:
                raise ZooError(f"{bad}\nThat is too many to judge answers by: mend or remove them")
            yield _asked(rows + [filler] * (local - len(rows)), filler)

    def _row(self, record: Mapping[str, Any], turn: int) -> "_Row":
        question, answer = record["conversations"][turn]
        try:
            example = self._encode(record["image"], question)
        except ZooError as error:
            example = Bad(f"{record['id']}: {error}")
        return _Row(question, answer, record["kinds"][turn], record["id"], record["image"], example)

    def _encode(self, image: Any, question: str) -> Arrays:
        batch = self.processor.encode_prompt([image], [question])
        return {name: array[0] for name, array in batch.items()}


class _Row(NamedTuple):
    question: str
    answer: str
    kind: str
    name: str
    image: Any
    example: Arrays | Bad


class _Read(NamedTuple):
    """What became of a record.

    Attributes:
      source: which it is from.
      example: what was made of it, or of the one that stands in for it; None if there is none.
      bad: what is wrong with it; where there is no example, also with those that were tried.
    """

    source: int
    example: Arrays | None
    bad: tuple[Bad, ...] = ()


class _Process:
    """Reads one record and turns it into an example. Where that fails, others of its source are
    tried in its place, until it is certain that too many of them are bad.

    Examples are kept as long as there is room for `keep_mib` of them. In a worker process the
    sources are opened anew: files and indexes do not travel.
    """

    def __init__(self, pipeline: Pipeline, opened: Sequence[Source]):
        self._pipeline = pipeline
        self._opened: Sequence[Source] | None = opened
        self._begin()

    def _begin(self) -> None:
        self._opening = threading.Lock()
        self._kept: dict[Place, Arrays] = {}
        keep = 0 if self._pipeline.workers else self._pipeline.keep_mib
        self._room = keep << 20  # bytes

    def __getstate__(self) -> dict[str, Any]:
        return {"_pipeline": self._pipeline, "_opened": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __call__(self, place: Place) -> _Read:
        example = self._example(place)
        if not isinstance(example, Bad):
            return _Read(place.source, example)
        bad = [example]
        length = len(self._sources()[place.source])
        most = int(self._pipeline.max_bad_share * length)
        for other in itertools.islice(others(place, length), most):
            example = self._example(other)
            if not isinstance(example, Bad):
                return _Read(place.source, example, (bad[0],))
            bad.append(example)
        return _Read(place.source, None, tuple(bad))

    def _example(self, place: Place) -> Arrays | Bad:
        if (kept := self._kept.get(place)) is not None:
            return kept
        example = self._made(place)
        if not isinstance(example, Bad):  # threads may overdraw the room by an example each
            size = sum(array.nbytes for array in example.values())
            if size <= self._room:
                self._room -= size
                self._kept[place] = example
        return example

    def _made(self, place: Place) -> Arrays | Bad:
        try:
            record = self._sources()[place.source][place.index]
        except ZooError as error:
            return Bad(str(error))
        try:
            return encoded(self._pipeline.processor, record)
        except ZooError as error:
            return Bad(f"{record['id']}: {error}")

    def _sources(self) -> Sequence[Source]:
        if self._opened is None:
            with self._opening:
                if self._opened is None:
                    p = self._pipeline
                    self._opened = [source for source, _ in sources(p.config, p.split, p.data_dir)]
        return self._opened


def _places(source: Source, limit: int | None) -> tuple[list[tuple[int, int]], BadRecords]:
    """(record, turn) of the first `limit` questions, and the bad records, which have none."""
    places: list[tuple[int, int]] = []
    bad = BadRecords()
    for index in range(len(source)):
        try:
            turns = len(source[index]["conversations"])
        except ZooError as error:
            bad = bad.plus(Bad(str(error)))
            continue
        places += [(index, turn) for turn in range(turns)]
        if limit is not None and len(places) >= limit:
            break
    if not places:
        raise ZooError(f"{bad}\nThere is nothing to ask.")
    return places[:limit], bad


def _asked(rows: list[_Row], filler: _Row) -> Asked:
    rows = [filler if isinstance(row.example, Bad) else row for row in rows]
    return Asked(
        batch=_stack([row.example for row in rows if not isinstance(row.example, Bad)]),
        valid=np.array([row is not filler for row in rows]),
        images=[row.image for row in rows],
        questions=[row.question for row in rows],
        answers=[row.answer for row in rows],
        kinds=[row.kind for row in rows],
        names=[row.name for row in rows],
    )


def _stack(examples: list[Arrays]) -> Arrays:
    return {name: np.stack([e[name] for e in examples]) for name in examples[0]}


def _check_processes(batch_size: int, process_index: int, process_count: int) -> None:
    if batch_size < 1 or batch_size % process_count:
        raise UsageError(
            f"batch_size is {batch_size}: want a multiple of the {process_count} processes"
        )
    if not 0 <= process_index < process_count:
        raise UsageError(f"process_index is {process_index} of {process_count} processes")
