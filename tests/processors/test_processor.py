"""Pictures to pixels, records to examples, prompts to batches."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from zoo.models.core.errors import UsageError, ZooError
from zoo.processors import ImageProcessor, Processor, Tokenizer

WIDE = np.zeros((20, 60, 3), np.uint8)
WIDE[:, :20], WIDE[:, 20:40], WIDE[:, 40:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
RAW = {"mean": (0, 0, 0), "std": (1, 1, 1)}


@pytest.fixture(scope="module")
def processor():
    tokenizer = Tokenizer.train(["what is this?", "a boat", "yes", "no"])
    return Processor(ImageProcessor(16), tokenizer, max_length=24)


def test_a_picture_of_the_right_size_is_only_normalised():
    picture = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    pixels = ImageProcessor(12, mean, std)(picture)
    assert pixels.dtype == np.float32
    assert np.allclose(pixels, (picture / 255 - mean) / std, atol=1e-6)


def test_pad_sets_the_picture_in_the_middle_of_its_mean_colour():
    mean = (0.48, 0.46, 0.41)
    pixels = ImageProcessor(60, mean, (1, 1, 1), resize="nearest")(WIDE) * 255 + np.multiply(
        mean, 255
    )
    assert np.allclose(pixels[:20], np.floor(np.multiply(mean, 255)), atol=1e-3)
    assert np.allclose(pixels[20:40], WIDE, atol=1e-3)
    assert np.allclose(pixels[40:], pixels[:20])


def test_pad_equals_padding_and_then_resizing():
    picture = np.random.default_rng(0).integers(0, 256, (30, 44, 3), np.uint8)
    canvas = np.full((44, 44, 3), 127, np.uint8)
    canvas[7:37] = picture
    expected = Image.fromarray(canvas).resize((16, 16), Image.Resampling.BICUBIC)
    pixels = ImageProcessor(16)(picture)
    assert np.allclose(pixels, np.asarray(expected) / 127.5 - 1, atol=1e-6)


def test_squash_keeps_all_and_crop_keeps_the_middle():
    squashed = ImageProcessor(20, **RAW, resize="nearest", fit="squash")(WIDE)
    assert squashed[0, [0, 10, 19]].tolist() == np.eye(3).tolist()
    cropped = ImageProcessor(20, **RAW, resize="nearest", fit="crop")(WIDE)
    assert (cropped == [0, 1, 0]).all()


def test_a_panorama_is_padded_in_bounded_memory():
    long = np.full((1_000, 9_000, 3), 255, np.uint8)
    pixels = ImageProcessor(18, **RAW)(long)
    assert pixels.shape == (18, 18, 3)
    assert (pixels[8:10] == 1).all()
    assert not pixels[:8].any()
    assert not pixels[10:].any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 0}, "at least 1"),
        ({"size": 8, "resize": "area"}, "resize is 'area'"),
        ({"size": 8, "fit": "stretch"}, "fit is 'stretch'"),
        ({"size": 8, "std": (1, 0, 1)}, "std above 0"),
        ({"size": 8, "mean": (0.5,)}, "three numbers"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(UsageError, match=message):
        ImageProcessor(**wrong)


def test_an_example_has_the_shapes_and_dtypes_of_a_batch_row(processor):
    example = processor.encode({"image": WIDE, "conversations": [("what is this?", "a boat")]})
    described = {name: (array.shape, array.dtype.name) for name, array in example.items()}
    assert described == {
        "pixels": ((1, 16, 16, 3), "float32"),
        "ids": ((24,), "int32"),
        "labels": ((24,), "int32"),
        "text_mask": ((24,), "bool"),
        "segments": ((24,), "int32"),
    }
    assert not example["segments"].any()
    ids, labels, mask = example["ids"], example["labels"], example["text_mask"]
    length = mask.sum()
    assert mask[:length].all()
    assert (ids[length:] == processor.tokenizer.pad).all()
    assert (labels[length:] == -100).all()
    assert (ids == processor.tokenizer.image).sum() == 1
    learned = labels != -100
    assert np.array_equal(labels[learned], ids[learned])
    assert processor.decode(ids[learned]) == "a boat"


def test_turns_that_are_independent_are_numbered(processor):
    record = {"image": WIDE, "conversations": [("a?", "b"), ("c?", "d")], "independent": True}
    segments = processor.encode(record)["segments"].tolist()
    assert segments[:3] == [0, 0, 1]
    assert sorted(set(segments)) == [0, 1, 2]


def test_text_alone_has_the_same_shapes_and_masks_the_picture_out(processor):
    turns = [("what is this?", "a boat")]
    seen = processor.encode({"image": WIDE, "conversations": turns})
    alone = processor.encode({"image": None, "conversations": turns})
    place = alone["ids"] == processor.tokenizer.image
    assert not alone["pixels"].any()
    assert not alone["text_mask"][place].any()
    assert np.array_equal(alone["text_mask"] | place, seen["text_mask"])
    assert np.array_equal(alone["ids"], seen["ids"])
    assert np.array_equal(alone["labels"], seen["labels"])


def test_text_that_spells_the_placeholder_stays_text(processor):
    example = processor.encode({"image": WIDE, "conversations": [("<image>?", "<image>")]})
    assert (example["ids"] == processor.tokenizer.image).sum() == 1


def test_too_long_is_refused_and_never_cut(processor):
    short = dataclasses.replace(processor, max_length=8)
    with pytest.raises(ZooError, match="max_length is 8"):
        short.encode({"image": WIDE, "conversations": [("what is this?", "a boat")] * 2})
    with pytest.raises(ZooError, match="more than the 8"):
        short.encode_prompt(WIDE, "what is this? " * 9)


def test_prompts_make_a_batch(processor):
    batch = processor.encode_prompt([WIDE, WIDE[:, :20]], ["what is this?", "yes no yes?"])
    assert batch["pixels"].shape == (2, 1, 16, 16, 3)
    assert set(batch) == {"pixels", "ids", "text_mask"}
    for ids, mask in zip(batch["ids"], batch["text_mask"], strict=True):
        assert ids[mask][-1] == processor.tokenizer.assistant
        assert (ids == processor.tokenizer.image).sum() == 1
    single = processor.encode_prompt(WIDE, "what is this?")
    assert all(np.array_equal(single[name][0], batch[name][0]) for name in batch)


def test_wrong_numbers_of_pictures_and_empty_prompts_are_refused(processor):
    with pytest.raises(UsageError, match="2 pictures for 1 prompts"):
        processor.encode_prompt([WIDE, WIDE], "what?")
    with pytest.raises(UsageError, match="no prompts"):
        processor.encode_prompt([], [])
    with pytest.raises(ZooError, match="question is empty"):
        processor.encode_prompt(WIDE, "  ")


def test_a_bad_picture_is_refused_by_name(processor, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ZooError, match=r"bad\.jpg"):
        processor.encode({"image": tmp_path / "bad.jpg", "conversations": [("a?", "b")]})


def test_a_saved_processor_does_the_same(processor, tmp_path):
    processor.save(tmp_path / "new" / "folder")
    loaded = Processor.load(tmp_path / "new" / "folder")
    assert loaded.image == processor.image
    assert loaded.max_length == processor.max_length
    record = {"image": WIDE, "conversations": [("what is this?", "a boat")]}
    expected = processor.encode(record)
    assert all(np.array_equal(loaded.encode(record)[name], expected[name]) for name in expected)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"image": {"sise": 3}, "max_length": 4}'])
def test_a_damaged_processor_is_refused_by_name(tmp_path, content):
    (tmp_path / "processor.json").write_text(content)
    with pytest.raises(ZooError, match=r"processor\.json"):
        Processor.load(tmp_path)


def test_processing_needs_neither_jax_nor_training():
    code = (
        "import sys, zoo.processors;"
        "sys.exit(bool({'jax', 'flax', 'torch', 'tensorflow', 'grain'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# A closer look.


@pytest.mark.parametrize("fit", ["pad", "squash", "crop"])
def test_crops_put_together_are_the_picture_seen_whole(fit):
    """Whatever `fit` makes of a picture is cut, so that crops and whole show the same."""
    picture = np.zeros((60, 120, 3), np.uint8)
    picture[:, :60], picture[20:40, 30:90] = (200, 0, 0), (0, 250, 0)
    image = ImageProcessor(30, **RAW, resize="box", fit=fit)
    crops, (rows, columns) = image.closer(picture, crops=4)
    assert (rows, columns) == ((1, 2) if fit == "squash" else (2, 2))
    assert crops.shape == (rows * columns, 30, 30, 3) and crops.dtype == np.float32
    large = crops.reshape(rows, columns, 30, 30, 3).swapaxes(1, 2).reshape(rows * 30, -1, 3)
    small = large.reshape(30, rows, 30, columns, 3).mean((1, 3))
    np.testing.assert_allclose(small, image(picture), atol=0.005)


def test_a_processor_with_crops(processor, tmp_path):
    """Crops and their grid stand beside the pixels, for several pictures too, and are saved."""
    closer = dataclasses.replace(processor, num_images=2, crops=4)
    wide = np.random.default_rng(0).integers(0, 256, (16, 64, 3), np.uint8)
    record = {"image": (WIDE, wide), "conversations": [("what is this?", "a boat")]}
    example = closer.encode(record)
    assert example["crops"].shape == (2, 4, 16, 16, 3)
    assert example["view_grid"].tolist() == [[2, 2], [2, 2]]
    parts, grid = closer.image.closer(wide, crops=4)
    assert example["view_grid"][1].tolist() == list(grid)
    np.testing.assert_array_equal(example["crops"][1, : len(parts)], parts)
    blind = closer.encode({**record, "image": None})
    assert {k: v.shape for k, v in blind.items()} == {k: v.shape for k, v in example.items()}
    assert (blind["crops"] == 0).all()
    closer.save(tmp_path)
    assert Processor.load(tmp_path).crops == 4
    assert "crops" not in processor.encode({**record, "image": wide})
