"""What stands between a vision-language model and the world: records, prompts and answers."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.images import Source, read_image
from zoo.models.core.errors import UsageError, ZooError
from zoo.processors import chat
from zoo.processors.image import ImageProcessor
from zoo.processors.text import Tokenizer

Example = dict[str, np.ndarray]

_CONFIG = "processor.json"
_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Processor:
    """Everything between a record and the arrays of one example, with fixed shapes.

    Attributes:
      image: how pictures become pixels.
      tokenizer: how text becomes ids.
      max_length: T, the number of token slots of an example, the image placeholder included.
    """

    image: ImageProcessor
    tokenizer: Tokenizer
    max_length: int

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return (self.tokenizer.eos,)

    @property
    def byte_id(self) -> None:
        """The token of a byte that is in no character: the tokenizer needs none, see there."""
        return None

    def encode(self, record: Mapping[str, Any]) -> Example:
        """One training example.

        Args:
          record: `image` (anything that `read_image` takes, or None); `conversations`, pairs of
            question and answer; and `independent`, whether no turn refers to another, so that they
            may stand side by side without seeing each other.

        Returns:
          pixels [1, H, W, 3] float32, normalised; ids [T] int32 with one image placeholder; labels
          [T] int32, -100 where nothing is learned; text_mask [T] bool, True on tokens; segments [T]
          int32, the number of the turn where turns are independent, else 0. Without a
          picture the pixels are zero and the placeholder is masked out, so that batches of both
          sorts have one shape.

        Raises:
          ZooError if the picture cannot be read, a text is empty, or the conversation is too long.
        """
        ids, labels, turns = chat.conversation(self.tokenizer, record["conversations"])
        if len(ids) > self.max_length:
            raise ZooError(
                f"the conversation has {len(ids)} tokens and max_length is {self.max_length}: "
                "shorten it or raise max_length"
            )
        example = self._example(record.get("image"), ids)
        segments = turns if record.get("independent") else []
        return {
            **example,
            "labels": chat.pad(labels, self.max_length, chat.IGNORE),
            "segments": chat.pad(segments, self.max_length, 0),
        }

    def encode_prompt(
        self, images: Source | Sequence[Source | None] | None, prompts: str | Sequence[str]
    ) -> Example:
        """A batch of first questions, ready for generation.

        Args:
          images: one picture per prompt, None for text alone; a single one may stand by itself.
          prompts: the questions; a single one may stand by itself.

        Returns:
          pixels [B, 1, H, W, 3], ids [B, T] and text_mask [B, T] as in `encode`, padded on the
          right.

        Raises:
          UsageError if the numbers differ; ZooError if a picture cannot be read or a prompt is
          empty or too long.
        """
        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        shown = [images] if images is None or isinstance(images, Source) else list(images)
        if len(shown) != len(asked):
            raise UsageError(
                f"got {len(shown)} pictures for {len(asked)} prompts: want one picture for each"
            )
        if not asked:
            raise UsageError("got no prompts: want at least one")
        examples = [self._prompt(*pair) for pair in zip(shown, asked, strict=True)]
        return {name: np.stack([e[name] for e in examples]) for name in examples[0]}

    def decode(self, ids: Iterable[int]) -> str:
        """The answer that `ids` spell, up to the first end-of-answer token."""
        return self.tokenizer.decode(ids)

    def save(self, folder: str | Path) -> None:
        """Write `processor.json` and `tokenizer.json` into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(folder / _TOKENIZER)
        config = {"max_length": self.max_length, "image": asdict(self.image)}
        (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "Processor":
        """Read what `save` wrote. Raises ZooError if a file is missing or damaged."""
        file = Path(folder) / _CONFIG
        try:
            config = json.loads(file.read_text("utf-8"))
            image, max_length = ImageProcessor(**config["image"]), config["max_length"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ZooError(f"{file} is not a processor that can be read: {error}") from error
        return cls(image, Tokenizer.load(Path(folder) / _TOKENIZER), max_length)

    def _prompt(self, image: Source | None, question: str) -> Example:
        ids = chat.prompt(self.tokenizer, question)
        if len(ids) > self.max_length:
            raise ZooError(
                f"the prompt has {len(ids)} tokens, more than the {self.max_length} that the model "
                "takes: shorten it"
            )
        return self._example(image, ids)

    def _example(self, image: Source | None, ids: list[int]) -> Example:
        text_mask = np.arange(self.max_length) < len(ids)
        if image is None:
            pixels = np.zeros((self.image.size, self.image.size, 3), np.float32)
            text_mask[ids.index(self.tokenizer.image)] = False
        else:
            pixels = self.image(read_image(image))
        return {
            "pixels": pixels[None],
            "ids": chat.pad(ids, self.max_length, self.tokenizer.pad),
            "text_mask": text_mask,
        }
