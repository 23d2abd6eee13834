"""Training examples in the words of a released checkpoint: its chat template, its tokenizer, and
its way to see pictures.

In training and in use a conversation is then spelled alike. What the model says is learned, and the
token that ends it; where the template does not write that token, it is added.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.convert.hub import folder_of
from zoo.images import listed, read_image
from zoo.models.core.config import ModelConfig
from zoo.models.core.errors import UsageError, ZooError
from zoo.processors.chat import IGNORE, MARK, pad, stand_at_marks
from zoo.processors.hf import HubProcessor, load_processor
from zoo.processors.tiling import pad_prompts

Example = dict[str, np.ndarray]


@dataclass(frozen=True)
class Chats:
    """Between records and examples of fixed shapes.

    Attributes:
      processor: of the checkpoint.
      config: of the model that is trained.
    """

    processor: HubProcessor
    config: ModelConfig

    @classmethod
    def load(cls, source: str | Path, config: ModelConfig) -> "Chats":
        """Read the processor of a checkpoint, a folder or a name on the hub, for a model.

        Raises:
          UsageError: it cannot be trained with.
          ZooError: a file is missing or damaged, or does not fit the model.
        """
        processor = load_processor(folder_of(source), config)
        if not isinstance(processor, HubProcessor) or processor.template is None:
            raise UsageError(f"{source} has no chat template: want a checkpoint that answers")
        if processor.around_image is not None:
            raise UsageError(f"{source} puts marks around pictures, which is not trained yet")
        return cls(processor, config)

    @property
    def vocab_size(self) -> int:
        """One more than the greatest id that a text may have; placeholders are no texts."""
        unread = {self.pad_id, self.image_id} - set(self.processor.stop_ids)
        known = range(self.processor.tokenizer.vocab_size)
        return max(i for i in known if i not in unread) + 1

    @property
    def image_id(self) -> int | None:
        """The placeholder of an image; None for a model without."""
        vision = self.processor.vision
        return None if vision is None else vision.image_id

    @property
    def pad_id(self) -> int:
        """What stands where no token is."""
        return self.processor.pad

    def save(self, folder: str | Path) -> None:
        """Write all that `load` needs into `folder`."""
        self.processor.save(folder)

    def encode(self, record: Mapping[str, Any]) -> Example:
        """One training example; the arguments and arrays are those of `Processor.encode`.

        A model that reads tiles gets `sizes` and `layout` too.

        Raises:
          ZooError if a picture cannot be read, there are too many, or the conversation is too long.
        """
        shapes = {name: leaf.shape[1:] for name, leaf in self.config.inputs(1).items()}
        length, vision = shapes["ids"][0], self.processor.vision
        pictures = listed(record.get("image"))
        ids, labels = self._spelled(record["conversations"], len(pictures))
        if len(ids) > length:
            raise ZooError(
                f"the conversation has {len(ids)} tokens and the model takes {length}: shorten it "
                "or raise text_tokens"
            )
        if vision is None:
            example = {"ids": pad(ids, length, self.processor.pad)}
            example["text_mask"] = np.arange(length) < len(ids)
        else:
            example = self._seen(ids, pictures, shapes)
        example |= {"labels": pad(labels, length, IGNORE), "segments": np.zeros(length, np.int32)}
        return {name: _grown(name, array, shapes[name]) for name, array in example.items()}

    def _seen(
        self, ids: list[int], pictures: Sequence[Any], shapes: Mapping[str, tuple[int, ...]]
    ) -> Example:
        """The arrays of a row of ids and its pictures."""
        vision: Any = self.processor.vision
        images = shapes["sizes"][0] if "sizes" in shapes else shapes["pixels"][0]
        if len(pictures) > images:
            raise ZooError(f"the record has {len(pictures)} pictures and the model takes {images}")
        seen = [vision.see(read_image(x), alone=len(pictures) == 1) for x in pictures]
        # Beside a row that has a picture, so that a row without any gets arrays of the same sort.
        blank = [vision.see(np.zeros((8, 8, 3), np.uint8), alone=True)]
        batch = vision.batch([ids, [vision.image_id]], [seen, blank], self.processor.pad)
        text = pad_prompts(
            [ids],
            image_id=vision.image_id,
            pad_id=self.processor.pad,
            num_images=images,
            length=shapes["ids"][0],
        )
        rows = {name: array[0] for name, array in batch.items() if name in shapes}
        if "layout" in rows:  # a newline has the number after all tiles, which are to be more
            old, new = len(rows["pixels"]) * vision.tokens, shapes["pixels"][0] * vision.tokens
            rows["layout"][rows["layout"] == old] = new
        return rows | {name: array[0] for name, array in text.items()}

    def _spelled(
        self, turns: Sequence[tuple[str, str]], pictures: int
    ) -> tuple[list[int], list[int]]:
        """Ids of a conversation and their labels, the id where it is learned, else `IGNORE`."""
        messages: list[Mapping[str, Any]] = []
        asked, told = [], []
        placed = stand_at_marks([question for question, _ in turns], pictures)
        for number, (question, answer) in enumerate(turns):
            if not answer.strip():
                raise ZooError(f"the answer to {question!r} is empty")
            shown = pictures if number == 0 and not placed else 0
            content = self._content(question.strip(), shown, placed)
            messages.append({"role": "user", "content": content})
            asked.append(self._ids(messages, opened=True))
            content = self._content(answer.strip(), 0, placed=False)
            messages.append({"role": "assistant", "content": content})
            told.append(self._ids(messages, opened=False))
        whole, stops = told[-1], self.processor.stop_ids
        ids: list[int] = []
        labels: list[int] = []
        done = 0
        for before, after in zip(asked, told, strict=True):
            start, stop = _shared(before, whole), _shared(after, whole)
            answer = whole[start:stop]
            ended = [] if set(stops) & set(answer) else [stops[0]]
            ids += [*whole[done:start], *answer, *ended]
            labels += [IGNORE] * (start - done) + answer + ended
            done = stop
        return ids, labels

    def _ids(self, messages: Sequence[Mapping[str, Any]], *, opened: bool) -> list[int]:
        """The conversation so far, up to where the model speaks or after it has spoken."""
        template, tokenizer = self.processor.template, self.processor.tokenizer
        marked = tokenizer.mark(list(messages), template.source)
        text = template.render(marked, add_generation_prompt=opened).rstrip()
        bos = template.names.get("bos_token")
        around = self.processor.vision is not None and (bos is None or not text.startswith(bos))
        return list(tokenizer.encode_marked(text, around=around))

    def _content(self, text: str, pictures: int, placed: bool) -> str | list[Mapping[str, Any]]:
        """A text after `pictures`, or with pictures in place of its marks."""
        if self.processor.vision is None:
            return text
        content: list[Mapping[str, Any]] = [{"type": "image"}] * pictures
        for number, part in enumerate(text.split(MARK) if placed else [text]):
            content += [{"type": "image"}] if number else []
            content += [{"type": "text", "text": part}] if part.strip() or not placed else []
        return content


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two rows have in common before they differ."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _grown(name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The array with zeros behind it on every axis, up to `shape`."""
    if any(have > want for have, want in zip(array.shape, shape, strict=True)):
        raise ZooError(f"{name} of this record is {array.shape} and the model takes {shape}")
    return np.pad(array, [(0, want - have) for have, want in zip(array.shape, shape, strict=True)])
