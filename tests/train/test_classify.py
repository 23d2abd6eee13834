"""The objective of image classifiers: its terms by hand, mixed images, a teacher; the digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.models.core.errors import UsageError
from zoo.train.data.classes import ClassFolders, DigitsClassify
from zoo.train.objectives.classify import (
    Classify,
    cross_entropy,
    distilled,
    draw_mix,
    hits,
    smoothed,
)

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(4, 7)).astype(np.float32)
CLASSES = np.array([1, 6, 0, 3], np.int32)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_cross_entropy():
    plain = cross_entropy(LOGITS, smoothed(CLASSES, 7, 0.0))
    want = -log_softmax(LOGITS)[np.arange(4), CLASSES]
    np.testing.assert_allclose(plain, want, rtol=1e-5)
    smooth = cross_entropy(LOGITS, smoothed(CLASSES, 7, 0.1))
    np.testing.assert_allclose(smooth, 0.9 * want - 0.1 * log_softmax(LOGITS).mean(-1), rtol=1e-5)


def test_distillation():
    teacher = RNG.normal(size=(4, 7)).astype(np.float32)
    ours, theirs = log_softmax(LOGITS / 3), log_softmax(teacher / 3)
    want = 9 * (np.exp(theirs) * (theirs - ours)).sum(-1)
    np.testing.assert_allclose(distilled(LOGITS, teacher, "soft", 3.0), want, rtol=1e-4)
    hard = -log_softmax(LOGITS)[np.arange(4), teacher.argmax(-1)]
    np.testing.assert_allclose(distilled(LOGITS, teacher, "hard"), hard, rtol=1e-5)


def test_hits():
    order = np.argsort(-LOGITS, -1)
    found = hits(LOGITS, CLASSES)
    assert found["accuracy"] == (order[:, 0] == CLASSES).sum()
    assert found["top5"] == (order[:, :5] == CLASSES[:, None]).any(-1).sum()
    assert set(hits(LOGITS[:, :5], CLASSES % 5)) == {"accuracy"}


def test_mixed_images():
    """The share of each image in the pixels is that in the labels."""
    pixels = np.stack([np.full((16, 12, 1), value, np.float32) for value in (0.0, 1.0)])
    labels = np.eye(2, dtype=np.float32)
    draw = jax.jit(draw_mix, static_argnums=(1, 2, 3, 4))
    kinds = set()
    for seed in range(12):
        mix = draw(jax.random.key(seed), pixels.shape, 0.8, 1.0, 1.0)
        images, wanted = np.asarray(mix.images(jnp.asarray(pixels))), np.asarray(mix.labels(labels))
        np.testing.assert_allclose(images.mean((1, 2, 3)), wanted[:, 1], atol=1e-5)
        np.testing.assert_allclose(wanted.sum(-1), 1, rtol=1e-6)
        kinds.add((bool(mix.blended), len(np.unique(images)) > 2 or float(mix.share) in (0, 1)))
    assert {blended for blended, _ in kinds} == {True, False}
    never = draw(jax.random.key(0), pixels.shape, 0.8, 1.0, 0.0)
    np.testing.assert_array_equal(never.images(jnp.asarray(pixels)), pixels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"smoothing": 1.5}, "smoothing is 1.5: want a share"),
        ({"mixup": -1.0}, "mixup is -1.0: want 0 or more"),
        ({"distillation": "warm"}, "want soft or hard"),
        ({"temperature": 0.0}, "want more than 0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        Classify(**settings)


def test_digits():
    """Real scans of ten digits; none is in both splits."""
    data = DigitsClassify()
    train, validation = (data.source(split, "nowhere") for split in ("train", "validation"))
    assert len(train) + len(validation) == 1797
    assert {record["class"] for record in validation} == set(range(10))
    pictures = [{r["image"].tobytes() for r in source} for source in (train, validation)]
    assert train[0]["image"].shape == (8, 8) and train[0]["image"].dtype == np.uint8
    assert not pictures[0] & pictures[1]
    with pytest.raises(UsageError, match="no split"):
        data.source("test", "nowhere")


def test_folders(tmp_path):
    from PIL import Image

    for split, names in (("train", ("b", "a")), ("validation", ("a",))):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / split / name / "1.png")
    data = ClassFolders(str(tmp_path))
    assert data.names() == ("a", "b")
    assert [record["class"] for record in data.source("train", "")] == [0, 1]
    assert len(data.source("validation", "")) == 1
