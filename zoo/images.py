"""Reading pictures that come from anywhere: handled right, or refused with the file's name."""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from zoo.models.core.errors import ZooError

Source = str | Path | bytes | Image.Image | np.ndarray
"""What a picture can be given as: a file, the bytes of a file, or a picture in memory."""

MAX_PIXELS = 1 << 25
"""A picture of more than 33.5 million pixels is handed out at a half, a third, ... of its size."""

MAX_DECODED = 1 << 27
"""The most pixels that are decoded: 134 million, which take up to 1.5 GB for a moment. A larger
picture is read only if it is a JPEG that can be decoded at a fraction of its size, and has no more
than Pillow opens at all."""

# Pillow warns of large pictures because they may be attacks; the limits above answer that.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_ORIENTATION = 0x0112  # the EXIF tag
_TURN = Image.Transpose
_UPRIGHT = {
    2: _TURN.FLIP_LEFT_RIGHT,
    3: _TURN.ROTATE_180,
    4: _TURN.FLIP_TOP_BOTTOM,
    5: _TURN.TRANSPOSE,
    6: _TURN.ROTATE_270,
    7: _TURN.TRANSVERSE,
    8: _TURN.ROTATE_90,
}


def listed(image: Source | tuple[Source, ...] | None) -> tuple[Source, ...]:
    """The pictures of a record or a prompt: none, one or several."""
    if image is None:
        return ()
    return image if isinstance(image, tuple) else (image,)


def read_image(
    source: Source, *, name: str | None = None, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Read a picture as upright 8-bit RGB.

    EXIF rotation is applied. Transparent pictures are laid on white. 16-bit grey is scaled to 8
    bits, CMYK and palettes are converted, and of an animation the first frame is taken. A picture
    of more than `max_pixels` is reduced by a whole factor, so that memory stays bounded.

    Args:
      source: a path, the bytes of a file, a PIL image, or an array [H, W], [H, W, 1], [H, W, 3] or
        [H, W, 4] of uint8, uint16 or bool.
      name: what errors call the picture; by default its path.
      max_pixels: the most pixels of the result.

    Returns:
      [H, W, 3] uint8.

    Raises:
      ZooError, with the picture's name, if it is missing, empty, truncated, too large or not a
      picture.
    """
    name = name or _name(source)
    try:
        if isinstance(source, np.ndarray):
            picture = _from_array(source)
        elif isinstance(source, Image.Image):
            picture = source
        elif isinstance(source, (str, Path, bytes)):
            picture = _open(source, max_pixels)
        else:
            raise ZooError(f"is a {type(source).__name__}: want a path, bytes, PIL image or array")
        return np.asarray(_upright(picture, max_pixels))
    except ZooError as error:
        raise ZooError(f"{name} {error}") from None
    # The decoders raise nearly anything on damaged files: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise ZooError(
            f"{name} is truncated or damaged ({error}): replace it or leave it out"
        ) from error


def _name(source: Source) -> str:
    if isinstance(source, (str, Path)):
        return str(source)
    return str(getattr(source, "filename", "") or "the picture")


def _open(source: str | Path | bytes, max_pixels: int) -> Image.Image:
    """The picture, not yet decoded; a JPEG will be as small as `max_pixels` asks."""
    content = source if isinstance(source, bytes) else _content(Path(source))
    if not content:
        raise ZooError("is empty (0 bytes): replace it or leave it out")
    try:
        picture = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        raise ZooError("is not a picture in a known format, such as JPEG or PNG") from None
    except Image.DecompressionBombError as error:
        raise ZooError(f"is too large: {error}") from None
    factor = _factor(picture.size, max_pixels)
    # All coefficients of a progressive file are held in memory at once, whatever size is asked for.
    if factor > 1 and picture.format == "JPEG" and "progressive" not in picture.info:
        width, height = picture.size
        picture.draft(None, (width // factor, height // factor))
    if picture.width * picture.height > MAX_DECODED:
        raise ZooError(
            f"has {picture.width} x {picture.height} pixels, more than the {MAX_DECODED:,} that "
            "are read in this format: make it smaller first"
        )
    return picture


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ZooError("does not exist: check the path") from None
    except IsADirectoryError:
        raise ZooError("is a folder: name a picture file in it") from None
    except (OSError, ValueError) as error:
        raise ZooError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))
    if not fits or array.size == 0 or array.dtype not in (np.uint8, np.uint16, np.bool_):
        raise ZooError(
            f"is an array {array.shape} of {array.dtype}: want [H, W], [H, W, 1], [H, W, 3] or "
            "[H, W, 4] of uint8, uint16 or bool"
        )
    if array.dtype == np.bool_:
        return Image.fromarray(array * np.uint8(255))
    return Image.fromarray(_eight_bits(array) if array.dtype == np.uint16 else array)


def _upright(picture: Image.Image, max_pixels: int) -> Image.Image:
    """`picture` as RGB, within `max_pixels`, the right way up."""
    picture.load()
    orientation = picture.getexif().get(_ORIENTATION, 1)
    picture = _rgb(picture)
    factor = _factor(picture.size, max_pixels)
    if factor > 1:
        picture = picture.reduce(factor)
    if orientation in _UPRIGHT:
        picture = picture.transpose(_UPRIGHT[orientation])
    return picture


def _factor(size: tuple[int, int], max_pixels: int) -> int:
    """The smallest whole factor that brings `size` within `max_pixels`."""
    width, height = size
    factor = 1
    while -(-width // factor) * -(-height // factor) > max_pixels:
        factor += 1
    return factor


def _rgb(picture: Image.Image) -> Image.Image:
    mode = picture.mode
    if mode == "I" or mode.startswith("I;16"):
        return Image.fromarray(_deep(picture)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("LA") if mode == "La" else picture
        picture = picture.convert("RGBA")
        white = Image.new("RGB", picture.size, "white")
        white.paste(picture, mask=picture.getchannel("A"))
        return white
    if mode in ("F", "LAB"):
        raise ZooError(f"has the colour mode {mode}, which has no plain RGB form: save it as RGB")
    return picture.convert("RGB")


def _deep(picture: Image.Image) -> np.ndarray:
    """16-bit grey as 8 bits."""
    values = np.asarray(picture)
    if values.min() < 0 or values.max() > 65535:
        raise ZooError("has 32-bit values beyond 0..65535: save it with 8 or 16 bits")
    return _eight_bits(values)


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Brightness from 0 to 65535 as uint8, 65535 becoming 255."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
