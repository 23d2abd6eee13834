"""Vocabularies of SentencePiece (`tokenizer.model`, `spiece.model`), read without its library.

The file is one message of Protocol Buffers, of which a few fields matter. What it describes is
rebuilt from the parts of the `tokenizers` library.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from zoo.models.core.errors import ZooError

UNIGRAM, BPE = 1, 2
"""Values of `Vocabulary.kind`: how the most likely pieces are found."""

CONTROL, USER_DEFINED = 3, 4
"""Values of `Piece.kind` that text is searched for first."""

SPACE = "▁"
"""What pieces have in place of a space."""

_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""


@dataclass(frozen=True)
class Piece:
    """One token: its text, its log-probability (or minus its rank), and its kind (1 is normal)."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class Vocabulary:
    """What a SentencePiece file says.

    Attributes:
      pieces: all tokens; the place is the id.
      kind: `UNIGRAM` or `BPE`.
      byte_fallback: whether characters that no piece has are spelled as bytes.
      unknown: id of the piece for what cannot be spelled.
      charsmap: normalisation of characters in the form of the library, empty for none.
    """

    pieces: tuple[Piece, ...]
    kind: int
    byte_fallback: bool
    unknown: int
    charsmap: bytes

    @property
    def ids(self) -> dict[str, int]:
        """Id of every piece."""
        return {piece.text: i for i, piece in enumerate(self.pieces)}

    def merges(self) -> list[tuple[str, str]]:
        """The pairs that byte-pair encoding joins, most urgent first: earlier pieces first."""
        ids = self.ids
        found = [
            (ids[whole.text], whole.text[:cut], whole.text[cut:])
            for whole in self.pieces
            for cut in range(1, len(whole.text))
            if whole.text[:cut] in ids and whole.text[cut:] in ids
        ]
        found.sort(key=lambda pair: (pair[0], len(pair[1]), len(pair[2])))
        return [(left, right) for _, left, right in found]


def read_vocabulary(file: Path) -> Vocabulary:
    """Read a SentencePiece file.

    Raises:
      ZooError: it cannot be read, is damaged, or of a kind other than unigram and byte-pair.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ZooError(f"{file} cannot be read: {error.strerror or error}") from error
    try:
        found = _fields(content)
        pieces = tuple(_piece(_fields(part)) for part in found.get(1, ()))
        trainer = _fields(found.get(2, [b""])[-1])
        normalizer = _fields(found.get(3, [b""])[-1])
        kind = trainer.get(3, [UNIGRAM])[-1]
        vocabulary = Vocabulary(
            pieces=pieces,
            kind=kind,
            byte_fallback=bool(trainer.get(35, [0])[-1]),
            unknown=trainer.get(40, [0])[-1],
            charsmap=bytes(normalizer.get(2, [b""])[-1]),
        )
    except (ValueError, LookupError, TypeError, struct.error) as error:
        raise ZooError(f"{file} is not a SentencePiece vocabulary, or damaged: {error}") from error
    if not pieces or kind not in (UNIGRAM, BPE) or not 0 <= vocabulary.unknown < len(pieces):
        raise ZooError(
            f"{file} has {len(pieces)} pieces of kind {kind}: want a SentencePiece vocabulary of "
            f"kind {UNIGRAM} (unigram) or {BPE} (byte pairs)"
        )
    return vocabulary


def llama_tokenizer(
    vocabulary: Vocabulary,
    *,
    prepend: str = "first",
    bos: str | None = None,
    eos: str | None = None,
) -> Tokenizer:
    """The tokenizer of Llama 1 and 2 and what descends from them.

    A space is set before the text (`prepend` "first"), before every part between control tokens
    ("always", which the older code did), or nowhere ("never"), unless one is there. `bos` and `eos`
    are put around.
    """
    fast = Tokenizer(_model(vocabulary))
    add_pieces(fast, vocabulary)
    like_llama(fast, prepend)
    around = [token for token in (bos, eos) if token is not None]
    single = " ".join([*([bos] if bos else []), "$A", *([eos] if eos else [])])
    fast.post_processor = TemplateProcessing(
        single=single, special_tokens=[(token, fast.token_to_id(token)) for token in around]
    )
    return fast


def like_llama(fast: Tokenizer, prepend: str) -> None:
    """Give `fast` what surrounds the model in Llama's tokenizer; see `llama_tokenizer`."""
    fast.normalizer = None
    fast.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=SPACE, prepend_scheme=prepend, split=False
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prepend != "never":
        steps.append(decoders.Strip(content=" ", left=1))
    fast.decoder = decoders.Sequence(steps)


def siglip_tokenizer(vocabulary: Vocabulary, *, eos: str, lowercase: bool = True) -> Tokenizer:
    """The tokenizer of SigLIP: lower case, without punctuation, single spaces, `eos` at the end."""
    steps: list[Any] = [normalizers.Lowercase()] if lowercase else []
    steps += [
        normalizers.Replace(Regex(_PUNCTUATION), ""),
        normalizers.Replace(Regex(rf"[\s{SPACE}]+"), " "),
        normalizers.Strip(),
    ]
    if vocabulary.charsmap:
        steps.append(normalizers.Precompiled(vocabulary.charsmap))
    fast = Tokenizer(_model(vocabulary))
    fast.normalizer = normalizers.Sequence(steps)
    fast.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    fast.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    add_pieces(fast, vocabulary)
    fast.post_processor = TemplateProcessing(
        single=f"$A {eos}", special_tokens=[(eos, fast.token_to_id(eos))]
    )
    return fast


def add_pieces(fast: Tokenizer, vocabulary: Vocabulary) -> None:
    """Let `fast` find the control and user-defined pieces of `vocabulary` in text."""
    fast.add_tokens(
        [
            AddedToken(piece.text, normalized=False, special=piece.kind == CONTROL)
            for piece in vocabulary.pieces
            if piece.kind in (CONTROL, USER_DEFINED)
        ]
    )


def _model(vocabulary: Vocabulary) -> Any:
    if vocabulary.kind == UNIGRAM:
        return models.Unigram(
            [(piece.text, piece.score) for piece in vocabulary.pieces],
            unk_id=vocabulary.unknown,
            byte_fallback=vocabulary.byte_fallback,
        )
    return models.BPE(
        vocab=vocabulary.ids,
        merges=vocabulary.merges(),
        unk_token=vocabulary.pieces[vocabulary.unknown].text,
        fuse_unk=True,
        byte_fallback=vocabulary.byte_fallback,
    )


def _piece(fields: dict[int, list[Any]]) -> Piece:
    (score,) = struct.unpack("<f", fields.get(2, [bytes(4)])[-1])
    return Piece(bytes(fields[1][-1]).decode("utf-8"), score, fields.get(3, [1])[-1])


def _fields(message: bytes) -> dict[int, list[Any]]:
    """Field number -> values of one message: ints, or bytes where the length is told."""
    found: dict[int, list[Any]] = {}
    for number, value in _parts(memoryview(message)):
        found.setdefault(number, []).append(value)
    return found


def _parts(message: memoryview) -> Iterator[tuple[int, Any]]:
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(message, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"field {number} has the unknown wire type {wire}")
        if at + length > len(message):
            raise ValueError(f"field {number} ends behind the end")
        yield number, bytes(message[at : at + length])
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """An integer of seven bits per byte, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("an integer has no end")
