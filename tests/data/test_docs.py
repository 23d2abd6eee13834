"""Every line of docs/data.md is a configuration that gives batches."""

import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from zoo.models.core.codec import decode, encode
from zoo.processors import ImageProcessor, Processor, Tokenizer
from zoo.train.data.folder import Folder
from zoo.train.data.mixture import Mixture
from zoo.train.data.pipeline import Pipeline
from zoo.train.data.records import Columns
from zoo.train.data.sources import DigitsVQA, LlavaJson
from zoo.train.data.tables import ArrayRecords, Parquet, Tfds
from zoo.train.data.webdataset import WebDataset

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
LINES = re.findall(r"```python\n(data = .*?)```", PAGE.read_text("utf-8"), re.DOTALL)
KNOWN = (
    ArrayRecords,
    Columns,
    DigitsVQA,
    Folder,
    LlavaJson,
    Mixture,
    Parquet,
    Tfds,
    WebDataset,
)
NAMES = {cls.__name__: cls for cls in KNOWN}


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """A folder with `mine` in all forms."""
    where = tmp_path_factory.mktemp("docs")
    mine = where / "mine"
    for folder in ("pictures", "captioned"):
        (mine / folder).mkdir(parents=True)
    said = [{"from": "human", "value": "<image> what?"}, {"from": "gpt", "value": "a boat"}]
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), 9, np.uint8)).save(file, "png")
    picture, count = file.getvalue(), 20
    entries = [{"id": str(i), "image": f"{i}.png", "conversations": said} for i in range(count)]
    (mine / "conversations.json").write_text(json.dumps(entries))
    writer = ArrayRecordWriter(str(mine / "a.array_record"), "group_size:1")
    with tarfile.open(mine / "a.tar", "w") as tar:
        for i, entry in enumerate(entries):
            (mine / "pictures" / f"{i}.png").write_bytes(picture)
            (mine / "captioned" / f"{i}.png").write_bytes(picture)
            (mine / "captioned" / f"{i}.txt").write_text("a boat")
            writer.write(msgpack.packb(entry) if i % 2 else json.dumps(entry).encode())
            for ending, content in (("png", picture), ("txt", b"a boat")):
                member = tarfile.TarInfo(f"{i}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    writer.close()
    row = {"image": {"bytes": picture}, "question": "what?", "answer": "a boat"}
    pq.write_table(pa.Table.from_pylist([row] * count), mine / "a.parquet")
    digits = DigitsVQA(pictures=20, validation_pictures=4)
    digits.prepare(where)
    shutil.move(digits._folder(where), mine / "prepared")
    return where


def test_every_source_has_its_line():
    shown = {name for line in LINES for name in re.findall(r"\b([A-Z]\w+)\(", line)}
    assert shown == set(NAMES)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.removeprefix("data = ").split("(")[0])
def test_a_line_gives_batches(line, stage, monkeypatch):
    monkeypatch.chdir(stage)
    found: dict = {}
    exec(line, {**NAMES}, found)
    data = found["data"]
    assert decode(json.loads(json.dumps(encode(data)))) == data
    data.prepare("cache")
    processor = Processor(ImageProcessor(4), Tokenizer.train(["what? a boat"]), 256)
    for split in ("train", "validation"):
        batches = iter(Pipeline(data, processor, 4, data_dir="cache", split=split))
        batch = next(batches)
        assert batch["pixels"].shape == (4, 1, 4, 4, 3)
        assert batch["pixels"].any()
        assert batches.bad.bad == 0
        batches.close()
