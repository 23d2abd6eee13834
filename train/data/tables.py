"""Data sets that are tables: every row becomes a record, as `Columns` says.

data=ArrayRecords("mine/*.array_record")
data=Parquet("mine/*.parquet", columns=Columns(question="problem", answer="solution"))
data=Tfds("mnist", columns=Columns(answer="label", ask="Which digit is this?"))
"""

import glob
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgpack
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from zoo.cache import cache_folder
from zoo.models.core.errors import UsageError, ZooError
from zoo.train.data.records import Columns
from zoo.train.data.sources import (
    DataConfig,
    NoRecordsError,
    Progress,
    Source,
    alone_in,
    check_split,
    folder_errors,
    quiet,
)

_TEXTS = 10_000
"""A tokenizer is trained on the texts of so many rows, the first ones."""


class Rows(Protocol):
    """The rows of a table, read one by one. Reading a bad one raises ZooError that names it.

    Attributes:
      faults: what is wrong with the table as a whole, such as empty shards.
    """

    faults: Sequence[str]

    def __len__(self) -> int: ...

    def name(self, index: int, /) -> str:
        """What row `index` is called."""
        ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Table(DataConfig):
    """Base of the data sets that are tables.

    Attributes:
      columns: which columns a record is made of.
      images: the folder that names of picture files start from, where rows have names.
      validation: share of the rows that is kept for validation, drawn by their numbers. With 0
        there is no validation split.
    """

    columns: Columns = field(default=Columns(), kw_only=True)
    images: str | None = field(default=None, kw_only=True)
    validation: float = field(default=0.05, kw_only=True)

    def __post_init__(self) -> None:
        if not 0 <= self.validation < 1:
            raise UsageError(f"validation is {self.validation}: want a share from 0 to below 1")

    def rows(self, data_dir: str | Path) -> Rows:
        """All rows, from what `prepare` has made in `data_dir`."""
        raise NotImplementedError(f"{type(self).__name__} does not say where its rows are")

    def prepare(self, data_dir: str | Path, progress: Progress | None = None) -> None:
        """Index what has to be; raise ZooError at once if nothing can be read."""
        self.rows(data_dir)

    def source(self, split: str, data_dir: str | Path) -> Source:
        """The records of `split`. Raises ZooError if there are none."""
        check_split(split)
        rows = self.rows(data_dir)
        held = held_out(len(rows), self.validation)
        chosen = np.flatnonzero(held == (split == "validation"))
        if not len(chosen):
            raise NoRecordsError(
                f"{self} leaves no record for {split}: change `validation` or add records"
            )
        return _Records(self, rows, chosen)

    def texts(self) -> Iterable[str]:
        """The questions and answers of the first 10,000 rows that are in order."""
        for name, row in self._first():
            try:
                record = self.columns.record(row, name, self.images or "")
            except ZooError:  # a bad record is reported when it is trained on
                continue
            for turn in record["conversations"]:
                yield from turn

    def _first(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        rows = self.rows(cache_folder() / "data")
        for index in range(min(_TEXTS, len(rows))):
            try:
                yield rows.name(index), rows[index]
            except ZooError:
                continue


class _Records:
    """Chosen rows as records."""

    def __init__(self, table: Table, rows: Rows, chosen: np.ndarray):
        self.faults = rows.faults
        self._table = table
        self._rows = rows
        self._chosen = chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        number = int(self._chosen[index])
        row = self._rows[number]
        return self._table.columns.record(row, self._rows.name(number), self._table.images)


def held_out(count: int, share: float) -> np.ndarray:
    """Which of `count` rows are kept for validation, [count] bool: `share` of them, rounded up."""
    # A mixing of the bits of the numbers (splitmix64), which no other row has a part in.
    x = np.arange(count, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    x ^= x >> np.uint64(31)
    held = np.zeros(count, bool)
    held[np.argsort(x, kind="stable")[: math.ceil(share * count)]] = True
    return held


def shards(pattern: str) -> tuple[list[str], list[str]]:
    """The files that a glob pattern or a folder names, in order, and what is wrong with others.

    Raises:
      ZooError: there are none, or nothing but empty ones.
    """
    found = sorted(glob.glob(os.path.join(pattern, "*") if os.path.isdir(pattern) else pattern))
    files = [path for path in found if os.path.isfile(path)]
    full = [path for path in files if os.path.getsize(path)]
    if not full:
        raise ZooError(
            f"{pattern}: {'all files are empty' if files else 'no such files'}; want a folder or a "
            "pattern such as 'mine/*.tar'"
        )
    return full, [f"{path} is empty (0 bytes)" for path in files if path not in set(full)]


@dataclass(frozen=True)
class ArrayRecords(Table):
    """ArrayRecord files, whose records are rows in JSON or MessagePack.

    Attributes:
      files: a folder or a glob pattern.
    """

    files: str

    def rows(self, data_dir: str | Path) -> Rows:
        """All rows; files are opened in place."""
        return _Stored(*shards(self.files))


class _Stored:
    """Rows in ArrayRecord files; `titles` are what errors call the files."""

    def __init__(
        self, files: Sequence[str], faults: Sequence[str], titles: Sequence[str] | None = None
    ):
        lengths = [_length(path) for path in files]
        named = list(zip(files, titles or files, lengths, strict=True))
        self.faults = [*faults, *(f"{title} has no records" for _, title, n in named if not n)]
        full = [path for path, _, length in named if length]
        if not full:
            raise ZooError(f"no records in {', '.join(self.faults)}")
        self._titles = [title for _, title, length in named if length]
        self._ends = np.cumsum([0, *filter(None, lengths)])
        self._data = ArrayRecordDataSource(full)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, index: int) -> str:
        shard = int(np.searchsorted(self._ends, index, "right")) - 1
        return f"{self._titles[shard]}: record {index - int(self._ends[shard])}"

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        try:
            stored = self._data[index]
        except (RuntimeError, ValueError, OSError) as error:
            raise ZooError(f"{self.name(index)} is damaged: {error}") from None
        row: Any
        try:
            row = json.loads(stored) if stored[:1] == b"{" else msgpack.unpackb(stored)
        except (ValueError, msgpack.exceptions.UnpackException) as error:
            raise ZooError(f"{self.name(index)} is neither JSON nor MessagePack: {error}") from None
        if not isinstance(row, dict):
            raise ZooError(f"{self.name(index)} is a {type(row).__name__}, want named columns")
        return row


def _length(path: str) -> int:
    """How many records an ArrayRecord file has."""
    try:
        reader = ArrayRecordReader(path)
        count = reader.num_records()
        reader.close()
    except (RuntimeError, ValueError, OSError) as error:
        raise ZooError(f"{path} is no whole ArrayRecord file: {error}") from None
    return int(count)


@dataclass(frozen=True)
class Parquet(Table):
    """Parquet files, such as data sets on the Hugging Face hub have.

    Parquet cannot be read row by row in random order, so that `prepare` copies the columns that are
    needed to ArrayRecord, below `data_dir`. An interrupted copy is continued, file by file; when a
    file changes it is copied anew.

    Attributes:
      files: a folder or a glob pattern.
    """

    files: str

    def prepare(self, data_dir: str | Path, progress: Progress | None = None) -> None:
        """Copy what is not copied yet. Raises ZooError if a file is damaged or there is no room."""
        files, _ = shards(self.files)
        copies = [self._copy(path, data_dir) for path in files]
        if all(copy.exists() for copy in copies):
            return
        with alone_in(Path(data_dir) / "parquet"):
            for done, (path, copy) in enumerate(zip(files, copies, strict=True), 1):
                if not copy.exists():
                    self._write(path, copy)
                if progress is not None:
                    progress(done, len(files))

    def rows(self, data_dir: str | Path) -> Rows:
        """The copied rows. Raises ZooError if they are not prepared."""
        files, faults = shards(self.files)
        copies = [self._copy(path, data_dir) for path in files]
        if missing := [path for path, c in zip(files, copies, strict=True) if not c.exists()]:
            raise ZooError(f"{missing[0]} is not copied yet: prepare the data set first")
        rows = {path: str(c) for path, c in zip(files, copies, strict=True) if c.stat().st_size}
        if not rows:
            raise ZooError(f"{self.files}: no file has rows")
        faults += [f"{path} has no rows" for path in files if path not in rows]
        return _Stored(list(rows.values()), faults, list(rows))

    def _first(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        left = _TEXTS
        for path in shards(self.files)[0]:
            for row in _parquet_rows(path, self.columns.names):
                if not left:
                    return
                left -= 1
                yield path, row

    def _copy(self, path: str, data_dir: str | Path) -> Path:
        status = os.stat(path)
        facts = [os.path.abspath(path), status.st_size, status.st_mtime_ns, self.columns.names]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        return Path(data_dir) / "parquet" / f"{digest}.array_record"

    def _write(self, path: str, copy: Path) -> None:
        part = copy.with_suffix(".part")
        need, free = os.path.getsize(path), shutil.disk_usage(copy.parent).free
        if 2 * need > free:
            raise ZooError(
                f"{copy.parent} has {free >> 20} MB left and a copy of {path} may need "
                f"{2 * need >> 20} MB: make room or choose another folder"
            )
        count = 0
        with folder_errors(copy.parent):
            writer = ArrayRecordWriter(str(part), "group_size:1")
            for row in _parquet_rows(path, self.columns.names):
                writer.write(msgpack.packb(row, default=str))
                count += 1
            writer.close()
            if not count:
                part.write_bytes(b"")
            part.replace(copy)


def _parquet_rows(path: str, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of one file, with these columns alone."""
    import pyarrow as pa  # takes a while, and only this needs it
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            present = file.schema_arrow.names
            if lacking := [name for name in names if name not in present]:
                raise ZooError(
                    f"{path} has no column {', '.join(lacking)}: it has {', '.join(present)}; "
                    "`columns` says which ones to read"
                )
            for batch in file.iter_batches(batch_size=64, columns=list(names)):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ZooError(f"{path} is no whole Parquet file: {error}") from None


@dataclass(frozen=True)
class Tfds(Table):
    """A data set of `tensorflow_datasets`, read without TensorFlow.

    One that is not prepared yet is downloaded and prepared as ArrayRecord, for which some builders
    need TensorFlow. Class labels are read as their names.

    Attributes:
      name: of the builder, with configuration and version if need be ("mnist", "coco/2017"), or the
        folder of a prepared data set.
      train: the split that is trained on, which may be a slice ("train[:90%]").
      held_out: the split for validation; None keeps a share of `train`, see `validation`.
    """

    name: str
    train: str = "train"
    held_out: str | None = None

    def prepare(self, data_dir: str | Path, progress: Progress | None = None) -> None:
        """Download and prepare, unless that is done."""
        if os.path.isdir(self.name):
            self.rows(data_dir)
            return
        with alone_in(Path(data_dir) / "tfds"), folder_errors(data_dir), quiet():
            self._builder(data_dir).download_and_prepare(file_format="array_record")

    def source(self, split: str, data_dir: str | Path) -> Source:
        """The records of `split`."""
        if self.held_out is None:
            return super().source(split, data_dir)
        check_split(split)
        rows = self._rows(self.train if split == "train" else self.held_out, data_dir)
        return _Records(self, rows, np.arange(len(rows)))

    def rows(self, data_dir: str | Path) -> Rows:
        """The rows that are trained on."""
        return self._rows(self.train, data_dir)

    def _rows(self, split: str, data_dir: str | Path) -> Rows:
        try:
            with quiet():
                return _TfdsRows(self._builder(data_dir), split, self.columns)
        # What the library raises for a data set that is missing, damaged or in another form.
        except (AssertionError, NotImplementedError, OSError, RuntimeError, ValueError) as error:
            raise ZooError(f"{self.name} cannot be read: {error}; is it prepared?") from error

    def _builder(self, data_dir: str | Path) -> tfds.core.DatasetBuilder:
        try:
            if os.path.isdir(self.name):
                return tfds.builder_from_directory(self.name)
            return tfds.builder(self.name, data_dir=os.fspath(Path(data_dir) / "tfds"))
        except (tfds.core.DatasetNotFoundError, FileNotFoundError, ValueError) as error:
            first = str(error).split("\n")[0]
            raise ZooError(f"there is no data set {self.name!r}: {first}") from None


class _TfdsRows:
    """The rows of a split, pictures as the bytes of their files."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, columns: Columns):
        features = dict(builder.info.features.items())
        skip = {
            name: tfds.decode.SkipDecoding()
            for name in columns.names
            if isinstance(features.get(name), tfds.features.Image)
        }
        if lacking := [name for name in columns.names if name not in features]:
            raise ZooError(
                f"{builder.name} has no feature {', '.join(lacking)}: it has {', '.join(features)};"
                " `columns` says which ones to read"
            )
        self.faults: list[str] = []
        self._labels = {
            name: features[name]
            for name in columns.names
            if isinstance(features[name], tfds.features.ClassLabel)
        }
        self._name = f"{builder.info.full_name} {split}"
        self._data = builder.as_data_source(split, decoders=skip)

    def __len__(self) -> int:
        return len(self._data)

    def name(self, index: int) -> str:
        return f"{self._name}: record {index}"

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        try:
            row = dict(self._data[index])
        except (RuntimeError, ValueError, OSError) as error:
            raise ZooError(f"{self.name(index)} is damaged: {error}") from None
        return row | {name: label.int2str(int(row[name])) for name, label in self._labels.items()}
