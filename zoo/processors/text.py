"""A byte-level tokenizer that encodes any text and is trained in a moment."""

import functools
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Fast

from zoo.models.core.errors import UsageError, ZooError

PAD, BOS, EOS, IMAGE, USER, ASSISTANT = SPECIAL = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<image>",
    "<user>",
    "<assistant>",
)

# Words with the space before them; every digit by itself, so that numbers are spelled out; what is
# left.
_WORDS = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer:
    """Byte-level byte-pair encoding with the control tokens `SPECIAL`.

    A control token is only ever placed by the program: text that spells one, such as "<image>", is
    encoded as the ordinary characters that it is.
    """

    def __init__(self, fast: Fast):
        missing = [token for token in SPECIAL if fast.token_to_id(token) is None]
        if missing:
            raise ZooError(f"the tokenizer lacks the control tokens {', '.join(missing)}")
        fast.encode_special_tokens = True
        self._fast = fast
        known = fast.get_vocab()
        self.pad, self.bos, self.eos, self.image, self.user, self.assistant = (
            known[token] for token in SPECIAL
        )
        # Questions come from few templates: most texts have been seen before.
        self.encode = functools.lru_cache(maxsize=1 << 14)(self._encode)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 512) -> "Tokenizer":
        """Learn which words of `texts` are worth a token of their own.

        Args:
          texts: examples of what will be encoded; the order does not matter.
          vocab_size: the most tokens there may be, at least 262: all bytes and the control tokens.

        Returns:
          the tokenizer, the same for the same texts.
        """
        least = 256 + len(SPECIAL)
        if vocab_size < least:
            raise UsageError(f"vocab_size is {vocab_size}: want at least {least}")
        fast = Fast(models.BPE())
        fast.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        fast.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        # The chat template sets a space before every text, so a word is learned with it.
        fast.train_from_iterator((" " + text for text in sorted(texts)), trainer)
        return cls(fast)

    @classmethod
    def load(cls, file: str | Path) -> "Tokenizer":
        """Read what `save` wrote. Raises ZooError if it is missing or damaged."""
        try:
            return cls(Fast.from_str(Path(file).read_text("utf-8")))
        except ZooError as error:
            raise ZooError(f"{file}: {error}") from None
        except Exception as error:  # the library raises bare Exception on malformed files
            raise ZooError(f"{file} is not a tokenizer that can be read: {error}") from error

    def save(self, file: str | Path) -> None:
        """Write one JSON file, which the `tokenizers` library reads anywhere."""
        Path(file).write_text(self._fast.to_str(pretty=True), "utf-8")

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the control tokens included; every id is below it."""
        return self._fast.get_vocab_size()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` up to the first `<eos>`, without control tokens and outer spaces."""
        answer = list(itertools.takewhile(lambda i: i != self.eos, map(int, ids)))
        return self._fast.decode(answer, skip_special_tokens=True).strip()

    def _encode(self, text: str) -> tuple[int, ...]:
        """The ids of `text` as it stands; never a control token."""
        return tuple(self._fast.encode(text, add_special_tokens=False).ids)

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} tokens)"

    def __reduce__(self) -> tuple[Any, ...]:  # what `encode` remembers does not travel
        return _of_json, (self._fast.to_str(),)


def _of_json(text: str) -> Tokenizer:
    return Tokenizer(Fast.from_str(text))
