"""Mixed images whose patches know what they show, and sub-networks that train at once."""

from dataclasses import replace
from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest

from tests.models.draw import draw
from zoo.models.core.errors import UsageError
from zoo.models.vision.vit_resnas import supernet
from zoo.models.vision.vit_resnas.nets import StageSpace
from zoo.train.objectives.classify import Classify
from zoo.train.objectives.patches import PatchMix, draw_box, mixed_patches
from zoo.train.objectives.subnets import SubNetworks

SPACE = (StageSpace((8, 4), (2, 1), 4, (12, 8), (False, True)),)
MODEL = supernet(SPACE, 3, image_size=28, stem=0)


def test_boxes():
    """All sizes there are, at all places."""
    boxes = jax.jit(jax.vmap(lambda key: draw_box(key, 3, 4)))(
        jax.random.split(jax.random.key(0), 400)
    )
    boxes = np.asarray(boxes)
    rows, columns = boxes.any(2).sum(1), boxes.any(1).sum(1)
    np.testing.assert_array_equal(boxes.sum((1, 2)), rows * columns)
    assert set(rows) == {0, 1, 2, 3} and set(columns) == {0, 1, 2, 3, 4}
    assert boxes.any(0).all() and not boxes.all((1, 2)).any()
    assert abs(boxes.mean() - 0.42) < 0.08  # half, less what is lost to whole cells


def test_patches_know_what_they_show():
    """Every image is of one brightness: its share in a cell is that of its brightness."""
    light = np.float32([1, 10, 100, 1000, 10000])
    pixels = np.broadcast_to(light[:, None, None, None], (5, 8, 12, 1))
    mix = jax.jit(mixed_patches, static_argnums=(2, 3))
    blended = cut = False
    for seed in range(6):
        mixed, shares = mix(jax.random.key(seed), pixels, 4, 0.8)
        assert shares.shape == (5, 6, 5)
        np.testing.assert_allclose(shares.sum(-1), 1, rtol=1e-5)
        cells = np.asarray(mixed).reshape(5, 2, 4, 3, 4)
        assert (np.ptp(cells, (2, 4)) == 0).all()
        np.testing.assert_allclose(cells[:, :, 0, :, 0].reshape(5, 6), shares @ light, rtol=1e-4)
        assert not shares[:2, :, 2:].any() and not shares[2:, :, :2].any()
        cut |= len({tuple(row) for row in np.asarray(shares)[0].tolist()}) > 1
        assert set(np.unique(shares[:2])) <= {0, 1}
        blended |= bool(((shares[2:] > 0) & (shares[2:] < 1)).any())
    assert blended and cut


def test_the_terms():
    """Of logits that the model hands on: patches and images have the same weight by default."""

    ramp = np.arange(1.0, 9.0, dtype=np.float32)[:, None]  # of eight patches

    class Echo(nn.Module):
        config = MODEL

        def __call__(self, batch):
            mean = batch["pixels"].mean((1, 2))  # [B, C]
            return SimpleNamespace(logits=mean, patch_logits=mean[:, None] * ramp)

    shown = batch(6) | {"pixels": np.tile(batch(6)["pixels"], (1, 1, 2, 1))}

    @jax.jit
    def losses():
        objective, key = PatchMix(smoothing=0.1, weight=0.5), jax.random.key(0)
        terms = objective.loss(Echo(), {}, {}, shown, key, None)[0]
        drawn = jax.random.split(key)[0]
        pixels, shares = mixed_patches(drawn, shown["pixels"], 14, 0.8)
        return terms, pixels.mean((1, 2)), shares

    terms, mean, shares = losses()
    wanted = np.asarray(shares) @ (0.9 * np.eye(3)[shown["classes"]] + 0.1 / 3)  # [B, 8, K]
    patches = jax.nn.log_softmax(np.asarray(mean)[:, None] * ramp)
    want = -(patches * wanted).sum(-1).mean() / 2
    np.testing.assert_allclose(terms["patch_loss"].value, want, rtol=1e-5)
    want = -(jax.nn.log_softmax(mean) * wanted.mean(1)).sum(-1).mean()
    np.testing.assert_allclose(terms["loss"].value, want, rtol=1e-5)


@pytest.fixture(scope="module")
def variables():
    model = MODEL.build()
    shapes = jax.eval_shape(model.init, jax.random.key(0), MODEL.inputs(1))
    return draw(nn.unbox(dict(shapes)))


def batch(size):
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(size, 28, 28, 3)).astype(np.float32)
    return {"pixels": pixels, "classes": rng.integers(0, 3, size)}


def test_sub_networks_train_at_once(variables):
    """In the first step all are the whole network, then they are smaller; evaluation is plain."""
    model, examples, key = MODEL.build(), batch(8), jax.random.key(0)
    inner = Classify()
    objective = SubNetworks(inner, examples=2, warmup=4)
    start = objective.init(model, variables, MODEL.inputs(1))

    @jax.jit
    def losses(step):
        def total(which, key, train=True):
            aux = {"subnets_step": step}
            found = which.loss(model, variables, aux, examples, key, None, train=train)
            return sum(mean.value for mean in found[0].values()), *found

        of_inner = total(inner, jax.random.split(key)[1])[0]
        return total(objective, key), of_inner, total(objective, key, False)

    (loss, terms, metrics, carried), of_inner, (plain, *_) = losses(start["subnets_step"])
    assert set(terms) == {"loss"} and set(metrics) == {"accuracy"}
    assert carried["aux"]["subnets_step"] == 1
    np.testing.assert_allclose(loss, of_inner, rtol=1e-5)
    (later, *_, carried), of_inner, again = losses(4)
    assert carried["aux"]["subnets_step"] == 5 and abs(later - of_inner) > 1e-3 * of_inner
    assert again[0] == plain and again[3] == {}


def test_wrong_settings(variables):
    with pytest.raises(UsageError, match=r"objective.examples is 0, objective.warmup 0"):
        SubNetworks(examples=0)
    with pytest.raises(UsageError, match=r"objective.mixup is 0, objective.weight 1.0"):
        PatchMix(mixup=0)
    bare = replace(MODEL, patch_head=False).build()
    params = {k: v for k, v in variables["params"].items() if k != "patch_head"}
    with pytest.raises(UsageError, match="the model has no classes of patches"):
        jax.eval_shape(
            lambda: PatchMix().loss(
                bare, {"params": params}, {}, batch(4), jax.random.key(0), None
            )[0]
        )
