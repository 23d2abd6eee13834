"""Training examples of dual encoders: a picture and what is said about it, in the words of a
released checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.convert.hub import folder_of
from zoo.images import listed
from zoo.models.core.config import ModelConfig
from zoo.models.core.errors import UsageError, ZooError
from zoo.processors.hf import PairProcessor, load_processor


@dataclass(frozen=True)
class Captions:
    """Between records and examples of fixed shapes.

    Attributes:
      processor: of the checkpoint.
      length: tokens of a text.
    """

    processor: PairProcessor
    length: int

    @classmethod
    def load(cls, source: str | Path, config: ModelConfig) -> "Captions":
        """Read the processor of a checkpoint, a folder or a name on the hub, for a model.

        Raises:
          UsageError: it does not read both pictures and texts.
          ZooError: a file is missing or damaged, or does not fit the model.
        """
        processor = load_processor(folder_of(source), config)
        pairs = isinstance(processor, PairProcessor)
        if not pairs or processor.views is None or processor.tokenizer is None:
            raise UsageError(f"{source} does not read both pictures and texts: want one that does")
        return cls(processor, config.inputs(1)["ids"].shape[1])

    @property
    def vocab_size(self) -> int:
        """Every id of an example is below it."""
        tokenizer: Any = self.processor.tokenizer
        return int(tokenizer.vocab_size)

    @property
    def image_id(self) -> None:
        """The placeholder of an image: there is none."""
        return None

    @property
    def pad_id(self) -> int:
        """What stands where no token is."""
        tokenizer: Any = self.processor.tokenizer
        return tokenizer.pad or 0

    def save(self, folder: str | Path) -> None:
        """Write all that `load` needs into `folder`."""
        self.processor.save(folder)

    def encode(self, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """One training example.

        Args:
          record: one `image`, and `conversations`, of which the first answer is the caption.

        Returns:
          pixels [H, W, 3] float32, ids [T] int32, text_mask [T] bool, True on what is read.

        Raises:
          ZooError: the record has not one picture, it cannot be read, or the caption is empty or
            too long.
        """
        pictures = listed(record.get("image"))
        if len(pictures) != 1:
            raise ZooError(f"the record has {len(pictures)} pictures: want one with its caption")
        (_, caption), *_ = record["conversations"]
        batch = self.processor.encode(pictures, [caption])
        ids = np.asarray(batch["ids"][0])
        mask = np.asarray(batch["text_mask"][0]) if "text_mask" in batch else ids >= 0
        grown = (0, self.length - len(ids))
        return {
            "pixels": np.asarray(batch["pixels"][0]),
            "ids": np.pad(ids, grown, constant_values=self.pad_id),
            "text_mask": np.pad(mask, grown),
        }
