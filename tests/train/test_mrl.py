"""Matryoshka heads, their loss, cascades and funnels."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.draw import draw
from zoo.configs.mrl_digits import config as experiment
from zoo.models.core.errors import UsageError
from zoo.train.objectives.classify import Classify
from zoo.train.objectives.nested import NestedCrossEntropy, nested_cross_entropy
from zoo.train.recipes.mrl import (
    FUNNEL,
    VARIANTS,
    Matryoshka,
    cascade,
    cascade_thresholds,
    head_table,
)

TINY = VARIANTS["mrl_tiny"]


def params_of(module, *args):
    return nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *args)["params"])


@pytest.mark.parametrize(("efficient", "count"), [(False, 4_097_000), (True, 2_049_000)])
def test_parameters_of_the_published_heads(efficient, count):
    """On 2,048 features for 1,000 classes."""
    head = Matryoshka(efficient=efficient).build(2048, 1000)
    shapes = params_of(head, jnp.zeros((1, 2048)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
    assert len(head_table(head.config).shapes(shapes)) == (2 if efficient else 18)


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32)


@pytest.mark.parametrize("efficient", [False, True])
def test_a_single_size_is_a_plain_head(x, efficient):
    head = Matryoshka((8,), efficient).build(8, 5)
    params = draw(params_of(head, x))
    plain = params if efficient else params["heads_0"]
    want = x @ plain["kernel"] + plain["bias"]
    got = head.apply({"params": params}, x)
    np.testing.assert_allclose(got[:, 0], want, rtol=1e-5, atol=1e-6)


def test_the_shared_head_reads_the_first_rows(x):
    head = Matryoshka((2, 5, 8), efficient=True).build(8, 5)
    params = draw(params_of(head, x))
    got = head.apply({"params": params}, x)
    for number, size in enumerate((2, 5, 8)):
        want = x[:, :size] @ params["kernel"][:size] + params["bias"]
        np.testing.assert_allclose(got[:, number], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("efficient", [False, True])
def test_features_learn_from_longer_prefixes_only(x, efficient):
    head = Matryoshka((2, 5, 8), efficient).build(8, 5)
    params = draw(params_of(head, x))
    for number, size in enumerate((2, 5, 8)):
        own = lambda x, n=number: (head.apply({"params": params}, x)[:, n] ** 2).sum()
        gradient = np.abs(jax.grad(own)(x)).max(0)
        assert (gradient[:size] > 0).all()
        assert (gradient[size:] == 0).all()


@pytest.fixture(scope="module")
def judged():
    """A tiny model, its variables and a batch."""
    model = TINY.build()
    batch = {
        "pixels": jnp.asarray(np.random.default_rng(0).normal(size=(6, 8, 8, 3)), jnp.float32),
        "classes": jnp.arange(6) % 5,
    }
    return model, {"params": draw(params_of(model, TINY.inputs(1)))}, batch


def test_the_loss_adds_up_the_prefixes(judged):
    model, variables, batch = judged
    found = NestedCrossEntropy((1.0, 0.0, 2.0, 0.5), 0.0).loss(
        model, variables, {}, batch, jax.random.key(0), None
    )
    out = model.apply(variables, batch)
    each = -jax.nn.log_softmax(out.nested)[jnp.arange(6), :, batch["classes"]]  # [B, G]
    want = (each.mean(0) * jnp.array([1.0, 0.0, 2.0, 0.5])).sum()
    np.testing.assert_allclose(found[0]["loss"].value, want, rtol=1e-5)
    right = out.nested.argmax(-1) == batch["classes"][:, None]
    for number, size in enumerate((2, 4, 8, 16)):
        assert found[1][f"accuracy_{size}"].value == right[:, number].mean()
    assert found[1]["accuracy"].value == right[:, -1].mean()


def test_the_longest_prefix_is_what_a_classifier_learns(judged):
    model, variables, batch = judged
    arguments = (model, variables, {}, batch, jax.random.key(0), None)
    nested = NestedCrossEntropy((0, 0, 0, 1), 0.1).loss(*arguments)[0]["loss"]
    plain = Classify(smoothing=0.1).loss(*arguments)[0]["loss"]
    np.testing.assert_allclose(nested.value, plain.value, rtol=1e-5)


def test_one_weight_for_every_prefix():
    with pytest.raises(ValueError, match="want one for each of 3 prefixes"):
        nested_cross_entropy(jnp.zeros((2, 3, 5)), jnp.zeros(2, int), weights=(1.0, 1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": Matryoshka((2, 32))}, "the embedding has 16 features"),
        ({"num_classes": 0}, "want 1 or more for nested heads"),
    ],
)
def test_heads_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_sizes_grow():
    with pytest.raises(ValueError, match="want growing lengths"):
        Matryoshka((4, 2))


def test_a_cascade_asks_longer_prefixes_when_it_is_not_sure():
    sure, unsure = [9.0, 0.0, 0.0], [0.2, 0.1, 0.0]
    logits = np.array([[sure, unsure], [unsure, sure[::-1]]])
    found = cascade(logits, (2, 8), (0.9,))
    assert found.classes.tolist() == [0, 2]
    assert found.stage.tolist() == [0, 1]
    assert found.mean_size == 5
    with pytest.raises(UsageError, match="want one less than 2"):
        cascade(logits, (2, 8), (0.9, 0.9))


def test_thresholds_lose_nothing_on_the_hold_out():
    rng = np.random.default_rng(0)
    classes = rng.integers(5, size=500)
    signal = np.eye(5)[classes][:, None] * np.array([1.0, 2.0, 4.0])[:, None]
    logits = signal + rng.normal(size=(500, 3, 5))
    thresholds = cascade_thresholds(logits, classes)
    found = cascade(logits, (2, 4, 8), thresholds)
    whole = (logits[:, -1].argmax(-1) == classes).mean()
    assert (found.classes == classes).mean() >= whole - 0.01
    assert found.mean_size < 8


def test_the_published_funnel_narrows():
    assert [stage.size for stage in FUNNEL] == [8, 16, 32, 64, 128, 2048]
    assert [stage.keep for stage in FUNNEL][:5] == [200, 100, 50, 25, 10]


def test_the_experiment_is_one_of_scans():
    found = experiment()
    assert found.model.head.sizes[-1] == found.model.pooled_width
    record = found.data.source("train", "unused")[0]
    assert record["image"].shape == (8, 8)
