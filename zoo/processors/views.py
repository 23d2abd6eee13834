"""What a model sees of a picture: one square, tiles beside a small whole, or its own resolution.

Each class reproduces one family of processors of published checkpoints; which one a checkpoint has,
and with which numbers, is read by `zoo.processors.image_config`.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from zoo.processors.native import NativeSpec, Picture, smart_resize
from zoo.processors.pixels import Pipeline, Size, resized, shown_in_square
from zoo.processors.tiling import (
    Box,
    crop_grid,
    cut,
    fitted_box,
    select_best_resolution,
    tile_boxes,
    tile_grid,
)


@dataclass(frozen=True)
class Single:
    """One picture of fixed size, as CLIP, SigLIP, ViT, DINOv2 and LLaVA-1.5 have it."""

    pipeline: Pipeline

    def tiles(self, picture: np.ndarray, *, alone: bool = True) -> np.ndarray:
        """[1, h, w, 3] float32 of `picture` [H, W, 3] uint8."""
        return self.pipeline(picture)[None]

    def shown(self, size: Size, side: int) -> tuple[int, int, int, int]:
        """Where a picture of this size lies in pixels of this side: top, left, bottom, right."""
        return shown_in_square(size if self.pipeline.square else (1, 1), side)

    def closer(self, picture: np.ndarray, *, crops: int, square: bool) -> tuple[np.ndarray, Size]:
        """What is seen of `picture` [H, W, 3] uint8, as crops [n, h, w, 3] float32.

        Args:
          picture: the picture.
          crops: how many at most.
          square: see `zoo.processors.tiling.crop_grid`.

        Returns:
          the crops row by row, and their rows and columns.
        """
        p, seen = self.pipeline, picture.shape[:2]
        if p.square or p.crop is not None:
            seen = ((max if p.square else min)(seen),) * 2
        size = p.crop or (seen if p.resize is None else p.resize(*seen))
        rows, columns = crop_grid(seen, tile=size[0], crops=crops, square=square)

        def enlarged(height: int, width: int) -> Size:
            height, width = (height, width) if p.resize is None else p.resize(height, width)
            return height * rows, width * columns

        crop = None if p.crop is None else (p.crop[0] * rows, p.crop[1] * columns)
        large = replace(p, resize=enlarged, crop=crop)(picture)
        return cut(large, (rows, columns)), (rows, columns)


@dataclass(frozen=True)
class AnyRes:
    """The whole picture as one tile, then the tiles of a larger version, as LLaVA-NeXT and
    LLaVA-OneVision have it.

    Attributes:
      pipeline: what every tile goes through.
      whole: the size of the first tile before that.
      tile: side of the tiles.
      resolutions: the sizes that a picture may be fitted into, multiples of `tile`.
      several: whether each of several pictures in one prompt is set in a square and is one tile.
    """

    pipeline: Pipeline
    whole: Size
    tile: int
    resolutions: tuple[Size, ...]
    several: bool = False

    def tiles(self, picture: np.ndarray, *, alone: bool = True) -> np.ndarray:
        """[M, h, w, 3] float32 of `picture` [H, W, 3] uint8.

        Args:
          picture: the picture.
          alone: whether it is the only one in its prompt.
        """
        if self.several and not alone:
            return self._one(picture)[None]
        size: Size = picture.shape[:2]
        resolution = select_best_resolution(size, self.resolutions)
        box = fitted_box(size, resolution)
        canvas = np.zeros((*resolution, 3), np.uint8)
        canvas[_of(box)] = resized(picture, box.size, self.pipeline.filter)
        first = resized(picture, self.whole, self.pipeline.filter)
        parts = [first, *(canvas[_of(box)] for box in tile_boxes(resolution, self.tile))]
        return np.stack([self.pipeline(part) for part in parts])

    @cached_property
    def _one(self) -> Pipeline:
        return replace(self.pipeline, square=True)


@dataclass(frozen=True)
class Tiled:
    """The picture stretched to a grid of tiles, then a thumbnail of it, as InternVL has it.

    Attributes:
      pipeline: what every tile goes through; its `resize` is not used.
      tile: height and width of a tile.
      min_tiles, max_tiles: bounds of the number of tiles of a grid.
    """

    pipeline: Pipeline
    tile: Size
    min_tiles: int = 1
    max_tiles: int = 12

    def grid(self, size: Size) -> Size:
        """Rows and columns of the tiles of a picture of `size`."""
        return tile_grid(
            size, tile=self.tile[0], min_tiles=self.min_tiles, max_tiles=self.max_tiles
        )

    def tiles(self, picture: np.ndarray, *, alone: bool = True) -> np.ndarray:
        """[M, h, w, 3] float32 of `picture` [H, W, 3] uint8; the thumbnail is the last."""
        (rows, columns), (height, width) = self.grid(picture.shape[:2]), self.tile
        large = resized(picture, (rows * height, columns * width), self.pipeline.filter)
        tiles = cut(large, (rows, columns))
        if len(tiles) > 1:
            small = resized(picture, self.tile, self.pipeline.filter)
            tiles = np.concatenate([tiles, small[None]])
        return self.pipeline.normalised(tiles)


@dataclass(frozen=True)
class Stretched:
    """The picture stretched to one tile and to a grid of tiles, and each of these again in crops,
    from the picture in several times the size, as DeepStack has it in high resolution.

    Attributes:
      pipeline: what every tile and crop goes through; its `resize` and `crop` are not used.
      tile: side of tiles and crops.
      max_tiles: of a grid, which has two at least.
      zoom: rows and columns of the crops of a tile.
    """

    pipeline: Pipeline
    tile: int
    max_tiles: int = 4
    zoom: int = 2

    def resolution(self, size: Size) -> Size:
        """What a picture of `size` is stretched to before it is cut into tiles."""
        rows, columns = crop_grid(size, tile=self.tile, crops=self.max_tiles)
        return rows * self.tile, columns * self.tile

    def tiles(self, picture: np.ndarray, *, alone: bool = True) -> np.ndarray:
        """[M, h, w, 3] float32 of `picture` [H, W, 3] uint8; the first shows all of it."""
        return self._views(picture, 1)[:, 0]

    def closer(self, picture: np.ndarray) -> np.ndarray:
        """The crops of each of the tiles, row by row: [M, zoom^2, h, w, 3] float32."""
        return self._views(picture, self.zoom)

    def _views(self, picture: np.ndarray, zoom: int) -> np.ndarray:
        """Every tile in `zoom` times its size, cut into tiles."""
        side, (height, width) = zoom * self.tile, self.resolution(picture.shape[:2])
        whole = resized(picture, (side, side), self.pipeline.filter)
        large = resized(picture, (zoom * height, zoom * width), self.pipeline.filter)
        parts = cut(large, (height // self.tile, width // self.tile))
        return self.pipeline.normalised(
            np.stack([cut(part, (zoom, zoom)) for part in (whole, *parts)])
        )


@dataclass(frozen=True)
class Native:
    """Patches of the picture in nearly its own resolution, as Qwen2-VL has it.

    Attributes:
      pipeline: rescaling and normalisation; its `resize` is not used.
      min_pixels, max_pixels: bounds of the area after resizing.
      patch_size, temporal_patch_size, merge_size: as in `NativeSpec`.
    """

    pipeline: Pipeline
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2

    def picture(self, picture: np.ndarray, spec: NativeSpec) -> Picture:
        """The patches of `picture` [H, W, 3] uint8. Raises UsageError if it is too narrow."""
        size = smart_resize(
            *picture.shape[:2],
            factor=spec.factor,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
        )
        frame = self.pipeline.normalised(resized(picture, size, self.pipeline.filter))
        return spec.picture(frame[None])


Views = Single | AnyRes | Tiled | Stretched | Native


def _of(box: Box) -> tuple[slice, slice]:
    return slice(box.top, box.bottom), slice(box.left, box.right)
