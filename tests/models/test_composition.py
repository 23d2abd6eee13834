"""Several systems in one model: an elastic connector, layers that skip tokens, taps between layers.

What each of them promises alone, in its own tests, must hold for all of them together.
"""

import dataclasses
import functools
import itertools
import re
from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

import zoo
from tests.models import toy
from tests.models.draw import draw
from zoo.models.connectors.deepstack import DeepStack, Levels
from zoo.models.connectors.mqt import MQT
from zoo.models.core import registry
from zoo.models.core.config import with_dtype
from zoo.models.core.errors import UsageError
from zoo.models.core.names import tree_names, tree_shardings
from zoo.models.core.tree import flatten_dict
from zoo.models.decoders.gamma_mod import GammaMoD
from zoo.models.decoders.p_mod import PMoD
from zoo.models.parts.assemblies.qwen_vl import QwenVLConfig
from zoo.models.parts.decoders.policies import wrap
from zoo.models.parts.layers.plan import cover
from zoo.models.parts.layers.stack import unstack
from zoo.train.mesh import MeshConfig, make_mesh

QUERIES, TEXT, ROOM = 9, 10, 3
LENGTHS = (10, 7)

# Whether a token runs is decided by the same threshold with and without a cache, so that generating
# equals recomputing; with the official thresholds it does not, see `GammaMoD`.
SKIPS = GammaMoD(text_prefix=1, threshold=0.45, decode_threshold=0.45, without_cache="infer")
POLICIES = {
    # Layers 2 to 9 choose, 1 to 9 add a tap: eight equal layers, which are scanned.
    "p_mod": (PMoD(schedule="deep_all_include_last"), DeepStack(groups=9)),
    "gamma_mod": (SKIPS, DeepStack(groups=9)),
}


def composed(policies, depth=10):
    parts = {"connector": MQT(num_queries=QUERIES, num_heads=2), "policies": policies}
    return zoo.config("llava_tiny", **parts, **{"decoder.depth": depth})


def boxed_of(config):
    return jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))["params"]


def batch_of(config, length, lengths=LENGTHS):
    """Prompts of `lengths` tokens, a picture in each, padded to `length`."""
    rng = np.random.default_rng(0)
    rows, side = len(lengths), config.tower.image_size
    ids = rng.integers(4, 60, (rows, length), np.int32)
    ids[:, 1] = config.image_id
    batch = {
        "ids": ids,
        "text_mask": np.arange(length) < np.array(lengths)[:, None],
        "pixels": rng.normal(size=(rows, 1, side, side, 3)).astype(np.float32),
    }
    if config.crops is not None:
        shape = (rows, 1, config.crops.number, side, side, 3)
        batch["crops"] = rng.normal(size=shape).astype(np.float32)
    return batch


def forward(model):
    """Logits [B, L, V] and what the steps report."""

    @jax.jit
    def run(params, batch):
        out = model.apply({"params": params}, batch)
        return model.apply({"params": params}, out.hidden, method="head"), out.aux

    return run


def close(got, want, bound=1e-5):
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= bound * np.abs(want).max()


@pytest.fixture(scope="module", params=list(POLICIES))
def case(request):
    config = composed(POLICIES[request.param])
    boxed, batch = boxed_of(config), batch_of(config, TEXT + ROOM)
    params, run = draw(boxed, seed=1), forward(config.build())
    logits, aux = run(params, batch)
    return config, boxed, params, batch, run, logits, aux


def test_layers_skip_and_taps_count(case):
    """The composition does what its parts do: nothing here is neutral by accident."""
    config, _, params, batch, run, logits, aux = case
    kept = np.array([report["kept"] for report in aux if "kept" in report])
    mod = isinstance(config.policies[0], PMoD)  # chooses among vision tokens only
    most = QUERIES if mod else np.array(LENGTHS) + QUERIES - 1
    assert kept.min() >= 1 and (kept < most).any()
    other, _ = run(params, {**batch, "crops": batch["crops"][::-1]})
    assert np.abs(other - logits).max() > 1e-2
    assert any(repeats >= 5 for _, _, repeats in cover(tuple(s.kind for s in config.plan())))


def test_generating_equals_recomputing(case):
    """Prompts of different lengths, cached and decoded, against one pass over the whole."""
    config, _, params, whole, run, _, _ = case
    model = config.build()
    prompt = {name: x[:, :TEXT] if x.ndim == 2 else x for name, x in whole.items()}
    prompt["text_mask"] = np.arange(TEXT) < np.array(LENGTHS)[:, None]
    prefill = jax.jit(lambda p, b: model.apply({"params": p}, b, room=ROOM, method="prefill"))
    decode = jax.jit(lambda p, t, c: model.apply({"params": p}, t, c, method="decode"))
    logits, cache = prefill(params, prompt)
    said, seen = [], [logits]
    for _ in range(ROOM):
        said.append(np.asarray(logits.argmax(-1), np.int32))
        logits, cache = decode(params, said[-1][:, None], cache)
        seen.append(logits)
    ids, mask = whole["ids"].copy(), whole["text_mask"].copy()
    for row, length in enumerate(LENGTHS):
        ids[row, length : length + ROOM] = [step[row] for step in said]
        mask[row, length : length + ROOM] = True
    want, _ = run(params, {**whole, "ids": ids, "text_mask": mask})
    for row, length in enumerate(LENGTHS):
        last = length + QUERIES - 2  # of the prompt, with the picture in it
        close([step[row] for step in seen], want[row, last : last + ROOM + 1])


def test_a_batch_equals_one_by_one(case):
    config, _, params, batch, _, logits, _ = case
    alone = {name: x[1:] for name, x in batch.items()}
    alone |= {name: alone[name][:, : LENGTHS[1]] for name in ("ids", "text_mask")}
    got, _ = forward(config.build())(params, alone)
    close(got[0], logits[1, : LENGTHS[1] + QUERIES - 1])


def test_the_future_changes_nothing(case):
    _, _, params, batch, run, logits, _ = case
    ids = batch["ids"].copy()
    ids[0, LENGTHS[0] - 1] += 1
    got, _ = run(params, {**batch, "ids": ids})
    last = LENGTHS[0] + QUERIES - 2
    np.testing.assert_array_equal(got[0, :last], logits[0, :last])
    np.testing.assert_array_equal(got[1], logits[1])
    assert np.abs(got[0, last] - logits[0, last]).max() > 1e-2


def test_eight_devices_equal_one(case):
    config, boxed, params, batch, _, logits, _ = case
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    sharded = jax.device_put(params, tree_shardings(boxed, mesh))
    with jax.set_mesh(mesh):
        got, _ = forward(config.build())(sharded, jax.tree.map(jnp.asarray, batch))
    close(got, logits, 5e-5)


@pytest.mark.parametrize(
    "inner",
    [
        PMoD(schedule="deep_all_include_last", factor=1.0),
        dataclasses.replace(SKIPS, threshold=0.0),
    ],
)
def test_bfloat16(inner):
    """Within a quarter of the logits, in the mean over all real tokens, after ten random layers.
    All tokens run: of those of nearly equal weight, others may be chosen than in float32.
    """
    config = composed((inner, DeepStack(groups=9)))
    params, batch = draw(boxed_of(config), seed=1), batch_of(config, TEXT)
    want, _ = forward(config.build())(params, batch)
    small = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    got, _ = forward(with_dtype(config, "bfloat16").build())(small, batch)
    real = np.arange(want.shape[1]) < np.array(LENGTHS)[:, None] + QUERIES - 1
    error = np.sqrt(np.mean((np.asarray(got, np.float32) - want)[real] ** 2))
    assert error <= 0.25 * np.sqrt(np.mean(np.asarray(want)[real] ** 2))


def test_scanned_equals_unrolled():
    config = composed(POLICIES["p_mod"])
    boxed, batch = boxed_of(config), batch_of(config, TEXT)
    params, run = draw(boxed), forward(config.build())
    want, aux = run(params, batch)
    got, other = run(unstack(params, tree_names(boxed)), batch)
    close(got, want)
    jax.tree.map(np.testing.assert_array_equal, aux, other)


def test_neutral_settings_are_the_dense_model():
    """All queries, all tokens in every layer, routers as they start, no taps."""
    neutral = (PMoD(schedule="deep_all_include_last", factor=1.0), DeepStack(groups=9))
    dense, config = composed(()), composed(neutral)
    params, batch = draw(boxed_of(config)), batch_of(config, TEXT)
    layers = params["decoder"]["stack"]["layers"]
    router = jax.tree.map(np.zeros_like, layers.pop("router"))
    routed = {**params["decoder"], "stack": {"layers": {**layers, "router": router}}}

    @jax.jit
    def both(params, routed, batch):
        """Of the two models: what goes into the decoder, and the logits of the same stream."""
        ours = {"params": {**params, "decoder": routed}}
        whole = {name: x for name, x in batch.items() if name != "crops"}
        streams = [
            made.build().apply(own, given, QUERIES, method="stream")[0]
            for made, own, given in ((config, ours, batch), (dense, {"params": params}, whole))
        ]
        read = lambda model: model.head(model.decoder.run(streams[0], None, {})[0].hidden)
        logits = [
            made.build().apply(own, method=read)
            for made, own in ((config, ours), (dense, {"params": params}))
        ]
        return [stream.hidden for stream in streams], logits

    hidden, (got, want) = both(params, routed, batch)
    close(*hidden, 1e-6)
    # Padding bypasses layers that choose.
    real = np.arange(got.shape[1]) < np.array(LENGTHS)[:, None] + QUERIES - 1
    close(np.asarray(got)[real], np.asarray(want)[real], 1e-6)


@pytest.mark.parametrize("inner", [POLICIES["p_mod"][0], GammaMoD(text_prefix=1)])
def test_gradients_reach_routers_connector_and_tower(inner):
    config = composed((inner, DeepStack(groups=9)))
    model, params, batch = config.build(), draw(boxed_of(config)), batch_of(config, TEXT)
    layers = params["decoder"]["stack"]["layers"]
    name = "router" if isinstance(inner, PMoD) else "gamma_mod"
    layers[name] = jax.tree.map(lambda x: 0.02 * x, layers[name])  # far from saturation

    @jax.jit
    def gradient(params):
        def loss(params):
            out = model.apply({"params": params}, batch)
            extra = sum(report.get("router_loss", 0.0) for report in out.aux)
            return jnp.mean(out.hidden**3) + extra

        return jax.grad(loss)(params)

    grads = {"/".join(path): np.asarray(g) for path, g in flatten_dict(gradient(params)).items()}
    assert all(np.isfinite(g).all() for g in grads.values())
    routers = [path for path in grads if f"/{name}/" in path]
    for path in (*routers, "connector/queries"):
        assert (np.abs(grads[path]).reshape(len(grads[path]), -1).max(1) > 0).all(), path
    assert routers and np.abs(grads["tower/patch/kernel"]).max() > 0


# Every base with every policy

TINY = {
    slug: name
    for slug, row in registry.base_index().items()
    for name in row["variants"]
    if name.endswith("_tiny") and hasattr(registry.config(name), "policies")
}
TRIED = {
    "p_mod": PMoD(schedule="interleave"),
    "gamma_mod": GammaMoD(layers="sparse", text_prefix=1),
    "deepstack": DeepStack(start=1, groups=4),
}


def trace(config):
    return {path: x.shape for path, x in flatten_dict(nn.unbox(boxed_of(config))).items()}


@pytest.mark.parametrize("slug", TINY)
def test_every_base_takes_every_policy(slug):
    """Traced at tiny size; weights of the base keep their names and shapes. The bases that number
    pictures in three axes, and make their taps themselves, refuse what they cannot have.
    """
    config = zoo.config(TINY[slug], **{"decoder.depth": 6})
    have = trace(config)
    native = isinstance(config, QwenVLConfig)
    if native:
        with pytest.raises(ValueError, match="add_tap at layer 1 reads taps, which this model"):
            dataclasses.replace(config, policies=(TRIED["deepstack"],))
        with pytest.raises(ValueError, match=r"GammaMoD .* positions of one axis"):
            dataclasses.replace(config, policies=(TRIED["gamma_mod"],))
    tried = {
        "router": (TRIED["p_mod"],) if native else (TRIED["p_mod"], TRIED["deepstack"]),
        **({} if native else {"gamma_mod": (TRIED["gamma_mod"],)}),
    }
    for added, policies in tried.items():
        want = trace(dataclasses.replace(config, policies=policies))
        assert {path: want[path] for path in have} == have
        assert {path[3] for path in want.keys() - have.keys()} == {added}


ALONE = {"yopo", "zipvl"}  # run the halves of every layer themselves


@pytest.mark.thorough
@pytest.mark.parametrize("method", registry.reducers())
def test_every_reducer_takes_policies(method):
    """Traced at tiny size. One that merges tokens, or drops them before a tap, says so."""
    base, taps = TINY["llava"], DeepStack(0, 1, 1, Levels((1,)))
    made = functools.partial(registry.config, base, reducer=method, keep=0.5)
    depth = {"decoder.depth": 6}
    if method in ALONE:
        with pytest.raises(ValueError, match=r"splits? the layer"):
            made(policies=(TRIED["p_mod"], taps), **depth)
        return
    try:
        config = made(policies=(TRIED["p_mod"], taps), **depth)
    except ValueError as error:
        if not re.search("with a policy that makes taps|drops some for good", str(error)):
            raise
        config = made(policies=(TRIED["p_mod"],), **depth)
    found = {path[:4] for path in trace(config)}
    assert ("decoder", "stack", "layers", "router") in found


# What does not go together


@struct.dataclass
class Leaves(toy.Drop):
    """Drops tokens for good."""

    drops: ClassVar[bool] = True


@dataclass(frozen=True)
class Leave:
    """Drops tokens for good at one layer."""

    layer: int

    def apply(self, plan, *, slots):
        return wrap(plan, {self.layer: Leaves(keep=slots // 2)})


def test_taps_before_tokens_are_dropped():
    plan = composed((DeepStack(groups=4), Leave(5))).plan()
    assert [p.name for p in itertools.chain(*(s.policies for s in plan))].count("drop") == 1


@pytest.mark.parametrize(
    ("policies", "said"),
    [
        ((PMoD(), GammaMoD()), "router.* split the layer into halves, which one policy at most"),
        ((DeepStack(), PMoD(layers=(2,))), "router splits the layer .* it must come first"),
        ((PMoD(), PMoD(factor=0.4)), "PMoD is there twice"),
        ((DeepStack(start=7),), r"no layers \[10\]; the plan has layers 0 to 9"),
        ((Leave(2), DeepStack()), "add_tap at layer 2 reads .* drop drops some .* at layer 2"),
        (("p_mod",), r"policies\[0\] = 'p_mod': want .* zoo.models.decoders.p_mod.PMoD"),
        ((PMoD,), r"policies\[0\] = <class .*: want an instance"),
        ((MQT(),), r"policies\[0\] = MQT\(...\): want an instance of a configuration with apply"),
    ],
)
def test_combinations_that_make_no_sense(policies, said):
    with pytest.raises(ValueError, match=said):
        composed(policies)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"policies": "p_mod"}, r"want tuple, not a name: p_mod has .*PMoD"),
        ({"policies": PMoD()}, r"want tuple such as \(PMoD\(...\),\)"),
        ({"connector": "mqt"}, r"want a configuration, not a name: mqt has .*MQT"),
    ],
)
def test_values_that_are_no_parts(overrides, said):
    with pytest.raises(UsageError, match=said):
        zoo.create("llava_tiny", **overrides)


def test_parts_that_do_not_fit_their_place():
    with pytest.raises(ValueError, match=r"connector = PMoD\(...\): want .* num_tokens and build"):
        zoo.create("llava_tiny", connector=PMoD())
    with pytest.raises(ValueError, match="wants a connector that keeps the 4 x 4 tokens"):
        zoo.create("llava_next_tiny", connector=MQT(num_queries=4, num_heads=2))


def test_settings_are_checked_when_all_are_in():
    """In whatever order: neither fits the model without the other."""
    given = {"policies": (PMoD(layers=(7,)),), "decoder.depth": 8}
    for order in (given, dict(reversed(given.items()))):
        assert len(zoo.config("llava_tiny", **order).plan()) == 8
