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
            named = entry.get("image") if isinstance(entry, dict) else None
            for name in named if isinstance(named, list) else [named]:
                if isinstance(name, str):
                    shade = int(name.removesuffix(".png"))
                    Image.new("RGB", (20, 10), (shade, 0, 0)).save(folder / name)
        file = tmp_path / "conversations.json"
        file.write_text(json.dumps(records))
        return LlavaJson(json=str(file), images=str(folder), **options)

    return make


def processor(data: LlavaJson, **options) -> Processor:
    image = ImageProcessor(8, (0, 0, 0), (1 / 255,) * 3)
    return Processor(image, Tokenizer.train(data.texts()), max_length=48, **options)


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


def test_several_pictures_stand_at_their_marks(mine, tmp_path):
    turns = said("First <image>, then\n<image>", "Yes.", "<image>", "And this.")
    unmarked = said("What are these?", "Two boats.")
    records = [
        record(0, image=["10.png", "20.png", "30.png"], conversations=turns),
        record(1, image=["40.png", "50.png"], conversations=unmarked),
        record(2),
    ]
    data = mine(records, validation=0.0)
    maker, source = processor(data, num_images=3), data.source("train", tmp_path)
    token, encode = maker.tokenizer, maker.tokenizer.encode

    several = maker.encode(source[0])
    expected = [token.bos, token.user, *encode(" First"), token.image, *encode(" , then")]
    expected += [token.image, token.assistant, *encode(" Yes."), token.eos]
    expected += [token.user, token.image, token.assistant, *encode(" And this."), token.eos]
    assert several["ids"][several["text_mask"]].tolist() == expected
    np.testing.assert_allclose(several["pixels"].max((1, 2, 3)), [10, 20, 30], atol=2)

    first = maker.encode(source[1])
    assert first["ids"][:3].tolist() == [token.bos, token.image, token.image]
    np.testing.assert_allclose(first["pixels"].max((1, 2, 3)), [40, 50, 0], atol=2)
    place = int(first["text_mask"].sum())
    assert first["ids"][place] == token.image  # the one without a picture, in the padding
    examples = [first, several, maker.encode(source[2])]
    assert all((example["ids"] == token.image).sum() == 3 for example in examples)
    assert np.stack([example["pixels"] for example in examples]).shape == (3, 3, 8, 8, 3)


def test_too_many_pictures_are_a_bad_record(mine, tmp_path):
    several = record(3, image=["1.png", "2.png"], conversations=said("<image> <image>?", "x"))
    data = mine([several, *map(record, range(4, 9))], validation=0.0)
    batches = iter(Pipeline(data, processor(data), 6, data_dir=tmp_path, max_bad_share=0.2))
    next(batches)
    assert "there are 2 pictures and the model takes 1" in str(batches.bad)


def test_questions_about_several_pictures_are_asked(mine, tmp_path):
    several = record(3, image=["1.png", "2.png"], conversations=said("<image> <image>?", "x"))
    data = mine([several] * 3, validation=0.0)
    asked = Questions(data, processor(data, num_images=2), 4, tmp_path, split="train")
    (batch,) = asked
    assert batch.valid.sum() == 3
    assert batch.batch["pixels"].shape == (4, 2, 8, 8, 3)


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
        (record(1, conversations=said("<image> <image>?", "x")), "2 <image> marks for 1 pictures"),
        (record(1, image=None), "1 <image> marks for 0 pictures"),
        (record(1, image=["1.png", "2.png"]), "1 <image> marks for 2 pictures"),
        (record(1, image=["1.png", 2]), "want a file name or a list of them"),
        (record(1, image={"bytes": ""}), "want a file name or a list of them"),
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
    list(itertools.islice(batches, 8))  # an epoch
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
    assert batch["pixels"].max() > 230
    assert batch["pixels"].min() < 25
