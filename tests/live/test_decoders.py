"""The decoders against transformers: logits, gradients, decoding, key tables, strict reading."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.live.reference import close, redraw, state_of, torch, transformers
from zoo.models.core.config import with_dtype
from zoo.models.core.errors import UsageError
from zoo.models.core.hf import Fields
from zoo.models.core.registry import base_of, read_hf
from zoo.models.core.tree import flatten_dict

LENGTH, VOCAB = 24, 61
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "ffn_dim": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,  # of which torch's embedding takes no gradient
}
SHORT, LONG = [1.0, 1.1, 1.4, 1.9], [1.0, 2.5, 6.0, 20.0]


def rope(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **more}}


ONE = {"num_hidden_layers": 1}
"""Enough where layers do not differ."""


LONGROPE = rope("longrope", short_factor=SHORT, long_factor=LONG)
CASES = {
    "llama mha": ("llama", {"num_key_value_heads": 4}),
    "llama gqa, biases, wide heads": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 14},
    ),
    "llama mqa, tied, linear": (
        "llama",
        {"num_key_value_heads": 1, "tie_word_embeddings": True, **rope("linear", factor=4.0)},
    ),
    "llama dynamic": (
        "llama",
        {"max_position_embeddings": 16, **ONE, **rope("dynamic", factor=3.0)},
    ),
    "llama yarn": (
        "llama",
        ONE | rope("yarn", factor=8.0, original_max_position_embeddings=16, beta_fast=4.0),
    ),
    "llama yarn with scales": (
        "llama",
        ONE | rope("yarn", factor=8.0, mscale=0.7, mscale_all_dim=1.2, truncate=False),
    ),
    "llama llama3": (
        "llama",
        ONE
        | rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "mistral window": ("mistral", {"sliding_window": 5}),
    "qwen2 windows, tied": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "num_hidden_layers": 3,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 12, "attention_bias": True}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 12,
            "sliding_window": 5,
            "num_hidden_layers": 4,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma2 no caps": (
        "gemma2",
        {"head_dim": 12, "attn_logit_softcapping": None, "final_logit_softcapping": None, **ONE},
    ),
    "phi3 short": ("phi3", {"original_max_position_embeddings": 32, **LONGROPE}),
    "phi3 long, window": (
        "phi3",
        {"original_max_position_embeddings": 16, "sliding_window": 7, **ONE, **LONGROPE},
    ),
    "phi3 partial": (
        "phi3",
        {"num_key_value_heads": 4, **ONE, **rope("default", partial_rotary_factor=0.5)},
    ),
    "opt": ("opt", {}),
    "opt post-norm, narrow embeddings": (
        "opt",
        {"do_layer_norm_before": False, "word_embed_proj_dim": 20},
    ),
    "opt gelu, no biases, untied": (
        "opt",
        {
            "activation_function": "gelu",
            "enable_bias": False,
            "tie_word_embeddings": False,
            **ONE,
        },
    ),
}
TRAINED = (
    "llama gqa, biases, wide heads",
    "llama mqa, tied, linear",
    "qwen2 windows, tied",
    "qwen3",
    "gemma2",
    "phi3 short",
    "opt",
    "opt post-norm, narrow embeddings",
)
DECODED = ("llama gqa, biases, wide heads", "qwen2 windows, tied", "gemma2", "phi3 short", "opt")


def original(name):
    """The model of transformers with drawn weights, and its configuration here."""
    model_type, changes = CASES[name]
    fields = {**(OPT if model_type == "opt" else TINY), **changes}
    config = transformers.AutoConfig.for_model(model_type, **fields)
    hf = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    redraw(hf)
    return hf, read_hf(Fields(model_type, hf.config.to_dict()))


def converted(hf, config):
    """The key table, the shapes of our parameters and the parameters."""
    shapes = jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))
    shapes = nn.unbox(shapes)["params"]
    table = base_of(hf.config.model_type).table(config)
    return table, shapes, table.load(state_of(hf), shapes)


def text(padded=0, seed=0):
    """Two rows of ids, the second with so many places of padding at its end."""
    ids = np.random.default_rng(seed).integers(1, VOCAB, (2, LENGTH)).astype(np.int32)
    mask = np.ones((2, LENGTH), bool)
    mask[1, LENGTH - padded :] = False
    return ids, mask


@pytest.mark.parametrize("name", CASES)
def test_logits_and_keys(name):
    hf, config = original(name)
    table, _, params = converted(hf, config)
    # Frequencies that depend on the length take that of the row here, of the batch there.
    ids, mask = text(0 if "longrope" in str(CASES[name]) or "dynamic" in name else 6)
    model = config.build()
    with torch.no_grad():
        seen = torch.tensor(mask).long()
        theirs = hf(input_ids=torch.tensor(ids).long(), attention_mask=seen).logits.numpy()
    close(jax.jit(logits_of(model, ids, mask))(params)[mask], theirs[mask], what=name)

    saved = table.save(params)
    for key, leaf in state_of(hf).items():
        np.testing.assert_array_equal(saved[table.aliases.get(key, key)], leaf)


def logits_of(model, ids, mask):
    """params -> logits."""

    def run(params):
        bound = model.bind({"params": params})
        return bound.head(bound({"ids": ids, "text_mask": mask}).hidden)

    return run


@pytest.mark.parametrize("name", TRAINED)
def test_gradients(name):
    hf, config = original(name)
    table, shapes, params = converted(hf, config)
    ids, mask = text(0 if "longrope" in str(CASES[name]) else 6)
    weights = np.random.default_rng(1).normal(size=(*ids.shape, VOCAB)).astype(np.float32)
    weights *= mask[..., None]
    seen = torch.tensor(mask).long()
    logits = hf(input_ids=torch.tensor(ids).long(), attention_mask=seen).logits
    (logits * torch.tensor(weights)).sum().backward()
    theirs = table.load({k: p.grad.numpy() for k, p in hf.named_parameters()}, shapes)
    run = logits_of(config.build(), ids, mask)
    ours = jax.jit(jax.grad(lambda params: (run(params) * weights).sum()))(params)
    for path, leaf in flatten_dict(theirs).items():
        mine, what = flatten_dict(ours)[path], f"{name}: gradient of {'/'.join(path)}"
        if np.abs(leaf).max() < 1e-5:  # without rotation, a bias of the keys changes nothing
            assert np.abs(mine).max() < 1e-5, what
        else:
            close(mine, leaf, what=what)


def generating(model, room):
    """Compiled `prefill` and `decode`."""
    return (
        jax.jit(lambda p, b: model.apply({"params": p}, b, room=room, method="prefill")),
        jax.jit(lambda p, i, c: model.apply({"params": p}, i, c, method="decode")),
    )


@pytest.mark.parametrize("name", DECODED)
def test_decoding_is_the_whole(name):
    """Prompts of different lengths, padded on the right, and three more tokens for each."""
    hf, config = original(name)
    _, _, params = converted(hf, config)
    ids, _ = text()
    prompt, short, more = 12, 9, 3
    mask = np.ones((2, prompt), bool)
    mask[1, short:] = False
    prefill, decode = generating(config.build(), room=more)
    logits, cache = prefill(params, {"ids": ids[:, :prompt], "text_mask": mask})
    with torch.no_grad():
        theirs = hf(input_ids=torch.tensor(ids).long()).logits.numpy()
    for step in range(more):
        at = np.array([prompt, short]) + step
        close(logits, theirs[[0, 1], at - 1], what=f"{name}: step {step}")
        logits, cache = decode(params, ids[[0, 1], at][:, None], cache)
    close(logits, theirs[[0, 1], at], what=f"{name}: last step")


def test_decoding_past_the_context_rotates_as_transformers_does():
    """With dynamic NTK, keys keep the rotation of the step that made them."""
    hf, config = original("llama dynamic")
    _, _, params = converted(hf, config)
    ids, _ = text()
    prompt = 20
    prefill, decode = generating(config.build(), room=3)
    logits, cache = prefill(params, {"ids": ids[:, :prompt]})
    past = None
    for step in range(3):
        new = ids[:, :prompt] if past is None else ids[:, prompt + step - 1 : prompt + step]
        with torch.no_grad():
            out = hf(input_ids=torch.tensor(new).long(), past_key_values=past, use_cache=True)
        past = out.past_key_values
        close(logits, out.logits[:, -1], what=f"step {step}")
        new = ids[:, prompt + step : prompt + step + 1]
        logits, cache = decode(params, new, cache)


def test_older_files_say_the_same():
    """`rope_theta` and `rope_scaling` beside each other, as transformers 4 wrote them."""
    tiny = {k: v for k, v in TINY.items() if k != "pad_token_id"}
    old = {**tiny, "rope_theta": 1000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
    new = {**tiny, **rope("linear", factor=4.0)}
    for model_type in ("llama", "mistral", "qwen2", "qwen3"):
        a, b = (read_hf(Fields(model_type, {"model_type": model_type, **f})) for f in (old, new))
        assert a == b


def test_null_is_not_the_default():
    """A null window is none, and null key-value heads are as many as query heads."""
    null = {"sliding_window": None, "num_key_value_heads": None}
    decoder = read_hf(Fields("x", {"model_type": "mistral", **null})).decoder
    assert (decoder.windows, decoder.num_kv_heads) == ((), 32)


def test_absent_fields_mean_the_defaults_of_transformers():
    for model_type in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "opt"):
        full = transformers.AutoConfig.for_model(model_type).to_dict()
        assert read_hf(Fields("x", {"model_type": model_type})) == read_hf(Fields("x", full))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_chunk": 7}, "sliding_chunk"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        (rope("spiral"), "spiral"),
        (rope("linear", factor=2.0, twist=1), "twist"),
        (rope("default", partial_rotary_factor=0.5), "partial_rotary_factor"),
    ],
)
def test_what_is_not_understood_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        read_hf(Fields("x", {"model_type": "llama", **TINY, **changes}))


def test_layer_types_are_checked():
    wrong = (
        {"layer_types": ["chunked_attention", "full_attention"]},
        {"layer_types": ["sliding_attention", "full_attention"]},
    )
    for changes in wrong:
        with pytest.raises(UsageError, match="layer_types"):
            read_hf(Fields("x", {"model_type": "qwen2", **TINY, **changes}))


def test_compute_in_bfloat16():
    """Every part keeps to the compute dtype; logits are float32 and near those of float32."""
    hf, config = original("gemma2")
    _, _, params = converted(hf, config)
    ids, mask = text()
    model = with_dtype(config, "bfloat16").build()
    hidden = jax.eval_shape(lambda p: model.apply({"params": p}, {"ids": ids}).hidden, params)
    assert hidden.dtype == jnp.bfloat16
    logits = jax.jit(logits_of(model, ids, mask))(params)
    assert logits.dtype == jnp.float32
    with torch.no_grad():
        close(logits, hf(input_ids=torch.tensor(ids).long()).logits, tolerance=0.1)
