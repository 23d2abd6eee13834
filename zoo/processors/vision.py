"""How the pictures of a vision-language model become arrays: as tiles, or in native resolution."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from zoo.models.parts.connect.crops import Crops
from zoo.processors import tiling
from zoo.processors.lengths import bucket, text_length
from zoo.processors.native import NativeSpec, Picture
from zoo.processors.tiling import Reading, Size
from zoo.processors.views import AnyRes, Native, Single, Stretched, Tiled

Batch = dict[str, np.ndarray]


class Seen(NamedTuple):
    """One picture as a model that reads tiles sees it: [tiles, h, w, 3], which tokens, and for some
    models the crops of every tile with their rows and columns, or where the picture lies in its
    tile: top, left, bottom, right.
    """

    tiles: np.ndarray
    reading: Reading
    crops: tuple[tuple[np.ndarray, tuple[int, int]], ...] = ()
    shown: tuple[int, int, int, int] | None = None


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
      crops: what the model sees besides the tiles of a `Single` or a `Stretched`; None for nothing.
    """

    views: Single | AnyRes | Tiled | Stretched
    image_id: int
    tokens: int
    grid: tuple[int, int]
    max_tiles: int | None = None
    video_id: int | None = None
    crops: Crops | None = None

    def see(self, picture: np.ndarray, *, alone: bool) -> Seen:
        """Tiles and reading of one picture."""
        views, size = self.views, picture.shape[:2]
        tiles = views.tiles(picture, alone=alone)
        if isinstance(views, Stretched):  # to a resolution that it fills
            size = views.resolution(size)
            crops = tuple((parts, (views.zoom,) * 2) for parts in views.closer(picture))
            return Seen(tiles, self._in_rows(size, (size,), views.tile), crops)
        if isinstance(views, AnyRes) and (alone or not views.several):
            return Seen(tiles, self._in_rows(size, views.resolutions, views.tile))
        newline = isinstance(views, AnyRes)
        reading, crops = tiling.whole_tiles(len(tiles), self.tokens, newline=newline), ()
        shown = views.shown(size, tiles.shape[1]) if isinstance(views, Single) else None
        if self.crops is not None and isinstance(views, Single):
            number, square = self.crops.number, self.crops.square
            crops = (views.closer(picture, crops=number, square=square),)
        return Seen(tiles, reading, crops, shown)

    def _in_rows(self, size: Size, resolutions: Sequence[Size], tile: int) -> Reading:
        options = {"tile": tile, "grid": self.grid, "max_tiles": self.max_tiles}
        return tiling.anyres(size, resolutions, **options)

    def num_tokens(self, seen: Seen) -> int:
        """How many vision tokens take the place of its placeholder."""
        return seen.reading.size

    def shown(self, seen: list[list[Seen]]) -> Batch:
        """Where the pictures of prompts lie in their tiles, as `shown` int32 [B, M, 4]; nothing
        where pictures have several tiles, or prompts none.
        """
        every = [picture.tiles.shape[1] for row in seen for picture in row]
        if not isinstance(self.views, Single) or not every:
            return {}
        whole = (0, 0, every[0], every[0])
        found = np.full((len(seen), bucket(max(map(len, seen))), 4), whole, np.int32)
        for line, row in zip(found, seen, strict=True):
            line[: len(row)] = [picture.shown for picture in row] or line[:0]
        return {"shown": found}

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
        most, batch = images, text
        if not isinstance(self.views, Single):  # there the order of the pixels is that of the slots
            most = bucket(max(sum(reading.tiles for reading in row) for row in readings))
            slots = bucket(max(sum(reading.size for reading in row) for row in readings))
            batch |= tiling.pack(
                readings, tokens=self.tokens, num_images=images, num_tiles=most, num_slots=slots
            )
        batch["pixels"] = tiling.stack_tiles(tiles, num_tiles=most)
        if self.crops is None:
            return batch
        crops = [[each for picture in row for each in picture.crops] for row in seen]
        return batch | tiling.stack_crops(crops, crops=self.crops.number, num_images=most)


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
