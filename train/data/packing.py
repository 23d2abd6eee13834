"""Packing: several short examples in one row, none of which sees another.

    ids       <bos> <image> ... <eos> <bos> ... <eos> <bos> <image> ... <eos> <image> <pad>
    segments      0 ...               1024 ...         2048 ...
    text_mask     1 ...                                                     1       0     0

The numbers of `segments` say which example a token is of (see `zoo.models.core.types`): attention
is block-diagonal, positions count anew in every example, and the first token of an example is never
learned. The pictures of a row stand in the order of its placeholders; placeholders that are not
used stand in the padding.

A row of the batch takes the first example that fits; a batch is full at the first example that fits
into none of its rows, which the next batch begins with.
"""

from dataclasses import dataclass, field

import numpy as np

from zoo.models.core.types import EXAMPLE, IGNORE

Arrays = dict[str, np.ndarray]

_OF_TOKENS = ("ids", "labels", "segments")
_OF_IMAGES = {"pixels": 0, "crops": 0, "view_grid": 1}
"""Arrays with a row for each image, and what they hold where there is none."""


@dataclass
class _Row:
    """What a row holds so far."""

    pieces: list[Arrays] = field(default_factory=list)
    tokens: int = 0
    images: int = 0


class Packer:
    """The rows of one batch.

    Args:
      rows: how many.
      image_id: the placeholder of an image; None where there are none.
      pad_id: stands where nothing is.
    """

    def __init__(self, rows: int, image_id: int | None, pad_id: int):
        self._rows = [_Row() for _ in range(rows)]
        self._image_id = image_id
        self._pad_id = pad_id

    def add(self, example: Arrays) -> bool:
        """Put an example, as `Processor.encode` makes it, into the first row with room for it.

        Returns:
          False if there is none, which never happens to the first example of a row.

        Raises:
          ValueError: the example has arrays that this does not know how to pack.
        """
        if more := set(example) - {*_OF_TOKENS, *_OF_IMAGES, "text_mask"}:
            raise ValueError(f"cannot pack {sorted(more)}: known are tokens and images alone")
        if int(example["segments"].max()) >= EXAMPLE:
            raise ValueError(f"an example to pack has more than {EXAMPLE - 1} independent turns")
        real = example["text_mask"]
        piece = {name: example[name][real] for name in _OF_TOKENS}
        seen = [name for name in _OF_IMAGES if name in example]
        images = int((piece["ids"] == self._image_id).sum()) if seen else 0
        piece |= {name: example[name][:images] for name in seen}
        limit, places = len(real), len(example[seen[0]]) if seen else 0
        for row in self._rows:
            unused = places - row.images - images
            if unused >= 0 and row.tokens + len(piece["ids"]) + unused <= limit:
                row.pieces.append(piece)
                row.tokens += len(piece["ids"])
                row.images += images
                self._limit, self._places = limit, places
                return True
        return False

    def batch(self) -> Arrays:
        """The rows: ids, labels, text_mask, segments [B, T], pixels [B, I, H, W, 3], ..."""
        rows = [self._filled(row) for row in self._rows]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _filled(self, row: _Row) -> Arrays:
        def joined(arrays: list[np.ndarray], filler: int, length: int = self._limit) -> np.ndarray:
            held = np.concatenate(arrays)
            whole = np.full((length, *held.shape[1:]), filler, held.dtype)
            whole[: len(held)] = held
            return whole

        def of(name: str) -> list[np.ndarray]:
            return [piece[name] for piece in row.pieces]

        ids = joined(of("ids"), self._pad_id)
        if self._image_id is not None:
            ids[row.tokens : row.tokens + self._places - row.images] = self._image_id
        numbered = [EXAMPLE * i + segments for i, segments in enumerate(of("segments"))]
        seen = {name: f for name, f in _OF_IMAGES.items() if name in row.pieces[0]}
        return {
            **{name: joined(of(name), filler, self._places) for name, filler in seen.items()},
            "ids": ids,
            "text_mask": np.arange(self._limit) < row.tokens,
            "labels": joined(of("labels"), IGNORE),
            "segments": joined(numbered, EXAMPLE * (len(row.pieces) - 1)),
        }
