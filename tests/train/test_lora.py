"""Low-rank adapters: as operands of any model, and in training."""

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
from zoo.convert.place import abstract_params, flat_paths, nested
from zoo.generate.autoregressive import generate
from zoo.models.core import codec
from zoo.models.core.errors import UsageError
from zoo.models.core.names import tree_names, tree_shardings
from zoo.models.parts.layers import low_rank
from zoo.models.parts.layers.operands import LowRank, contract, has_operands, merge, unmerge
from zoo.models.parts.layers.stack import restack, unstack
from zoo.train.loop import train
from zoo.train.lora import LoRA
from zoo.train.mesh import MeshConfig, make_mesh
from zoo.train.objectives import NextToken
from zoo.train.optim import OptimConfig
from zoo.train.parts import Part
from zoo.train.setup import Setup

EVERY = (".*/kernel",)


def drawn(shapes, seed=0):
    """Adapters of which no part is zero."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        wide = 0.5 if path[-1].key == low_rank.SCALE else 0.3
        return (wide * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, nn.unbox(shapes))


def adapted(config, patterns=EVERY, rank=3):
    """Parameters of a model with operands, and those without."""
    boxed = abstract_params(config)
    base = draw(boxed)
    shapes = low_rank.adapters(low_rank.targets(boxed, patterns), rank)
    flat = flat_paths(base) | flat_paths(drawn(shapes))
    tree = nested(flat)
    return low_rank.attach(tree), base, tree


def llama(depth=6, **changes):
    """Deep enough for a scan."""
    config = zoo.config("llama_tiny")
    return replace(config, decoder=replace(config.decoder, depth=depth, **changes))


def words(config, rows=2, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, config.decoder.vocab_size, (rows, config.text_tokens)).astype(np.int32)
    mask = np.ones(ids.shape, bool)
    return {"ids": ids, "labels": ids, "segments": np.zeros_like(ids), "text_mask": mask}


def near(found, wanted, what):
    error = np.abs(np.asarray(found) - np.asarray(wanted)).max()
    assert error <= 3e-3 * np.abs(wanted).max(), f"{what}: {error}"


def logits(model, params, batch):
    hidden = model.apply({"params": params}, batch).hidden
    return model.apply({"params": params}, hidden, method="head")


@pytest.mark.parametrize(
    ("eq", "x", "w", "num_in"),
    [
        ("...d,df->...f", (2, 3, 5), (5, 4), 1),
        ("bld,dhe->blhe", (2, 3, 5), (5, 2, 4), 1),
        ("blhe,hed->bld", (2, 3, 2, 4), (2, 4, 5), 2),
        ("...d,dr->...r", (3, 5), (5, 4), 1),
    ],
)
def test_a_low_rank_kernel_does_what_its_sum_does(eq, x, w, num_in):
    rng = np.random.default_rng(0)
    x, base = rng.normal(size=x), rng.normal(size=w)
    a, b = rng.normal(size=(*w[:num_in], 3)), rng.normal(size=(3, *w[num_in:]))
    whole = base + 0.7 * np.tensordot(a, b, 1)
    wanted = np.einsum(eq, x, whole)
    operand = LowRank(*(jnp.asarray(leaf, jnp.float32) for leaf in (base, a, b, 0.7)))
    assert (operand.shape, operand.rank, operand.lead) == (w, 3, 0)
    found = contract(eq, jnp.asarray(x, jnp.float32), operand)
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(operand.merged(), whole, rtol=1e-6, atol=1e-6)
    assert contract(eq, jnp.asarray(x, jnp.bfloat16), operand).dtype == jnp.bfloat16
    nested = contract(eq, jnp.asarray(x, jnp.float32), operand.replace(base=operand))
    twice = np.einsum(eq, x, whole + 0.7 * np.tensordot(a, b, 1))
    np.testing.assert_allclose(nested, twice, rtol=2e-5, atol=5e-5)


def test_a_table_of_words_is_no_low_rank_kernel():
    operand = LowRank(jnp.ones((7, 5)), jnp.ones((7, 2)), jnp.ones((2, 5)), jnp.float32(1))
    with pytest.raises(ValueError, match="contracted axes first"):
        contract("...d,vd->...v", jnp.ones((3, 5)), operand)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_operands_go_through_scans_and_the_gradient_is_theirs(remat):
    config = llama(remat=remat)
    params, base, _ = adapted(config)
    model, batch = config.build(), words(config)
    assert has_operands(params) and not has_operands(base)
    kernel = params["decoder"]["stack"]["layers"]["out"]["kernel"]
    assert (kernel.lead, kernel.a.shape, kernel.b.shape) == (1, (6, 4, 8, 3), (6, 3, 32))
    found = jax.jit(logits, static_argnums=0)(model, params, batch)
    wanted = jax.jit(logits, static_argnums=0)(model, merge(params), batch)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(found - logits(model, base, batch)).max() > 0.1
    if remat == "none":
        return

    def loss(params):
        return (logits(model, params, batch) ** 2).mean()

    ours = jax.jit(jax.grad(loss))(params)
    whole = jax.jit(jax.grad(loss))(merge(params))
    for path, leaf in flat_paths(ours).items():
        theirs = flat_paths(whole)[path]
        if not isinstance(leaf, LowRank):
            near(leaf, theirs, path)
            continue
        kernel = flat_paths(params)[path]
        lead = kernel.shape[: kernel.lead]
        a = np.asarray(kernel.a).reshape(*lead, -1, 3)
        b = np.asarray(kernel.b).reshape(*lead, 3, -1)
        g = np.asarray(theirs).reshape(*lead, a.shape[-2], b.shape[-1])
        scale = np.asarray(kernel.scale)[..., None, None]
        for found, wanted in (
            (leaf.a, scale * g @ b.swapaxes(-1, -2)),
            (leaf.b, scale * a.swapaxes(-1, -2) @ g),
        ):
            near(found, wanted.reshape(found.shape), path)


def test_generation_and_rows_apart():
    config = llama()
    params, _, _ = adapted(config)
    names = tree_names(abstract_params(config))
    apart = unstack(params, names)
    kernel = apart["decoder"]["stack"]["layers"]["q"]["kernel"]
    assert len(kernel) == 6 and isinstance(kernel[0], LowRank)
    jax.tree.map(np.testing.assert_array_equal, restack(apart), params)
    batch = {name: words(config)[name][:, :5] for name in ("ids", "text_mask")}
    said = [
        generate(config.build(), tree, batch, max_new_tokens=6, eos_id=())
        for tree in (params, merge(params), apart)
    ]
    np.testing.assert_array_equal(said[0], said[1])
    np.testing.assert_array_equal(said[0], said[2])


def test_unmerged_is_bit_for_bit_the_base_and_a_fresh_adapter_changes_nothing():
    config = llama(2)
    params, base, tree = adapted(config)
    jax.tree.map(np.testing.assert_array_equal, unmerge(params), base)
    jax.tree.map(np.testing.assert_array_equal, low_rank.detach(params), tree)
    boxed = abstract_params(config)
    shapes = low_rank.adapters(low_rank.targets(boxed, EVERY), 4)
    fresh = low_rank.draw(shapes, jax.random.key(0), 2.0)
    flat = flat_paths(fresh)
    a = flat["decoder/stack/layers/down/lora_a"]  # from 48
    assert a.shape == (2, 48, 4) and abs(float(jnp.abs(a).max()) - 48**-0.5) < 2e-3
    assert not np.array_equal(a[0], a[1])
    again = low_rank.attach(nested(flat_paths(base) | flat))
    jax.tree.map(np.testing.assert_array_equal, merge(again), base)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    merged = merge(low_rank.attach(nested(flat_paths(half) | flat)))
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}


def test_adapters_are_divided_as_their_kernels_are():
    boxed = abstract_params(llama())
    shapes = low_rank.adapters(low_rank.targets(boxed, EVERY), 4)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    found = {path: leaf.spec for path, leaf in flat_paths(tree_shardings(shapes, mesh)).items()}
    spec = jax.sharding.PartitionSpec
    at = "decoder/stack/layers"
    assert found[f"{at}/q/lora_a"] == spec(None, "fsdp")
    assert found[f"{at}/q/lora_b"] == spec(None, None, "tensor")
    assert found[f"{at}/out/lora_a"] == spec(None, "tensor")
    assert found[f"{at}/out/lora_b"] == spec(None, None, "fsdp")
    assert found[f"{at}/q/lora_scale"] == spec()


def test_patterns_that_match_no_linear_map_are_refused():
    boxed = abstract_params(zoo.config("llava_tiny"))
    chosen = low_rank.targets(boxed, LoRA().targets)
    assert {path.split("/")[3] for path in chosen} == {
        "q", "k", "v", "out", "gate", "up", "down",
    }  # fmt: skip
    for pattern in ("decoder/embedding/embedding", "decoder/stack/layers/qq/kernel"):
        with pytest.raises(UsageError, match=r"no linear map; nearest: decoder/"):
            low_rank.targets(boxed, (pattern,))
    with pytest.raises(UsageError, match="no regular expression"):
        low_rank.targets(boxed, ("(",))
    for wrong in ({"targets": ()}, {"rank": 0}, {"alpha": 0.0}, {"lr": 0.0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            LoRA(**wrong)
    assert LoRA(rank=16, alpha=32).scale == 2
    assert LoRA(rank=16, alpha=32, rslora=True).scale == 8


# ------------------------------------------------------------------ training


def run(**changes):
    """A LLaVA of a few kilobytes that learns how light pictures are."""
    given = {
        "model": replace(zoo.config("llava_tiny"), text_tokens=24),
        "objective": NextToken(),
        "lora": LoRA(rank=2, alpha=8),
        "optim": OptimConfig(lr=3e-2, warmup=2, weight_decay=0.01),
        "mesh": MeshConfig(),
    }
    return tiny(**given | changes)


def losses(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("lora") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "_find", find_here)
        return out, train(run(), out)


def test_only_adapters_train_and_are_kept(done):
    out, result = done
    setup = Setup.of(run())
    trained = flat_paths(setup.trained)
    assert {path.rpartition("/")[2] for path in trained} == {"lora_a", "lora_b"}
    assert len(trained) == 14
    assert losses(out)[-1] < losses(out)[0] - 0.3
    names = {path.name for path in (out / "checkpoints" / "12" / "params").glob("*")}
    assert names  # the adapters; the base is beside all checkpoints, once
    sizes = [
        sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        for folder in (out / "checkpoints" / "12", out / "checkpoints" / "frozen")
    ]
    adapters = sum(leaf.size * 4 for leaf in jax.tree.leaves(nn.unbox(setup.trained)))
    assert sizes[0] < 3 * adapters + 150_000

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "_find", find_here)
        loaded = zoo.load(out)
    found = flat_paths(restack(loaded.params))
    for path, leaf in flat_paths(result.params).items():
        np.testing.assert_array_equal(found[path], leaf)
    start = flat_paths(nn.unbox(setup.begin(setup.state(make_mesh(MeshConfig()))).frozen))
    moved = {path for path, leaf in found.items() if not np.array_equal(leaf, start[path])}
    assert moved == {path.replace("lora_a", "kernel") for path in trained if "lora_a" in path}


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=2, tensor=2)])
def test_the_same_on_another_mesh(done, tmp_path, mesh, monkeypatch):
    monkeypatch.setattr(codec, "_find", find_here)
    out, _ = done
    train(run(mesh=mesh), tmp_path / "run")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(out), atol=2e-5)


def test_interrupted_it_goes_on_with_the_same_losses(done, tmp_path, monkeypatch):
    monkeypatch.setattr(codec, "_find", find_here)

    def crash(model, params, step):
        assert has_operands(params)
        raise RuntimeError("gone")

    out, again = done[0], tmp_path / "run"
    with pytest.raises(RuntimeError, match="gone"):
        train(run(eval_every=6), again, on_eval=crash)
    train(run(), again)
    assert losses(again)[-8:] == losses(out)[-8:]


def test_what_cannot_have_adapters_is_said():
    parts = (Part("(tower|connector)/.*", frozen=True), Part("decoder/.*"))
    with pytest.raises(UsageError, match="want it in a frozen part"):
        Setup.of(run(parts=parts))
    parts = (Part("connector/.*", lr=1e-3), Part("(decoder|tower)/.*", frozen=True))
    setup = Setup.of(run(parts=parts, lora=LoRA(rank=2, lr=1e-2)))
    tops = {path.split("/")[0] for path in flat_paths(setup.trained)}
    assert tops == {"connector", "decoder"}
    assert len(flat_paths(setup.frozen)) == len(flat_paths(setup.boxed)) - 4 + 7
