"""Meta-Transformer: sizes, the order of tokens, each tokenizer, mixed inputs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.draw import draw
from zoo.models.core.errors import UsageError
from zoo.models.encoders.meta_transformer import (
    VARIANTS,
    MetaTransformerConfig,
    encoder_table,
    tokenizer_table,
)
from zoo.models.parts.layers.modalities import (
    Audio,
    Bands,
    Pictures,
    Sequence,
    Series,
    TableRows,
    Text,
    Video,
    group_bands,
    waves,
)
from zoo.models.parts.layers.points import (
    Graphs,
    Points,
    farthest,
    laplacian_ids,
    nearest,
    random_ids,
)
from zoo.models.parts.layers.spectrum import log_mel

RNG = np.random.default_rng(0)
SIZES = {"width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 32}
KINDS = {
    "image": (Pictures(8, 4), 4),
    "video": (Video(4, 8, (2, 4, 4)), 8),
    "series": (Series(2, 5), 5),
    "audio": (Audio(20, 12, 8, 4), 2 * 4),
    "text": (Text(20, 12, 6), 6),
    "table": (TableRows((3, 4), 2), 4),
    "bands": (Bands(6, 3), 7),
    "points": (Points(12, 4, 3), 5),
    "graph": (Graphs(4, 3, 2, 2, 4), 2 + 4 + 3),
}
ALL = MetaTransformerConfig(tuple(kind for kind, _ in KINDS.values()), **SIZES)


def filled(config, size=2):
    """A batch of all that a configuration reads; integers are 0 to 2."""
    return {
        name: RNG.integers(0, 3, x.shape).astype(np.int32)
        if x.dtype == jnp.int32
        else RNG.normal(size=x.shape).astype(np.float32)
        for name, x in config.inputs(size).items()
    }


@pytest.fixture(scope="module")
def everything():
    made = jax.eval_shape(ALL.build().init, jax.random.key(0), ALL.inputs(1))
    return draw(dict(made)), filled(ALL)


@pytest.mark.parametrize(
    ("name", "count"), [("meta_transformer_b16", 85_054_464), ("meta_transformer_l14", 302_309_376)]
)
def test_parameters(name, count):
    config = VARIANTS[name]
    made = jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))
    encoder = nn.unbox(made["params"]["encoder"])
    assert sum(leaf.size for leaf in jax.tree.leaves(encoder)) == count
    keys = encoder_table(config).shapes(encoder)
    assert len(keys) == 12 * config.depth and "0.attn.qkv.weight" in keys


KEYS = {
    "video": {"proj.weight": (16, 3, 2, 4, 4), "proj.bias": (16,)},
    "audio": {
        "patch_embed.proj.weight": (16, 1, 8, 8),
        "patch_embed.proj.bias": (16,),
        "pos_embed": (1, 8, 16),
    },
    "text": {"token_embedding.weight": (20, 12)},
    "bands": {
        "patch_to_embedding.weight": (16, 3),
        "patch_to_embedding.bias": (16,),
        "cls_token": (1, 1, 16),
        "pos_embedding": (1, 7, 16),
    },
}


@pytest.mark.parametrize("kind", KEYS)
def test_keys_of_tokenizers(kind, everything):
    """Names and shapes of the official classes, there and back; the rest is in the goldens."""
    params, table = everything[0]["params"][f"tokenizers_{kind}"], tokenizer_table(KINDS[kind][0])
    state = table.save(params)
    assert {key: leaf.shape for key, leaf in state.items()} == KEYS[kind]
    jax.tree.map(np.testing.assert_array_equal, table.load(state, params), params)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens(kind, everything):
    """Of each kind as many as expected, finite; and a batch of that kind alone will do."""
    variables, batch = everything
    tokenizer, count = KINDS[kind]
    own = {name: batch[name] for name in tokenizer.inputs(2)}
    found = ALL.build().apply(variables, own, method="tokens")
    assert found.tokens.shape == (2, count, 16) and np.isfinite(found.tokens).all()
    assert (found.place is not None) == (kind == "points")


def test_mixed(everything):
    """All side by side; what belongs to points is added to their tokens alone. In training
    statistics move.
    """
    variables, batch = everything
    model = ALL.build()
    sequence = model.apply(variables, batch, method="tokens")
    counts = [count for _, count in KINDS.values()]
    assert sequence.tokens.shape[1] == sum(counts)
    first = sum(counts[: list(KINDS).index("points")])
    moved = np.abs(sequence.place).max((0, 2)) > 0
    assert moved[first : first + 5].all() and moved.sum() == 5
    key = {"dropout": jax.random.key(0)}
    run = jax.jit(lambda v: model.apply(v, batch, train=True, mutable=["stats"], rngs=key))
    out, changed = run(variables)
    assert out.features.tokens.shape == sequence.tokens.shape
    assert np.isfinite(out.pooled).all() and jax.tree.leaves(changed)
    with pytest.raises(UsageError, match="want pixels, or video"):
        model.apply(variables, {"other": np.zeros(2)}, method="tokens")


def test_order_of_tokens():
    """The encoder has no positions; with places they move along."""
    config = VARIANTS["meta_transformer_tiny"]
    made = jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))
    params = draw(made["params"])
    x, place = RNG.normal(size=(2, 2, 6, 16)).astype(np.float32)
    order = np.array([4, 0, 5, 2, 1, 3])
    run = jax.jit(
        lambda x, place: config.build().apply(
            {"params": params}, Sequence(x, place), method="encode"
        )
    )
    got = run(x[:, order], place[:, order])
    np.testing.assert_allclose(got, run(x, place)[:, order], rtol=1e-4, atol=1e-5)
    assert np.abs(run(x, place) - run(x, 0 * place)).max() > 0.1


def test_circular_series():
    """Shifted steps give shifted values, less the waves of their places."""
    module = Series(2, 7).build(8)
    x = RNG.normal(size=(1, 7, 2)).astype(np.float32)
    params = draw(jax.eval_shape(module.init, jax.random.key(0), {"series": x})["params"])
    values = [
        module.apply({"params": params}, {"series": each}).tokens - waves(7, 8)
        for each in (x, np.roll(x, 2, 1))
    ]
    np.testing.assert_allclose(values[1], np.roll(values[0], 2, 1), rtol=1e-4, atol=1e-5)


def test_points_and_neighbours():
    line = np.zeros((1, 5, 3), np.float32)
    line[0, :, 0] = [0.0, 1.0, 2.0, 3.0, 10.0]
    np.testing.assert_array_equal(farthest(line, 3)[0], [0, 4, 3])
    np.testing.assert_array_equal(nearest(line[:, 4:], line, 2)[0], [[4, 3]])


def test_identifiers_of_nodes():
    ids = random_ids(RNG, 3, 5)
    np.testing.assert_allclose(ids @ ids.T, np.eye(3), atol=1e-6)
    with pytest.raises(ValueError, match="6 nodes: want 5 at most"):
        random_ids(RNG, 6, 5)
    ring = np.array([[0, 1], [1, 2], [2, 3], [3, 0]])
    found = laplacian_ids(ring, 4, 6)
    np.testing.assert_allclose(np.abs(found[:, 0]), 0.5, atol=1e-6)  # the constant
    np.testing.assert_allclose(found.T @ found, np.diag([1, 1, 1, 1, 0, 0]), atol=1e-6)


def test_spectrogram():
    """A tone of 1 kHz is loudest in the band that holds it, in each of 98 frames of a second."""
    wave = np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000)
    found = log_mel(wave)
    assert found.shape == (98, 128) and found.dtype == np.float32
    tone, low, high = 1127 * np.log1p(np.array([1000, 20, 8000]) / 700)
    want = (tone - low) / (high - low) * 129 - 1
    assert np.abs(found.argmax(1) - want).max() <= 1
    with pytest.raises(ValueError, match="400 samples"):
        log_mel(wave[:300])


def test_groups_of_bands():
    np.testing.assert_array_equal(group_bands(np.arange(4), 3)[[0, 3]], [[3, 0, 1], [2, 3, 0]])
    with pytest.raises(ValueError, match="an odd number"):
        group_bands(np.arange(4), 2)


def test_bad_settings():
    with pytest.raises(ValueError, match="each kind of data once"):
        MetaTransformerConfig((Pictures(), Pictures(8, 4)))
    with pytest.raises(UsageError, match="the tokenizer of graph: no official class"):
        tokenizer_table(Graphs())
    with pytest.raises(ValueError, match="text_width = 512: want 16"):
        Text().build(16)
    with pytest.raises(ValueError, match="sizes"):
        TableRows(())
    few, module = {"points": jnp.zeros((1, 4, 3))}, Points(12, 12, 3).build(8)
    with pytest.raises(ValueError, match="12 or more, 3"):
        jax.eval_shape(module.init, jax.random.key(0), few)
