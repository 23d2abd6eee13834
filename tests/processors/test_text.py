"""Tokenizer and chat template."""

import subprocess
import sys

import pytest

from zoo.models.core.errors import UsageError, ZooError
from zoo.processors import Tokenizer, chat
from zoo.processors.text import SPECIAL

TEXTS = (
    "how many digits are there?",
    "which digit is leftmost?",
    "yes",
    "no",
    *map(str, range(28)),
)
STRANGE = (
    "",
    " ",
    "plain",
    "  two  spaces  and\ttabs\r\n",
    "naïve café ﬁ Ω",
    "漢字 🦓🏽 \u200b\x00",
    "<image> <eos></s>",
    "1234567 and 3.14",
    "# $ % & ' ` ~ ^",
)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS)


@pytest.mark.parametrize("text", STRANGE)
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer._fast.decode(list(ids), skip_special_tokens=False) == text
    assert tokenizer.decode(ids) == text.strip()


@pytest.mark.parametrize("control", SPECIAL)
def test_text_never_becomes_a_control_token(tokenizer, control):
    controls = set(range(len(SPECIAL)))
    for text in (control, f"see {control} here", control * 2, f"<{control}>"):
        assert not controls & set(tokenizer.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_common_words_are_one_token_and_digits_stand_alone(tokenizer):
    assert len(tokenizer.encode(" how many digits are there?")) == 6
    assert len(tokenizer.encode(" 7")) == 1
    assert len(tokenizer.encode(" 27")) == 2
    three, seven = tokenizer.encode(" 3"), tokenizer.encode(" 7")
    assert tokenizer.encode(" 3 7 3") == three + seven + three


def test_training_gives_the_same_tokenizer_in_any_process_and_order(tokenizer):
    code = (
        "import sys; from zoo.processors import Tokenizer;"
        f"print(Tokenizer.train({TEXTS[::-1]!r})._fast.to_str())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == tokenizer._fast.to_str()


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.vocab_size == tokenizer.vocab_size
    for text in (*STRANGE, *TEXTS):
        assert loaded.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"version": "1.0"}'])
def test_a_damaged_tokenizer_is_refused_by_name(tmp_path, content):
    file = tmp_path / "tokenizer.json"
    file.write_text(content)
    with pytest.raises(ZooError, match=r"tokenizer\.json"):
        Tokenizer.load(file)
    with pytest.raises(ZooError, match=r"gone\.json"):
        Tokenizer.load(tmp_path / "gone.json")


def test_a_tokenizer_without_control_tokens_is_refused(tmp_path, tokenizer):
    file = tmp_path / "tokenizer.json"
    file.write_text(tokenizer._fast.to_str().replace("<image>", "<picture>"))
    with pytest.raises(ZooError, match=r"tokenizer\.json: the tokenizer lacks .*<image>"):
        Tokenizer.load(file)


def test_a_vocabulary_that_cannot_hold_all_bytes_is_refused():
    with pytest.raises(UsageError, match="want at least 262"):
        Tokenizer.train(TEXTS, vocab_size=100)
    assert Tokenizer.train(TEXTS, vocab_size=262).vocab_size == 262


def test_decoding_stops_at_the_end_of_the_answer(tokenizer):
    ids = [*tokenizer.encode(" yes"), tokenizer.eos, *tokenizer.encode(" no")]
    assert tokenizer.decode(ids) == "yes"
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([tokenizer.pad, tokenizer.eos]) == ""


def test_only_answers_and_their_ends_are_learned(tokenizer):
    t = tokenizer
    turns = [("which digit is leftmost?", "7"), ("yes?", " no ")]
    ids, labels, numbers = chat.conversation(t, turns)
    first, second = t.encode(" which digit is leftmost?"), t.encode(" yes?")
    seven, no = t.encode(" 7"), t.encode(" no")
    expected = [t.bos, t.image, t.user, *first, t.assistant, *seven, t.eos]
    expected += [t.user, *second, t.assistant, *no, t.eos]
    assert ids == expected
    learned = [(i, label) for i, label in enumerate(labels) if label != chat.IGNORE]
    ends = [i for i, token in enumerate(ids) if token == t.eos]
    assert learned == [(i, ids[i]) for end in ends for i in (end - 1, end)]
    assert numbers == [0, 0] + [1] * (len(first) + 4) + [2] * (len(second) + 4)


def test_a_prompt_is_the_beginning_of_its_conversation(tokenizer):
    ids, _, _ = chat.conversation(tokenizer, [("yes?", "no")])
    prompt = chat.prompt(tokenizer, " yes? ")
    assert ids[: len(prompt)] == prompt
    assert prompt[-1] == tokenizer.assistant


def test_empty_texts_are_refused(tokenizer):
    with pytest.raises(ZooError, match="question is empty"):
        chat.prompt(tokenizer, " \n")
    with pytest.raises(ZooError, match=r"answer to 'a\?' is empty"):
        chat.conversation(tokenizer, [("a?", "")])
    with pytest.raises(ZooError, match="no turns"):
        chat.conversation(tokenizer, [])
