"""Tokenizers: from data of many kinds to tokens of one width.

Each is described by a frozen configuration with the names and shapes of what it reads of a batch
(`inputs`); its module takes the batch and returns `Sequence`. Shapes of arrays:

    pixels       [B, H, W, C]     pictures
    video        [B, Z, H, W, C]  frames
    series       [B, T, C]        and `stamps` int [B, T, 4 or 5]: month, day, weekday, hour,
                                  quarter of an hour; which may be left out
    spectrogram  [B, T, F]        see `zoo.models.parts.layers.spectrum`
    ids          [B, T]           text
    categories   int [B, K]       and `numbers` [B, M]: a row of a table
    bands        [B, S, G]        S groups of G neighbouring bands of a place
"""

from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from zoo.models.core.types import Array, Batch
from zoo.models.parts.layers.conv import Conv
from zoo.models.parts.layers.embed import Embed, PatchEmbed, check_pixels
from zoo.models.parts.layers.linear import dense, table_init
from zoo.models.parts.layers.positions import sincos_1d

STAMPS = (13, 32, 7, 24, 4)
"""Values of month, day, weekday, hour and quarter of an hour."""


@struct.dataclass
class Sequence:
    """What a tokenizer returns.

    Attributes:
      tokens: [B, N, D].
      place: [B, N, D], what is added again before every layer of the encoder; None for nothing.
    """

    tokens: Array
    place: Array | None = None


@dataclass(frozen=True)
class Modality:
    """Base of the configurations of tokenizers.

    Attributes:
      name: of the modality.
      reads: the entries of a batch that it cannot do without.
    """

    name: ClassVar[str] = ""
    reads: ClassVar[tuple[str, ...]] = ()

    def build(self, width: int) -> nn.Module:
        """The module that makes tokens of `width`: `(batch, *, train=False) -> Sequence`."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")

    def shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """{entry of a batch: its shape without the batch's axis, its dtype}."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it reads")

    def inputs(self, batch_size: int) -> Batch:
        """Shapes of a batch."""
        return {
            name: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
            for name, (shape, dtype) in self.shapes().items()
        }


@dataclass(frozen=True)
class Pictures(Modality):
    """Patches of pictures, rows first; of X-rays and infrared pictures as well.

    Attributes:
      image_size: side in pixels that `inputs` describes; others are taken.
      patch_size: side of a patch.
      channels: of the pictures.
    """

    image_size: int = 224
    patch_size: int = 16
    channels: int = 3

    name: ClassVar[str] = "image"
    reads: ClassVar[tuple[str, ...]] = ("pixels",)

    def build(self, width: int) -> nn.Module:
        return PictureTokens(self, width)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        return {"pixels": ((self.image_size, self.image_size, self.channels), jnp.float32)}


class PictureTokens(nn.Module):
    """Tokens of `Pictures`."""

    config: Pictures
    width: int

    def setup(self) -> None:
        self.patch = PatchEmbed(self.config.patch_size, self.width, self.config.channels)

    def __call__(self, batch: Batch, *, train: bool = False) -> Sequence:
        del train
        return Sequence(self.patch(batch["pixels"]))


@dataclass(frozen=True)
class Video(Modality):
    """Tubes of several frames.

    Attributes:
      frames: that `inputs` describes, a multiple of `tube[0]`.
      image_size: their side in pixels.
      tube: frames, rows and columns of a tube.
      channels: of the frames.
    """

    frames: int = 16
    image_size: int = 224
    tube: tuple[int, int, int] = (2, 16, 16)
    channels: int = 3

    name: ClassVar[str] = "video"
    reads: ClassVar[tuple[str, ...]] = ("video",)

    def build(self, width: int) -> nn.Module:
        return VideoTokens(self, width)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        side = self.image_size
        return {"video": ((self.frames, side, side, self.channels), jnp.float32)}


class VideoTokens(nn.Module):
    """Tokens of `Video`, frames first, then rows."""

    config: Video
    width: int

    def setup(self) -> None:
        self.tube = Conv(self.width, self.config.tube, self.config.tube, padding=0)

    def __call__(self, batch: Batch, *, train: bool = False) -> Sequence:
        del train
        x, tube = batch["video"], self.config.tube
        check_pixels(x, channels=self.config.channels)
        if x.ndim != 5 or any(side % step for side, step in zip(x.shape[1:4], tube, strict=True)):
            raise ValueError(f"video: got {x.shape}, want [B, Z, H, W, C] in multiples of {tube}")
        y = self.tube(x)
        return Sequence(y.reshape(y.shape[0], -1, self.width))


@dataclass(frozen=True)
class Series(Modality):
    """Time series and motion sensors: a circular convolution of three steps, plus sines and cosines
    of the step and, where there are stamps, of the time of year, week and day.

    Attributes:
      channels: C.
      length: T that `inputs` describes; others are taken.
      dropout: in training, the share of numbers that are left out.
    """

    channels: int = 7
    length: int = 96
    dropout: float = 0.1

    name: ClassVar[str] = "series"
    reads: ClassVar[tuple[str, ...]] = ("series",)

    def build(self, width: int) -> nn.Module:
        return SeriesTokens(self, width)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        return {"series": ((self.length, self.channels), jnp.float32)}


class SeriesTokens(nn.Module):
    """Tokens of `Series`, one for each step."""

    config: Series
    width: int

    def setup(self) -> None:
        self.value = Conv(self.width, (3,), padding=0, bias=False)
        self.drop = nn.Dropout(self.config.dropout)

    def __call__(self, batch: Batch, *, train: bool = False) -> Sequence:
        x, stamps = batch["series"], batch.get("stamps")
        if x.ndim != 3 or x.shape[-1] != self.config.channels:
            raise ValueError(f"series: got {x.shape}, want [B, T, {self.config.channels}]")
        y = self.value(jnp.pad(x, ((0, 0), (1, 1), (0, 0)), "wrap"))
        y = y + waves(x.shape[1], self.width)
        if stamps is not None:
            if stamps.shape[:-1] != x.shape[:2] or stamps.shape[-1] not in (4, 5):
                raise ValueError(f"stamps: got {stamps.shape}, want {x.shape[:2]} and 4 or 5")
            numbers = stamps.astype(jnp.int32)
            sizes = STAMPS[: stamps.shape[-1]]
            y = y + sum(
                jnp.asarray(waves(n, self.width))[numbers[..., i]] for i, n in enumerate(sizes)
            )
        return Sequence(self.drop(y, deterministic=not train))


@dataclass(frozen=True)
class Audio(Modality):
    """Overlapping patches of a spectrogram, frequencies first, with learned positions.

    Attributes:
      frames: T.
      bins: F.
      patch_size: side of a patch.
      stride: from one patch to the next.
    """

    frames: int = 1024
    bins: int = 128
    patch_size: int = 16
    stride: int = 10

    name: ClassVar[str] = "audio"
    reads: ClassVar[tuple[str, ...]] = ("spectrogram",)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along frequencies and time."""
        bins, frames = (
            (side - self.patch_size) // self.stride + 1 for side in (self.bins, self.frames)
        )
        return bins, frames

    def build(self, width: int) -> nn.Module:
        return AudioTokens(self, width)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        return {"spectrogram": ((self.frames, self.bins), jnp.float32)}


class AudioTokens(nn.Module):
    """Tokens of `Audio`."""

    config: Audio
    width: int

    def setup(self) -> None:
        c = self.config
        self.patch = Conv(self.width, (c.patch_size,) * 2, c.stride, padding=0)
        rows = nn.with_logical_partitioning(table_init(self.width), ("positions", "embed"))
        self.position = self.param("position", rows, (c.grid[0] * c.grid[1], self.width))

    def __call__(self, batch: Batch, *, train: bool = False) -> Sequence:
        del train
        x, c = batch["spectrogram"], self.config
        if x.shape[1:] != (c.frames, c.bins):
            raise ValueError(f"spectrogram: got {x.shape}, want [B, {c.frames}, {c.bins}]")
        y = self.patch(x.swapaxes(1, 2)[..., None])  # [B, bins, frames, D]
        return Sequence(y.reshape(y.shape[0], -1, self.width) + self.position.astype(y.dtype))


@dataclass(frozen=True)
class Text(Modality):
    """Rows of a vocabulary table, filled up with zeros to the width of the encoder.

    Attributes:
      vocab_size: V.
      text_width: of the table, at most the encoder's.
      length: T that `inputs` describes; others are taken.
    """

    vocab_size: int = 49408
    text_width: int = 512
    length: int = 77

    name: ClassVar[str] = "text"
    reads: ClassVar[tuple[str, ...]] = ("ids",)

    def build(self, width: int) -> nn.Module:
        if self.text_width > width:
            raise ValueError(f"text_width = {self.text_width}: want {width} at most")
        return TextTokens(self, width)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        return {"ids": ((self.length,), jnp.int32)}


class TextTokens(nn.Module):
    """Tokens of `Text`."""

    config: Text
    width: int

    def setup(self) -> None:
        self.embed = Embed(self.config.vocab_size, self.config.text_width)

    def __call__(self, batch: Batch, *, train: bool = False) -> Sequence:
        del train
        rest = self.width - self.config.text_width
        return Sequence(jnp.pad(self.embed(batch["ids"]), ((0, 0), (0, 0), (0, rest))))


@dataclass(frozen=True)
class TableRows(Modality):
    """A token for each column of a table: a row of its categories' table, or a number times a
    vector.

    Attributes:
      sizes: number of categories of each of K columns.
      numbers: M columns of numbers.
    """

    sizes: tuple[int, ...] = (2,)
    numbers: int = 0

    name: ClassVar[str] = "table"
    reads: ClassVar[tuple[str, ...]] = ("categories",)

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"sizes = {self.sizes}: want one column with a category at least")

    def build(self, width: int) -> nn.Module:
        return TableTokens(self, width)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        found = {"categories": ((len(self.sizes),), jnp.int32)}
        return found | ({"numbers": ((self.numbers,), jnp.float32)} if self.numbers else {})


class TableTokens(nn.Module):
    """Tokens of `TableRows`, columns of categories first."""

    config: TableRows
    width: int

    def setup(self) -> None:
        c = self.config
        self.embed = Embed(sum(c.sizes), self.width)
        if c.numbers:
            rows = nn.with_logical_partitioning(table_init(self.width), ("queries", "embed"))
            self.slope = self.param("slope", rows, (c.numbers, self.width))
            self.offset = self.param("offset", rows, (c.numbers, self.width))

    def __call__(self, batch: Batch, *, train: bool = False) -> Sequence:
        del train
        c, first = self.config, np.cumsum([0, *self.config.sizes[:-1]])
        x = self.embed(batch["categories"] + first)
        if c.numbers:
            columns = batch["numbers"][..., None] * self.slope + self.offset
            x = jnp.concatenate([x, columns.astype(x.dtype)], 1)
        return Sequence(x)


@dataclass(frozen=True)
class Bands(Modality):
    """Groups of bands of a place in a hyperspectral picture, behind a class token.

    Attributes:
      groups: S.
      size: G.
    """

    groups: int = 200
    size: int = 3

    name: ClassVar[str] = "bands"
    reads: ClassVar[tuple[str, ...]] = ("bands",)

    def build(self, width: int) -> nn.Module:
        return BandTokens(self, width)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        return {"bands": ((self.groups, self.size), jnp.float32)}


class BandTokens(nn.Module):
    """Tokens of `Bands`, the class token first."""

    config: Bands
    width: int

    def setup(self) -> None:
        c, init = self.config, table_init(self.width)
        self.embed = dense(c.size, self.width, bias=True, axes=("mlp", "embed"))
        self.cls = self.param("cls", nn.with_logical_partitioning(init, ("norm",)), (self.width,))
        rows = nn.with_logical_partitioning(init, ("positions", "embed"))
        self.position = self.param("position", rows, (c.groups + 1, self.width))

    def __call__(self, batch: Batch, *, train: bool = False) -> Sequence:
        del train
        x = self.embed(batch["bands"])
        cls = jnp.broadcast_to(self.cls.astype(x.dtype), (x.shape[0], 1, self.width))
        return Sequence(jnp.concatenate([cls, x], 1) + self.position.astype(x.dtype))


def waves(length: int, width: int) -> np.ndarray:
    """Sines and cosines of the places 0 to `length` - 1 side by side, float32 [length, width]."""
    half = sincos_1d(np.arange(length), width)
    pairs = np.stack(np.split(half, 2, 1), -1)
    return pairs.reshape(length, width).astype(np.float32)


def group_bands(spectrum: np.ndarray, size: int) -> np.ndarray:
    """Every band with its neighbours, [..., S] to [..., S, size]; the last ones follow the first.

    Raises:
      ValueError: `size` is even.
    """
    if size % 2 == 0:
        raise ValueError(f"size = {size}: want an odd number of neighbouring bands")
    around = np.arange(spectrum.shape[-1])[:, None] + np.arange(size) - size // 2
    return spectrum[..., around % spectrum.shape[-1]]


def present(modalities: Several[Modality], batch: Batch) -> tuple[Modality, ...]:
    """Those of which a batch has all that they read."""
    return tuple(each for each in modalities if all(name in batch for name in each.reads))
