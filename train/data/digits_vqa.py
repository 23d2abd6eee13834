"""Questions and answers about pictures that are composed of real handwritten digits.

The scans are the 1,797 of the UCI repository (Alpaydin & Kaynak, CC BY 4.0, see ATTRIBUTION.md) and
lie beside this file in `digits.npz`; a fixed fifth of them appears in validation pictures only. A
picture shows a few of them, enlarged, at random places and in random brightness, and is asked about
in five ways: reading, position, counting, comparing and summing. Every answer follows from the
picture without doubt: whoever is asked for the leftmost digit finds one that lies further left than
all others by an eighth of the picture.

`DigitsVqa` is an ordinary `tensorflow_datasets` builder that writes ArrayRecord. Whoever only wants
the data uses `zoo.train.data.sources.DigitsVQA`.
"""

import functools
import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from zoo.models.core.errors import UsageError

SCANS = Path(__file__).parent / "digits.npz"
SPLITS = ("train", "validation")
INK = 0.4
"""The share of full ink from which on a place shows the digit and not the paper."""
KINDS = ("reading", "position", "counting", "comparing", "summing")

# Few words: what a question costs in training is its tokens.
_READING = "read the digits"
_POSITION = "{} digit"
_PLACES = ("leftmost", "rightmost")
_COUNTING = "count {} digits"
_COUNTED = ("the", "even", "odd")
_COMPARING = ("largest digit", "smallest digit")
_GREATER = "leftmost larger than rightmost"
_SUMMING = "digit sum"


@dataclass(frozen=True)
class Scene:
    """How a picture is composed. Lengths in pixels, brightness from 0 (black) to 255 (white).

    Attributes:
      canvas: side of the square picture.
      min_scans, max_scans: how many scans a picture shows, both ends included.
      min_size, max_size: side of an enlarged scan, both ends included.
      cells: each scan lies somewhere in one cell of a grid of cells x cells; None: anywhere.
      background: range of the brightness of the paper.
      ink: range of the brightness of the ink, drawn for each scan.
      noise: largest standard deviation of the noise laid over a picture, drawn for each picture.
      questions: how many are asked about a picture, each of another of the five kinds.
    """

    canvas: int = 64
    min_scans: int = 2
    max_scans: int = 3
    min_size: int = 16
    max_size: int = 26
    cells: int | None = None
    background: tuple[int, int] = (0, 80)
    ink: tuple[int, int] = (150, 255)
    noise: float = 8.0
    questions: int = 5

    def __post_init__(self) -> None:
        if not 1 <= self.min_scans <= self.max_scans:
            raise UsageError(
                f"min_scans and max_scans are {self.min_scans} and {self.max_scans}: "
                "want 1 <= min_scans <= max_scans"
            )
        if not 1 <= self.questions <= len(KINDS):
            raise UsageError(f"questions is {self.questions}: want 1 to {len(KINDS)}")
        if self.cells is not None and not 1 <= self.cells <= self.canvas // self.max_size:
            raise UsageError(
                f"cells is {self.cells}: want 1 to {self.canvas // self.max_size}, so that scans "
                f"of {self.max_size} pixels fit into the cells of a canvas of {self.canvas}"
            )
        if not 8 <= self.min_size <= self.max_size <= self.canvas:
            raise UsageError(
                f"min_size, max_size and canvas are {self.min_size}, {self.max_size} and "
                f"{self.canvas}: want 8 <= min_size <= max_size <= canvas"
            )

    @property
    def margin(self) -> float:
        """How far apart the centres of two scans are whose order may be asked for."""
        return self.canvas / 8


class Scans(NamedTuple):
    """Handwritten digits: `ink` [N, 8, 8] float32 from 0 (paper) to 1 and `labels` [N] uint8."""

    ink: np.ndarray
    labels: np.ndarray


class Question(NamedTuple):
    """One question about a picture, one of `KINDS`, and its answer."""

    kind: str
    question: str
    answer: str


class Drawn(NamedTuple):
    """A scene that was drawn.

    Attributes:
      picture: uint8 [Z, canvas, canvas], of one slice where no volume was asked for.
      classes: int32, likewise: 0 is paper, 1 to 10 the ink of the digits 0 to 9.
      digits: [n], those that it shows.
      centres: theirs, [n, (x, y)].
    """

    picture: np.ndarray
    classes: np.ndarray
    digits: np.ndarray
    centres: np.ndarray


@functools.cache
def scans(split: str) -> Scans:
    """The scans that pictures of `split` are made of; no scan is in both splits."""
    with np.load(SCANS) as stored:
        chosen = stored["validation"] == (split == "validation")
        return Scans(stored["images"][chosen] / np.float32(16), stored["labels"][chosen])


def compose(
    scene: Scene, source: Scans, rng: np.random.Generator
) -> tuple[np.ndarray, tuple[Question, ...]]:
    """Compose one picture and ask questions of different kinds about it, in random order.

    Args:
      scene: how pictures look.
      source: the scans to draw from.
      rng: decides everything; the same state gives the same picture to the last bit.

    Returns:
      the picture [canvas, canvas] uint8 and `scene.questions` questions.

    Raises:
      UsageError if the scans do not fit beside each other.
    """
    drawn = draw(scene, source, rng)
    asked = _ask(drawn.digits.tolist(), drawn.centres, rng)
    return drawn.picture[0], asked[: scene.questions]


def draw(scene: Scene, source: Scans, rng: np.random.Generator, slices: int = 1) -> Drawn:
    """Draw one picture or one volume.

    Args:
      scene: how pictures look; a volume is a stack of them.
      source: the scans to draw from.
      rng: as of `compose`.
      slices: Z. Each scan goes through a random run of them, half of them at least.

    Raises:
      UsageError if the scans do not fit beside each other.
    """
    sizes, corners = _place(scene, rng)
    chosen = rng.integers(len(source.labels), size=len(sizes))
    inks = rng.uniform(*scene.ink, size=len(sizes)).astype(np.float32)
    canvas = (slices, scene.canvas, scene.canvas)
    picture = np.full(canvas, rng.uniform(*scene.background), np.float32)
    classes = np.zeros(canvas, np.int32)
    digits = source.labels[chosen]
    each = zip(source.ink[chosen], digits, sizes, corners, inks, strict=True)
    for scan, digit, size, (x, y), ink in each:
        grow = _enlargement(int(size))
        cover = np.clip(grow @ scan @ grow.T, 0, 1)
        where = (_run(slices, rng), slice(y, y + size), slice(x, x + size))
        patch = picture[where]
        patch += cover * (ink - patch)
        classes[where][:, cover >= INK] = digit + 1
    picture += rng.uniform(0, scene.noise) * rng.standard_normal(picture.shape, np.float32)
    shown = np.clip(np.round(picture), 0, 255).astype(np.uint8)
    return Drawn(shown, classes, digits, corners + sizes[:, None] / 2)


def _run(slices: int, rng: np.random.Generator) -> slice:
    """Which slices a scan goes through; nothing is drawn where there is one."""
    if slices == 1:
        return slice(0, 1)
    length = int(rng.integers(-(-slices // 2), slices + 1))
    first = int(rng.integers(slices - length + 1))
    return slice(first, first + length)


def every_text() -> Iterator[str]:
    """Each question that can be asked and each form of answer: what a tokenizer is trained on."""
    yield from (_READING, *_COMPARING, _GREATER, _SUMMING, "yes", "no")
    yield from map(_POSITION.format, _PLACES)
    yield from map(_COUNTING.format, _COUNTED)
    yield from map(str, range(28))


def _place(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sizes [n] and corners [n, (x, y)] of scans that do not overlap and have clear columns."""
    number = int(rng.integers(scene.min_scans, scene.max_scans + 1))
    a, b = _pairs(number)
    for _ in range(100):
        sizes = rng.integers(scene.min_size, scene.max_size + 1, size=number)
        if scene.cells is None:
            room = (scene.canvas - sizes + 1)[:, None]
            corners = (rng.random((64, number, 2)) * room).astype(int)
        else:
            side = scene.canvas // scene.cells
            room = (side - sizes + 1)[:, None]
            corners = side * rng.integers(scene.cells, size=(64, number, 2))
            corners += (rng.random((64, number, 2)) * room).astype(int)
        centres = corners + sizes[:, None] / 2
        apart = np.abs(centres[:, a] - centres[:, b])  # [64, pairs, (x, y)]
        reach = (sizes[a] + sizes[b]) / 2 + 1
        fits = (apart[..., 0] >= scene.margin) & (apart >= reach[:, None]).any(-1)
        good = fits.all(-1)
        if good.any():
            return sizes, corners[good.argmax()]
    raise UsageError(
        f"{number} scans of {scene.min_size} to {scene.max_size} pixels do not fit on a canvas of "
        f"{scene.canvas} x {scene.canvas}: take a larger canvas, fewer or smaller scans"
    )


@functools.cache
def _enlargement(size: int) -> np.ndarray:
    """The matrix [size, 8] that enlarges one axis of a scan by bicubic interpolation."""
    unit = Image.fromarray(np.eye(8, dtype=np.float32))
    return np.asarray(unit.resize((8, size), Image.Resampling.BICUBIC))


@functools.cache
def _pairs(number: int) -> tuple[np.ndarray, np.ndarray]:
    """The first and the second of each pair of `number` things."""
    return np.triu_indices(number, 1)


def _ask(digits: list[int], centres: np.ndarray, rng: np.random.Generator) -> tuple[Question, ...]:
    """One question of each kind about `digits` whose centres are [n, (x, y)]."""
    row = [digits[i] for i in np.argsort(centres[:, 0])]
    counted = (len(row), sum(d % 2 == 0 for d in row), sum(d % 2 for d in row))
    greater = "yes" if row[0] > row[-1] else "no"
    compared = ((_COMPARING[0], str(max(row))), (_COMPARING[1], str(min(row))), (_GREATER, greater))
    place, what = rng.integers(len(_PLACES)), rng.integers(len(_COUNTED))
    asked = (
        Question("reading", _READING, " ".join(map(str, row))),
        Question("position", _POSITION.format(_PLACES[place]), str((row[0], row[-1])[place])),
        Question("counting", _COUNTING.format(_COUNTED[what]), str(counted[what])),
        Question("comparing", *compared[rng.integers(len(compared))]),
        Question("summing", _SUMMING, str(sum(row))),
    )
    return tuple(asked[i] for i in rng.permutation(len(asked)))


@dataclass(eq=False)
class DigitsVqaConfig(tfds.core.BuilderConfig):
    """How many pictures there are, from which seed, and how they look."""

    pictures: int = 12_000
    validation_pictures: int = 500
    seed: int = 0
    scene: Scene = field(default_factory=Scene)

    @classmethod
    def of(
        cls, pictures: int, validation_pictures: int, seed: int, scene: Scene
    ) -> "DigitsVqaConfig":
        """The configuration of these settings, under a name that no other settings have."""
        settings = {
            "pictures": pictures,
            "validation_pictures": validation_pictures,
            "seed": seed,
            **asdict(scene),
        }
        digest = sha256(repr(sorted(settings.items())).encode()).hexdigest()[:8]
        name = f"{pictures}_{validation_pictures}_seed{seed}_{digest}"
        return cls(
            name=name,
            pictures=pictures,
            validation_pictures=validation_pictures,
            seed=seed,
            scene=scene,
        )


class DigitsVqa(tfds.core.GeneratorBasedBuilder):
    """Builder of the data set. Calls `progress(done, total)`, where given, after each picture."""

    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES: ClassVar = {"1.1.0": "Five kinds of questions, in few words each."}

    def __init__(self, *, progress: Callable[[int, int], None] | None = None, **kwargs: Any):
        self._progress = progress or (lambda done, total: None)
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        canvas = self._settings.scene.canvas
        texts = tfds.features.Tensor(shape=(None,), dtype=np.str_)
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            homepage="https://doi.org/10.24432/C50P49",
            license="CC BY 4.0",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(canvas, canvas, 1), encoding_format="png"),
                    "questions": texts,
                    "answers": texts,
                    "kinds": texts,
                }
            ),
        )

    @property
    def _settings(self) -> DigitsVqaConfig:
        return self.builder_config or DigitsVqaConfig(name="default")

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        numbers = (self._settings.pictures, self._settings.validation_pictures)
        done = itertools.count(1)
        return {
            split: self._generate_examples(split, number, done, sum(numbers))
            for split, number in zip(SPLITS, numbers, strict=True)
        }

    def _generate_examples(
        self, split: str, number: int, done: Iterator[int], total: int
    ) -> Iterator[tuple[int, dict]]:
        for index in range(number):
            # A stream of its own for each picture: picture 7 is the same in a set of 10 and of
            # 10,000.
            rng = np.random.default_rng((self._settings.seed, SPLITS.index(split), index))
            picture, asked = compose(self._settings.scene, scans(split), rng)
            yield (
                index,
                {
                    "id": f"{split}-{index:06d}",
                    "image": _png(picture),
                    "questions": np.array([q.question for q in asked], object),
                    "answers": np.array([q.answer for q in asked], object),
                    "kinds": np.array([q.kind for q in asked], object),
                },
            )
            self._progress(next(done), total)

    # tensorflow_datasets prints these two notices to standard output; the caller reports progress
    # instead.
    def _log_download_bytes(self) -> None: ...

    def _log_download_done(self) -> None: ...


def _png(picture: np.ndarray) -> bytes:
    """`picture` [H, W] uint8 as a PNG file: encoded here, so that TensorFlow is not asked to do it.

    Not compressed, which takes a third of the time of composing: ArrayRecord compresses what it
    stores.
    """
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "png", compress_level=0)
    return file.getvalue()
