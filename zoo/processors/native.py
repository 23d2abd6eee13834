"""Pictures in their native resolution: sizes, patches, windows and rotary positions, for Qwen-VL.

Follows: arXiv:2409.12191 (Qwen2-VL), arXiv:2502.13923 (Qwen2.5-VL), arXiv:2511.21631 (Qwen3-VL).

A *picture* is an image or a video. It is cut into patches of `patch_size` x `patch_size` pixels and
`temporal_patch_size` frames; its *grid* (t, h, w) counts them. The language model sees one token
for every `merge_size` x `merge_size` patches, so patches stand in the order of these blocks: frame
by frame, block by block in reading order, and inside a block row by row.

    target = smart_resize(height, width, factor=spec.factor, min_pixels=..., max_pixels=...)
    picture = spec.picture(frames)                    # [F, H, W, 3] resized and normalised
    batch = spec.batch([ids, ...], [[picture, ...], ...], placeholders=(image_id, video_id), pad=0)

`batch` holds everything that the model reads: see `NativeSpec.batch`. Everything here is NumPy.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from zoo.models.core.errors import UsageError
from zoo.processors.lengths import bucket

if TYPE_CHECKING:
    from zoo.models.parts.assemblies.qwen_vl import QwenVLConfig

Grid = tuple[int, int, int]
Round = Callable[[int], int]
"""How a number of patches, windows, ... is rounded up so that few shapes occur."""


def smart_resize(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The size to which a picture is resized: both sides multiples of `factor`, the area within
    bounds, the aspect ratio nearly kept.

    Args:
      height: of the picture in pixels.
      width: of the picture in pixels.
      factor: side of a block of patches in pixels, `NativeSpec.factor`.
      min_pixels: lower bound of height x width.
      max_pixels: upper bound of height x width.

    Raises:
      UsageError: one side is more than 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise UsageError(
            f"a picture of {height} x {width} pixels: want the longer side at most 200 times the "
            "shorter one; crop it first"
        )
    sides = [round(side / factor) * factor for side in (height, width)]  # to the nearest, .5 even
    area = sides[0] * sides[1]
    if area > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        down = [math.floor(side / shrink / factor) * factor for side in (height, width)]
        sides = [max(factor, side) for side in down]
    elif area < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        sides = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return sides[0], sides[1]


@dataclass(frozen=True, eq=False)
class Picture:
    """An image or a video, cut into patches.

    Attributes:
      patches: float32 [t h w, C T p p]: channels, then T frames, then the p x p pixels of a patch.
      grid: (t, h, w) in patches.
      seconds: of a video, the time between two steps of t in seconds; None for an image.
    """

    patches: np.ndarray
    grid: Grid
    seconds: float | None = None


@dataclass(frozen=True)
class NativeSpec:
    """How pictures are cut and where their tokens stand. The defaults are Qwen2-VL.

    Attributes:
      patch_size: side of a patch in pixels.
      temporal_patch_size: frames in a patch; an image is repeated, as is the last frame of a video.
      merge_size: side of the block of patches that becomes one token.
      window_size: side of an attention window in pixels; None for a tower without windows.
      tokens_per_second: temporal positions per second of video; None: one per step of t.
      time_in_text: every step of t is a picture of its own, with a placeholder of its own and, for
        a video, its time in the text before it.
    """

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    window_size: int | None = None
    tokens_per_second: float | None = None
    time_in_text: bool = False

    @classmethod
    def of(cls, config: "QwenVLConfig") -> "NativeSpec":
        """What a model of this configuration reads."""
        tower = config.tower
        return cls(
            tower.patch_size,
            tower.temporal_patch_size,
            tower.merge_size,
            tower.window_size,
            config.tokens_per_second,
            config.time_in_text,
        )

    @property
    def factor(self) -> int:
        """Side of a block of patches in pixels: sizes of pictures are multiples of it."""
        return self.patch_size * self.merge_size

    @property
    def block(self) -> int:
        """Patches per token."""
        return self.merge_size**2

    def num_tokens(self, grid: Grid) -> int:
        """Tokens that the language model sees of a picture."""
        return math.prod(grid) // self.block

    def grid(self, num_frames: int, height: int, width: int) -> Grid:
        """(t, h, w) of `num_frames` frames (1 for an image) of resized pixels.

        Raises:
          UsageError: a side is no multiple of `factor`, there is no frame, or there are more than
            one picture may have.
        """
        if num_frames < 1 or height % self.factor or width % self.factor or not height * width:
            raise UsageError(
                f"{num_frames} frames of {height} x {width} pixels: want at least one frame and "
                f"both sides multiples of {self.factor}, as `smart_resize` makes them"
            )
        steps = -(-num_frames // self.temporal_patch_size)
        if self.time_in_text and steps > 1:
            raise UsageError(
                f"a video of {num_frames} frames: this model reads one picture for each "
                f"{self.temporal_patch_size} of them, with the time in the text before it; cut the "
                "video into such pictures, each with a placeholder"
            )
        return steps, height // self.patch_size, width // self.patch_size

    def picture(self, frames: np.ndarray, seconds: float | None = None) -> Picture:
        """Cut an image or video into patches.

        Args:
          frames: float [F, H, W, C], resized and normalised; F = 1 for an image.
          seconds: of a video, the time between two steps of t, which is `temporal_patch_size`
            divided by the sampled frames per second; None for an image.

        Raises:
          UsageError: see `grid`.
        """
        length, height, width, channels = frames.shape
        t, h, w = self.grid(length, height, width)
        p, m, per = self.patch_size, self.merge_size, self.temporal_patch_size
        frames = np.concatenate([frames, np.repeat(frames[-1:], t * per - length, 0)])
        x = frames.reshape(t, per, h // m, m, p, w // m, m, p, channels)
        x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # [t, h/m, w/m, m, m, C, T, p, p]
        patches = np.ascontiguousarray(x, np.float32).reshape(t * h * w, -1)
        return Picture(patches, (t, h, w), seconds)

    def coordinates(self, grid: Grid) -> np.ndarray:
        """(row, column) of every patch in its frame: int32 [t h w, 2]."""
        t, h, w = grid
        m = self.merge_size
        place = np.indices((h, w), np.int32).reshape(2, h // m, m, w // m, m)
        frame = place.transpose(1, 3, 2, 4, 0).reshape(h * w, 2)
        return np.tile(frame, (t, 1))

    def windows(self, grid: Grid) -> list[np.ndarray]:
        """The patches of every attention window, in the order in which they are read.

        A window spans `window_size` pixels of one frame; those at the right and bottom edges hold
        less. Only for a spec with windows.
        """
        t, h, w = grid
        m, side = self.merge_size, self.window_side
        blocks = np.arange(t * h * w // self.block).reshape(t, h // m, w // m)
        cut = [
            frame[y : y + side, x : x + side].ravel()
            for frame in blocks
            for y in range(0, h // m, side)
            for x in range(0, w // m, side)
        ]
        inside = np.arange(self.block)
        return [(of[:, None] * self.block + inside).ravel() for of in cut]

    @property
    def window_side(self) -> int:
        """Side of a window in blocks. Raises UsageError for a spec without windows."""
        if self.window_size is None:
            raise UsageError("this spec has no window_size: its tower attends to whole frames")
        return self.window_size // self.merge_size // self.patch_size

    def positions(
        self, ids: Sequence[int], pictures: Sequence[Picture], placeholders: Collection[int]
    ) -> np.ndarray:
        """M-RoPE positions (time, row, column) of the expanded sequence: float32 [L, 3].

        A text token advances all three by one. The tokens of a picture count from where it starts;
        what follows it starts max(rows, columns) later.

        Args:
          ids: one placeholder for each picture.
          pictures: in the order of their placeholders.
          placeholders: the ids that stand for a picture.

        Raises:
          UsageError: there are not as many placeholders as pictures.
        """
        self._check_count(ids, pictures, placeholders)
        waiting, parts, start = iter(pictures), [np.zeros((0, 3), np.float32)], 0
        for token in ids:
            if token in placeholders:
                picture = next(waiting)
                parts.append(start + self._picture_positions(picture))
                start += max(picture.grid[1:]) // self.merge_size
            else:
                parts.append(np.full((1, 3), start, np.float32))
                start += 1
        return np.concatenate(parts)

    def pack(
        self, rows: Sequence[Sequence[Picture]], *, round_up: Round = bucket
    ) -> dict[str, np.ndarray]:
        """The tower's input: the pictures of every row of a batch, in the order of their
        placeholders.

        Args:
          rows: the pictures of every row, all cut by this spec; at least one in the whole batch.
          round_up: applied to the numbers of blocks, of frame groups and of windows.

        Returns:
          patches: float32 [B, P, C'], zeros behind the last one of a row.
          patch_grid: int32 [B, P, 2], (row, column) of every patch in its frame.
          patch_segment: int32 [B, P], the number of its frame in the row from 1 on; 0 on padding.
          patch_frame: int32 [B, G, K], groups of whole frames in which full attention runs: places
            of their patches, -1 on padding. A group holds several frames where they fit.
          patch_window: int32 [B, W, K'], the same for the attention windows, one in each group;
            absent for a spec without windows.
        """
        counts = [sum(len(picture.patches) for picture in row) for row in rows]
        frame = max(grid[1] * grid[2] for row in rows for _, grid in _starts(row))
        length = round_up(max(counts) // self.block) * self.block
        group = round_up(frame // self.block) * self.block
        out = {
            "patches": _stack([_cat([p.patches for p in row]) for row in rows], length, 0.0),
            "patch_grid": _stack(
                [_cat([self.coordinates(p.grid) for p in row]) for row in rows], length, 0
            ),
            "patch_segment": _stack([_segments(row) for row in rows], length, 0),
            "patch_frame": _groups([_frame_groups(row, group) for row in rows], group, round_up),
        }
        if self.window_size is not None:
            cut = [
                [at + w for at, grid in _starts(row) for w in self.windows(grid)] for row in rows
            ]
            out["patch_window"] = _groups(cut, self.window_side**2 * self.block, round_up)
        return out

    def batch(
        self,
        ids: Sequence[Sequence[int]],
        pictures: Sequence[Sequence[Picture]],
        *,
        placeholders: Sequence[int],
        pad: int,
        round_up: Round = bucket,
    ) -> dict[str, np.ndarray]:
        """The arrays of a batch of prompts, padded on the right.

        Args:
          ids: of every row, one placeholder for each picture.
          pictures: of every row, in the order of their placeholders.
          placeholders: the ids that stand for a picture; the first also fills up rows with fewer.
          pad: id of padding.
          round_up: applied to every length, so that few shapes occur.

        Returns:
          What `pack` returns, and
          ids: int32 [B, T], the same number I of placeholders in every row: surplus ones stand in
            the padding.
          text_mask: bool [B, T], False on padding.
          sizes: int32 [B, I], the tokens of every placeholder, 0 for surplus ones.
          positions: float32 [B, T - I + S, 3], S = P / block: see `positions`; 0 on padding.
          Without any picture: `ids` and `text_mask` alone.

        Raises:
          UsageError: as many placeholders as pictures are wanted in every row.
        """
        for row, shown in zip(ids, pictures, strict=True):
            self._check_count(row, shown, placeholders)
        if not any(pictures):
            width = round_up(max(map(len, ids)))
            return {
                "ids": _stack([np.array(row, np.int32) for row in ids], width, pad),
                "text_mask": _stack([np.ones(len(row), bool) for row in ids], width, False),
            }
        packed = self.pack(pictures, round_up=round_up)
        slots = packed["patches"].shape[1] // self.block
        sizes = [[self.num_tokens(picture.grid) for picture in row] for row in pictures]
        most = round_up(max(map(len, sizes)))
        full = [
            np.array([*row, *placeholders[:1] * (most - len(size))], np.int32)
            for row, size in zip(ids, sizes, strict=True)
        ]
        width = round_up(max(map(len, full)))
        places = [self.positions(*pair, placeholders) for pair in zip(ids, pictures, strict=True)]
        return {
            **packed,
            "ids": _stack(full, width, pad),
            "text_mask": _stack([np.ones(len(row), bool) for row in ids], width, False),
            "sizes": _stack([np.array(row, np.int32) for row in sizes], most, 0),
            "positions": _stack(places, width - most + slots, 0.0),
        }

    def _picture_positions(self, picture: Picture) -> np.ndarray:
        """float32 [tokens, 3] from 0 on."""
        t, h, w = picture.grid
        cells = np.indices((t, h // self.merge_size, w // self.merge_size)).reshape(3, -1).T
        cells = cells.astype(np.float32)
        if picture.seconds is not None and self.tokens_per_second is not None:
            # In float32, as the original: the product decides on which side of an integer it falls.
            step = np.float32(self.tokens_per_second) * np.float32(picture.seconds)
            cells[:, 0] = np.trunc(cells[:, 0] * step)
        return cells

    def _check_count(
        self, ids: Sequence[int], pictures: Sequence[Picture], placeholders: Collection[int]
    ) -> None:
        count = sum(token in placeholders for token in ids)
        if count != len(pictures):
            raise UsageError(
                f"{count} placeholders for {len(pictures)} pictures: want one placeholder in the "
                "text for each picture"
            )


def _starts(pictures: Sequence[Picture]) -> list[tuple[int, Grid]]:
    """(first patch in the row, grid) of every picture."""
    found, start = [], 0
    for picture in pictures:
        found.append((start, picture.grid))
        start += len(picture.patches)
    return found


def _segments(pictures: Sequence[Picture]) -> np.ndarray:
    """The number of its frame in the row, from 1 on, of every patch."""
    sizes = [h * w for _, (t, h, w) in _starts(pictures) for _ in range(t)]
    return np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), np.array(sizes, np.int32))


def _frame_groups(pictures: Sequence[Picture], size: int) -> list[np.ndarray]:
    """Whole frames put together into groups of at most `size` patches, large frames first."""
    frames = [
        np.arange(start + i * h * w, start + (i + 1) * h * w)
        for start, (t, h, w) in _starts(pictures)
        for i in range(t)
    ]
    groups: list[list[np.ndarray]] = []
    for frame in sorted(frames, key=len, reverse=True):
        roomy = (g for g in groups if sum(map(len, g)) + len(frame) <= size)
        if (group := next(roomy, None)) is None:
            groups.append(group := [])
        group.append(frame)
    return [np.concatenate(group) for group in groups]


def _groups(rows: Sequence[Sequence[np.ndarray]], size: int, round_up: Round) -> np.ndarray:
    """Index lists of every row as int32 [B, groups, size], -1 on padding."""
    count = round_up(max(map(len, rows)))
    out = np.full((len(rows), count, size), -1, np.int32)
    for row, groups in zip(out, rows, strict=True):
        for line, group in zip(row, groups, strict=False):
            line[: len(group)] = group
    return out


def _cat(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenated; an empty array for no parts."""
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def _stack(rows: Sequence[np.ndarray], length: int, fill: float) -> np.ndarray:
    """Rows [n, ...] as one array [B, length, ...], `fill` behind the last of each."""
    like = max(rows, key=len)
    out = np.full((len(rows), length, *like.shape[1:]), fill, like.dtype)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row.reshape(-1, *like.shape[1:])
    return out
