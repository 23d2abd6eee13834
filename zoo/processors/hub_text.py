"""Tokenizers of published checkpoints, with the ids that transformers 5 gives.

`tokenizer.json` says all that matters and is read by the `tokenizers` library; `tokenizer.model`
and `spiece.model` are rebuilt by `zoo.processors.sentencepiece`, `vocab.json` with `merges.txt` is
GPT-2's. What differs from transformers:

  - Control tokens that a text spells, such as "<image>" in a question, are ordinary characters
    unless the caller says that they count.
  - SigLIP's lower case is Unicode's of single characters: a Greek sigma at the end of a word is σ.
"""

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Fast
from tokenizers.processors import TemplateProcessing

from zoo.models.core.errors import ZooError
from zoo.processors import sentencepiece
from zoo.processors.files import read_json

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"

_DEFAULTS: dict[str, dict[str, str]] = {
    "BertTokenizer": {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    },
    "CLIPTokenizer": {
        "unk_token": "<|endoftext|>",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    },
    "GPT2Tokenizer": {
        "unk_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
    },
    "GemmaTokenizer": {
        "unk_token": "<unk>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
    },
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "Qwen2Tokenizer": {
        "unk_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    },
    "SiglipTokenizer": {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>"},
}
"""Special tokens that the classes of transformers know when a checkpoint does not name them."""

_AS_IT_STANDS = frozenset({"llava", "llava_next", "mistral", "phi3", "qwen2"})
"""Architectures whose `tokenizer.json` counts although their `tokenizer_class` is Llama's: for all
others that class replaces what surrounds the vocabulary."""

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # never characters of a text: Unicode has set them aside
_UNBOUNDED = 10**9  # `model_max_length` of tokenizers that have no limit


class HubTokenizer:
    """The tokenizer of a checkpoint.

    Attributes:
      names: special tokens by name, such as {"bos_token": "<s>"}; chat templates refer to them.
      byte: the id of the byte 0xFF, which is in no character; None for a tokenizer that does not
        spell what it has no token for in bytes.
      bos, eos, pad: ids; None for those that the tokenizer does not have.
      max_length: the most tokens of a text; None where no limit is told.
    """

    def __init__(self, fast: Fast, names: Mapping[str, str], max_length: int | None = None):
        fast.no_truncation()
        fast.no_padding()
        self._fast = fast
        self._pattern = functools.lru_cache(maxsize=8)(self._find_control_tokens)
        self.names = dict(names)
        self.max_length = max_length
        self.byte = fast.token_to_id("<0xFF>")
        self.bos, self.eos, self.pad = (
            None if (token := self.names.get(name)) is None else fast.token_to_id(token)
            for name in ("bos_token", "eos_token", "pad_token")
        )

    @classmethod
    def load(cls, folder: str | Path) -> "HubTokenizer":
        """Read the tokenizer of a checkpoint.

        Raises:
          ZooError: there is none, or a file is damaged or of a kind that is not understood.
        """
        folder = Path(folder)
        config = read_json(folder / CONFIG)
        if "added_tokens_decoder" not in config:  # the older form has files for these
            listed = read_json(folder / "added_tokens.json")
            added = {number: {"content": token} for token, number in listed.items()}
            config = {**config, **read_json(folder / "special_tokens_map.json")}
            config["added_tokens_decoder"] = added
        family = str(config.get("tokenizer_class") or "").removesuffix("Fast")
        names = _DEFAULTS.get(family, {}) | _names(config)
        fast = _open(folder, family, config, names)
        _add_missing(fast, config, names)
        limit = config.get("model_max_length")
        return cls(fast, names, None if limit is None or limit > _UNBOUNDED else int(limit))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the added ones included."""
        return self._fast.get_vocab_size()

    def id(self, token: str) -> int:
        """The id of `token`. Raises ZooError if the tokenizer does not have it."""
        found = self._fast.token_to_id(token)
        if found is None:
            raise ZooError(f"the tokenizer has no token {token!r}")
        return int(found)

    def token(self, number: int) -> str:
        """The token with the id `number`. Raises ZooError if there is none."""
        found = self._fast.id_to_token(number)
        if found is None:
            raise ZooError(f"the tokenizer has no token with the id {number}")
        return str(found)

    def encode(self, text: str, *, control: bool = False, around: bool = True) -> list[int]:
        """The ids of a text.

        Args:
          text: anything.
          control: whether control tokens that the text spells count as such; by default they are
            ordinary characters.
          around: whether the tokens that begin and end a text are put around.
        """
        return self.encode_marked(text if control else self.mark(text), around=around)

    def mark(self, value: Any, literals: str = "") -> Any:
        """`value` with its control tokens marked, so that `encode_marked` spells them out.

        Args:
          value: a text, or lists and mappings of texts as deep as you like.
          literals: added tokens that are not special count as control tokens where they stand in
            this text, the source of a chat template.
        """
        if isinstance(value, str):
            clean = value.replace(_OPEN, "").replace(_CLOSE, "")
            return self._pattern(literals).sub(rf"{_OPEN}\g<0>{_CLOSE}", clean)
        if isinstance(value, Mapping):
            return {key: self.mark(item, literals) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item, literals) for item in value]
        return value

    def encode_marked(self, text: str, *, around: bool = True) -> list[int]:
        """The ids of a text in which control tokens count, but for those that `mark` has marked.

        Raises:
          ZooError: a marked token cannot be spelled otherwise.
        """
        return self.locate_marked(text, around=around)[0]

    def locate_marked(
        self, text: str, *, around: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """What `encode_marked` returns, and the part of the text that each of these tokens spells:
        where it begins and where it ends, the same for tokens that are put around.
        """
        if _OPEN not in text and _CLOSE not in text:
            found = self._fast.encode(text, add_special_tokens=around)
            return list(found.ids), list(found.offsets)
        pieces = self._marked.split(text)
        first = self._fast.encode(pieces[0], add_special_tokens=False)
        ids, places, at = list(first.ids), list(first.offsets), len(pieces[0])
        for i, piece in enumerate(pieces[1:], 1):
            at += i % 2  # the mark before it, or one that stands alone
            if piece:
                part, spans = self._continued(piece, self._plain if i % 2 else self._fast)
                if i % 2 and self.id(piece) in part:
                    raise ZooError(f"the text spells the control token {piece!r}: leave it out")
                ids += part
                places += [(at + begin, at + end) for begin, end in spans]
                at += len(piece) + i % 2
        before, after = self._around if around else ([], [])
        none = [(0, 0)]
        return [*before, *ids, *after], [*none * len(before), *places, *none * len(after)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without special tokens."""
        return str(self._fast.decode([int(i) for i in ids], skip_special_tokens=True))

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` into `folder`."""
        self._fast.save(str(Path(folder) / FILE))
        config = {
            **self.names,
            "added_tokens_decoder": {},  # all of them stand in the other file
            "model_max_length": self.max_length,
            "tokenizer_class": "PreTrainedTokenizerFast",  # which reads that file as it stands
        }
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (Path(folder) / CONFIG).write_text(text + "\n", "utf-8")

    def _continued(self, piece: str, fast: Fast) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a part of a text, without the space that some set before a text, and which
        part of it each spells.
        """
        newline = self._newline
        found = fast.encode("\n" + piece, add_special_tokens=False)
        ids, cut = list(found.ids), len(newline)
        if ids[:cut] == newline:
            return ids[cut:], [(max(0, begin - 1), end - 1) for begin, end in found.offsets[cut:]]
        found = fast.encode(piece, add_special_tokens=False)
        return list(found.ids), list(found.offsets)

    def _find_control_tokens(self, literals: str) -> re.Pattern[str]:
        """Finds the tokens that count as such beside `literals`, the longest first."""
        found = [
            token.content
            for token in self._fast.get_added_tokens_decoder().values()
            if token.special or (token.content in literals and not token.content.isspace())
        ]
        return re.compile(_alternatives(found))

    @functools.cached_property
    def _marked(self) -> re.Pattern[str]:
        added = [token.content for token in self._fast.get_added_tokens_decoder().values()]
        return re.compile(f"{_OPEN}({_alternatives(added)}){_CLOSE}|[{_OPEN}{_CLOSE}]")

    @functools.cached_property
    def _plain(self) -> Fast:
        """The same tokenizer without added tokens."""
        plain = Fast(self._fast.model)
        if self._fast.normalizer is not None:
            plain.normalizer = self._fast.normalizer
        if self._fast.pre_tokenizer is not None:
            plain.pre_tokenizer = self._fast.pre_tokenizer
        return plain

    @functools.cached_property
    def _newline(self) -> list[int]:
        return list(self._fast.encode("\n", add_special_tokens=False).ids)

    @functools.cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """What is put before and behind a text."""
        inner = self._fast.encode("a", add_special_tokens=False).ids
        outer = self._fast.encode("a", add_special_tokens=True).ids
        for at in range(len(outer) - len(inner) + 1):
            if outer[at : at + len(inner)] == inner:
                return outer[:at], outer[at + len(inner) :]
        return [], []

    def __repr__(self) -> str:
        return f"HubTokenizer({self.vocab_size} tokens)"


def _alternatives(tokens: Sequence[str]) -> str:
    longest = sorted(tokens, key=len, reverse=True)
    return "|".join(map(re.escape, longest)) or "(?!)"  # which never matches


def _open(folder: Path, family: str, config: Mapping[str, Any], names: Mapping[str, str]) -> Fast:
    """The tokenizer of `folder`, by the first of its files that counts."""
    if family == "SiglipTokenizer" and (folder / "spiece.model").is_file():
        vocabulary = sentencepiece.read_vocabulary(folder / "spiece.model")
        lowercase = config.get("do_lower_case", True)
        return sentencepiece.siglip_tokenizer(
            vocabulary, eos=names["eos_token"], lowercase=lowercase
        )
    if (folder / FILE).is_file():
        return _from_json(folder, family, config)
    ends = {key: names[f"{key}_token"] for key in ("bos", "eos") if config.get(f"add_{key}_token")}
    if (folder / "tokenizer.model").is_file():
        if family not in ("LlamaTokenizer", ""):
            raise ZooError(
                f"{folder}: a {family} is read from {FILE}, which is missing; save the tokenizer "
                "with transformers once to have it"
            )
        vocabulary = sentencepiece.read_vocabulary(folder / "tokenizer.model")
        return sentencepiece.llama_tokenizer(vocabulary, prepend=_prepend(config), **ends)
    if family == "GPT2Tokenizer" and (folder / "vocab.json").is_file():
        return _gpt2(folder, config, **ends)
    raise ZooError(
        f"{folder} has no tokenizer that can be read: want {FILE} or tokenizer.model"
        + (f" for a {family}" if family else "")
    )


def _from_json(folder: Path, family: str, config: Mapping[str, Any]) -> Fast:
    file = folder / FILE
    try:
        fast = Fast.from_str(file.read_text("utf-8"))
    except Exception as error:  # the library raises bare Exception on malformed files
        raise ZooError(f"{file} is not a tokenizer that can be read: {error}") from error
    architecture = read_json(folder / "config.json").get("model_type")
    spelled_in_bytes = getattr(fast.model, "byte_fallback", False)
    if family == "LlamaTokenizer" and architecture not in _AS_IT_STANDS and spelled_in_bytes:
        sentencepiece.like_llama(fast, _prepend(config))
    return fast


def _gpt2(
    folder: Path, config: Mapping[str, Any], bos: str | None = None, eos: str | None = None
) -> Fast:
    """Byte-level byte-pair encoding, as GPT-2 has it and OPT took it over."""
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    try:
        fast = Fast(models.BPE.from_file(*files))
    except Exception as error:  # as above
        raise ZooError(f"{' and '.join(files)} cannot be read: {error}") from error
    space = bool(config.get("add_prefix_space", False))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    fast.decoder = decoders.ByteLevel()
    around = [token for token in (bos, eos) if token is not None]
    fast.add_special_tokens(around)
    fast.post_processor = TemplateProcessing(
        single=" ".join([*([bos] if bos else []), "$A", *([eos] if eos else [])]),
        special_tokens=[(token, fast.token_to_id(token)) for token in around],
    )
    return fast


def _prepend(config: Mapping[str, Any]) -> str:
    """Where Llama's tokenizer sets a space, see `sentencepiece.llama_tokenizer`."""
    if config.get("add_prefix_space") is False:
        return "never"
    return "always" if config.get("legacy") else "first"


def _names(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name; a null is one that the tokenizer does without."""
    extra = config.get("extra_special_tokens")
    found = {key: value for key, value in config.items() if key.endswith("_token")}
    if isinstance(extra, Mapping):
        found |= extra
    return {key: text for key, value in found.items() if (text := _text(value)) is not None}


def _text(token: Any) -> str | None:
    """A token as a configuration spells it: a text, or an object with `content`."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _add_missing(fast: Fast, config: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Let `fast` find the tokens that the configuration names and its own file does not."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    special = [*names.values(), *(text for token in extra if (text := _text(token)) is not None)]
    listed = config.get("added_tokens_decoder") or {}
    try:
        for _, token in sorted(listed.items(), key=lambda item: int(item[0])):
            is_special = token["content"] in special
            flags = {"special": is_special, "normalized": not is_special}
            flags |= {key: token[key] for key in _FLAGS if key in token}
            fast.add_tokens([AddedToken(token["content"], **flags)])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ZooError(f"{CONFIG}: added_tokens_decoder is malformed: {error}") from error
    fast.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
