"""DC²: divide a large picture, describe its parts, and look up what a question is about.

The picture is cut into quarters, again and again, and quarters that look alike are merged. Parts
are described from the smallest ones upwards; things that a part and its whole agree on are
remembered with their places. A question is then answered with what is seen where the things stand
that it is about.

Follows: arXiv:2408.15556. All parts of one level are described in one batch.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.cluster import hierarchy

from zoo.agents.wording import DivideWording
from zoo.evaluate.subject import Agent, Prepared, Query, Remembered, Subject
from zoo.images import read_image
from zoo.models.core.card import Card
from zoo.models.core.errors import UsageError
from zoo.models.core.registry import register
from zoo.processors import crops
from zoo.processors.tiling import Box

CARD = Card(
    slug="dc2",
    paper="arXiv:2408.15556",
    code="https://github.com/DreamMr/HR-Bench",
    differs=(
        "Where a place of a thing lies in another one, that place is forgotten; the official code "
        "takes its number in the order of areas for one in the order of storing, and forgets "
        "another (`official_filter`).",
        "Boxes of merged parts are those around the parts, not as many times as high and wide as "
        "there are parts (`official_filter`).",
        "The wording of the prompts is ours; another one can be given.",
        "Memory is kept for each picture, not in a file for whichever comes next.",
        "The number of parts can be bounded (`max_parts`).",
    ),
)


def cluster(vectors: np.ndarray, theta: float) -> np.ndarray:
    """Groups of vectors that are alike: average linkage by cosine distance, cut at `theta`.

    Args:
      vectors: [n, D].
      theta: groups farther apart than this, on average, are not merged.

    Returns:
      int [n], the group of each, from 1.

    Raises:
      UsageError: a vector is zero or not finite, and so has no direction.
    """
    if not np.isfinite(vectors).all() or not vectors.any(-1).all():
        raise UsageError("dc2: the vector of a part has no direction: want finite ones, not 0")
    tree = hierarchy.linkage(vectors, method="average", metric="cosine")
    return np.asarray(hierarchy.fcluster(tree, theta, criterion="distance"), int)


def retrieve(query: np.ndarray, keys: np.ndarray, alpha: float, most: int = 2) -> list[int]:
    """The keys nearest to a query by their cosine, the nearest first.

    Args:
      query: [D] or [1, D].
      keys: [n, D].
      alpha: the least cosine.
      most: how many at most.
    """
    query = query.reshape(-1)
    norms = np.maximum(np.linalg.norm(keys, axis=1) * np.linalg.norm(query), 1e-8)
    score = keys @ query / norms
    order = np.argsort(-score, kind="stable")[:most]
    return [int(i) for i in order if score[i] >= alpha and score[i] != 0]


@dataclass(frozen=True)
class Place:
    """Where a thing was seen: one part of the picture, or several that were merged.

    Attributes:
      boxes: the parts.
      merged: whether several were.
    """

    boxes: tuple[Box, ...]
    merged: bool = False

    def around(self, official: bool = False) -> Box:
        """The box around all parts; the `official` one begins at the upper left of them and is as
        many times as high and wide as the first as there are parts, 4 for 3.
        """
        if not official or not self.merged:
            return crops.union(self.boxes)
        first = min(self.boxes, key=lambda box: (box.top, box.left))
        height, width = (length * self._count for length in self.boxes[0].size)
        return Box(first.top, first.left, first.top + height, first.left + width)

    @property
    def area(self) -> int:
        """Of the parts, in pixels, where three count as four."""
        height, width = self.boxes[0].size
        return height * width * self._count

    @property
    def _count(self) -> int:
        return 4 if len(self.boxes) == 3 else len(self.boxes)

    def look(self, picture: np.ndarray) -> np.ndarray:
        """What is there: the part, or the mean of the parts, which are of one size."""
        parts = [crops.crop(picture, box) for box in self.boxes]
        return crops.mean_picture(parts) if self.merged else parts[0]


def filter_places(places: Sequence[Place], *, official: bool = False) -> list[Place]:
    """The places of a thing without those that lie in a larger one, in their order.

    Args:
      places: where the thing was seen.
      official: as the official code does it: its boxes of merged parts, and in the place of the
        one that lies in another, the one that has its rank by area as its number.
    """
    order = sorted(range(len(places)), key=lambda i: places[i].area, reverse=True)
    boxes = [places[i].around(official) for i in order]
    dropped: set[int] = set()
    for rank, outer in enumerate(boxes):
        if rank not in dropped:
            inside = range(rank + 1, len(boxes))
            dropped |= {later for later in inside if crops.contains(outer, boxes[later])}
    gone = dropped if official else {order[rank] for rank in dropped}
    return [place for i, place in enumerate(places) if i not in gone]


@dataclass(eq=False)
class Part:
    """A node of the divided picture.

    Attributes:
      pixels: what it shows.
      box: where that is; of merged parts, where the first of them is.
      depth: 0 for the whole picture.
      children: its parts.
      places: where these are in the whole picture.
      caption: its description.
      objects: the things that this names.
    """

    pixels: np.ndarray
    box: Box
    depth: int = 0
    children: list["Part"] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    caption: str = ""
    objects: list[str] = field(default_factory=list)


Look = Callable[[list[np.ndarray]], np.ndarray]
"""From pictures to their vectors [n, D]."""

Memory = dict[str, list[Place]]
"""Where each thing was seen."""


@dataclass(frozen=True)
class DC2(Agent):
    """The agent. The defaults are those of the official demonstration.

    Attributes:
      max_depth: how often parts are divided again.
      smallest: the least side of a part in pixels.
      theta: parts are merged up to this distance of their vectors.
      alpha: the least cosine of a thing that a question is about.
      things: how many things a question is about, at most.
      max_parts: parts that are described, at most; a level that would have more is not divided.
        None for no bound: 4 to the power of `max_depth`, and a third of that again.
      max_new_tokens: of every description.
      official_filter: see `filter_places`.
      wording: the prompts.

    Raises:
      ValueError: a number is out of its range.
    """

    max_depth: int = 5
    smallest: int = 168
    theta: float = 0.1
    alpha: float = 0.3
    things: int = 2
    max_parts: int | None = None
    max_new_tokens: int = 1024
    official_filter: bool = False
    wording: DivideWording = DivideWording()

    def __post_init__(self) -> None:
        least = {"max_depth": 0, "smallest": 1, "things": 0, "max_parts": 1, "max_new_tokens": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name} = {value}: want {bound} or more")

    def wrap(self, subject: Subject, embedder: Subject | None = None) -> "DC2Subject":
        """The subject, told what is to be seen where.

        Args:
          subject: describes pictures, and has vectors of them.
          embedder: has vectors of texts, such as a model of sentences; by default the subject.
        """
        return DC2Subject(self, subject, embedder)

    def divide(self, picture: np.ndarray, look: Look) -> list[list[Part]]:
        """The parts of a picture [H, W, 3] uint8, level by level, the whole picture first."""
        levels = [[Part(picture, Box(0, 0, *picture.shape[:2]))]]
        number = 1
        while True:
            whole = [part for part in levels[-1] if self._is_divided(part)]
            if self.max_parts is not None and number + 4 * len(whole) > self.max_parts:
                whole = []
            if not whole:
                return levels
            inner = [crops.quarters(Box(0, 0, *part.pixels.shape[:2])) for part in whole]
            pieces = [
                [crops.crop(part.pixels, box) for box in boxes]
                for part, boxes in zip(whole, inner, strict=True)
            ]
            vectors = look([piece for four in pieces for piece in four])
            for i, part in enumerate(whole):
                self._group(part, inner[i], pieces[i], vectors[4 * i : 4 * i + 4])
            levels.append([child for part in whole for child in part.children])
            number += len(levels[-1])

    def _is_divided(self, part: Part) -> bool:
        half = min(part.pixels.shape[:2]) // 2
        return part.depth < self.max_depth and half >= self.smallest

    def _group(
        self, part: Part, boxes: Sequence[Box], pieces: Sequence[np.ndarray], vectors: np.ndarray
    ) -> None:
        """Give a part its children: quarters, and the mean of those that look alike."""
        labels = cluster(vectors, self.theta)
        for label in dict.fromkeys(labels.tolist()):
            same = np.flatnonzero(labels == label)
            moved = tuple(
                Box(*(edge + part.box[i % 2] for i, edge in enumerate(boxes[number])))
                for number in same
            )
            shown = [pieces[number] for number in same]
            merged = len(same) > 1
            pixels = crops.mean_picture(shown) if merged else shown[0]
            part.places.append(Place(moved, merged))
            part.children.append(Part(pixels, moved[0], part.depth + 1))

    def remember(self, whole: Part) -> Memory:
        """Where the things are that parts and their wholes agree on, from the smallest parts up."""
        memory: Memory = {}

        def walk(part: Part) -> None:
            for child in part.children:
                walk(child)
            if not part.children or not part.pixels.any():
                return
            own = Place((part.box,))
            for thing in part.objects:
                seen = [
                    p for p, c in zip(part.places, part.children, strict=True) if thing in c.objects
                ]
                if self.max_depth <= 1:
                    memory.setdefault(thing, []).append(own)
                elif seen:
                    memory.setdefault(thing, []).append(own if len(seen) > 1 else seen[0])
            if self.max_depth <= 1:
                for child in part.children:
                    for thing in child.objects:
                        there = (
                            p
                            for p, c in zip(part.places, part.children, strict=True)
                            if thing in c.objects
                        )
                        memory.setdefault(thing, []).extend(there)

        walk(whole)
        official = self.official_filter
        return {thing: filter_places(found, official=official) for thing, found in memory.items()}


def things_in(said: str) -> list[str]:
    """The things that an answer lists as JSON, each once, in their order; none where it has none.

    The list may be the value of "object_list" or stand alone, in a block of code or not.
    """
    block = re.search(r"```(?:json)?(.*?)```", said, re.DOTALL)
    text = block.group(1) if block else said
    starts = [place for place in (text.find("{"), text.find("[")) if place >= 0]
    if not starts:
        return []
    try:
        value, _ = json.JSONDecoder().raw_decode(text[min(starts) :])
    except ValueError:
        return []
    listed = value.get("object_list") if isinstance(value, dict) else value
    things = [thing.strip() for thing in listed or () if isinstance(thing, str)]
    return list(dict.fromkeys(thing for thing in things if thing))


class DC2Subject(Prepared):
    """A subject that is told what is to be seen where. A picture is divided once.

    Attributes:
      memory: where the things of the picture of the last query are.
    """

    def __init__(self, agent: DC2, subject: Subject, embedder: Subject | None = None):
        """Around `subject`, which is asked nothing twice."""
        super().__init__(Remembered(subject))
        self.agent = agent
        self.embedder = self.subject if embedder is None else Remembered(embedder)
        self.memory: Memory = {}

    def prepare(self, query: Query) -> Query:
        """The query with what was seen where the things are that it is about.

        Raises:
          UsageError: there are several pictures, or a conversation about one.
        """
        self.memory = {}
        if not query.images:
            return query
        if len(query.images) > 1 or not isinstance(query.prompt, str):
            raise UsageError(
                "dc2 divides one picture for one question: got "
                f"{len(query.images)} pictures and a {type(query.prompt).__name__}"
            )
        picture = read_image(query.images[0])
        self.memory = self.study(picture)
        information = self.inform(picture, query.question)
        if not information:
            return query
        told = self.agent.wording.informed.format(
            information="\n\n".join(information), question=query.prompt
        )
        return Query(told, query.images)

    def study(self, picture: np.ndarray) -> Memory:
        """Divide and describe a picture [H, W, 3] uint8; what it shows where."""
        levels = self.agent.divide(picture, lambda pieces: self.subject.embed(images=pieces))
        wording = self.agent.wording
        for level in reversed(levels):
            seen = [part for part in level if part.pixels.any()]
            prompts = [
                wording.refine.format("".join(f"{child.caption}\n" for child in part.children))
                if part.children
                else wording.describe
                for part in seen
            ]
            shown = [(part.pixels,) for part in seen]
            said = self._ask([Query(*pair) for pair in zip(prompts, shown, strict=True)])
            listed = self._ask([Query(wording.objects.format(caption)) for caption in said])
            for part, caption, objects in zip(seen, said, listed, strict=True):
                part.caption, part.objects = caption.strip(), things_in(objects)
        return self.agent.remember(levels[0][0])

    def inform(self, picture: np.ndarray, question: str) -> list[str]:
        """What the places say about a question of the things that it is about."""
        things, agent = list(self.memory), self.agent
        if not things or not agent.things:
            return []
        keys = self.embedder.embed(texts=things)
        chosen = retrieve(self.embedder.embed(texts=[question]), keys, agent.alpha, agent.things)
        places = [place for number in chosen for place in self.memory[things[number]]]
        prompt = agent.wording.inform.format(question)
        said = self._ask([Query(prompt, (place.look(picture),)) for place in places])
        return [text for text in said if text not in ("", agent.wording.nothing)]

    def _ask(self, queries: Sequence[Query]) -> list[str]:
        if not queries:
            return []
        return self.subject.generate(queries, max_new_tokens=self.agent.max_new_tokens)


VARIANTS = {
    # Settings of the official demonstration.
    "dc2_llava_1_5": DC2(),
    "dc2_tiny": DC2(max_depth=2, smallest=8, max_new_tokens=8),
}

register(CARD, VARIANTS)
