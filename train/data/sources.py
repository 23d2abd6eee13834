"""The data sets that a configuration can name: each is one frozen dataclass.

Training on pictures and conversations of your own takes one line in a configuration:

    data=LlavaJson(json="mine/conversations.json", images="mine/pictures")

A data set in another form is a subclass of `DataConfig` whose `source` returns a sequence of
records.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import tensorflow_datasets as tfds
from absl import logging as absl_logging

from zoo.models.core.errors import UsageError, ZooError
from zoo.train.data.digits_vqa import SPLITS, DigitsVqa, DigitsVqaConfig, Scene, every_text
from zoo.train.data.records import Turns, turns

Progress = Callable[[int, int], None]
"""Told how much is done, out of how much."""


class Source(Protocol):
    """A sequence of records, read one by one.

    A record has `id`; `image`, anything that `zoo.images.read_image` takes, a tuple of several, or
    None; `conversations`, pairs of question and answer; and `kinds`, the sort of each question (""
    where there are no sorts). Reading a bad record raises ZooError that names it.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class NoRecordsError(ZooError):
    """A data set is in order and has nothing for the split that was asked for."""


@dataclass(frozen=True)
class DataConfig:
    """Base of all data sets: where records come from."""

    def prepare(self, data_dir: str | Path, progress: Progress | None = None) -> None:
        """Bring the data set into `data_dir`, if it has to be; at once if it is there already."""

    def source(self, split: str, data_dir: str | Path) -> Source:
        """The records of `split`, "train" or "validation", from what `prepare` has made."""
        raise NotImplementedError(f"{type(self).__name__} does not say where its records are")

    def texts(self) -> Iterable[str]:
        """Questions and answers from which a tokenizer can be trained."""
        raise NotImplementedError(f"{type(self).__name__} does not say what texts it has")

    def weighted(self) -> tuple[tuple["DataConfig", float], ...]:
        """The data sets that this one is made of, with their weights; by default itself alone."""
        return ((self, 1.0),)


@dataclass(frozen=True)
class DigitsVQA(DataConfig):
    """Questions about pictures composed of handwritten digits, see `zoo.train.data.digits_vqa`.

    Attributes:
      pictures, validation_pictures: how many, each with five questions.
      seed: other seeds give other pictures.
      scene: how pictures look.
    """

    pictures: int = 12_000
    validation_pictures: int = 500
    seed: int = 0
    scene: Scene = field(default_factory=Scene)

    def __post_init__(self) -> None:
        if self.pictures < 1 or self.validation_pictures < 1:
            raise UsageError(
                f"pictures and validation_pictures are {self.pictures} and "
                f"{self.validation_pictures}: want at least 1 of each"
            )
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}: want 0 or more")

    def prepare(self, data_dir: str | Path, progress: Progress | None = None) -> None:
        """Compose the pictures below `data_dir`, unless all of them are there.

        What an interrupted preparation left behind is removed. Raises ZooError if there is no room
        or no permission to write.
        """
        if self._complete(data_dir):
            return
        with alone_in(Path(data_dir) / "digits_vqa"):
            if self._complete(data_dir):  # by a process that was faster
                return
            _remove_leftovers(self._folder(data_dir))
            self._check_room(data_dir)
            # The library insists on a folder for downloads, of which there are none.
            with folder_errors(data_dir), quiet(), tempfile.TemporaryDirectory() as unused:
                self._builder(data_dir, progress).download_and_prepare(download_dir=unused)

    def source(self, split: str, data_dir: str | Path) -> Source:
        """Records with PNG pictures. Raises ZooError if the data set is not prepared."""
        check_split(split)
        if not self._complete(data_dir):
            raise ZooError(
                f"{self._folder(data_dir)} is missing or incomplete: prepare the data set first"
            )
        return _DigitsSource(self._builder(data_dir), split)

    def texts(self) -> Iterable[str]:
        """All questions and forms of answer; the pictures need not be prepared."""
        return every_text()

    @property
    def _config(self) -> DigitsVqaConfig:
        return DigitsVqaConfig.of(self.pictures, self.validation_pictures, self.seed, self.scene)

    def _folder(self, data_dir: str | Path) -> Path:
        return Path(data_dir) / "digits_vqa" / self._config.name / str(DigitsVqa.VERSION)

    def _builder(self, data_dir: str | Path, progress: Progress | None = None) -> DigitsVqa:
        with quiet():
            return DigitsVqa(config=self._config, data_dir=os.fspath(data_dir), progress=progress)

    def _complete(self, data_dir: str | Path) -> bool:
        """Whether all files are there and whole, as far as reading their ends shows."""
        try:
            builder = self._builder(data_dir)
            splits = [_DigitsSource(builder, split) for split in SPLITS]
            for records in splits:
                for end in (0, -1):
                    records[end]
        # Whatever the readers say to a missing or damaged folder, it has to be made anew.
        except Exception:
            return False
        return list(map(len, splits)) == [self.pictures, self.validation_pictures]

    def _check_room(self, data_dir: str | Path) -> None:
        # Pixels with noise compress badly: a picture takes as many bytes as pixels, its questions
        # about 600.
        need = (self.pictures + self.validation_pictures) * (self.scene.canvas**2 + 600)
        free = shutil.disk_usage(data_dir).free
        if need > free:
            raise ZooError(
                f"{data_dir} has {free >> 20} MB left and digits_vqa needs {need >> 20} MB: make "
                "room, choose another folder or ask for fewer pictures"
            )


class _DigitsSource:
    """The pictures of one split, read from their ArrayRecord files."""

    def __init__(self, builder: DigitsVqa, split: str):
        # The picture stays a PNG: `read_image` decodes it, as it does with all pictures.
        skip = {"image": tfds.decode.SkipDecoding()}
        self._folder = builder.data_path
        with quiet():
            self._records = builder.as_data_source(split, decoders=skip)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        try:
            record = self._records[range(len(self))[index]]
        except (RuntimeError, OSError) as error:
            raise ZooError(
                f"record {index} of {self._folder} is damaged ({error}): delete the folder, "
                "so that it is made anew"
            ) from error
        questions, answers, kinds = (
            [text.decode() for text in record[name]] for name in ("questions", "answers", "kinds")
        )
        return {
            "id": record["id"].decode(),
            "image": record["image"],
            "conversations": tuple(zip(questions, answers, strict=True)),
            "kinds": tuple(kinds),
            "independent": True,
        }


@dataclass(frozen=True)
class LlavaJson(DataConfig):
    """Conversations about pictures, in the form of LLaVA's instruction data.

    The file holds a list of records such as

        {"id": "7", "image": "a.jpg", "conversations": [
            {"from": "human", "value": "<image> What is this?"},
            {"from": "gpt", "value": "A boat."}]}

    with any number of turns; a record without `image` is text only, and one whose `image` is a list
    has several pictures. A single picture comes first, wherever its mark is; several stand where
    their marks are, and come first if there are no marks.

    Attributes:
      json: the file.
      images: the folder that the names of pictures start from.
      validation: share of the pictures that is kept for validation, drawn by their names; all
        conversations about a picture (of several, the first) are on the same side. With 0 there is
        no validation split.
    """

    json: str
    images: str
    validation: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.validation < 1:
            raise UsageError(f"validation is {self.validation}: want a share from 0 to below 1")

    def prepare(self, data_dir: str | Path, progress: Progress | None = None) -> None:
        """Copy nothing; raise ZooError at once if the file or the folder cannot be used."""
        self._entries()
        if not Path(self.images).is_dir():
            raise ZooError(f"{self.images} is not a folder: `images` names the one with pictures")

    def source(self, split: str, data_dir: str | Path) -> Source:
        """The records of `split`. Raises ZooError if the file is malformed or none are left."""
        check_split(split)
        entries = self._entries()
        held_out = _held_out(entries, self.validation)
        chosen = [i for i, held in enumerate(held_out) if held == (split == "validation")]
        if not chosen:
            raise NoRecordsError(
                f"{self.json} leaves no record for {split} with validation={self.validation}: "
                "change the share or add records"
            )
        return _LlavaSource(self, entries, chosen)

    def texts(self) -> Iterable[str]:
        """The questions and answers of all records that are well-formed."""
        for index, entry in enumerate(self._entries()):
            with contextlib.suppress(ZooError):  # a bad record is reported when it is read
                for turn in self.record(entry, f"{self.json}: record {index}")["conversations"]:
                    yield from turn

    def record(self, entry: Any, name: str) -> dict[str, Any]:
        """The record of an entry of the file, which errors call `name`."""
        pairs = _turns(entry, name)
        paths = [os.path.join(self.images, image) for image in _image_names(entry, name)]
        return {
            "id": f"{name} (id {entry.get('id')!r})",
            "image": tuple(paths) if len(paths) > 1 else paths[0] if paths else None,
            "conversations": pairs,
            "kinds": ("",) * len(pairs),
            "independent": False,
        }

    def _entries(self) -> list[Any]:
        try:
            status = os.stat(self.json)
            entries = _parsed(self.json, status.st_mtime_ns, status.st_size)
        except OSError as error:
            raise ZooError(f"{self.json} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ZooError(f"{self.json} is not valid JSON: {error}") from None
        if not isinstance(entries, list) or not entries:
            raise ZooError(f"{self.json} holds no list of records: want LLaVA's instruction form")
        return entries


class _LlavaSource:
    """Chosen entries of one file."""

    def __init__(self, config: LlavaJson, entries: Sequence[Any], chosen: Sequence[int]):
        self._config = config
        self._entries = entries
        self._chosen = chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        number = self._chosen[index]
        return self._config.record(self._entries[number], f"{self._config.json}: record {number}")


@functools.lru_cache(maxsize=4)
def _parsed(file: str, changed: int, size: int) -> Any:
    """The content of a JSON file as last changed; large ones take a while to parse."""
    return json.loads(Path(file).read_text("utf-8"))


def _turns(entry: Any, name: str) -> Turns:
    """The questions and answers of one entry; raises ZooError that says what is wrong with it."""
    known = entry if isinstance(entry, dict) else {}
    return turns(known.get("conversations"), len(_image_names(known, name)), name)


def _image_names(entry: Mapping[str, Any], name: str) -> list[str]:
    """The file names of an entry's pictures; raises ZooError if they are none."""
    image = entry.get("image")
    names = [] if image is None else image if isinstance(image, list) else [image]
    if not all(isinstance(one, str) for one in names):
        raise ZooError(f"{name}: `image` is {image!r}, want a file name or a list of them")
    return names


def _held_out(entries: Sequence[Any], share: float) -> list[bool]:
    """Which entries are kept for validation: those of a `share` of the pictures."""

    def group(index: int, entry: Any) -> str:
        known = entry if isinstance(entry, dict) else {}
        image = known.get("image")
        first = image[0] if isinstance(image, list) and image else image
        return str(first or known.get("id") or index)

    groups = [group(i, entry) for i, entry in enumerate(entries)]
    ranked = sorted(set(groups), key=lambda name: hashlib.sha256(name.encode()).digest())
    held = set(ranked[: math.ceil(share * len(ranked))])
    return [name in held for name in groups]


def check_split(split: str) -> None:
    """Raise UsageError if there is no such split."""
    if split not in SPLITS:
        raise UsageError(f"there is no split {split!r}: want one of {', '.join(SPLITS)}")


def _remove_leftovers(folder: Path) -> None:
    """Remove a damaged data set and what interrupted preparations left beside it."""
    for path in (folder, *folder.parent.glob(f"incomplete.*_{folder.name}")):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of `folder` meanwhile. The lock of a killed process is void."""
    with folder_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def folder_errors(folder: str | Path) -> Iterator[None]:
    """What goes wrong in writing to `folder`, as one clear error."""
    try:
        yield
    # The writer of ArrayRecord reports a full disk as RuntimeError.
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ZooError(
            f"cannot write to {folder}: {reason}; make room or choose another folder"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and warnings of tensorflow_datasets: the caller reports progress."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    tfds.disable_progress_bar()
    try:
        yield
    finally:
        absl_logging.set_verbosity(verbosity)
