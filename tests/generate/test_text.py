"""From tokens to text: whole characters, stop strings cut exactly, pieces that never change."""

import itertools

import numpy as np
import pytest

from zoo.generate.text import first_stop, settled, spoken, steady, whole
from zoo.models.core.errors import UsageError


def decode(ids):
    """One byte for each token."""
    return bytes(ids).decode("utf-8", errors="replace")


BROKEN = "\N{REPLACEMENT CHARACTER}"


class Script:
    """Answers that are written already; `advance` shows more of them."""

    def __init__(self, *texts):
        self.written = [list(text.encode()) for text in texts]
        self.shown, self.most = 1, max(map(len, self.written))
        self.ended = np.zeros(len(texts), bool)
        self.cut = [len(row) for row in self.written]  # where they are ended from outside

    def rows(self):
        return [
            row[: min(self.shown, cut)] for row, cut in zip(self.written, self.cut, strict=True)
        ]

    @property
    def done(self):
        return self.shown >= self.most or bool(self.ended.all())

    def advance(self, tokens):
        self.shown += tokens

    def end(self, rows):
        self.cut = [
            self.shown if new and not old else cut
            for cut, new, old in zip(self.cut, rows, self.ended, strict=True)
        ]
        self.ended = self.ended | rows


LINES = ("two words. STOP more", "  é😀 ünï", "a\nb", "ST", "")


@pytest.mark.parametrize("every", [1, 2, 3, 7, 100])
def test_texts_grow_into_the_same_answers(every):
    script = Script(*LINES)
    texts = list(spoken(script, decode, stop=("STOP", "\n"), every=every))
    assert texts[-1] == ["two words.", "é😀 ünï", "a", "ST", ""]
    for earlier, later in itertools.pairwise(texts):
        assert all(new.startswith(old) for old, new in zip(earlier, later, strict=True))
    assert not any(BROKEN in text for line in texts for text in line)
    assert not any(text.endswith(("S", "STO")) for line in texts[:-1] for text in line)


def test_nothing_is_written_after_a_stop_string():
    script = Script("one. two. three.")
    list(spoken(script, decode, stop=(". ",), every=1))
    assert script.shown == len("one. ")


def test_without_stop_strings_all_is_written_at_once():
    assert len(list(spoken(Script("abc"), decode))) == 2


@pytest.mark.parametrize("every", [1, 2, 5])
def test_a_character_that_is_never_finished_is_left_out(every):
    script = Script("a😀")
    script.written = [script.written[0][:-1]]
    *_, [text] = spoken(script, decode, every=every)
    assert text == "a"


def test_a_decoder_that_takes_back_whole_characters():
    """With byte tokens that are no character, some decoders spell the characters before them
    anew."""

    def strict(ids):
        try:
            return bytes(ids).decode()
        except UnicodeDecodeError:
            return BROKEN * len(ids)

    assert whole("é".encode() + "é".encode()[:1], strict) == "é"
    script = Script("éé")
    script.written = [script.written[0][:-1]]
    texts = [texts[0] for texts in spoken(script, strict, byte_id=0xFF, every=1)]
    assert texts == ["", "", "", "é"]

    # Nothing is shown that may be taken back: all of these bytes are one run.
    script = Script("Qé")
    script.written = [[*script.written[0], 0xFF]]
    script.most = 4
    texts = [texts[0] for texts in spoken(script, strict, byte_id=0xFF, every=1)]
    assert texts == ["", "", "", "Qé"]
    assert steady(list(b"Q"), strict, 0xFF) == ""
    assert steady(list(b"Q"), strict, None) == "Q"


def test_settled():
    assert settled("  a b \n", ()) == "a b"
    assert settled("a b ST", ("STOP",)) == "a b"
    assert settled("a b SST", ("STOP",)) == "a b S"
    assert settled("aab", ("abab", "bc")) == "a"
    assert settled("", ("x",)) == ""


def test_the_first_stop_string_counts():
    assert first_stop("a b c", ("c", "b")) == 2
    assert first_stop("a b c", ("d",)) == 5
    assert first_stop("a b c", ()) == 5


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(UsageError, match="stop string is empty"):
        list(spoken(Script("a"), decode, stop=("b", "")))
    with pytest.raises(UsageError, match="every is 0"):
        list(spoken(Script("a"), decode, every=0))
