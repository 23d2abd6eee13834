"""From a data set to batches: an endless one for training, a finite one for judging answers.

    pipeline = Pipeline(DigitsVQA(), processor, batch_size=64, seed=0, data_dir="data")
    batches = iter(pipeline)
    batch = next(batches)            # pixels [B, 1, H, W, 3], ids, labels, text_mask [B, T]
    state = batches.get_state()      # ... a restart later ...
    batches.set_state(state)         # goes on with the very batch that would have been next

The iterator is a `grain.DatasetIterator`, so `grain.checkpoint.CheckpointSave(batches)` stores it
with Orbax.

Bad records (a picture that cannot be read, a conversation without answer or beyond `max_length`)
are left out and counted; more than a set share of them stops the run.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from zoo.models.core.errors import UsageError, ZooError
from zoo.processors import Processor
from zoo.train.data.sources import DataConfig, Source

Arrays = dict[str, np.ndarray]

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
        if not isinstance(record, Bad):
            return BadRecords(self.seen + 1, self.bad, self.reasons)
        reasons = self.reasons
        if len(reasons) < _REASONS_KEPT and record.reason not in reasons:
            reasons = (*reasons, record.reason)
        return BadRecords(self.seen + 1, self.bad + 1, reasons)

    def __str__(self) -> str:
        listed = "".join(f"\n  {reason}" for reason in self.reasons)
        return f"{self.bad} of {self.seen} records are bad, among them:{listed}"


@dataclass(frozen=True)
class Pipeline:
    """Endless shuffled batches of whole conversations, for training.

    Every epoch has its own order, given by `seed`. Process p of n takes every n-th record of that
    order, starting with the p-th: the processes share the records out without overlap and never run
    out of batches. Records are read and processed ahead by threads; the result does not depend on
    their number.

    Attributes:
      config: the data set.
      processor: turns a record into arrays of fixed shape.
      batch_size: of all processes together.
      seed: decides the order.
      data_dir: where the data set is prepared.
      split: "train" or "validation".
      process_index, process_count: which process this is, of how many.
      max_bad_share: the run stops as soon as it is certain that more than this share of the data
        set is bad: 1 % of 12,000 records at the 121st bad one of an epoch. A whole epoch without a
        good record stops it in any case.
      num_threads: threads that process records; 0 does it when a batch is asked for.
      keep_mib: examples stay in memory, so that later epochs cost nothing, until they take so much;
        those that do not fit are processed anew.
    """

    config: DataConfig
    processor: Processor
    batch_size: int
    seed: int = 0
    data_dir: str | Path = "data"
    split: str = "train"
    process_index: int = 0
    process_count: int = 1
    max_bad_share: float = 0.01
    num_threads: int = 2
    keep_mib: int = 512

    def __post_init__(self) -> None:
        _check_processes(self.batch_size, self.process_index, self.process_count)

    def __iter__(self) -> "BatchIterator":
        """An iterator from the first batch on; each call gives an independent one."""
        source = self.config.source(self.split, self.data_dir)
        records = grain.MapDataset.range(len(source)).seed(self.seed).shuffle().repeat()
        mine = records[self.process_index :: self.process_count]
        examples = mine.map(_Process(source, self.processor.encode, self.keep_mib))
        local = self.batch_size // self.process_count
        options = grain.ReadOptions(
            num_threads=self.num_threads, prefetch_buffer_size=2 * local if self.num_threads else 0
        )
        return BatchIterator(
            iter(examples.to_iter_dataset(options)),
            batch_size=local,
            epoch=len(source),
            max_bad_share=self.max_bad_share,
            identity=[len(source), self.seed, self.process_index, self.process_count],
        )


class BatchIterator(grain.DatasetIterator):
    """Batches of the good records; see `Pipeline`. `bad` tells what was left out so far.

    The state, plain JSON, holds the place in the data set and the counts of `bad`. Records that
    were read ahead are not part of it: they are read again.
    """

    def __init__(
        self,
        records: grain.DatasetIterator,
        *,
        batch_size: int,
        epoch: int,
        max_bad_share: float,
        identity: list[int],
    ):
        super().__init__(records)
        self.bad = BadRecords()
        self._batch_size = batch_size
        self._epoch = epoch
        self._max_bad_share = max_bad_share
        self._identity = identity
        self._bad_in_a_row = 0

    def __next__(self) -> Arrays:
        """The next batch of arrays [B / n, ...]. Raises ZooError if too many records are bad."""
        examples = []
        while len(examples) < self._batch_size:
            record = next(self._parent)
            self.bad = self.bad.plus(record)
            if isinstance(record, Bad):
                self._bad_in_a_row += 1
                self._check()
            else:
                self._bad_in_a_row = 0
                examples.append(record)
        return _stack(examples)

    def _check(self) -> None:
        epochs_begun = -(-self.bad.seen // self._epoch)
        allowed = self._max_bad_share * self._epoch * epochs_begun
        if self.bad.bad > allowed or self._bad_in_a_row >= self._epoch:
            raise ZooError(
                f"{self.bad}\nThat is more than max_bad_share={self._max_bad_share:g} allows of "
                f"{self._epoch}: mend or remove them, or raise it"
            )

    def get_state(self) -> dict[str, Any]:
        """Where the iterator stands, as plain JSON values."""
        return {
            "records": self._parent.get_state(),
            "seen": self.bad.seen,
            "bad": self.bad.bad,
            "reasons": list(self.bad.reasons),
            "bad_in_a_row": self._bad_in_a_row,
            "identity": self._identity,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken. Raises ZooError if it was taken from other data."""
        if state["identity"] != self._identity:
            raise ZooError(
                "the saved place is in other data: records, seed, process and number of processes "
                f"were {state['identity']} and are {self._identity}"
            )
        self._parent.set_state(state["records"])
        self.bad = BadRecords(state["seen"], state["bad"], tuple(state["reasons"]))
        self._bad_in_a_row = state["bad_in_a_row"]


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
        batch = self.processor.encode_prompt(image, question)
        return {name: array[0] for name, array in batch.items()}


class _Row(NamedTuple):
    question: str
    answer: str
    kind: str
    name: str
    image: Any
    example: Arrays | Bad


class _Process:
    """Reads one record and turns it into an example, or into `Bad` with the record's name.

    Examples are kept as long as there is room for `keep_mib` of them.
    """

    def __init__(
        self, source: Source, encode: Callable[[Mapping[str, Any]], Arrays], keep_mib: int
    ):
        self._source = source
        self._encode = encode
        self._kept: dict[int, Arrays] = {}
        self._room = keep_mib << 20  # bytes

    def __call__(self, index: int) -> Arrays | Bad:
        if (kept := self._kept.get(index)) is not None:
            return kept
        example = self._made(index)
        if not isinstance(example, Bad):  # threads may overdraw the room by an example each
            size = sum(array.nbytes for array in example.values())
            if size <= self._room:
                self._room -= size
                self._kept[index] = example
        return example

    def _made(self, index: int) -> Arrays | Bad:
        try:
            record = self._source[index]
        except ZooError as error:
            return Bad(str(error))
        try:
            return self._encode(record)
        except ZooError as error:
            return Bad(f"{record['id']}: {error}")


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
