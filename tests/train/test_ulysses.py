"""Divided sequences: the numbers of one device, and what is sent for them."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.models.draw import draw
from zoo.models.core import registry
from zoo.models.core.errors import UsageError
from zoo.models.core.names import tree_shardings
from zoo.models.core.types import IGNORE, Stream, Tokens
from zoo.models.parts.decoders.gqa import Decoder, DecoderConfig
from zoo.models.parts.layers.attention import Sliding, attend, causal
from zoo.models.parts.layers.sequence import elements_sent
from zoo.train.config import Recipe
from zoo.train.mesh import ALONG_SEQUENCE, MeshConfig, make_mesh

BATCH, LENGTH, VOCAB = 2, 24, 40


def mesh_of(ranks, **sizes):
    devices = jax.devices()[: ranks * int(np.prod(list(sizes.values()) or [1]))]
    return make_mesh(MeshConfig(**{"data": 1, **sizes}, seq=ranks), devices)


def qkv(heads, kv_heads, length=LENGTH):
    rng = np.random.default_rng(0)
    shapes = [(BATCH, length, h, 8) for h in (heads, kv_heads, kv_heads)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def padded(length=LENGTH):
    """Tokens of two examples, one of which is shorter."""
    return Tokens.sequence(jnp.arange(length) < jnp.array([[length], [length - 5]]))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks"),
    [(8, 8, 4), (8, 4, 4), (8, 2, 4), (7, 7, 4), (6, 2, 4), (12, 6, 4), (5, 1, 2)],
)
def test_any_number_of_heads_is_exact(heads, kv_heads, ranks):
    arrays, tokens = qkv(heads, kv_heads), padded()

    def run(q, k, v):
        return jnp.sin(attend(q, k, v, Sliding(9), tokens, tokens)).sum()

    step = jax.value_and_grad(run, argnums=(0, 1, 2))
    expected = jax.jit(step)(*arrays)
    with jax.set_mesh(mesh_of(ranks)):
        got = jax.jit(step)(*arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


def test_what_cannot_be_divided_is_refused():
    tokens = padded()
    with jax.set_mesh(mesh_of(4)):
        with pytest.raises(ValueError, match=r"3 attention heads on a mesh with seq=4.*at most 3"):
            attend(*qkv(3, 3), causal, tokens, tokens)
        # Only decoders insist: the tokens of a picture may be of any number.
        assert attend(*qkv(8, 8, 22), causal, padded(22), padded(22)).shape == (BATCH, 22, 8, 8)
        with pytest.raises(ValueError, match=r"22 tokens on a mesh with seq=4.*such as 24"):
            zoo.create("ulysses", ranks=4).attend(*qkv(8, 8, 22))
    with pytest.raises(UsageError, match="the current mesh has seq=1: want 8"):
        zoo.create("ulysses").attend(*qkv(8, 8))


CONFIG = DecoderConfig(vocab_size=VOCAB, width=32, depth=2, num_heads=8, num_kv_heads=4, mlp_dim=48)


@pytest.fixture(scope="module")
def decoder():
    """`(parameters, batch) -> (loss, gradient)` of a decoder, its parameters and a batch."""
    model, rng = Decoder(CONFIG, CONFIG.plan()), np.random.default_rng(1)
    ids = jnp.asarray(rng.integers(VOCAB, size=(BATCH, LENGTH)))
    labels = jnp.where(jnp.arange(LENGTH) % 3 > 0, jnp.roll(ids, -1, 1), IGNORE)

    def logits(params):
        def run(module, ids):
            stream = Stream(module.embed(ids), padded())
            return module.head(module.run(stream)[0].hidden)

        return model.apply({"params": params}, ids, method=run)

    def init(key):
        def run(module, ids):
            stream, _, _ = module.run(Stream(module.embed(ids), padded()))
            return module.head(stream.hidden)

        return model.init(key, ids, method=run)["params"]

    boxed = jax.eval_shape(init, jax.random.key(0))
    return logits, labels, boxed, draw(boxed)


def plain_loss(logits, labels):
    learned = labels != IGNORE
    each = jax.nn.logsumexp(logits, -1)
    each -= jnp.take_along_axis(logits, jnp.where(learned, labels, 0)[..., None], -1)[..., 0]
    return jnp.where(learned, each, 0).sum() / learned.sum()


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("rest", [{}, {"fsdp": 2}])
def test_loss_and_gradients_are_those_of_one_device(decoder, ranks, rest):
    logits, labels, boxed, params = decoder
    expected = jax.jit(jax.value_and_grad(lambda p: plain_loss(logits(p), labels)))(params)
    config = MeshConfig(rules=ALONG_SEQUENCE if rest else ())
    system = zoo.create("ulysses", ranks=ranks)
    mesh = mesh_of(ranks, **rest)
    with jax.set_mesh(mesh), config.ruled():
        shardings = tree_shardings(boxed, mesh)
        specs = [str(leaf.spec) for leaf in jax.tree.leaves(shardings)]
        assert any("seq" in spec for spec in specs) == (bool(rest) and ranks > 1)
        step = jax.value_and_grad(lambda p: system.loss(logits(p), labels))
        got = jax.jit(step)(jax.device_put(params, shardings))
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected[1]))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), got[1], expected[1]
    )


def all_to_alls(run, *arguments):
    """Elements of the operand of each all-to-all of a compiled program."""
    text = jax.jit(run).lower(*arguments).compile().as_text()
    found = re.findall(r"= (?:f32\[([\d,]+)\]|\(([^)]*)\))\S* all-to-all(?:-start)?\(", text)
    sizes = []
    for one, several in found:
        shapes = [one] if one else re.findall(r"f32\[([\d,]+)\]", several)
        sizes.append(sum(int(np.prod([int(n) for n in s.split(",")])) for s in shapes))
    return sizes


@pytest.mark.parametrize(("heads", "kv_heads", "ranks"), [(8, 8, 4), (8, 4, 2), (8, 4, 4)])
def test_four_exchanges_forward_and_four_back(heads, kv_heads, ranks):
    arrays = qkv(heads, kv_heads)

    def forward(q, k, v):
        return attend(q, k, v, causal, padded(), padded())

    with jax.set_mesh(mesh_of(ranks)) as mesh:
        spec = jax.sharding.PartitionSpec(None, "seq")
        arrays = jax.device_put(arrays, jax.sharding.NamedSharding(mesh_of(ranks), spec))
        sizes = all_to_alls(forward, *arrays)
        both = all_to_alls(jax.grad(lambda *a: forward(*a).sum() ** 2, (0, 1, 2)), *arrays)
    del mesh
    assert len(sizes) == 4
    assert len(both) == 8
    sent = sum(sizes) * (ranks - 1) // ranks
    assert [sent] * ranks == elements_sent(BATCH, LENGTH, heads, kv_heads, 8, ranks)
    assert sum(both) == 2 * sum(sizes)


def test_what_is_sent_does_not_grow_with_sequence_and_devices():
    counts = [elements_sent(2, 1024 * ranks, 64, 64, 16, ranks)[0] for ranks in (2, 4, 8, 16)]
    formula = [4 * 2 * 1024 * p * 64 * 16 * (p - 1) // p**2 for p in (2, 4, 8, 16)]
    assert counts == formula
    assert elements_sent(2, 1024, 64, 8, 16, 8) == [(2 * 64 + 2 * 8) * 16 * 2 * 1024 * 7 // 64] * 8
    # The paper's form for many devices: doubling both changes nothing.
    assert counts[3] / counts[2] == pytest.approx(15 / 14)


def test_the_recipe_divides_the_sequences_of_an_experiment():
    from zoo.train.cli import find

    experiment = find("digits_vqa_tiny")
    heads = experiment.model.decoder.num_heads
    got = zoo.create("ulysses", ranks=heads)(experiment)
    assert got == replace(experiment, mesh=MeshConfig(seq=heads, rules=ALONG_SEQUENCE))
    with pytest.raises(UsageError, match=f"want at most {heads} ranks"):
        zoo.create("ulysses", ranks=2 * heads)(experiment)
    recipe = zoo.create("ulysses_tiny", divide_params=False)(Recipe("two", (experiment,)))
    assert recipe.stages[0].mesh == MeshConfig(seq=2)
    assert registry.card("ulysses").scope == "full"
    with pytest.raises(ValueError, match="ranks = 0"):
        zoo.create("ulysses", ranks=0)
