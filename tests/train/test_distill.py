"""Distillation: the divergences by hand, the labelled tokens alone, and a student that learns."""

import json
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.models.draw import draw
from tests.train.tiny import find_here, tiny
from zoo.convert.place import abstract_params
from zoo.models.core import codec
from zoo.models.core.errors import UsageError
from zoo.models.core.types import IGNORE
from zoo.processors import ImageProcessor, Processor, Tokenizer
from zoo.saving import save_model
from zoo.train.loop import train
from zoo.train.mesh import MeshConfig, make_mesh
from zoo.train.objectives.distill import Distill, divergence
from zoo.train.optim import OptimConfig

KEY = jax.random.key(0)
STUDENT = replace(zoo.config("llava_tiny"), text_tokens=24)
TEACHER = replace(STUDENT, decoder=replace(STUDENT.decoder, depth=3, width=32))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a larger model, and its parameters."""
    params = draw(abstract_params(TEACHER), seed=1)
    processor = Processor(ImageProcessor(16), Tokenizer.train(["which digit?"], 300), 24)
    folder = tmp_path_factory.mktemp("teacher") / "model"
    return str(save_model(folder, TEACHER, params, processor, {})), params


def batch_of(size=4, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, 300, (size, 24)).astype(np.int32)
    ids[:, 1] = STUDENT.image_id
    labels = np.where(rng.random((size, 24)) < 0.4, ids, IGNORE).astype(np.int32)
    labels[:, :2] = IGNORE
    return {
        "pixels": rng.standard_normal((size, 1, 16, 16, 3)).astype(np.float32),
        "ids": ids,
        "labels": labels,
        "text_mask": np.ones(ids.shape, bool),
        "segments": np.zeros_like(ids),
    }


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_hand(t, s, kind, temperature, mix):
    t, s = (softmax(np.asarray(x, np.float64) / temperature) for x in (t, s))

    def kl(p, q):
        return (p * np.log(p / q)).sum(-1)

    m = mix * t + (1 - mix) * s
    found = {
        "forward": kl(t, s),
        "reverse": kl(s, t),
        "jsd": mix * kl(t, m) + (1 - mix) * kl(s, m),
    }
    return temperature**2 * found[kind]


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize(("temperature", "mix"), [(1.0, 0.5), (2.5, 0.1)])
def test_divergences_by_hand(kind, temperature, mix):
    rng = np.random.default_rng(0)
    t, s = rng.normal(size=(2, 5, 7)), rng.normal(size=(2, 5, 7))
    options = {"temperature": temperature, "mix": mix}
    found = divergence(jnp.asarray(t), jnp.asarray(s), kind, **options)
    np.testing.assert_allclose(found, by_hand(t, s, kind, temperature, mix), rtol=2e-5, atol=1e-6)
    same = divergence(jnp.asarray(t), jnp.asarray(t), kind, **options)
    np.testing.assert_allclose(same, 0, atol=1e-5)
    if kind == "forward":  # its gradient: temperature (softmax(s / T) - softmax(t / T))
        grad = jax.grad(lambda s: divergence(jnp.asarray(t), s, kind, **options).sum())(
            jnp.asarray(s, jnp.float32)
        )
        wanted = temperature * (softmax(s / temperature) - softmax(t / temperature))
        np.testing.assert_allclose(grad, wanted, rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_mean_over_labelled_tokens_in_their_order(teacher):
    folder, known = teacher
    model, params, batch = STUDENT.build(), draw(abstract_params(STUDENT)), batch_of()
    objective = Distill(folder, labels=0.5)
    boxed = objective.init(model, {"params": params}, STUDENT.inputs(1))
    assert jax.tree.map(jnp.shape, nn.unbox(boxed)["teacher"]) == jax.tree.map(np.shape, known)
    aux = objective.load(make_mesh(MeshConfig(), jax.devices()[:1]))
    jax.tree.map(np.testing.assert_array_equal, aux["teacher"], known)

    def loss(objective, params, batch):
        terms, others, _ = objective.loss(model, {"params": params}, aux, batch, KEY, None)
        return terms["loss"].value, others

    run = jax.jit(jax.value_and_grad(loss, 1, has_aux=True), static_argnums=0)
    (found, others), grads = run(objective, params, batch)

    def logits(config, params):
        out = config.build().apply({"params": params}, batch)
        head = config.build().apply({"params": params}, out.hidden, method="head")
        return np.asarray(head), np.asarray(out.tokens.tags["label"])

    ours, label = logits(STUDENT, params)
    theirs, _ = logits(TEACHER, known)
    learned = label != IGNORE
    each = by_hand(theirs, ours, "forward", 1.0, 0.5)
    assert float(others["divergence"].value) == pytest.approx(each[learned].mean(), rel=1e-4)
    entropy = -np.log(softmax(ours.astype(np.float64)))[learned, label[learned]]
    assert float(others["cross_entropy"].value) == pytest.approx(entropy.mean(), rel=1e-4)
    wanted = each[learned].mean() + 0.5 * entropy.mean()
    assert float(found) == pytest.approx(wanted, rel=1e-4)

    # In chunks, and with a teacher that sees the picture otherwise, it is the same.
    (chunked, _), others = run(replace(objective, chunk=5), params, batch)
    assert float(chunked) == pytest.approx(float(found), rel=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_a_teacher_gets_no_gradient_and_must_fit(teacher, tmp_path):
    folder, known = teacher
    model, params, batch = STUDENT.build(), draw(abstract_params(STUDENT)), batch_of()
    objective = Distill(folder)

    def loss(aux):
        return objective.loss(model, {"params": params}, aux, batch, KEY, None)[0]["loss"].value

    grads = jax.jit(jax.grad(loss))({"teacher": known})
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))

    other = replace(STUDENT, decoder=replace(STUDENT.decoder, vocab_size=300))
    with pytest.raises(UsageError, match="320 tokens and the model 300"):
        objective.init(other.build(), {"params": draw(abstract_params(other))}, other.inputs(1))
    wide = replace(STUDENT, tower=replace(STUDENT.tower, image_size=24))
    with pytest.raises(UsageError, match="cannot read the batches"):
        objective.init(wide.build(), {"params": draw(abstract_params(wide))}, wide.inputs(1))
    wrongs = {"divergence": "other", "temperature": 0.0, "mix": 1.0, "labels": -1.0, "chunk": 0}
    for name, value in wrongs.items():
        with pytest.raises(UsageError, match=f"objective.{name} is"):
            Distill(folder, **{name: value})


def test_a_student_is_trained_and_its_teacher_lies_on_the_disk_once(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(codec, "_find", find_here)
    experiment = tiny(
        model=STUDENT,
        objective=Distill(teacher[0], divergence="jsd"),
        optim=OptimConfig(lr=1e-2, warmup=2),
        mesh=MeshConfig(fsdp=2),
        eval_every=6,
    )
    out = tmp_path / "run"

    def crash(model, params, step):
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        train(experiment, out, on_eval=crash)
    assert (out / "checkpoints" / "fixed").is_dir()
    assert not (out / "checkpoints" / "4" / "aux").exists()
    train(experiment, out)
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 12
    assert losses[-1] < 0.9 * losses[0]
