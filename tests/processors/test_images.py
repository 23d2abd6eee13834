"""Pictures of every sort are read right, or refused with the file's name."""

import contextlib
import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from zoo.images import MAX_PIXELS, read_image
from zoo.models.core.errors import ZooError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
EXIF_ORIENTATION = 0x0112


def corners(height: int = 8, width: int = 12) -> np.ndarray:
    """A picture with a colour of its own in each quarter."""
    picture = np.zeros((height, width, 3), np.uint8)
    y, x = height // 2, width // 2
    picture[:y, :x], picture[:y, x:], picture[y:, :x], picture[y:, x:] = RED, GREEN, BLUE, WHITE
    return picture


def encoded(picture: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("form", ["png", "bmp", "tiff", "webp", "gif"])
def test_lossless_formats_come_back_exact(form):
    options = {"lossless": True} if form == "webp" else {}
    picture = corners()
    assert np.array_equal(read_image(encoded(Image.fromarray(picture), form, **options)), picture)


def test_a_path_bytes_a_picture_and_an_array_are_the_same(tmp_path):
    picture = corners()
    file = tmp_path / "corners.png"
    Image.fromarray(picture).save(file)
    for source in (file, str(file), file.read_bytes(), Image.open(file), picture):
        assert np.array_equal(read_image(source), picture)


@pytest.mark.parametrize("form", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(form, orientation):
    upright = corners(32, 48)
    undo = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p, 1),
        7: lambda p: np.rot90(p, 2).transpose(1, 0, 2),
        8: lambda p: np.rot90(p, -1),
    }[orientation]
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo(upright)))
    options = {"jpeg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}
    picture = read_image(encoded(stored, form, exif=exif, **options.get(form, {})))
    assert picture.shape == upright.shape
    assert np.abs(picture.astype(int) - upright).max() < 40


def test_exif_rotation_survives_reduction():
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(corners(64, 96))))
    for form in ("jpeg", "png"):
        picture = read_image(encoded(stored, form, exif=exif), max_pixels=2000)
        assert picture.shape[0] < picture.shape[1]
        assert picture[2, 2, 0] > 200 > 60 > picture[2, 2, 1]


def test_grey_is_repeated_over_the_channels():
    grey = np.arange(96, dtype=np.uint8).reshape(8, 12)
    assert np.array_equal(
        read_image(encoded(Image.fromarray(grey), "png")), grey[..., None].repeat(3, -1)
    )


def test_one_bit_pictures_are_black_and_white():
    bits = np.indices((8, 12)).sum(0) % 2 == 0
    expected = (bits[..., None] * np.uint8(255)).repeat(3, -1)
    assert np.array_equal(read_image(encoded(Image.fromarray(bits), "png")), expected)
    assert np.array_equal(read_image(bits), expected)
    assert np.array_equal(read_image(np.stack([bits] * 3, -1)), expected)


@pytest.mark.parametrize("form", ["png", "tiff", "ppm"])
def test_16_bit_grey_is_scaled_and_not_clipped(form):
    values = np.linspace(0, 65535, 96).astype(np.uint16).reshape(8, 12)
    picture = read_image(encoded(Image.fromarray(values), form))
    expected = np.round(values / 257)[..., None].repeat(3, -1)
    assert np.array_equal(picture, expected)
    assert picture.min() == 0
    assert picture.max() == 255
    assert np.array_equal(read_image(values), expected)


def test_cmyk_is_converted(tmp_path):
    flat = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan, full magenta and yellow: red
    file = tmp_path / "print.jpg"
    flat.save(file, quality=95)
    assert np.abs(read_image(file).astype(int) - RED).max() < 10


def test_palettes_with_and_without_transparency():
    picture = Image.fromarray(corners())
    assert np.array_equal(read_image(encoded(picture.quantize(4), "png")), corners())
    clear = picture.quantize(4)
    index = clear.getpixel((0, 0))
    expected = corners()
    expected[:4, :6] = WHITE
    assert np.array_equal(read_image(encoded(clear, "png", transparency=index)), expected)
    assert np.array_equal(read_image(encoded(clear, "gif", transparency=index)), expected)


def test_transparent_pictures_are_laid_on_white():
    picture = np.dstack([corners(), np.full((8, 12), 255, np.uint8)])
    picture[:4, :6, 3] = 0
    picture[:4, 6:, 3] = 128
    seen = read_image(encoded(Image.fromarray(picture), "png"))
    assert (seen[:4, :6] == 255).all()
    assert seen[0, 8].tolist() == [127, 255, 127]
    assert np.array_equal(seen[4:], corners()[4:])
    assert np.array_equal(read_image(picture), seen)
    grey = Image.new("LA", (4, 4), (0, 0))
    assert (read_image(encoded(grey, "png")) == 255).all()
    marked = encoded(Image.new("RGB", (4, 4), RED), "png", transparency=RED)
    assert (read_image(marked) == 255).all()


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (6, 6), colour) for colour in (RED, GREEN)]
    moving = encoded(frames[0], "gif", save_all=True, append_images=frames[1:])
    assert (read_image(moving) == RED).all()


def test_other_colour_spaces():
    for mode in ("YCbCr", "HSV"):
        seen = read_image(Image.fromarray(corners()).convert(mode)).astype(int)
        assert np.abs(seen - corners()).max() < 6
    for mode in ("F", "LAB"):
        with pytest.raises(ZooError, match=f"colour mode {mode}"):
            read_image(Image.new(mode, (4, 4)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"this is no picture", "not a picture"),
        (b"\x89PNG\r\n\x1a\n", "not a picture|truncated or damaged"),
    ],
)
def test_what_is_no_picture_is_refused_by_name(tmp_path, content, message):
    file = tmp_path / "odd.png"
    file.write_bytes(content)
    with pytest.raises(ZooError, match=message) as caught:
        read_image(file)
    assert "odd.png" in str(caught.value)


@pytest.mark.parametrize("form", ["png", "jpeg", "gif", "bmp", "tiff", "webp"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_pictures_are_refused_by_name(tmp_path, form, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    content = encoded(Image.fromarray(noise), form)
    file = tmp_path / f"cut.{form}"
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ZooError, match=f"cut.{form}"):
        read_image(file)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_pictures_never_escape_as_other_errors():
    rng = np.random.default_rng(1)
    for form in ("png", "jpeg", "gif", "bmp", "tiff", "webp"):
        whole = np.frombuffer(encoded(Image.fromarray(corners(32, 32)), form), np.uint8)
        for _ in range(40):
            broken = whole.copy()
            broken[rng.integers(len(broken), size=4)] = rng.integers(0, 256, 4)
            with contextlib.suppress(ZooError):
                picture = read_image(broken.tobytes())
                assert picture.dtype == np.uint8
                assert picture.shape[-1] == 3


def test_missing_files_and_folders_are_refused_by_name(tmp_path):
    with pytest.raises(ZooError, match=r"gone\.png does not exist"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(ZooError, match="is a folder"):
        read_image(tmp_path)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((2, 4, 4, 3), np.uint8),
    ],
)
def test_arrays_that_are_no_picture_are_refused(array):
    with pytest.raises(ZooError, match="mine is an array"):
        read_image(array, name="mine")


def test_what_is_no_source_is_refused():
    with pytest.raises(ZooError, match="is a int"):
        read_image(7)


def test_a_picture_that_is_handed_in_is_not_changed():
    given = Image.open(io.BytesIO(encoded(Image.fromarray(corners(64, 96)), "jpeg")))
    read_image(given, max_pixels=500)
    assert given.size == (96, 64)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.parametrize("form", ["jpeg", "png"])
def test_a_hundred_megapixels_are_read_in_bounded_memory(tmp_path, form):
    file = tmp_path / f"large.{form}"
    options = {"compress_level": 1} if form == "png" else {}
    Image.new("L", (12_000, 9_000), 200).save(file, **options)
    # `ru_maxrss` would begin with what this process took when it started the other.
    code = (
        "import sys; from zoo.images import read_image; seen = read_image(sys.argv[1]);"
        "lines = dict(line.split(':') for line in open('/proc/self/status'));"
        "print(*seen.shape, seen[::99].mean(), lines['VmHWM'].split()[0])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, file],
        capture_output=True,
        text=True,
        check=True,
    )
    height, width, channels, mean, kilobytes = map(float, done.stdout.split())
    assert height * width <= MAX_PIXELS
    assert width / height == pytest.approx(12_000 / 9_000, rel=1e-3)
    assert channels == 3
    assert mean == pytest.approx(200)
    assert kilobytes < (500_000 if form == "jpeg" else 1_200_000)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("side", "message"),
    [(13_000, r"huge\.png has 13000 x 13000 pixels"), (20_000, r"huge\.png is too large")],
)
def test_a_picture_beyond_the_limit_is_refused_by_its_header(tmp_path, side, message):
    content = bytearray(encoded(Image.new("L", (1, 1)), "png"))
    content[16:24] = struct.pack(">II", side, side)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "huge.png").write_bytes(content)
    with pytest.raises(ZooError, match=message):
        read_image(tmp_path / "huge.png")


def test_reduction_keeps_the_picture():
    picture = corners(400, 600)
    small = read_image(picture, max_pixels=134 * 200)
    assert small.shape == (134, 200, 3)
    assert small[10, 10].tolist() == list(RED)
    assert small[-10, -10].tolist() == list(WHITE)
