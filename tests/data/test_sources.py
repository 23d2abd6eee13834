"""Further sources: each gives the same three records in one line, and reports what is wrong."""

import io
import itertools
import json
import os
import tarfile
from pathlib import Path

import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from zoo.images import read_image
from zoo.models.core.errors import UsageError, ZooError
from zoo.processors import ImageProcessor, Processor, Tokenizer
from zoo.train.data import folder as folders
from zoo.train.data.folder import Folder
from zoo.train.data.mixture import Mixture
from zoo.train.data.pipeline import Pipeline
from zoo.train.data.records import Columns
from zoo.train.data.sources import DigitsVQA
from zoo.train.data.tables import ArrayRecords, Parquet, Tfds, held_out
from zoo.train.data.webdataset import WebDataset

COUNT = 6
CAPTION = Columns(answer="caption", ask="what is it?")


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(file, "png")
    return file.getvalue()


def said(number: int) -> list[dict[str, str]]:
    asked = {"from": "human", "value": "<image>\nwhat is it?"}
    return [asked, {"from": "gpt", "value": f"number {number}"}]


def write_array_record(path: Path, rows: list[bytes]) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for row in rows:
        writer.write(row)
    writer.close()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def make_array_records(where: Path):
    rows = [msgpack.packb({"image": png(i), "conversations": said(i)}) for i in range(4)]
    write_array_record(where / "a.array_record", rows)
    for i in (4, 5):
        (where / f"{i}.png").write_bytes(png(i))
    rows = [json.dumps({"image": f"{i}.png", "conversations": said(i)}).encode() for i in (4, 5)]
    write_array_record(where / "b.array_record", rows)
    return ArrayRecords(f"{where}/*.array_record", images=str(where), validation=0)


def make_parquet(where: Path):
    rows = [
        {"image": {"bytes": png(i), "path": None}, "caption": f"number {i}", "unread": b"x" * 99}
        for i in range(COUNT)
    ]
    pq.write_table(pa.Table.from_pylist(rows[:4]), where / "a.parquet")
    pq.write_table(pa.Table.from_pylist(rows[4:]), where / "b.parquet")
    return Parquet(f"{where}/*.parquet", columns=CAPTION, validation=0)


def make_web_dataset(where: Path):
    def files(numbers):
        return {
            f"./some/{i:03d}.{ending}": content
            for i in numbers
            for ending, content in (("png", png(i)), ("txt", f"number {i}".encode()))
        }

    write_tar(where / "a.tar", files(range(4)))
    write_tar(where / "b.tar", files((4, 5)))
    columns = Columns(answer="txt", ask="what is it?")
    return WebDataset(f"{where}/*.tar", columns=columns, validation=0)


def make_folder(where: Path):
    for i in range(COUNT):
        inner = where / ("one", "two")[i > 3]
        inner.mkdir(exist_ok=True)
        (inner / f"{i}.png").write_bytes(png(i))
        if i % 2:
            (inner / f"{i}.txt").write_text(f"number {i}\n")
        else:
            (inner / f"{i}.json").write_text(json.dumps({"conversations": said(i)}))
    return Folder(str(where), ask="what is it?", validation=0)


MAKERS = {
    "array_record": make_array_records,
    "parquet": make_parquet,
    "webdataset": make_web_dataset,
    "folder": make_folder,
}


@pytest.fixture
def where(tmp_path):
    (tmp_path / "mine").mkdir()
    return tmp_path / "mine"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def encoder() -> Processor:
    return Processor(ImageProcessor(4), Tokenizer.train(["what is it? number 1 2"]), 48)


@pytest.mark.parametrize("name", MAKERS)
def test_every_source_gives_the_same_records(name, where, cache):
    data = MAKERS[name](where)
    data.prepare(cache)
    source = data.source("train", cache)
    assert len(source) == COUNT
    for i, record in enumerate(source[i] for i in range(COUNT)):
        ((question, answer),) = record["conversations"]
        assert (question, answer.strip()) == ("what is it?", f"number {i}")
        assert read_image(record["image"])[0, 0, 0] == i
        assert str(where) in record["id"]
    assert not source.faults
    batch = next(iter(Pipeline(data, encoder(), 4, data_dir=cache)))
    assert batch["pixels"].shape == (4, 1, 4, 4, 3)


@pytest.mark.parametrize("name", MAKERS)
def test_texts_train_a_tokenizer(name, where, monkeypatch, cache):
    monkeypatch.setattr("zoo.train.data.tables.cache_folder", lambda: cache)
    texts = [text.strip() for text in MAKERS[name](where).texts()]
    assert texts == [t for i in range(COUNT) for t in ("what is it?", f"number {i}")]


def break_array_record(where):
    content = bytearray((where / "a.array_record").read_bytes())
    content[content.index(b"PNG")] ^= 1  # of the first record
    (where / "a.array_record").write_bytes(content)
    write_array_record(where / "c.array_record", [b"{", b"\xc1", b"[1]", b'{"image": null}'])
    (where / "d.array_record").write_bytes(b"")
    write_array_record(where / "e.array_record", [])
    return 5, ["d.array_record is empty", "e.array_record has no records"]


def break_parquet(where):
    rows = [
        {"image": {"bytes": b"not a picture"}, "caption": "a"},
        {"image": None, "caption": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), where / "c.parquet")
    (where / "d.parquet").write_bytes(b"")
    schema = pq.read_schema(where / "a.parquet")
    pq.write_table(schema.empty_table(), where / "e.parquet")
    return 2, ["d.parquet is empty", "e.parquet has no rows"]


def break_web_dataset(where):
    write_tar(where / "c.tar", {"1.png": png(0), "2.txt": b"", "3.json": b"{"})
    write_tar(where / "e.tar", {"9.png": b"x" * 5000, "9.txt": b"a"})
    (where / "d.tar").write_bytes(b"")
    (where / "e.tar").write_bytes((where / "e.tar").read_bytes()[:3000])
    write_tar(where / "f.tar", {})
    return 4, ["d.tar is empty", "e.tar is cut off", "f.tar has no samples"]


def break_folder(where):
    (where / "one" / "8.png").write_bytes(png(8))
    (where / "one" / "9.png").write_bytes(b"")
    (where / "one" / "9.txt").write_text("empty")
    return 2, []


BREAKERS = {
    "array_record": break_array_record,
    "parquet": break_parquet,
    "webdataset": break_web_dataset,
    "folder": break_folder,
}


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_wrong_is_counted_reported_and_resumable(name, where, cache):
    data = MAKERS[name](where)
    bad, faults = BREAKERS[name](where)
    data.prepare(cache)
    pipeline = Pipeline(data, encoder(), 2, data_dir=cache, max_bad_share=0.5)
    batches = iter(pipeline)
    list(itertools.islice(batches, 2 * COUNT))
    assert len(batches.faults) == len(faults)
    assert all(want in got for want, got in zip(faults, batches.faults, strict=True))
    epochs = batches.bad.seen / (COUNT + bad)
    assert batches.bad.bad >= bad * (epochs - 1)
    assert len(batches.bad.reasons) == min(bad, 5)
    state = json.loads(json.dumps(batches.get_state()))
    expected = next(batches)
    again = iter(pipeline)
    again.set_state(state)
    assert all(np.array_equal(value, expected[key]) for key, value in next(again).items())


@pytest.mark.parametrize("name", ["array_record", "parquet", "webdataset"])
def test_files_in_another_format_and_no_files_are_clear_errors(name, where, cache):
    data = MAKERS[name](where)
    for file in where.glob("a.*"):
        file.write_bytes(b"nonsense" * 5000)
    with pytest.raises(ZooError, match=r"/a\.\w+ is no (whole|plain)"):
        data.prepare(cache)
    for file in where.iterdir():
        file.unlink()
    with pytest.raises(ZooError, match="no such files"):
        data.prepare(cache)


def test_parquet_is_copied_once_and_again_when_it_changes(where, cache):
    data = make_parquet(where)
    with pytest.raises(ZooError, match="prepare the data set first"):
        data.source("train", cache)
    data.prepare(cache)
    before = {file: file.stat().st_mtime_ns for file in cache.rglob("*.array_record")}
    assert len(before) == 2
    assert sum(file.stat().st_size for file in before) < 10**6
    told = []
    data.prepare(cache, lambda *progress: told.append(progress))
    assert not told
    rows = [{"image": {"bytes": png(9)}, "caption": "number 9"}]
    pq.write_table(pa.Table.from_pylist(rows), where / "b.parquet")
    data.prepare(cache, lambda *progress: told.append(progress))
    assert told == [(1, 2), (2, 2)]
    assert all(file.stat().st_mtime_ns == when for file, when in before.items())
    assert len(data.source("train", cache)) == 5
    with pytest.raises(ZooError, match="no column title: it has image, caption"):
        Parquet(data.files, columns=Columns(answer="title", ask="?")).prepare(cache)


def test_a_folder_is_looked_through_once(where, cache, monkeypatch):
    data, looked = make_folder(where), []
    scan = os.scandir
    monkeypatch.setattr(folders.os, "scandir", lambda path: looked.append(path) or scan(path))
    assert len(data.source("train", cache)) == COUNT
    assert len(looked) == 3
    assert len(data.source("train", cache)) == COUNT
    assert len(looked) == 3
    (where / "two" / "7.png").write_bytes(png(7))
    assert len(data.source("train", cache)) == COUNT + 1
    (where / "three").mkdir()
    (where / "three" / "8.png").write_bytes(png(8))
    assert len(data.source("train", cache)) == COUNT + 2
    (kept,) = (cache / "index").glob("folder-*")
    kept.write_bytes(kept.read_bytes()[:100])
    assert len(data.source("train", cache)) == COUNT + 2


def test_a_vanished_file_is_a_bad_record(where, cache):
    source = make_folder(where).source("train", cache)
    (where / "one" / "1.txt").unlink()
    with pytest.raises(ZooError, match=r"1\.txt cannot be read: No such file"):
        source[1]


def test_shards_are_indexed_once_and_again_when_they_change(where, cache, monkeypatch):
    data, opened = make_web_dataset(where), []
    real = tarfile.open
    monkeypatch.setattr(
        tarfile, "open", lambda path, *a, **k: opened.append(path) or real(path, *a, **k)
    )
    data.source("train", cache)
    data.source("train", cache)
    assert len(opened) == 2
    write_tar(where / "b.tar", {"1.png": png(0)})
    opened.clear()
    assert len(data.source("train", cache)) == 5
    assert [Path(path).name for path in opened if Path(path).name == "b.tar"]


def test_a_tar_file_never_writes_or_reads_outside(where, cache, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    with tarfile.open(where / "a.tar", "w") as tar:
        for name, kind, target in [
            ("1.txt", tarfile.SYMTYPE, "../secret.txt"),
            ("2.txt", tarfile.LNKTYPE, "../secret.txt"),
            ("3.txt", tarfile.CHRTYPE, ""),
        ]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
        for name in ("../out.txt", "/tmp/out.txt"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))
    columns = Columns(image=None, answer="txt", ask="what?")
    source = WebDataset(str(where / "a.tar"), columns=columns, validation=0).source("train", cache)
    before = set(tmp_path.rglob("*"))
    assert [source[i]["conversations"] for i in range(len(source))] == [(("what?", "abc"),)] * 2
    assert set(tmp_path.rglob("*")) == before


def test_several_pictures_of_a_sample_stand_in_their_order(where, cache):
    entry = {"conversations": [{"from": "human", "value": "<image> or <image>?"}, said(0)[1]]}
    files = {"7.0.png": png(1), "7.1.png": png(2), "7.json": json.dumps(entry).encode()}
    write_tar(where / "a.tar", files)
    (record,) = [WebDataset(str(where), validation=0).source("train", cache)[0]]
    assert [int(read_image(picture)[0, 0, 0]) for picture in record["image"]] == [1, 2]
    assert record["conversations"] == (("<image> or <image>?", "number 0"),)


def test_any_prepared_tensorflow_data_set(cache):
    digits = DigitsVQA(pictures=12, validation_pictures=4)
    digits.prepare(cache)
    columns = Columns(question="questions", answer="answers")
    folder = str(digits._folder(cache))
    data = Tfds(folder, held_out="validation", columns=columns)
    data.prepare(cache)
    for split, count in (("train", 12), ("validation", 4)):
        source, same = data.source(split, cache), digits.source(split, cache)
        assert len(source) == count
        for i in range(count):
            assert source[i]["conversations"] == same[i]["conversations"]
            assert np.array_equal(read_image(source[i]["image"]), read_image(same[i]["image"]))
    assert len(Tfds(folder, train="train[:50%]", columns=columns).source("train", cache)) == 5
    with pytest.raises(ZooError, match="has no feature label: it has"):
        Tfds(folder, columns=Columns(answer="label", ask="?")).source("train", cache)
    with pytest.raises(ZooError, match="no data set 'no_such_data'"):
        Tfds("no_such_data").prepare(cache)


def test_held_out_rows_are_a_share_and_stay():
    held = held_out(1000, 0.1)
    assert held.sum() == 100
    assert 3 <= held[:100].sum() <= 20
    assert held_out(7, 0.01).sum() == 1
    assert not held_out(7, 0).any()


def test_splits_do_not_overlap(where, cache):
    write_array_record(
        where / "a.array_record",
        [json.dumps({"conversations": said(i)[:0]}).encode() for i in range(40)],
    )
    data = ArrayRecords(str(where), validation=0.25)
    assert [len(data.source(split, cache)) for split in ("train", "validation")] == [30, 10]
    with pytest.raises(UsageError, match="validation is 1"):
        ArrayRecords(str(where), validation=1)


def test_sources_mix(where, cache, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    data = Mixture((make_folder(pictures), 1), (make_web_dataset(where), 2))
    data.prepare(cache)
    batches = iter(Pipeline(data, encoder(), 6, data_dir=cache))
    list(itertools.islice(batches, 10))
    assert batches.bad == type(batches.bad)(60, 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"answer": "a"}, "no question"),
        ({"question": "q"}, "no `answer`"),
        ({"ask": "what?"}, "no `answer`"),
    ],
)
def test_columns_that_make_no_record_are_refused(wrong, message):
    with pytest.raises(UsageError, match=message):
        Columns(**wrong)


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"image": 3}, CAPTION, "a picture is a int"),
        ({"image": "a.png"}, CAPTION, "`images` says in which folder"),
        ({"image": b""}, CAPTION, "row has no 'caption': it has image"),
        ({"caption": {"a": 1}}, CAPTION, "is no text"),
        ({"caption": ["a", "b"], "q": "?"}, Columns(question="q", answer="caption"), "1 questions"),
        ({"conversations": "[{"}, Columns(), "not valid JSON"),
        ({"conversations": "[1]"}, Columns(), "no list of turns"),
    ],
)
def test_rows_that_make_no_record_are_named(row, columns, message):
    with pytest.raises(ZooError, match=message) as caught:
        columns.record(row, "row", None)
    assert str(caught.value).startswith("row")


def test_conversations_come_in_several_forms():
    expected = (("what is it?", "number 3"),)
    listed = said(3)
    table = {"from": np.array(["human", "gpt"], object), "value": [t["value"] for t in listed]}
    for form in (listed, json.dumps(listed), json.dumps(listed).encode(), table):
        record = Columns().record({"image": png(0), "conversations": form}, "row", None)
        assert record["conversations"] == expected
