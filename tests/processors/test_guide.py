"""The question by which methods choose vision tokens: found in every form of a prompt, and asked
for where it is missing.
"""

import jax
import numpy as np
import pytest

from tests.models.draw import draw
from tests.processors.test_hub import DECODER, LLAVA, PICTURE, TOWER, write_checkpoint
from zoo.loaded import Loaded
from zoo.models.core.errors import UsageError, ZooError
from zoo.models.core.types import Reserve
from zoo.models.parts.assemblies.dual import DualConfig
from zoo.models.parts.reduce.base import Reducer
from zoo.models.parts.reduce.report import seen_cells
from zoo.models.parts.text.clip import TextConfig
from zoo.models.reduction.mmtok import MMTok
from zoo.models.reduction.recoverable_compression import RecoverableCompression
from zoo.processors import ImageProcessor, Processor, Tokenizer, guide
from zoo.processors.hf import load_processor

SHOWN = {"type": "image"}
TALK = [
    {"role": "user", "content": [SHOWN, {"type": "text", "text": "a cat?"}]},
    {"role": "assistant", "content": "no"},
    {"role": "user", "content": [{"type": "text", "text": " is it <turn> then? "}]},
]


def open_model(folder, config, processor):
    shapes = jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))["params"]
    return Loaded(folder, config, config.build(), jax.device_put(draw(shapes)), processor, {})


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("llava"))
    return open_model(folder, LLAVA, load_processor(folder, LLAVA))


@pytest.fixture(scope="module")
def reduced(loaded):
    """It keeps one of the four tokens of a picture."""
    return loaded.with_(reducer="mmtok", keep=1)


def guided(loaded, batch, row=0):
    """The text that guides."""
    return loaded.processor.tokenizer._fast.decode(batch["ids"][row][batch["guide"][row]], False)


def test_the_question_is_found(loaded, reduced):
    batch = reduced.encode([PICTURE, PICTURE], ["  which dog? ", TALK])
    assert guided(loaded, batch).strip() == "which dog?"
    assert guided(loaded, batch, 1).strip() == "is it <turn> then?"
    assert batch["guide"].shape == batch["ids"].shape
    assert batch["shown"].tolist() == [[[0, 0, 28, 28]]] * 2  # this processor crops
    one = reduced.encode(PICTURE, "o")  # which other words have too
    assert one["guide"].sum() == 1
    plain = loaded.encode(PICTURE, "  which dog? ")
    assert "guide" not in plain
    number = plain["text_mask"].sum()
    np.testing.assert_array_equal(plain["ids"][0, :number], batch["ids"][0, :number])
    raw = loaded.processor.encode_prompt(PICTURE, "<image> what?", raw=True, reducer=MMTok(2))
    assert guided(loaded, raw) == "<image> what?"
    plain = loaded.processor.encode_prompt(PICTURE, "what?", reducer=Reducer(2))
    assert "guide" not in plain


def test_no_question_is_refused(loaded, reduced):
    silent = [{"role": "user", "content": [SHOWN]}]
    with pytest.raises(UsageError, match="MMTok chooses vision tokens by the question"):
        reduced.encode(PICTURE, silent)
    assert loaded.encode(PICTURE, silent)["ids"].shape[0] == 1
    assert "guide" in reduced.encode(None, "what?")


def test_a_prompt_that_only_fits_reduced(loaded, reduced):
    (short,) = loaded.processor.expanded_ids(PICTURE, "x")
    longest = "x" * (1 + DECODER.context - len(short) + 2)
    with pytest.raises(ZooError, match="has 66 tokens with its pictures"):
        loaded.generate(PICTURE, longest)
    assert isinstance(reduced.generate(PICTURE, longest, max_new_tokens=1), str)
    with pytest.raises(UsageError, match="context of the model is 64"):
        reduced.generate(PICTURE, longest, max_new_tokens=2)
    with pytest.raises(ZooError, match="takes 64"):
        reduced.generate(PICTURE, "x" * 80)


def test_a_vector_of_the_question(loaded, tmp_path):
    """As a dual encoder has the question alone."""
    sizes = {"vocab_size": 300, "width": 8, "depth": 1, "num_heads": 2, "mlp_dim": 8}
    text = TextConfig(**sizes, max_length=24, pool="last")
    dual = DualConfig(TOWER, text, embedding_dim=6)
    folder = write_checkpoint(tmp_path / "dual")
    clip = open_model(folder, dual, load_processor(folder, dual))
    model = loaded.with_(reducer=RecoverableCompression(2, embedding_dim=6))
    with pytest.raises(UsageError, match="guided_by"):
        model.encode(PICTURE, "which?")
    with pytest.raises(UsageError, match="dual encoder"):
        model.guided_by(loaded)
    batch = model.guided_by(clip).encode([PICTURE] * 2, ["which?", TALK])
    alone = model.guided_by(clip).encode([PICTURE] * 2, ["which?", "is it <turn> then?"])
    assert batch["guide_vector"].shape == (2, 6)
    np.testing.assert_allclose(batch["guide_vector"], alone["guide_vector"], atol=1e-6)
    assert np.abs(batch["guide_vector"][0] - batch["guide_vector"][1]).max() > 1e-3


def left(model, batch):
    """The vision tokens that leave the decoder."""

    def look(module, batch):
        stream, memory = module.stream(batch, None)
        return module.decoder.run(stream, Reserve(), memory)[0].tokens

    run = jax.jit(lambda params, batch: model.model.apply({"params": params}, batch, method=look))
    return [sorted(row[row >= 0].tolist()) for row in seen_cells(run(model.params, batch))]


@pytest.mark.parametrize("method", ["mmtok", "fastv"])
def test_a_second_question_about_what_the_first_has_chosen(loaded, method):
    """By its own question, or by the first: then the same tokens as when that was alone."""
    model = loaded.with_(reducer=method, keep=2)
    talk = [TALK[0], {"role": "model", "content": "no"}, TALK[2]]
    alone, anew = model.encode(PICTURE, talk[:1]), model.encode(PICTURE, talk)
    again = model.encode([PICTURE] * 2, [talk, "a cat?"], guide="first")
    want = alone["text_mask"] & alone.get("guide", True)
    np.testing.assert_array_equal(again["ids"][again["guide"]], np.tile(alone["ids"][want], 2))
    assert not np.array_equal(anew.get("guide"), again["guide"][:1])
    [first] = left(model, alone)
    assert len(first) == 2 and left(model, again) == [first] * 2


def test_where_pictures_lie_in_squares(tmp_path):
    """With two prompts, of which one shows a picture less."""
    facts = {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    processor = load_processor(write_checkpoint(tmp_path, **facts), LLAVA)
    given = [[PICTURE, PICTURE.swapaxes(0, 1)], PICTURE]
    batch = processor.encode_prompt(given, ["a?", "b?"], reducer=MMTok(2))
    tall, wide, whole = [0, 3, 28, 24], [3, 0, 24, 28], [0, 0, 28, 28]
    assert batch["shown"].tolist() == [[tall, wide], [tall, whole]]
    assert "shown" not in processor.encode_prompt(PICTURE, "a?", reducer=Reducer(2))


def test_models_that_were_trained_here(tmp_path):
    processor = Processor(ImageProcessor(28), Tokenizer.train(["which digit?"], 300), 20, 2)
    batch = processor.encode_prompt([(PICTURE, PICTURE), None], ["which?", "a"], reducer=MMTok(2))
    words = [list(processor.tokenizer.encode(" " + text)) for text in ("which?", "a")]
    assert [row[kept].tolist() for row, kept in zip(batch["ids"], batch["guide"])] == words
    assert batch["shown"][0].tolist() == [[0, 3, 28, 24]] * 2  # in the middle of a square
    plain = processor.encode_prompt(PICTURE, "which?", reducer=Reducer(2))
    assert "guide" not in plain
    with pytest.raises(UsageError, match="asks none"):
        processor.encode_prompt([(PICTURE, PICTURE)], ["<image><image>"], reducer=MMTok(2))


def test_marks_leave_the_text_as_it_is():
    for text in ("plain", "  spaced\n", "", " "):
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}]
        rendered = "".join(f"<{m['role']}>{m['content']}" for m in guide.marked(messages))
        clean, spans = guide.unmarked(rendered)
        assert clean == f"<user>{text}<assistant>x"
        assert [clean[slice(*span)] for span in spans] == ([text.strip()] if text.strip() else [])
        assert guide.question_of(messages) == text.strip()
    assert guide.question_of(replace_last(TALK, [SHOWN])) == ""
    assert guide.question_of([]) == "" and guide.marked([]) == []


def replace_last(messages, content):
    return [*messages[:-1], {**messages[-1], "content": content}]
