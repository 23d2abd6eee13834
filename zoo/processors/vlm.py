"""What stands between a vision-language model and the world: records, prompts and answers."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.images import Source, listed, read_image
from zoo.models.core.errors import UsageError, ZooError
from zoo.processors import chat, guide, tiling
from zoo.processors.image import ImageProcessor
from zoo.processors.pixels import Pipeline
from zoo.processors.text import Tokenizer
from zoo.processors.views import Stretched

if TYPE_CHECKING:
    from zoo.models.parts.reduce.base import Reducer

Example = dict[str, np.ndarray]

_CONFIG = "processor.json"
_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Rows:
    """How a picture is read in rows of tiles, each of which has crops of its own.

    Attributes:
      tiles: M, the most of a picture: one that shows all of it, and those of a grid.
      grid: rows and columns of the tokens of a tile.
      slots: S, the most vision tokens of an example, a newline after every row included.
    """

    tiles: int
    grid: tuple[int, int]
    slots: int


@dataclass(frozen=True)
class Processor:
    """Everything between a record and the arrays of one example, with fixed shapes.

    Attributes:
      image: how pictures become pixels.
      tokenizer: how text becomes ids.
      max_length: T, the number of token slots of an example, the image placeholders included.
      num_images: I, the most pictures of an example, and the placeholders of every one.
      crops: V, for a model that sees crops of a picture besides the whole; 0 for the others.
      square_crops: whether they always make a square, see `zoo.processors.tiling.crop_grid`.
      rows: for a model that sees one picture in tiles, and square crops of each; None for others.
    """

    image: ImageProcessor
    tokenizer: Tokenizer
    max_length: int
    num_images: int = 1
    crops: int = 0
    square_crops: bool = False
    rows: Rows | None = None

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return (self.tokenizer.eos,)

    @property
    def vocab_size(self) -> int:
        """Every id of an example is below it."""
        return self.tokenizer.vocab_size

    @property
    def image_id(self) -> int:
        """The placeholder of an image."""
        return self.tokenizer.image

    @property
    def pad_id(self) -> int:
        """What stands where no token is."""
        return self.tokenizer.pad

    @property
    def byte_id(self) -> None:
        """The token of a byte that is in no character: the tokenizer needs none, see there."""
        return None

    def encode(self, record: Mapping[str, Any]) -> Example:
        """One training example.

        Args:
          record: `image` (anything that `read_image` takes, a tuple of several, or None);
            `conversations`, pairs of question and answer, which may have an `<image>` mark for each
            of several pictures; and `independent`, whether no turn refers to another, so that they
            may stand side by side without seeing each other.

        Returns:
          pixels [I, H, W, 3] float32, normalised; ids [T] int32 with I image placeholders; labels
          [T] int32, -100 where nothing is learned; text_mask [T] bool, True on tokens; segments [T]
          int32, the number of the turn where turns are independent, else 0; for models that see
          them, crops [I, V, H, W, 3] and view_grid [I, 2], and where these are of tiles M in place
          of I, with sizes [1] and layout [S] of `zoo.processors.tiling.pack`. Where a picture is
          missing its pixels are zero and its placeholder is masked out, so that batches of all
          sorts have one shape.

        Raises:
          ZooError if a picture cannot be read, there are too many, a text is empty, or the
            conversation is too long.
        """
        images = listed(record.get("image"))
        turns = record["conversations"]
        ids, labels, numbers = chat.conversation(self.tokenizer, turns, max(1, len(images)))
        length = len(ids) + self._unused(images)
        if length > self.max_length:
            raise ZooError(
                f"the conversation has {length} tokens and max_length is {self.max_length}: "
                "shorten it or raise max_length"
            )
        example = self._example(images, ids)
        segments = numbers if record.get("independent") else []
        return {
            **example,
            "labels": chat.pad(labels, self.max_length, chat.IGNORE),
            "segments": chat.pad(segments, self.max_length, 0),
        }

    def encode_prompt(
        self,
        images: Source | Sequence[Source | None] | None,
        prompts: str | Sequence[str],
        *,
        reducer: "Reducer | None" = None,
    ) -> Example:
        """A batch of first questions, ready for generation.

        Args:
          images: one picture per prompt, a tuple of several, or None for text alone; a single one
            may stand by itself.
          prompts: the questions; a single one may stand by itself.
          reducer: what leaves vision tokens out in the model: where it reads the text, `guide`
            [B, T] marks the question; where it leaves out padding, `shown` [B, I, 4] says where the
            pictures lie in their pixels.

        Returns:
          pixels [B, I, H, W, 3], ids [B, T] and text_mask [B, T] as in `encode`, padded on the
          right.

        Raises:
          UsageError if the numbers differ, or a prompt has none of the words that the reducer
          reads; ZooError if a picture cannot be read or a prompt is empty or too long.
        """
        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        shown = [images] if images is None or isinstance(images, Source) else list(images)
        if len(shown) != len(asked):
            raise UsageError(
                f"got {len(shown)} pictures for {len(asked)} prompts: want one picture for each"
            )
        if not asked:
            raise UsageError("got no prompts: want at least one")
        padding = reducer is not None and reducer.skips_padding
        examples = [self._prompt(*pair, padding) for pair in zip(shown, asked, strict=True)]
        if reducer is not None and reducer.reads_text:
            for example in examples:
                example["guide"] = self._question(example["ids"])
                guide.check(example["guide"].tolist(), reducer)
        return {name: np.stack([e[name] for e in examples]) for name in examples[0]}

    def decode(self, ids: Iterable[int]) -> str:
        """The answer that `ids` spell, up to the first end-of-answer token."""
        return self.tokenizer.decode(ids)

    def save(self, folder: str | Path) -> None:
        """Write `processor.json` and `tokenizer.json` into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(folder / _TOKENIZER)
        config = {
            "max_length": self.max_length,
            "num_images": self.num_images,
            "image": asdict(self.image),
        }
        if self.crops:
            config |= {"crops": self.crops, "square_crops": self.square_crops}
        if self.rows is not None:
            config["rows"] = asdict(self.rows)
        (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "Processor":
        """Read what `save` wrote. Raises ZooError if a file is missing or damaged."""
        file = Path(folder) / _CONFIG
        try:
            config = json.loads(file.read_text("utf-8"))
            image, max_length = ImageProcessor(**config["image"]), config["max_length"]
            num_images = config.get("num_images", 1)  # earlier versions had no other number
            crops = config.get("crops", 0), config.get("square_crops", False)
            if (rows := config.get("rows")) is not None:
                rows = Rows(rows["tiles"], tuple(rows["grid"]), rows["slots"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ZooError(f"{file} is not a processor that can be read: {error}") from error
        tokenizer = Tokenizer.load(Path(folder) / _TOKENIZER)
        return cls(image, tokenizer, max_length, num_images, *crops, rows)

    def _prompt(
        self, image: Source | tuple[Source, ...] | None, question: str, padding: bool
    ) -> Example:
        images = listed(image)
        ids = chat.prompt(self.tokenizer, question, max(1, len(images)))
        length = len(ids) + self._unused(images)
        if length > self.max_length:
            raise ZooError(
                f"the prompt has {length} tokens, more than the {self.max_length} that the model "
                "takes: shorten it"
            )
        return self._example(images, ids, padding=padding)

    def _question(self, ids: np.ndarray) -> np.ndarray:
        """Which of the ids are the words of the question."""
        turn = np.cumsum(ids == self.tokenizer.user) > np.cumsum(ids == self.tokenizer.assistant)
        return turn & (ids != self.tokenizer.user) & (ids != self.tokenizer.image)

    def _unused(self, images: Sequence[Source]) -> int:
        """Placeholders in the padding of an example; its text has one even without a picture."""
        if len(images) > self.num_images:
            raise ZooError(
                f"there are {len(images)} pictures and the model takes {self.num_images}: leave "
                "some out or raise num_images"
            )
        return self.num_images - max(1, len(images))

    def _example(
        self, images: Sequence[Source], ids: list[int], *, padding: bool = False
    ) -> Example:
        text_mask = np.arange(self.max_length) < len(ids)
        if not images:
            text_mask[ids.index(self.tokenizer.image)] = False
        placeholders = [self.tokenizer.image] * self._unused(images)
        pictures = [read_image(image) for image in images]
        places = {}
        if padding:
            boxes = [self.image.shown(picture.shape[:2]) for picture in pictures]
            boxes += [(0, 0, self.image.size, self.image.size)] * (self.num_images - len(boxes))
            places["shown"] = np.array(boxes, np.int32)
        return {
            **self._views(pictures),
            **places,
            "ids": chat.pad([*ids, *placeholders], self.max_length, self.tokenizer.pad),
            "text_mask": text_mask,
        }

    def _views(self, pictures: Sequence[np.ndarray]) -> Example:
        """What the model sees of pictures; zeros where there are fewer than `num_images`."""
        if self.rows is not None:
            return self._in_rows(self.rows, pictures)
        side = self.image.size
        views = {"pixels": np.zeros((self.num_images, side, side, 3), np.float32)}
        if self.crops:
            most = (self.num_images, self.crops)
            views["crops"] = np.zeros((*most, side, side, 3), np.float32)
            views["view_grid"] = np.ones((self.num_images, 2), np.int32)
        for i, picture in enumerate(pictures):
            views["pixels"][i] = self.image(picture)
            if self.crops:
                crops, grid = self.image.closer(picture, crops=self.crops, square=self.square_crops)
                views["crops"][i, : len(crops)], views["view_grid"][i] = crops, grid
        return views

    def _in_rows(self, rows: Rows, pictures: Sequence[np.ndarray]) -> Example:
        """The same of one picture in tiles, or none, with the order in which these are read."""
        image, side = self.image, self.image.size
        pipeline = Pipeline(None, image.resize, mean=image.mean, std=image.std)
        views = Stretched(pipeline, side, rows.tiles - 1, math.isqrt(self.crops))
        pixels = np.zeros((rows.tiles, side, side, 3), np.float32)
        crops = np.zeros((rows.tiles, self.crops, side, side, 3), np.float32)
        readings = []
        for picture in pictures:
            size, tiles = views.resolution(picture.shape[:2]), views.tiles(picture)
            pixels[: len(tiles)], crops[: len(tiles)] = tiles, views.closer(picture)
            readings.append(tiling.anyres(size, (size,), tile=side, grid=rows.grid))
        most = {"num_images": 1, "num_tiles": rows.tiles, "num_slots": rows.slots}
        places = tiling.pack([readings], tokens=math.prod(rows.grid), **most)
        own = {name: places[name][0] for name in ("sizes", "layout")}
        return {"pixels": pixels, "crops": crops, **own}
