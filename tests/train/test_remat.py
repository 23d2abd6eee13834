from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.draw import draw
from zoo.convert.place import abstract_params
from zoo.models.parts.assemblies.language import CausalLMConfig
from zoo.models.parts.decoders.gqa import DecoderConfig
from zoo.train.objectives import NextToken

DECODER = DecoderConfig(
    vocab_size=64, width=16, depth=6, num_heads=2, num_kv_heads=1, mlp_dim=32, windows=(None,)
)


@pytest.fixture(scope="module")
def params():
    return draw(abstract_params(CausalLMConfig(DECODER)))


def compiled(params, **changes):
    """Loss and gradient of a batch of 4 x 32 tokens, and the memory that they take meanwhile."""
    model = CausalLMConfig(replace(DECODER, **changes)).build()
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 64, (4, 32), np.int32))
    batch = {"ids": ids, "labels": ids, "text_mask": ids >= 0}

    def loss(params):
        return NextToken().loss(model, params, batch, jax.random.key(0), None)[0]["loss"].value

    run = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
    return run(params), run.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("windows", [(None,), (8, None, 16)], ids=["scanned", "unrolled"])
def test_what_is_not_kept_is_computed_again_with_the_same_numbers(params, windows):
    kept, most = compiled(params, windows=windows)
    memory = {}
    for remat in ("dots", "full"):
        again, memory[remat] = compiled(params, windows=windows, remat=remat)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), again,
                     kept)  # fmt: skip
    assert memory["full"] < memory["dots"] < most
    if windows == (None,):
        assert memory["full"] < 0.6 * most


def test_an_unknown_policy_is_refused(params):
    with pytest.raises(ValueError, match="remat = 'some': want one of none, dots, full"):
        compiled(params, remat="some")
