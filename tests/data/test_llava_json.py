"""A data set of one's own: a folder of pictures and a JSON file, in one line of configuration."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from zoo.models.core.errors import UsageError, ZooError
from zoo.processors import ImageProcessor, Processor, Tokenizer
from zoo.train.data.pipeline import Pipeline, Questions
from zoo.train.data.sources import LlavaJson


def said(*values: str) -> list[dict[str, str]]:
    speakers = itertools.cycle(("human", "gpt"))
    return [{"from": s, "value": v} for s, v in zip(speakers, values, strict=False)]


def record(number: int, **changes) -> dict:
    good = {
        "id": str(number),
        "image": f"{number}.png",
        "conversations": said(f"<image>\nWhich number is this?\n{number}", f"It is {number}."),
    }
    return {**good, **changes}


@pytest.fixture
def mine(tmp_path):
    """Makes a data set of records; those that name a picture get one."""

    def make(records, **options) -> LlavaJson:
        folder = tmp_path / "pictures"
        folder.mkdir(exist_ok=True)
        for entry in records:
            name = entry.get("image") if isinstance(entry, dict) else None
            if isinstance(name, str):
                Image.new("RGB", (20, 10), (len(name), 0, 0)).save(folder / name)
        file = tmp_path / "conversations.json"
        file.write_text(json.dumps(records))
        return LlavaJson(json=str(file), images=str(folder), **options)

    return make


def processor(data: LlavaJson) -> Processor:
    return Processor(ImageProcessor(8), Tokenizer.train(data.texts()), max_length=48)


def test_one_line_of_configuration_gives_batches(mine, tmp_path):
    text_only = record(100, conversations=said("What is 1 and 1?", "2"))
    del text_only["image"]
    turns = record(101, conversations=said("What?\n<image>", "A boat.", "Its colour?", "Red."))
    data = mine([*map(record, range(18)), text_only, turns])
    data.prepare(tmp_path)
    batches = iter(Pipeline(data, processor(data), batch_size=4, data_dir=tmp_path))
    batch = next(batches)
    assert batch["pixels"].shape == (4, 1, 8, 8, 3)
    assert batch["ids"].shape == (4, 48)
    list(itertools.islice(batches, 10))
    assert batches.bad.bad == 0
    asked = list(Questions(data, processor(data), batch_size=4, data_dir=tmp_path))
    assert sum(b.valid.sum() for b in asked) >= 1


def test_the_mark_of_the_picture_is_taken_out_of_the_text(mine, tmp_path):
    data = mine([record(7), record(8, conversations=said("What? <image>", "A <image> tag."))])
    source = mine([record(7)], validation=0.0).source("train", tmp_path)
    assert source[0]["conversations"] == (("Which number is this?\n7", "It is 7."),)
    assert source[0]["image"].endswith("7.png")
    assert "(id '7')" in source[0]["id"]
    assert list(data.texts())[:2] == ["Which number is this?\n7", "It is 7."]


def test_validation_keeps_whole_pictures_apart_and_the_same_ones(mine, tmp_path):
    records = [record(i % 30, id=str(i)) for i in range(90)]
    data = mine(records, validation=0.2)
    train, validation = (
        [r["image"] for r in data.source(split, tmp_path)] for split in ("train", "validation")
    )
    assert not set(train) & set(validation)
    assert len(set(validation)) == 6
    assert len(train) + len(validation) == 90
    shuffled = mine(records[::-1], validation=0.2)
    again = {r["image"] for r in shuffled.source("validation", tmp_path)}
    assert again == set(validation)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (record(1, conversations=None), "`conversations` is no list"),
        (record(1, conversations=said("What? <image>")), "in alternation"),
        (record(1, conversations=said("<image> <image>?", "x")), "2 <image> marks"),
        (record(1, image=None), "1 <image> marks"),
        (record(1, image=["1.png", "2.png"]), "want one file name"),
        (record(1, conversations=[{"from": "gpt", "value": "x"}] * 2), "want one with `from`"),
        (record(1, conversations=[{"from": "human"}, {"from": "gpt"}]), "a `value`"),
        ({"id": "1"}, "`conversations` is no list"),
        ("not a record", "`conversations` is no list"),
    ],
)
def test_malformed_records_are_named(mine, tmp_path, bad, message):
    source = mine([record(0), bad], validation=0.0).source("train", tmp_path)
    assert source[0]["image"]
    with pytest.raises(ZooError, match=r"conversations\.json: record 1: ") as caught:
        source[1]
    assert message in str(caught.value)


def test_bad_pictures_and_texts_are_left_out_and_named(mine, tmp_path):
    records = [record(i) for i in range(40)]
    records[5]["conversations"] = said("<image> What?", "")
    records[6]["conversations"] = said("<image>", "no question")
    data = mine(records, validation=0.0)
    folder = tmp_path / "pictures"
    (folder / "1.png").write_bytes(b"")
    (folder / "2.png").write_bytes((folder / "3.png").read_bytes()[:50])
    (folder / "4.png").unlink()
    pipeline = Pipeline(data, processor(data), batch_size=5, data_dir=tmp_path, max_bad_share=0.2)
    batches = iter(pipeline)
    list(itertools.islice(batches, 7))
    told = str(batches.bad)
    for reason in ("1.png is empty", "2.png is truncated", "4.png does not exist"):
        assert reason in told
    assert "the answer to 'What?' is empty" in told
    assert "the question is empty" in told
    with pytest.raises(ZooError, match="max_bad_share"):
        list(itertools.islice(Pipeline(data, processor(data), 5, data_dir=tmp_path), 99))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "not valid JSON"),
        ("", "not valid JSON"),
        ("{}", "no list of records"),
        ("[]", "no list of records"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_a_malformed_file_is_one_clear_error(mine, tmp_path, content, message):
    data = mine([record(0)])
    with open(data.json, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
    for use in (data.prepare, lambda where: data.source("train", where)):
        with pytest.raises(ZooError, match=message) as caught:
            use(tmp_path)
        assert "conversations.json" in str(caught.value)


def test_missing_files_folders_and_splits_are_clear_errors(mine, tmp_path):
    data = mine([record(0)])
    with pytest.raises(ZooError, match=r"none\.json cannot be read: No such file"):
        LlavaJson("none.json", data.images).prepare(tmp_path)
    with pytest.raises(ZooError, match="nowhere is not a folder"):
        LlavaJson(data.json, "nowhere").prepare(tmp_path)
    with pytest.raises(ZooError, match="leaves no record for train"):
        data.source("train", tmp_path)
    with pytest.raises(ZooError, match="leaves no record for validation"):
        mine([record(0)], validation=0.0).source("validation", tmp_path)
    with pytest.raises(UsageError, match="no split 'test'"):
        data.source("test", tmp_path)
    with pytest.raises(UsageError, match="validation is 1"):
        LlavaJson(data.json, data.images, validation=1)


def test_a_changed_file_is_read_again(mine, tmp_path):
    assert len(mine([record(0)], validation=0.0).source("train", tmp_path)) == 1
    assert len(mine([record(0), record(1)], validation=0.0).source("train", tmp_path)) == 2


def test_16_bit_pictures_are_handled(mine, tmp_path):
    data = mine([record(0)], validation=0.0)
    grey = Image.fromarray(np.array([[0], [65535]], np.uint16).repeat(20, 0).repeat(40, 1))
    grey.save(tmp_path / "pictures" / "0.png")
    batch = next(iter(Pipeline(data, processor(data), batch_size=2, data_dir=tmp_path)))
    assert batch["pixels"].max() > 0.8
    assert batch["pixels"].min() < -0.8
