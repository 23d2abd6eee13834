"""Classes of pixels: terms by hand, several resolutions, and the metrics."""

from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
import torch

from zoo.evaluate.dense import class_dice, class_iou, confusion
from zoo.models.core.errors import UsageError
from zoo.models.core.types import IGNORE
from zoo.models.dense.stunet import supervision_weights
from zoo.train.objectives.dense import Segment

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(2, 4, 6, 3)).astype(np.float32)
COARSE = RNG.normal(size=(2, 2, 3, 3)).astype(np.float32)
CLASSES = RNG.integers(0, 3, (2, 4, 6))
CLASSES[0, 0, :3] = IGNORE


class Given(nn.Module):
    """Hands on what it is given."""

    logits: Any
    coarse: Any = ()

    def __call__(self, batch):
        return SimpleNamespace(logits=self.logits, coarse=self.coarse)


def terms(objective, logits=LOGITS, coarse=(), classes=CLASSES):
    """Values of the terms and of the metrics."""

    @jax.jit
    def run(logits, coarse, classes):
        found = objective.loss(
            Given(logits, coarse),
            {},
            {},
            {"classes": classes},
            jax.random.key(0),
            None,
            train=False,
        )
        return [{name: mean.value for name, mean in part.items()} for part in found[:2]]

    return run(logits, tuple(coarse), classes)


def entropy(logits, classes):
    """Torch's, over the places that count."""
    logits = torch.from_numpy(np.moveaxis(logits, -1, 1))
    return torch.nn.functional.cross_entropy(logits, torch.from_numpy(classes)).item()


def dice(logits, classes, axes):
    """1 less the mean over all but class 0, overlaps summed over these axes."""
    counted = (classes != IGNORE)[..., None]
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) * counted
    there = np.eye(3)[np.maximum(classes, 0)] * counted
    both, total = (shares * there).sum(axes), (shares + there).sum(axes)
    return 1 - ((2 * both + 1e-5) / (total + 1e-5))[..., 1:].mean()


def test_cross_entropy_passes_over_what_is_ignored():
    found, _ = terms(Segment())
    assert set(found) == {"loss"}
    np.testing.assert_allclose(found["loss"], entropy(LOGITS, CLASSES), rtol=1e-5)
    other = np.where(CLASSES == IGNORE, 255, CLASSES)
    again, _ = terms(Segment(ignore=255), classes=other)
    np.testing.assert_allclose(again["loss"], found["loss"], rtol=1e-6)


@pytest.mark.parametrize(("batch_dice", "axes"), [(True, (0, 1, 2)), (False, (1, 2))])
def test_soft_dice(batch_dice, axes):
    objective = Segment(dice=0.5, batch_dice=batch_dice)
    assert objective.whole_batch == batch_dice
    found, _ = terms(objective)
    want = 0.5 * dice(LOGITS, CLASSES, axes)
    np.testing.assert_allclose(found["dice_loss"], want, rtol=1e-5)


def test_deep_supervision():
    """Weights of STU-Net: halved from level to level, the lowest does not count."""
    weights = supervision_weights(3)
    lowest = np.zeros((2, 1, 1, 3), np.float32)
    found, _ = terms(Segment(dice=1.0, levels=weights), coarse=(COARSE, lowest))
    assert set(found) == {"loss", "dice_loss", "loss_1", "dice_loss_1"}
    np.testing.assert_allclose(found["loss"], entropy(LOGITS, CLASSES) * 2 / 3, rtol=1e-5)
    near = CLASSES[:, ::2, ::2]
    np.testing.assert_allclose(found["loss_1"], entropy(COARSE, near) / 3, rtol=1e-5)
    want = dice(COARSE, near, (1, 2)) / 3
    np.testing.assert_allclose(found["dice_loss_1"], want, rtol=1e-5)
    with pytest.raises(UsageError, match="the model has 1 outputs"):
        terms(Segment(levels=weights))


def test_small_logits_are_enlarged():
    found, _ = terms(Segment(), logits=COARSE)
    large = torch.nn.functional.interpolate(
        torch.from_numpy(COARSE).permute(0, 3, 1, 2), (4, 6), mode="bilinear"
    )
    want = entropy(large.permute(0, 2, 3, 1).numpy(), CLASSES)
    np.testing.assert_allclose(found["loss"], want, rtol=1e-5)
    with pytest.raises(ValueError, match=r"classes: got \(2, 4, 6, 2\)"):
        terms(Segment(), classes=np.zeros((2, 4, 6, 2), np.int32))


def test_metrics():
    """Means over images of what the counts of each give."""
    _, found = terms(Segment())
    guess = LOGITS.argmax(-1)
    counts = [confusion(guess[i], CLASSES[i], 3) for i in range(2)]
    assert sum(map(np.sum, counts)) == (CLASSES != IGNORE).sum()
    right = ((guess == CLASSES) & (CLASSES != IGNORE)).sum()
    np.testing.assert_allclose(found["accuracy"], right / np.sum(counts), rtol=1e-6)
    for name, of in (("mean_iou", class_iou), ("mean_dice", class_dice)):
        want = np.mean([np.nanmean(of(each)) for each in counts])
        np.testing.assert_allclose(found[name], want, rtol=1e-5)


def test_confusion():
    counts = confusion(np.array([0, 1, 1, 1]), np.array([0, 0, 1, 9]), 3, ignore=9)
    np.testing.assert_array_equal(counts, [[1, 1, 0], [0, 1, 0], [0, 0, 0]])
    np.testing.assert_allclose(class_iou(counts), [0.5, 0.5, np.nan])
    np.testing.assert_allclose(class_dice(counts), [2 / 3, 2 / 3, np.nan])
    with pytest.raises(UsageError, match="classes: got 0 to 9, want 0 to 2"):
        confusion(np.zeros(2, int), np.array([0, 9]), 3)
    with pytest.raises(UsageError, match="want the same shape"):
        confusion(np.zeros(2, int), np.zeros(3, int), 3)


def test_wrong_settings():
    with pytest.raises(UsageError, match=r"objective.dice is -1"):
        Segment(dice=-1)
    with pytest.raises(UsageError, match=r"objective.levels is \(0.0, 1.0\)"):
        Segment(levels=(0.0, 1.0))
