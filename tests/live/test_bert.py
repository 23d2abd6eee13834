"""BERT and RoBERTa against transformers."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.live.reference import close, redraw, state_of, torch, transformers
from tests.models.draw import draw
from zoo.models.core import registry
from zoo.models.core.errors import UsageError
from zoo.models.core.hf import Fields
from zoo.models.core.tree import size_by_part
from zoo.models.parts.text.bert import BertConfig

SIZES = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 16,
}


def make(kind, **options):
    """A redrawn model of theirs; its configuration names its class, as in a saved folder."""
    config = transformers.BertConfig(**SIZES, **options, architectures=[kind])
    return redraw(getattr(transformers, kind)(config))


def shapes(config):
    variables = jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))
    return nn.unbox(variables)["params"]


def theirs_state(hf):
    """Their tensors under the keys of a checkpoint of a model with heads, tied ones once."""
    prefix = "" if any(key.startswith("bert.") for key in hf.state_dict()) else "bert."
    return {
        prefix + key: leaf
        for key, leaf in state_of(hf).items()
        if not key.startswith("cls.predictions.decoder.")
    }


def converted(hf):
    config = registry.read_hf(Fields("test", hf.config.to_dict()))
    table = registry.base("bert").table(config)
    return config, config.build(), table.load(theirs_state(hf), shapes(config)), table


def run(model, params, *args, method=None):
    """`apply`, compiled."""
    return jax.jit(functools.partial(model.apply, method=method))({"params": params}, *args)


def texts(seed=0):
    """Ids of three texts of several lengths, which of them are no padding, and token types."""
    rng = np.random.default_rng(seed)
    place, lengths = np.arange(9), np.array([[9], [4], [7]])
    types = (place > lengths // 2).astype(np.int32)
    return rng.integers(1, 64, (3, 9)).astype(np.int32), place < lengths, types


def context(seed=1):
    """What cross-attention reads, and which of it."""
    x = np.random.default_rng(seed).normal(size=(3, 5, 24)).astype(np.float32)
    return x, np.arange(5) < np.array([[5], [2], [3]])


def asked(hf, *, is_masked=True, **options):
    ids, mask, types = (torch.tensor(x).long() for x in texts())
    return hf(
        input_ids=ids,
        attention_mask=mask if is_masked else None,
        token_type_ids=types,
        output_hidden_states=True,
        **options,
    )


def ours_batch(is_masked=True):
    ids, mask, types = texts()
    return {"ids": ids, "token_types": types} | ({"text_mask": mask} if is_masked else {})


@pytest.mark.parametrize("is_masked", [True, False])
def test_hidden_states_and_pooler(is_masked):
    hf = make("BertModel")
    _, model, params, _ = converted(hf)
    with torch.no_grad():
        theirs = asked(hf, is_masked=is_masked)

    def both(model, batch):
        """All at once, and in two runs, as models that split BERT use it."""
        mask = batch.get("text_mask")
        x = model.embed(batch["ids"], batch["token_types"])
        text = model.encode(x, mask, stop=2, taps=(0, 1, 2))
        rest = model.encode(text.tokens, mask, start=2, taps=(3,))
        return model(batch), text.taps | rest.taps

    ours, found = run(model, params, ours_batch(is_masked), method=both)
    seen = texts()[1] if is_masked else np.ones((3, 9), bool)
    close(ours.cls, theirs.pooler_output, what="pooler")
    close(ours.tokens[seen], theirs.last_hidden_state.numpy()[seen], what="last hidden state")
    for depth, hidden in enumerate(theirs.hidden_states):
        close(found[depth][seen], hidden.numpy()[seen], what=f"hidden state {depth}")


def test_heads_of_pre_training():
    hf = make("BertForPreTraining")
    _, model, params, _ = converted(hf)
    with torch.no_grad():
        theirs = asked(hf)

    def heads(model, batch):
        features = model(batch)
        return model.predict(features.tokens), model.match(features.cls)

    tokens, match = run(model, params, ours_batch(), method=heads)
    close(tokens[texts()[1]], theirs.prediction_logits.numpy()[texts()[1]], what="tokens")
    close(match, theirs.seq_relationship_logits, what="match")


def test_masked_language_model_and_its_gradients():
    hf = make("BertForMaskedLM")
    _, model, params, table = converted(hf)
    ids, mask, _ = texts()
    chosen = mask & (np.arange(9) % 3 == 1)
    labels = torch.tensor(np.where(chosen, ids, -100)).long()
    theirs = asked(hf, labels=labels)
    theirs.loss.backward()

    def objective(params):
        hidden = model.apply({"params": params}, ours_batch()).tokens
        logits = model.apply({"params": params}, hidden, method="predict")
        logps = jnp.take_along_axis(nn.log_softmax(logits), jnp.asarray(ids)[..., None], -1)
        return -jnp.where(chosen, logps[..., 0], 0).sum() / chosen.sum()

    loss, grads = jax.jit(jax.value_and_grad(objective))(params)
    close(loss, theirs.loss, what="loss")
    found = table.save(jax.tree.map(np.asarray, grads))
    given = {key: leaf.grad for key, leaf in hf.named_parameters() if leaf.grad is not None}
    assert found.keys() == given.keys()
    largest = max(float(grad.abs().max()) for grad in given.values())
    for key, grad in given.items():
        error = np.abs(found[key] - grad.numpy()).max()
        assert error <= 1e-4 * largest, f"{key}: {error}"


@pytest.mark.parametrize("kind", ["RobertaForMaskedLM", "XLMRobertaModel"])
def test_roberta_skips_padding(kind):
    """Padding stands on both sides, and positions count what is none."""
    make_config = getattr(transformers, kind.split("For")[0].removesuffix("Model") + "Config")
    sizes = {**SIZES, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    hf = redraw(getattr(transformers, kind)(make_config(**sizes, architectures=[kind])))
    ids, mask, _ = texts()
    ids, mask[2, 0] = np.maximum(ids, 2), False
    ids = np.where(mask, ids, 1).astype(np.int32)
    with torch.no_grad():
        theirs = hf(torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long())
    config = registry.read_hf(Fields("test", hf.config.to_dict()))
    base, state = registry.base("roberta"), {}
    for key, leaf in state_of(hf).items():
        for pattern, replacement in base.renames:
            key = re.sub(pattern, replacement, key)
        state[key] = leaf  # the tied head too, which must be the token table
    table = base.table(config)
    params, model = table.load(state, shapes(config)), config.build()
    assert table.save(params).keys() == state.keys() - table.aliases.keys()

    def both(model, batch):
        features = model(batch)
        return features if config.pooler else model.predict(features.tokens)

    ours = run(model, params, {"ids": ids, "text_mask": mask}, method=both)
    if config.pooler:
        close(ours.tokens[mask], theirs.last_hidden_state.numpy()[mask])
        close(ours.cls, theirs.pooler_output)
    else:
        close(ours[mask], theirs.logits.numpy()[mask])


@pytest.mark.parametrize("reads", ["all", "some", "nothing"])
def test_decoder_with_cross_attention(reads):
    hf = make("BertLMHeadModel", is_decoder=True, add_cross_attention=True)
    config, model, params, _ = converted(hf)
    assert config.cross_layers == (0, 1, 2)
    x, kept = context()
    options, batch = {}, ours_batch()
    if reads != "nothing":
        options["encoder_hidden_states"], batch["context"] = torch.tensor(x), x
    if reads == "some":
        options["encoder_attention_mask"], batch["context_mask"] = torch.tensor(kept).long(), kept
    with torch.no_grad():
        theirs = asked(hf, use_cache=False, **options)

    def decode(model, batch):
        hidden = model(batch).tokens
        return hidden, model.predict(hidden)

    hidden, logits = run(model, params, batch, method=decode)
    seen = texts()[1]
    close(hidden[seen], theirs.hidden_states[-1].numpy()[seen], what="hidden state")
    close(logits[seen], theirs.logits.numpy()[seen], what="logits")


def test_cross_attention_in_some_layers_reads_the_same_weights():
    """Layers without it own no rows, and a context of zeros differs from none."""
    config = dataclasses.replace(registry.config("bert_tiny"), cross_layers=(1,), context_width=20)
    params = draw(shapes(config))
    assert params["stack"]["layers"]["cross_q"]["kernel"].shape[0] == 1
    assert params["stack"]["layers"]["cross_k"]["kernel"].shape[1] == 20
    assert params["stack"]["layers"]["q"]["kernel"].shape[0] == 2
    model, ids = config.build(), texts()[0]
    alone = run(model, params, {"ids": ids}).tokens
    with_zeros = {"ids": ids, "context": np.zeros((3, 2, 20), np.float32)}
    assert not np.allclose(alone, run(model, params, with_zeros).tokens)
    table = registry.base("bert").table(config)
    again = table.load(table.save(params), shapes(config))
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("kind", ["BertForPreTraining", "BertForMaskedLM", "BertModel"])
def test_conversion_there_and_back_is_exact(kind):
    hf = make(kind)
    _, _, params, table = converted(hf)
    found, want = table.save(params), theirs_state(hf)
    assert found.keys() == want.keys()
    for key, leaf in want.items():
        np.testing.assert_array_equal(found[key], leaf, err_msg=key)


def test_a_checkpoint_says_which_heads_it_has():
    """Google's files are of pre-training, in old names, and call themselves `BertForMaskedLM`."""
    hf = make("BertForPreTraining")
    base = registry.base("bert")
    written = {**hf.config.to_dict(), "architectures": ["BertForMaskedLM"]}
    config = registry.read_hf(Fields("test", written))
    assert not (config.pooler or config.match_head)
    config = base.fit(config, hf.state_dict())
    assert config.pooler and config.lm_head and config.match_head
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    state = {}
    for key, leaf in theirs_state(hf).items():
        for new, former in old.items():
            key = key.replace(new, former)
        for pattern, replacement in base.renames:
            key = re.sub(pattern, replacement, key)
        state[key] = leaf
    decoder = "cls.predictions.decoder.weight"  # a tied tensor may be there twice
    state[decoder] = state["bert.embeddings.word_embeddings.weight"]
    params = base.table(config).load(state, shapes(config))
    assert "match_head" in params


# As transformers counts them: BertForPreTraining, RobertaForMaskedLM.
COUNTS = {
    "bert_base_uncased": 110_106_428,
    "bert_large_uncased": 336_226_108,
    "roberta_base": 124_697_433,
    "xlm_roberta_large": 560_142_482,
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes(name):
    config = registry.config(name)
    written = {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
    }
    if name.startswith("bert"):
        make, theirs = transformers.BertForPreTraining, transformers.BertConfig(**written)
    else:
        written |= {"vocab_size": config.vocab_size, "max_position_embeddings": 514}
        theirs = transformers.RobertaConfig(**written, type_vocab_size=1, layer_norm_eps=1e-5)
        make = transformers.RobertaForMaskedLM
    with torch.device("meta"):
        hf = make(theirs)
    assert registry.read_hf(Fields(name, theirs.to_dict())) == config
    assert size_by_part(shapes(config))["total"] == hf.num_parameters() == COUNTS[name]


UNREADABLE = {
    "frobnicate": {"frobnicate": 1},
    "hidden_act is 'relu'": {"hidden_act": "relu"},
    "position_embedding_type": {"position_embedding_type": "relative_key"},
    "whose names end with ForPreTraining": {"architectures": ["BertForTokenClassification"]},
}


@pytest.mark.parametrize("message", UNREADABLE)
def test_unknown_and_unsupported_fields_raise(message):
    known = transformers.BertConfig(**SIZES).to_dict()
    with pytest.raises(UsageError, match=message):
        registry.read_hf(Fields("config", {**known, **UNREADABLE[message]}))


def test_errors_name_what_is_wrong():
    config = registry.config("bert_tiny")
    model, params = config.build(), draw(shapes(config))
    with pytest.raises(ValueError, match="at most 16"):
        model.apply({"params": params}, {"ids": np.zeros((1, 17), np.int32)})
    batch = {"ids": np.zeros((1, 4), np.int32), "text_mask": np.ones((1, 5), bool)}
    with pytest.raises(ValueError, match="mask"):
        model.apply({"params": params}, batch)
    with pytest.raises(ValueError, match="cross_layers"):
        BertConfig(cross_layers=(12,))
    with pytest.raises(ValueError, match="pooler = True"):
        BertConfig(pooler=False)
