"""The decoding loop on a tiny decoder: seeds, ends, chunks, lengths, and what is compiled."""

import jax
import numpy as np
import pytest

from tests.models.draw import draw
from zoo.generate.autoregressive import Answers, Reader, generate, padded
from zoo.generate.sampling import Sampling
from zoo.models.core.errors import UsageError
from zoo.models.parts.assemblies.language import CausalLMConfig
from zoo.models.parts.decoders.gqa import DecoderConfig
from zoo.processors.lengths import text_length

V, CONTEXT, LENGTH = 40, 64, 10
LENGTHS = (9, 3, 6)


@pytest.fixture(scope="module")
def model():
    sizes = {"width": 16, "depth": 2, "num_heads": 2, "num_kv_heads": 1, "mlp_dim": 24}
    return CausalLMConfig(DecoderConfig(vocab_size=V, context=CONTEXT, **sizes)).build()


@pytest.fixture(scope="module")
def params(model):
    return draw(jax.eval_shape(model.init, jax.random.key(0), model.config.inputs(1))["params"])


@pytest.fixture(scope="module")
def prompts():
    ids = np.random.default_rng(0).integers(0, V, (3, 9)).astype(np.int32)
    return {"ids": ids, "text_mask": np.arange(9) < np.array(LENGTHS)[:, None]}


@pytest.fixture(scope="module")
def ask(model, params, prompts):
    """Answers to the prompts, or to those of some rows."""

    def ask(sampling=None, rows=slice(None), *, eos_id=(), length=LENGTH):
        batch = {name: array[rows] for name, array in prompts.items()}
        options = {"max_new_tokens": length, "eos_id": eos_id, "sampling": sampling}
        return generate(model, params, batch, **options)

    return ask


def test_a_row_is_answered_as_if_alone(ask):
    for sampling in (Sampling(), Sampling(repetition_penalty=2.0), Sampling(1.5, 9, 0.9, 1.2, 5)):
        together = ask(sampling)
        for row in range(3):
            seed = sampling.seed + row
            alone = ask(Sampling(**{**vars(sampling), "seed": seed}), slice(row, row + 1))
            assert alone[0].tolist() == together[row].tolist()


def test_seeds(ask):
    first = ask(Sampling(2.0, seed=1))
    assert (ask(Sampling(2.0, seed=1)) == first).all()
    assert (ask(Sampling(2.0, seed=9)) != first).any()
    assert (ask(Sampling(1.0, top_k=1, seed=1)) == ask()).all()
    assert (ask(Sampling(1e-4, seed=4)) == ask()).all()


def test_a_penalty_counts_prompt_and_answer(model, params, prompts, ask):
    penalty, width = 1.7, 16
    apply = jax.jit(model.apply, static_argnames="method")
    answers = ask(Sampling(repetition_penalty=penalty))
    for prompt, length, answer in zip(prompts["ids"], LENGTHS, answers, strict=True):
        ids = prompt[:length].tolist()
        while len(ids) < width:
            row = np.array([ids + [0] * (width - len(ids))], np.int32)
            output = apply({"params": params}, {"ids": row})
            head = apply({"params": params}, output.hidden, method="head")
            logits = np.array(head[0, len(ids) - 1])
            said = logits[ids]
            logits[ids] = np.where(said < 0, said * penalty, said / penalty)
            ids.append(int(logits.argmax()))
        more = min(width - length, LENGTH)
        assert answer[:more].tolist() == ids[length : length + more]
    assert (answers != ask()).any()


def test_any_of_several_tokens_ends_an_answer(ask):
    plain = ask()
    ends = (int(plain[0, 4]), int(plain[1, 6]))
    for row, full in zip(ask(eos_id=ends), plain, strict=True):
        at = next((i for i, token in enumerate(full) if token in ends), LENGTH - 1)
        assert row.tolist() == [*full[: at + 1], *[ends[0]] * (LENGTH - 1 - at)]


def test_chunks_are_the_same_as_one_run(model, params, prompts, ask):
    sampling = Sampling(1.5, top_p=0.9, seed=2)
    answers = Answers(
        Reader(model), params, prompts, max_new_tokens=LENGTH, eos_id=7, sampling=sampling
    )
    whole = ask(sampling, eos_id=7)
    seen = []
    while not answers.done:
        seen.append(answers.rows())
        answers.advance(3)
    assert (answers.ids() == whole).all()
    for early in seen:
        for part, row in zip(early, answers.rows(), strict=True):
            assert part == row[: len(part)]
    assert [len(row) for row in seen[0]] == [0 if row[0] == 7 else 1 for row in whole]


def test_rows_can_be_ended_from_outside(model, params, prompts, ask):
    answers = Answers(Reader(model), params, prompts, max_new_tokens=LENGTH, eos_id=())
    answers.advance(2)
    answers.end(np.array([False, True, False]))
    answers.advance(LENGTH)
    assert [len(row) for row in answers.rows()] == [LENGTH, 3, LENGTH]
    assert (answers.ids()[[0, 2]] == ask()[[0, 2]]).all()
    assert answers.done
    answers.advance(1)
    assert [len(row) for row in answers.rows()] == [LENGTH, 3, LENGTH]


def test_lengths_up_to_the_room(ask):
    full = ask(length=40)
    for length in (1, 2, 15, 16, 17, 33):
        found = ask(length=length)
        assert found.shape == (3, length)
        assert (found == full[:, :length]).all()


def test_padding_changes_nothing(model, params, prompts, ask):
    wide = padded(prompts)
    assert wide["ids"].shape == wide["text_mask"].shape == (3, 16)
    assert not wide["text_mask"][:, 9:].any()
    assert padded(wide)["ids"] is wide["ids"]
    tight = {"ids": prompts["ids"][:1]}
    found = generate(model, params, tight, max_new_tokens=LENGTH, eos_id=())
    assert (found == ask(rows=slice(1))).all()


def test_lengths_to_compile_for():
    assert [text_length(n) for n in (1, 16, 17, 20, 21, 100, 1000, 1025)] == [
        *(16, 16, 20, 20, 24, 112, 1024, 1280)
    ]
    assert len({text_length(n) for n in range(1, 4097)}) <= 1 + 4 * 8


def test_few_programs_are_compiled(model, params):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )

    def ask(width, length, sampling=None, eos_id=3, rows=2):
        before = len(compiled)
        batch = {"ids": np.ones((rows, width), np.int32)}
        options = {"max_new_tokens": length, "eos_id": eos_id, "sampling": sampling}
        generate(model, params, batch, **options)
        return len(compiled) - before

    ask(17, 12)
    assert ask(17, 12) == 0
    assert ask(18, 9, Sampling(0.7, 5, 0.9, 1.1, 8), eos_id=4) == 0
    assert ask(20, 16, Sampling(2.0)) == 0
    assert ask(20, 17) > 0
    assert ask(21, 16) > 0


def test_the_context_is_a_limit(model, params, prompts):
    def ask(length, batch=prompts):
        return generate(model, params, batch, max_new_tokens=length, eos_id=())

    assert ask(CONTEXT - max(LENGTHS)).shape == (3, CONTEXT - max(LENGTHS))
    with pytest.raises(UsageError, match="prompt 1 of 3 has 9 tokens, images included, and 56 may"):
        ask(CONTEXT - max(LENGTHS) + 1)
    long = {"ids": np.ones((1, CONTEXT), np.int32)}
    with pytest.raises(UsageError, match="the context of the model is 64 tokens"):
        ask(1, long)
