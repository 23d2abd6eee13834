"""Pictures and volumes with an answer for every place, and the processor that reads them."""

from dataclasses import replace

import numpy as np
import pytest

from zoo.configs import espcn_digits, stunet_digits, vwformer_digits
from zoo.models.core.codec import decode, encode
from zoo.models.core.errors import UsageError, ZooError
from zoo.processors import ImageProcessor
from zoo.processors.pictures import Pictures
from zoo.train.data.dense import DigitsRestore, DigitsSegment
from zoo.train.data.digits_vqa import INK, SPLITS, Scene, compose, draw, scans
from zoo.train.data.pipeline import Pipeline

CLEAN = Scene(min_scans=1, min_size=22, max_size=30, background=(0, 0), ink=(200, 200), noise=0.0)


def batch_of(experiment, split="validation"):
    """The first four records."""
    processor = experiment.processor.build(experiment.model, experiment.data)
    batches = iter(Pipeline(experiment.data, processor, 4, split=split, num_threads=0))
    batch = next(batches)
    assert batches.bad.bad == 0
    batches.close()
    want = {name: leaf.shape for name, leaf in experiment.model.inputs(4).items()}
    assert {name: batch[name].shape for name in want} == want
    return batch


def test_classes_are_those_of_the_ink():
    """Without noise and on black paper brightness alone says where ink is; digits are those that
    were drawn.
    """
    drawn = draw(CLEAN, scans("train"), np.random.default_rng(3))
    edge = round(200 * INK)
    clear = drawn.picture != edge
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(drawn.classes[clear] > 0, drawn.picture[clear] > edge)
    assert set(np.unique(drawn.classes)) == {0, *(1 + int(digit) for digit in drawn.digits)}
    for digit, (x, y) in zip(drawn.digits, drawn.centres.astype(int), strict=True):
        around = drawn.classes[0, y - 11 : y + 11, x - 11 : x + 11]
        assert np.bincount(around.ravel(), minlength=11)[1:].argmax() == digit


def test_pictures_are_those_of_the_questions():
    """One composer: the same state gives the same picture."""
    data = DigitsSegment(pictures=3, seed=5)
    rng = np.random.default_rng((5, SPLITS.index("train"), 2))
    want, _ = compose(data.scene, scans("train"), rng)
    np.testing.assert_array_equal(data.source("train", "")[2]["image"], want)


@pytest.mark.parametrize("slices", [None, 6])
def test_records_follow_from_the_seed(slices):
    data = DigitsSegment(pictures=4, validation_pictures=2, slices=slices)
    train, again = data.source("train", ""), replace(data, pictures=9).source("train", "")
    assert (len(train), len(data.source("validation", ""))) == (4, 2)
    for one, other in zip(train, [again[i] for i in range(4)], strict=True):
        np.testing.assert_array_equal(one["image"], other["image"])
        np.testing.assert_array_equal(one["classes"], other["classes"])
        assert one["classes"].min() == 0 and 0 < one["classes"].max() <= 10
    for other in (data.source("validation", "")[0], replace(data, seed=1).source("train", "")[0]):
        assert not np.array_equal(other["image"], train[0]["image"])
    with pytest.raises(UsageError, match="no split"):
        data.source("test", "")


def test_digits_run_through_a_part_of_a_volume():
    """At least half of the slices, one after another; what is there looks the same in all."""
    ends = set()
    for seed in range(8):
        drawn = draw(replace(CLEAN, max_scans=2), scans("train"), np.random.default_rng(seed), 6)
        for digit in drawn.digits:
            there = np.flatnonzero((drawn.classes == 1 + digit).any((1, 2)))
            assert len(there) >= 3 and np.ptp(there) == len(there) - 1
            ends.add((there[0], there[-1]))
            maps = drawn.classes[there] == 1 + digit
            assert (maps == maps[:1]).all() or list(drawn.digits).count(digit) > 1
    assert len(ends) > 2


def test_batches_of_the_recipes():
    """Pictures of three channels, volumes and small pictures of one."""
    pictures = batch_of(vwformer_digits.config())
    assert pictures["classes"].shape == (4, 64, 64) and pictures["classes"].dtype == np.int32
    volumes = batch_of(stunet_digits.config(), "train")
    assert volumes["classes"].shape == volumes["pixels"].shape[:-1] == (4, 8, 32, 32)
    small = batch_of(espcn_digits.config())
    assert small["target"].shape == (4, 8, 8, 1)
    means = small["target"].reshape(4, 4, 2, 4, 2, 1).mean((2, 4))
    np.testing.assert_allclose(small["pixels"], means, atol=1 / 255)
    assert small["target"].min() == 0 and small["target"].max() == 1


def test_processors_are_read_back(tmp_path):
    for number, recipe in enumerate((vwformer_digits, stunet_digits, espcn_digits)):
        experiment = recipe.config()
        assert decode(encode(experiment)) == experiment
        processor = experiment.processor.build(experiment.model, experiment.data)
        processor.save(tmp_path / str(number))
        assert Pictures.load(tmp_path / str(number)) == processor
    picture = np.zeros((4, 4), np.uint8)
    assert processor.encode_images(picture)["pixels"].shape == (1, 4, 4, 1)
    volumes = Pictures(ImageProcessor(4), 1, 2)
    assert volumes.encode_images([[picture] * 2] * 3)["pixels"].shape == (3, 2, 4, 4, 1)
    with pytest.raises(ZooError, match="1 pictures: want 2"):
        volumes.encode_images([picture])


def test_what_does_not_fit():
    picture, classes = np.zeros((8, 8), np.uint8), np.zeros((4, 4), np.int32)
    processor = Pictures(ImageProcessor(4))
    with pytest.raises(ZooError, match=r"pictures of \(8, 8\): want integers \(4, 4\)"):
        processor.encode({"image": picture, "classes": classes})
    with pytest.raises(ZooError, match=r"float64 \(4, 4\)"):
        processor.encode({"image": picture[:4, :4], "classes": classes * 0.5})
    with pytest.raises(ZooError, match="2 pictures: want 1"):
        processor.encode({"image": (picture, picture), "class": 1})
    for record in ({"class": -1}, {}):
        with pytest.raises(ZooError, match="want a number from 0"):
            processor.encode({"image": picture, **record})
    with pytest.raises(UsageError, match="channels is 4"):
        Pictures(ImageProcessor(4), 4)
    for wrong in ({"pictures": 0}, {"seed": -1}, {"slices": 0}):
        with pytest.raises(UsageError, match="want"):
            DigitsSegment(**wrong)
    with pytest.raises(UsageError, match="factor is 3"):
        DigitsRestore(3)
