"""The contrastive objective: transformers' losses, groups, meshes, and that it learns."""

import functools
import json
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoo
from tests.live import test_dual as dual
from tests.live import tiny_processors
from tests.live.reference import close, transformers
from tests.live.test_processors import photograph
from tests.models.draw import draw
from tests.train.tiny import TinyConfig, find_here, tiny
from zoo.convert.place import abstract_params
from zoo.models.core import codec
from zoo.models.core.errors import UsageError, ZooError
from zoo.train.config import ProcessorConfig
from zoo.train.data.captions import Captions
from zoo.train.loop import train
from zoo.train.mesh import MeshConfig, batch_sharding, make_mesh, put_batch
from zoo.train.objectives.contrastive import Contrastive, pairwise_sigmoid, symmetric_softmax
from zoo.train.optim import OptimConfig
from zoo.train.state import abstract_state, boxed_params, initial_state
from zoo.train.step import make_train_step

KEY = jax.random.key(0)


def batch_of(size=8, seed=0):
    ids, mask = dual.texts(size, 10, seed=seed)
    return {"pixels": dual.images(size, seed), "ids": ids, "text_mask": mask}


def loss_of(model, params, batch, **options):
    return _loss(Contrastive(**options), model, params, batch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _loss(objective, model, params, batch):
    terms, others, _ = objective.loss(model, {"params": params}, {}, batch, KEY, None)
    return terms["loss"].value, others


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_loss_and_gradients_are_those_of_transformers(name):
    hf = dual.redraw(dual.CASES[name][0]())
    _, model, params, table = dual.converted(hf)
    ids, mask = dual.texts(count=4)
    mask = mask if dual.CASES[name][1] else None
    pixels = dual.images(4)
    theirs = dual.asked(hf, pixels, ids, mask, return_loss=True).loss
    theirs.backward()
    batch = {"pixels": pixels, "ids": ids} | ({} if mask is None else {"text_mask": mask})
    run = jax.jit(jax.value_and_grad(lambda p: loss_of(model, p, batch)[0]))
    ours, grads = run(params)
    close(ours, theirs, what="loss")
    found = table.save(jax.tree.map(np.asarray, grads))
    given = dict(hf.named_parameters())
    largest = max(float(leaf.grad.abs().max()) for leaf in given.values())
    for key, leaf in given.items():
        error = np.abs(found[key] - leaf.grad.numpy()).max()
        assert error <= 1e-4 * max(largest, 1), f"{key}: {error}"


def test_values_by_hand():
    logits = np.array([[2.0, -1.0, 0.5], [0.0, 1.0, 3.0], [-2.0, 0.0, 1.5]])
    e = np.exp(logits)
    rows = -np.log(np.diag(e) / e.sum(1))
    columns = -np.log(np.diag(e) / e.sum(0))
    np.testing.assert_allclose(symmetric_softmax(logits), (rows + columns) / 2, rtol=1e-5)
    signs = 2 * np.eye(3) - 1
    each = np.log1p(np.exp(-signs * logits)).sum(1)
    np.testing.assert_allclose(pairwise_sigmoid(jnp.asarray(logits)), each, rtol=1e-5)


@pytest.mark.parametrize("name", ["clip_tiny", "siglip_tiny"])
def test_groups_are_batches_of_their_own(name):
    config = zoo.config(name)
    model, params, batch = config.build(), draw(abstract_params(config)), batch_of()
    whole, facts = loss_of(model, params, batch)
    halves = [
        loss_of(model, params, jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], batch))[0]
        for i in range(2)
    ]
    found, _ = loss_of(model, params, batch, groups=2)
    np.testing.assert_allclose(found, np.mean(halves), rtol=1e-5)
    assert abs(float(found - whole)) > 1e-2
    logits = jax.jit(model.apply)({"params": params}, batch).logits
    right = (np.asarray(logits).argmax(0) == np.arange(8)).mean()
    assert float(facts["text_to_image"].value) == pytest.approx(right)
    with pytest.raises(UsageError, match=r"objective\.groups = 3"):
        loss_of(model, params, batch, groups=3)


def test_the_scale_has_a_bound_and_finds_its_way_back():
    config = zoo.config("clip_tiny")
    model, batch = config.build(), batch_of()
    params = {**draw(abstract_params(config)), "logit_scale": np.float32(np.log(150))}
    bound = {**params, "logit_scale": np.float32(np.log(100))}
    options = {"max_scale": 100.0}
    run = jax.jit(jax.value_and_grad(lambda p: loss_of(model, p, batch, **options)[0]))
    found, grads = run(params)
    wanted, theirs = run(bound)
    assert loss_of(model, params, batch, **options)[1]["scale"].value == pytest.approx(100)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    np.testing.assert_allclose(grads["logit_scale"], theirs["logit_scale"], rtol=1e-5)
    assert grads["logit_scale"] != 0
    free = loss_of(model, params, batch)[0]
    assert abs(float(free - found)) > 1e-3


def trained(mesh, steps=12, lr=3e-3, **options):
    """Losses, and the parameters after so many steps on one batch."""
    config = zoo.config("siglip_tiny" if options.pop("sigmoid", False) else "clip_tiny")
    model, inputs, optimizer = config.build(), config.inputs(1), optax.adam(lr)
    objective = Contrastive(**options)
    with jax.set_mesh(mesh):
        abstract = abstract_state(boxed_params(model, inputs), optimizer, mesh)
        state = initial_state(model, inputs, optimizer, abstract, 0, objective=objective)
        step = make_train_step(model, objective, optimizer, lambda _: lr, abstract)
        batch = put_batch(batch_of(), batch_sharding(mesh))
        out = []
        for _ in range(steps):
            state, metrics = step(state, batch, None)
            out.append(float(metrics["loss"]))
    return out, state


@pytest.mark.parametrize(
    "options", [{"groups": 4}, pytest.param({"sigmoid": True}, marks=pytest.mark.thorough)]
)
def test_eight_devices_do_what_one_does_and_learn(options):
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    ours, state = trained(mesh, **options)
    alone, other = trained(one, **options)
    np.testing.assert_allclose(ours, alone, rtol=1e-5, atol=1e-5)
    assert ours[-1] < 0.7 * ours[0]
    start = 2.302585 if options.get("sigmoid") else 2.659260
    assert abs(float(state.params["logit_scale"]) - start) > 1e-3  # it is learned
    np.testing.assert_allclose(state.params["logit_scale"], other.params["logit_scale"], rtol=1e-5)


def test_pictures_and_captions_train_in_the_words_of_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(codec, "_find", find_here)
    words = tmp_path / "clip"
    tiny_processors.write_clip(words)
    transformers.CLIPImageProcessorPil(crop_size=16, size=16).save_pretrained(words)
    model = zoo.config("clip_tiny")
    text = replace(model.text, vocab_size=516, end_id=515, max_length=16)
    model = replace(model, text=text)
    captions = Captions.load(words, model)
    example = captions.encode({"image": photograph(20, 30), "conversations": (("", "a cat"),)})
    assert {name: array.shape for name, array in example.items()} == {
        "pixels": (16, 16, 3), "ids": (16,), "text_mask": (16,),
    }  # fmt: skip
    seen = example["ids"][example["text_mask"]]
    assert (seen[0], seen[-1], captions.vocab_size) == (514, 515, 516)
    with pytest.raises(ZooError, match="want one with its caption"):
        captions.encode({"image": None, "conversations": (("", "a cat"),)})
    experiment = tiny(
        model=model,
        objective=Contrastive(max_scale=100.0),
        processor=ProcessorConfig(source=str(words)),
        optim=OptimConfig(lr=1e-2, warmup=2),
        mesh=MeshConfig(fsdp=2),
    )
    train(experiment, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < losses[0] - 0.1
    loaded = zoo.load(tmp_path / "run")
    assert loaded.processor.encode([photograph(20, 30)], ["a cat"])["ids"][0, 0] == 514


def test_wrong_use_is_refused():
    with pytest.raises(UsageError, match="groups"):
        Contrastive(groups=0)
    with pytest.raises(UsageError, match="max_scale"):
        Contrastive(max_scale=0.0)
    with pytest.raises(UsageError, match="reads batches as a whole"):
        tiny(objective=Contrastive(), accumulate=2)
    model = TinyConfig().build()
    params = nn.unbox(abstract_params(TinyConfig()))
    with pytest.raises(UsageError, match="dual encoder"):
        Contrastive().init(model, {"params": params}, TinyConfig().inputs(1))
    assert replace(Contrastive(), groups=2).whole_batch
