"""Coarse-to-fine token pruning for large pictures: a few layers of the language model, distilled,
look at a coarse view and say which tiles of a finer one are worth encoding, and then which tokens
of these are worth reading.

Follows: arXiv:2503.07588 (ICCV 2025; the region focus module and the dynamic image pyramid). As
released, one finer level is looked at. Every choice is made on static shapes: a picture comes with
all tiles of the finer level, of which at most `max_tiles` are encoded, and what is not kept is
masked within a bound.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zoo.models.base import qwen2
from zoo.models.core.card import Card
from zoo.models.core.keytable import Row, Table
from zoo.models.core.registry import register
from zoo.models.core.types import Array, Batch, Memory, Stream, TokenSet, take
from zoo.models.parts.assemblies.llava import Llava, LlavaConfig, llava_table
from zoo.models.parts.assemblies.llava_hub import projector_rows
from zoo.models.parts.assemblies.splice import splice
from zoo.models.parts.decoders.gqa import DecoderConfig
from zoo.models.parts.layers.resize import resize_bilinear
from zoo.models.parts.layers.selection import pick
from zoo.models.parts.towers.vit import ViTConfig
from zoo.models.reduction.lrs_vqa.focus import RegionFocus, focus_table, selected, tile_at

CARD = Card(
    slug="lrs_vqa",
    code="https://github.com/VisionXLab/LRS-VQA",
    differs=(
        "Shapes are static: all tiles of the finer level come with a picture, at most `max_tiles` "
        "of the chosen ones are encoded, and surplus tokens are masked.",
        "Batches may have any number of examples, with one picture each.",
        "Only the choice is here, not the loss that distils it, which was not released.",
    ),
)


@dataclass(frozen=True)
class LrsVqaConfig(LlavaConfig):
    """A LLaVA model that reads large pictures from coarse to fine. The defaults are Vicuna-7B.

    Tile 0 of `pixels` is the whole picture, the others those of the coarse level; `crops` are those
    of the fine one. Without layouts both levels are squares of tiles that the picture fills.

    Attributes:
      focus_depth: layers that the region focus module runs before the one that scores.
      ratio: of the tokens of a level that are kept.
      max_tiles: tiles of the finer level that are encoded, at most; the first ones in reading order
        where more are chosen. None for all that there are.
      coarse_tiles: tiles of the coarse level that `inputs` describes, a square number.
      fine_tiles: tiles of the finer level that `inputs` describes, a square number.
      separator_id: the text token between the whole picture and its parts, a colon.
    """

    focus_depth: int = 4
    ratio: float = 0.25
    max_tiles: int | None = None
    coarse_tiles: int = 9
    fine_tiles: int = 36
    separator_id: int = 29_901
    newline: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        rows, columns = self.tower.grid
        squares = [math.isqrt(n) ** 2 == n > 0 for n in (self.coarse_tiles, self.fine_tiles)]
        wrong = {
            "want newline=True and num_images=1": not self.newline or self.num_images != 1,
            "want no reducer, no crops of a policy and no class tokens": (
                self.reducer is not None or self.crops is not None or self.keep_class
            ),
            f"a grid of {rows} x {columns} patches has no halves": rows % 2 or columns % 2,
            f"focus_depth = {self.focus_depth}: want 1 or more": self.focus_depth < 1,
            f"ratio = {self.ratio}: want more than 0 and at most 1": not 0 < self.ratio <= 1,
            f"max_tiles = {self.max_tiles}: want 1 or more, or None": (
                self.max_tiles is not None and self.max_tiles < 1
            ),
            "coarse_tiles and fine_tiles: want square numbers": not all(squares),
        }
        if found := [what for what, is_wrong in wrong.items() if is_wrong]:
            raise ValueError("; ".join(found))

    @property
    def pooled(self) -> int:
        """Tokens of a tile of a level."""
        return self.tile_tokens // 4

    def bound(self, slots: int, tiles: int) -> int:
        """The most image slots that the decoder sees, of `slots` that a prompt has for `tiles`."""
        first = self.tile_tokens + 1
        rows = tiles * self.tower.grid[0] // 2
        return min(slots, first + rows + int((slots - first) * self.ratio))

    @property
    def slots(self) -> int:
        """Image slots of the examples that `inputs` describes, as the decoder sees them."""
        return self.bound(self._size(self.fine_tiles), self.fine_tiles)

    def _size(self, tiles: int) -> int:
        """Image slots of a prompt with a square of tiles."""
        side = math.isqrt(tiles) * self.tower.grid[0] // 2
        return self.tile_tokens + 1 + side * (side + 1)

    @property
    def unread(self) -> tuple[str, ...]:
        """Parameters without a gradient: those of the tower that nothing reads, and the region
        focus module, which only chooses.
        """
        parts = ["attn_norm/scale", "mlp_norm/scale"]
        parts += [f"{name}/kernel" for name in ("q", "k", "v", "out", "gate", "up", "down")]
        if self.decoder.qkv_bias:
            parts += [f"{name}/bias" for name in "qkv"]
        own = [f"focus/stack/layers/{part}" for part in parts]
        return (*super().unread, *own, "focus/final_norm/scale")

    def build(self) -> "LrsVqa":
        """The module."""
        return LrsVqa(self)

    def inputs(self, batch_size: int) -> Batch:
        """Shapes of a training batch."""
        side = self.tower.image_size
        tile = (side, side, 3)
        pixels = (batch_size, 1 + self.coarse_tiles, *tile)
        crops = (batch_size, 1, self.fine_tiles, *tile)
        ints = {
            "sizes": (batch_size, 1),
            "layout": (batch_size, self._size(self.coarse_tiles)),
            "view_grid": (batch_size, 1, 2),
            "fine_sizes": (batch_size, 1),
            "fine_layout": (batch_size, self._size(self.fine_tiles)),
        }
        kept = {"ids", "labels", "text_mask", "segments"}
        batch = {name: spec for name, spec in super().inputs(batch_size).items() if name in kept}
        batch |= {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in ints.items()}
        return batch | {
            "pixels": jax.ShapeDtypeStruct(pixels, jnp.float32),
            "crops": jax.ShapeDtypeStruct(crops, jnp.float32),
        }


class LrsVqa(Llava):
    """A LLaVA model whose prompt holds the whole picture and the chosen tokens of its parts.

    The vision tokens of a prompt are numbered: those of the whole picture, those of the tiles of a
    level (half as many per side), then the newline and the separator. Batches come from
    `zoo.processors.pyramid.pyramid_batch`.
    """

    config: LrsVqaConfig

    def setup(self) -> None:
        super().setup()
        self.focus = RegionFocus(self.config.decoder, self.config.focus_depth)

    def stream(self, batch: Batch, budget: int | Array | None) -> tuple[Stream, Memory]:
        """Embedded text with the whole picture and what was chosen of it.

        Raises:
          ValueError: a budget; pixels without the tiles of the finer level.
        """
        if "pixels" not in batch:
            return super().stream(batch, budget)
        if budget is not None:
            raise ValueError(f"budget = {budget}: this model keeps a share, set by its `ratio`")
        if "crops" not in batch:
            raise ValueError("a batch of pixels for this model needs crops: the finer tiles")
        c, embedded = self.config, self.decoder.embed(batch["ids"])
        encoded = self.encode_image(batch["pixels"]).tokens.tokens  # [B, 1 + M, Q, D]
        whole, coarse = encoded[:, 0], self._pooled(encoded[:, 1:])
        spliced = self._spliced(batch, embedded, whole, coarse, "")
        level = _level(spliced, c.tile_tokens, coarse.shape[1] * c.pooled)
        score, _ = self.focus(_detached(spliced), level.local)
        chosen = selected(score, level.local, level.newline, c.ratio)

        tiles = batch["crops"][:, 0]  # [B, V, H, W, 3]
        wanted = self._tiles(level, chosen, batch.get("view_grid"), tiles.shape[1])
        fine = self._encoded(tiles, wanted)  # [B, V, P, D]
        spliced = self._spliced(batch, embedded, whole, fine, "fine_")
        level = _level(spliced, c.tile_tokens, tiles.shape[1] * c.pooled)
        tile = jnp.clip((level.cell - c.tile_tokens) // c.pooled, 0, tiles.shape[1] - 1)
        real = level.local & (level.newline | take(wanted, tile))
        valid = spliced.tokens.valid & (~level.local | real)
        seen = spliced.replace(tokens=spliced.tokens.replace(valid=valid))
        score, _ = self.focus(_detached(seen), real)
        kept = ~level.local | selected(score, real, level.newline, c.ratio)
        return _shortened(seen, kept, c.bound(spliced.slots, tiles.shape[1])), {}

    def _pooled(self, tokens: Array) -> Array:
        """Tokens [B, M, Q, D] with half as many per side, [B, M, P, D]."""
        rows, columns = self.config.tower.grid
        grid = tokens.reshape(*tokens.shape[:2], rows, columns, -1)
        small = resize_bilinear(grid, rows // 2, columns // 2)
        return small.reshape(*tokens.shape[:2], -1, tokens.shape[-1])

    def _spliced(
        self, batch: Batch, embedded: Array, whole: Array, parts: Array, prefix: str
    ) -> Stream:
        """The prompt with the whole picture [B, Q, D] and all of a level [B, M, P, D]."""
        c, rows = self.config, parts.shape[0]
        colon = self.decoder.embed(jnp.array([[c.separator_id]]))[0]
        flat = jnp.concatenate([whole, parts.reshape(rows, -1, parts.shape[-1])], 1)
        places = {name: batch.get(prefix + name) for name in ("layout", "sizes")}
        if places["layout"] is None:
            line = square_layout(parts.shape[1], c.tile_tokens, c.tower.grid[0] // 2)
            places["layout"] = jnp.broadcast_to(line, (rows, len(line)))
            places["sizes"] = jnp.full((rows, 1), len(line), jnp.int32)
        return splice(
            batch["ids"],
            embedded,
            TokenSet(flat[:, None]),
            image_id=c.image_id,
            extra=jnp.concatenate([self.newline[None], colon.astype(self.newline.dtype)]),
            **places,
            **{name: batch.get(name) for name in ("text_mask", "labels", "segments")},
        )

    def _tiles(self, level: "_Level", chosen: Array, blocks: Array | None, tiles: int) -> Array:
        """The tiles of the finer level where chosen tokens lie, bool [B, V]."""
        side = math.isqrt(tiles)
        blocks = jnp.array([side, side]) if blocks is None else blocks[:, 0]
        blocks = jnp.broadcast_to(blocks, (chosen.shape[0], 2))
        number = jnp.cumsum(level.local, -1) - 1  # [B, L], of every token of the level
        rows = jnp.maximum(level.newline.sum(-1), 1)
        columns = jnp.maximum(level.local.sum(-1) // rows, 1)
        size = jnp.stack([rows, columns], -1)[:, None]  # [B, 1, 2]
        at = number // columns[:, None], number % columns[:, None]
        down, across = tile_at(*at, size, blocks[:, None])
        tile = jnp.where(chosen, down * blocks[:, 1:] + across, tiles)

        def vote(row: Array) -> Array:
            return jnp.zeros(tiles, bool).at[row].set(True, mode="drop")

        found = jax.vmap(vote)(tile)
        first = jnp.cumsum(found, -1) <= (self.config.max_tiles or tiles)
        return found & first

    def _encoded(self, tiles: Array, wanted: Array) -> Array:
        """The tokens [B, V, P, D] of the wanted tiles [B, V, H, W, 3], zeros for the others."""
        number = min(self.config.max_tiles or tiles.shape[1], tiles.shape[1])
        index = jnp.argsort(~wanted, -1, stable=True)[:, :number]
        tokens = self._pooled(self.encode_image(take(tiles, index)).tokens.tokens)
        tokens = jnp.where(take(wanted, index)[..., None, None], tokens, 0)
        empty = jnp.zeros((*wanted.shape, *tokens.shape[2:]), tokens.dtype)
        return jax.vmap(lambda row, at, new: row.at[at].set(new))(empty, index, tokens)


class _Level(NamedTuple):
    """Which tokens of a prompt are those of a level.

    Attributes:
      cell: int [B, L], the number of every vision token.
      newline: bool [B, L], the newlines.
      local: bool [B, L], the tokens of tiles and the newlines.
    """

    cell: Array
    newline: Array
    local: Array


def _level(stream: Stream, whole: int, parts: int) -> _Level:
    """Those of a prompt whose whole picture and tiles have so many tokens."""
    cell, valid = stream.tokens.tags["cell"], stream.tokens.valid
    last = whole + parts
    return _Level(cell, (cell == last) & valid, (cell >= whole) & (cell <= last) & valid)


def _detached(stream: Stream) -> Stream:
    return stream.replace(hidden=jax.lax.stop_gradient(stream.hidden))


def _shortened(stream: Stream, kept: Array, capacity: int) -> Stream:
    """The stream with the kept tokens of at most `capacity` image slots, counted anew."""
    slot = stream.tokens.modality == 1
    kept &= stream.tokens.valid
    count = (slot & kept).sum(-1)
    index, there = pick(kept, slot, count, slots=stream.slots, capacity=capacity)
    tokens = take(stream.tokens, index)
    valid = tokens.valid & there
    position = jnp.maximum(jnp.cumsum(valid, -1) - 1, 0).astype(jnp.float32)
    order = jnp.broadcast_to(jnp.arange(index.shape[1], dtype=jnp.int32), index.shape)
    tokens = tokens.replace(valid=valid, position=position, order=order)
    return Stream(take(stream.hidden, index), tokens, capacity)


def square_layout(tiles: int, whole: int, side: int) -> np.ndarray:
    """What stands in the image slots of a prompt whose picture fills a square of tiles: the whole
    picture, the separator, rows of tokens with a newline after each. int32 [n].

    Args:
      tiles: a square number.
      whole: Q, tokens of the whole picture.
      side: rows and columns of the tokens of a tile.

    Raises:
      ValueError: another number of tiles; a batch of them needs layouts.
    """
    across, parts = math.isqrt(tiles), tiles * side**2
    if across**2 != tiles:
        raise ValueError(f"{tiles} tiles are no square: want a layout that says how they lie")
    tile = np.arange(tiles).reshape(across, 1, across, 1) * side**2
    cells = (tile + np.arange(side**2).reshape(1, side, 1, side)).reshape(across * side, -1)
    lines = np.pad(cells, ((0, 0), (0, 1)), constant_values=parts).ravel() + whole
    return np.concatenate([np.arange(whole), [whole + parts + 1], lines]).astype(np.int32)


def table(config: LrsVqaConfig) -> Table:
    """Keys of the released checkpoints."""
    prefix = "model.mm_projector."
    projector = projector_rows(bias=config.connector.bias, keys=("0", "2"))
    focus = focus_table(config.decoder, config.focus_depth, f"{prefix}token_pruner.")
    found = llava_table(config) + projector.under("connector", f"{prefix}mlp_projector.")
    return found + focus + Table((Row("newline", "model.image_newline"),))


_QWEN2 = dataclasses.replace(qwen2.VARIANTS["qwen2_5_7b"].decoder, context=8192)
_TINY: Mapping[str, Any] = {"width": 24, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 32}
VARIANTS = {
    # ll-13/llava-largeimg-Qwen2-7B and ll-13/llava-largeimg-Vicuna-7B; the number of layers of the
    # region focus module is the default of the official class.
    "lrs_vqa_qwen2_7b": LrsVqaConfig(decoder=_QWEN2, separator_id=25, image_id=151_646),
    "lrs_vqa_vicuna_7b": LrsVqaConfig(),
    "lrs_vqa_tiny": LrsVqaConfig(
        tower=ViTConfig(image_size=16, patch_size=4, width=16, depth=3, num_heads=2, mlp_dim=32),
        decoder=DecoderConfig(vocab_size=320, depth=2, **_TINY),
        focus_depth=1,
        coarse_tiles=1,
        fine_tiles=4,
        separator_id=7,
        image_id=3,
        text_tokens=12,
    ),
}

register(CARD, VARIANTS, table=table)
