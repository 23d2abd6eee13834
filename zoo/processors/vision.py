"""How the pictures of a vision-language model become arrays: as tiles, or in native resolution."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from zoo.models.parts.connect.crops import Crops
from zoo.processors import tiling
from zoo.processors.lengths import bucket, text_length
from zoo.processors.native import NativeSpec, Picture
from zoo.processors.tiling import Reading
from zoo.processors.views import AnyRes, Native, Single, Tiled

Batch = dict[str, np.ndarray]


class Seen(NamedTuple):
    """One picture as a model that reads tiles sees it: [tiles, h, w, 3], which tokens, and for some
    models crops with their rows and columns.
    """

    tiles: np.ndarray
    reading: Reading
    crops: tuple[np.ndarray, tuple[int, int]] | None = None


class Vision(Protocol):
    """How the pictures of a vision-language model become arrays.

    Attributes:
      image_id: the placeholder of a picture.
      video_id: that of a video, which no prompt may have; None for a model without one.
    """

    image_id: int
    video_id: int | None

    def see(self, picture: np.ndarray, *, alone: bool) -> Any:
        """What the model sees of `picture` [H, W, 3] uint8, the only one of its prompt or not."""
        ...

    def num_tokens(self, seen: Any) -> int:
        """How many vision tokens take the place of its placeholder."""
        ...

    def batch(self, ids: list[list[int]], seen: list[list[Any]], pad: int) -> Batch:
        """The arrays of a batch of prompts, `ids` with one placeholder for each picture."""
        ...


@dataclass(frozen=True)
class TileVision:
    """Pictures as tiles of one size, whose tokens are read in some order.

    Attributes:
      views: how pictures are cut.
      image_id: the placeholder.
      tokens: Q, vision tokens of one tile.
      grid: rows and columns of these, where rows of tiles are read.
      max_tiles: see `zoo.processors.tiling.anyres`.
      video_id: the placeholder of a video.
      crops: what the model sees besides a picture that is one tile; None for nothing.
    """

    views: Single | AnyRes | Tiled
    image_id: int
    tokens: int
    grid: tuple[int, int]
    max_tiles: int | None = None
    video_id: int | None = None
    crops: Crops | None = None

    def see(self, picture: np.ndarray, *, alone: bool) -> Seen:
        """Tiles and reading of one picture."""
        tiles = self.views.tiles(picture, alone=alone)
        whole = isinstance(self.views, AnyRes) and (alone or not self.views.several)
        if not whole:
            newline, crops = isinstance(self.views, AnyRes), None
            if self.crops is not None and isinstance(self.views, Single):
                number, square = self.crops.number, self.crops.square
                crops = self.views.closer(picture, crops=number, square=square)
            reading = tiling.whole_tiles(len(tiles), self.tokens, newline=newline)
            return Seen(tiles, reading, crops)
        reading = tiling.anyres(
            picture.shape[:2],
            self.views.resolutions,
            tile=self.views.tile,
            grid=self.grid,
            max_tiles=self.max_tiles,
        )
        return Seen(tiles, reading)

    def num_tokens(self, seen: Seen) -> int:
        """How many vision tokens take the place of its placeholder."""
        return seen.reading.size

    def batch(self, ids: list[list[int]], seen: list[list[Seen]], pad: int) -> Batch:
        """Prompts padded on the right; lengths and numbers of tiles and slots are rounded up."""
        images = bucket(max(map(len, seen)))
        longest = max(len(row) + images - len(shown) for row, shown in zip(ids, seen, strict=True))
        text = tiling.pad_prompts(
            ids,
            image_id=self.image_id,
            pad_id=pad,
            num_images=images,
            length=text_length(longest),
        )
        if not images:
            return text
        readings = [[picture.reading for picture in row] for row in seen]
        tiles = [[picture.tiles for picture in row] for row in seen]
        if isinstance(self.views, Single):  # the order of the pixels is that of the slots
            batch = {**text, "pixels": tiling.stack_tiles(tiles, num_tiles=images)}
            if self.crops is None:
                return batch
            crops = [[p.crops for p in row if p.crops is not None] for row in seen]
            most = self.crops.number
            return batch | tiling.stack_crops(crops, crops=most, num_images=images)
        most = bucket(max(sum(reading.tiles for reading in row) for row in readings))
        slots = bucket(max(sum(reading.size for reading in row) for row in readings))
        places = tiling.pack(
            readings, tokens=self.tokens, num_images=images, num_tiles=most, num_slots=slots
        )
        return {**text, **places, "pixels": tiling.stack_tiles(tiles, num_tiles=most)}


@dataclass(frozen=True)
class NativeVision:
    """Pictures as patches in their native resolution.

    Attributes:
      views: how pictures are resized and normalised.
      spec: how they are cut.
      image_id: the placeholder of an image.
      video_id: that of a video.
    """

    views: Native
    spec: NativeSpec
    image_id: int
    video_id: int

    def see(self, picture: np.ndarray, *, alone: bool) -> Picture:
        """The patches of one picture. Raises UsageError if it is too narrow."""
        return self.views.picture(picture, self.spec)

    def num_tokens(self, seen: Picture) -> int:
        """How many vision tokens take the place of its placeholder."""
        return self.spec.num_tokens(seen.grid)

    def batch(self, ids: list[list[int]], seen: list[list[Picture]], pad: int) -> Batch:
        """Prompts padded on the right; all lengths are rounded up."""
        placeholders = (self.image_id, self.video_id)
        return self.spec.batch(ids, seen, placeholders=placeholders, pad=pad)
