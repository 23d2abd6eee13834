from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

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
        terms, *_ = NextToken().loss(model, {"params": params}, {}, batch, jax.random.key(0), None)
        return terms["loss"].value

    run = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
    return run(params), run.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("windows", [(None,), (8, None, 16)], ids=["scanned", "unrolled"])
def test_what_is_not_kept_is_computed_again_with_the_same_numbers(params, windows):
    kept, most = compiled(params, windows=windows)
    memory = {}
    for remat in ("dots", "offload", "full"):
        again, memory[remat] = compiled(params, windows=windows, remat=remat)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), again,
                     kept)  # fmt: skip
    assert memory["full"] < memory["dots"] < most
    # On a CPU the memory of the host is the only one there is.
    assert memory["full"] < memory["offload"] < most
    if windows == (None,):
        assert memory["full"] < 0.6 * most


def products(jaxpr):
    """The dtypes that every product multiplies, in programs within programs too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield {var.aval.dtype.name for var in equation.invars}
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


def test_products_are_bfloat16_of_parameters_that_are_float32(params):
    model = CausalLMConfig(replace(DECODER, dtype="bfloat16")).build()
    ids = jnp.zeros((4, 32), jnp.int32)
    batch = {"ids": ids, "labels": ids, "text_mask": ids >= 0}

    def loss(params):
        terms, *_ = NextToken().loss(model, {"params": params}, {}, batch, jax.random.key(0), None)
        return terms["loss"].value

    program, grads = jax.make_jaxpr(jax.value_and_grad(loss), return_shape=True)(params)
    found = list(products(program.jaxpr))
    # Seven linear maps of a layer, forward and twice backward; those of attention and of the head.
    assert found.count({"bfloat16"}) >= 21
    assert {x.dtype.name for x in jax.tree.leaves((params, grads))} == {"float32"}


def test_an_unknown_policy_is_refused(params):
    with pytest.raises(ValueError, match="remat = 'some': want one of none, dots, offload, full"):
        compiled(params, remat="some")
