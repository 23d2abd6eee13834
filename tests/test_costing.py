"""What `zoo cost` counts, against counts by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from zoo.costing import Flops, main, measure
from zoo.models.core.errors import UsageError
from zoo.models.decoders.gamma_mod import GammaMoD
from zoo.models.decoders.p_mod import PMoD
from zoo.models.parts.assemblies.llava import LlavaConfig

TEXT = 58
D, M, V, LAYERS = 4096, 11_008, 32_000, 32


@pytest.fixture(scope="module")
def llava():
    return zoo.cost(LlavaConfig(), text_tokens=TEXT)


def test_llava_1_5_7b_by_hand(llava):
    """The published 8.38 TFLOPs: products with weights, with logits at every position."""
    n = 576 + TEXT
    by_hand = LAYERS * (8 * n * D * D + 6 * n * D * M) + 2 * n * D * V
    assert llava.flops["prefill"].weights == by_hand
    assert round(by_hand / 1e12, 2) == 8.38
    attention = LAYERS * 4 * n * n * D
    assert llava.flops["prefill"].total == by_hand + attention
    step = LAYERS * (8 * D * D + 6 * D * M) + 2 * D * V
    assert llava.flops["decode_step"] == Flops(step, step + LAYERS * 4 * (n + 1) * D)
    assert llava.vision_tokens == 576
    assert llava.params["total"] == sum(v for k, v in llava.params.items() if k != "total")


@pytest.mark.parametrize(
    ("name", "vision_tokens", "published"),
    [("llava_1_5_7b", 576, 8.38e12), ("llava_next_vicuna_7b", 2928, 39.46e12)],
)
def test_published_tables(name, vision_tokens, published):
    """Of arXiv:2412.04449; the hub's checkpoints have 64 rows more in their vocabulary."""
    found = zoo.cost(name, text_tokens=TEXT)
    assert found.vision_tokens == vision_tokens
    assert found.flops["prefill"].weights == pytest.approx(published, rel=5e-4)


def test_caches_and_bytes(llava):
    layer = 2 * (576 + TEXT) * D * 2  # keys and values in bfloat16
    assert llava.kv_bytes == {"per_layer": [layer] * LAYERS, "total": LAYERS * layer}
    assert llava.weight_bytes == 2 * llava.params["total"]
    # More than the MLP's three activations of one layer, less than those of two.
    assert 3 * (576 + TEXT) * M * 2 < llava.activation_bytes < 6e8


def test_encoding_by_hand(llava):
    """Patches, 23 of 24 layers (the last one is not read), and the MLP connector."""
    n, d, m = 577, 1024, 4096
    layers = 23 * (8 * n * d * d + 4 * n * d * m)
    by_hand = 2 * 576 * 14 * 14 * 3 * d + layers + 2 * 576 * (d * D + D * D)
    assert llava.flops["encode"].weights == pytest.approx(by_hand, rel=0.05)


def test_a_smaller_budget_costs_less():
    costs = {m: zoo.cost("mqt_llava_7b", text_tokens=TEXT, budget=m) for m in (16, 256)}
    for m, found in costs.items():
        n = m + TEXT
        assert found.vision_tokens == m
        assert (
            found.flops["prefill"].weights == LAYERS * n * (8 * D * D + 6 * D * M) + 2 * n * D * V
        )


def test_layers_keep_what_they_run():
    """Policies that skip tokens: FLOPs and caches of a prefill count the places that they keep."""
    text, slots, place = 7, 16, 2 * 2 * 6 * 4  # keys and values of two heads of six in float32
    found = zoo.cost("p_mod_tiny", text_tokens=text, dtype="float32")
    ratios = [PMoD().ratios(6).get(layer, 1.0) for layer in range(6)]
    kept = [text + int(np.float32(slots) * np.float32(ratio)) for ratio in ratios]
    assert min(kept) < text + slots / 2
    assert found.kv_bytes["per_layer"] == [n * place for n in kept]
    d, m, v = 24, 32, 320
    layers = sum(2 * n * d * (2 * d + 2 * 12 + 3 * m) for n in kept)
    routers = 2 * d * (text + slots) * sum(ratio < 1 for ratio in ratios)
    assert found.flops["head"].weights == 2 * (text + slots) * d * v
    assert found.flops["prefill"].weights == layers + routers + found.flops["head"].weights

    policy = GammaMoD(text_prefix=2, capacity=0.5)  # of 18 tokens half may be left out
    found = zoo.cost("gamma_mod_tiny", text_tokens=text, dtype="float32", policies=(policy,))
    kept = [text + slots - 9 * (layer in policy.chosen(6)) for layer in range(6)]
    assert found.kv_bytes["per_layer"] == [n * place for n in kept]


def test_text_alone():
    found = zoo.cost("mqt_tiny", num_images=0, text_tokens=7, dtype="float32")
    assert found.vision_tokens == 0
    assert found.flops["encode"] == Flops()
    assert found.kv_bytes["per_layer"] == [2 * 7 * 2 * 6 * 4] * 3


def test_loops_and_branches():
    """Scans count as often as they run, conditions as much as their dearest branch."""
    w = jnp.zeros((8, 8))

    def function(w, x):
        y, _ = jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=5)
        return jax.lax.cond(y.sum() > 0, lambda y: y @ y, lambda y: y, y)

    flops, peak = measure(function, w, w)
    assert flops == Flops(5 * 2 * 8**3, 6 * 2 * 8**3)
    assert 2 * 8 * 8 * 4 <= peak <= 6 * 8 * 8 * 4


def test_the_command(capsys):
    assert main(["mqt_tiny", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["flops"]) == {"encode", "prefill", "head", "decode_step"}
    assert set(facts["flops"]["prefill"]) == {"weights", "total"}
    assert main(["mqt_tiny", "--budget", "2", "--text-tokens", "5"]) == 0
    assert "2 vision tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "mqt_tinny"}, "did you mean"),
        ({"model": "mqt_tiny", "budget": 99}, "budget = 99"),
        ({"model": "mqt_tiny", "image_size": 17}, "multiple of patch_size"),
        ({"model": "mqt_tiny", "text_tokens": 0}, "text_tokens is 0"),
        ({"model": "mqt_tiny", "dtype": "float33"}, "float33"),
        ({"model": "mqt_tiny", "dtype": "str"}, "want a number's"),
        ({"model": "mqt_tiny", "batch": 0}, "batch is 0"),
        ({"model": "mqt_tiny", "num_images": -1}, "num_images is -1"),
    ],
)
def test_refusals(options, said):
    with pytest.raises(UsageError, match=said):
        zoo.cost(**options)
