"""ZoomEye: a search through the parts of a picture, led by what the model itself thinks is there.

A picture is cut into a tree of regions. The model says how likely it can answer, sees an object, or
would see it closer to; the best regions are looked into first, and the answer is given from what
was found.

Follows: arXiv:2411.16044. The regions that a step adds are judged in one batch, and nothing is
asked twice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from zoo.agents.wording import Kind, SearchWording, cues
from zoo.evaluate.subject import Agent, Prepared, Query, Remembered, Subject
from zoo.images import read_image
from zoo.models.core.card import Card
from zoo.models.core.errors import UsageError
from zoo.models.core.registry import register
from zoo.processors import crops
from zoo.processors.crops import Region
from zoo.processors.pixels import pad_to_square
from zoo.processors.tiling import Box

CARD = Card(
    slug="zoomeye",
    paper="arXiv:2411.16044",
    code="https://github.com/om-ai-lab/ZoomEye",
    differs=(
        "The wording of the prompts and of the examples for finding cues is ours; another one can "
        "be given.",
        "Pronouns are found in a list of words, not by a parser.",
        "What a step adds to the queue is judged in one batch, and what was judged for one cue is "
        "remembered for the next.",
        "How a model tiles what it is shown is for its processor: the number of tiles is not "
        "bounded further.",
    ),
)

Judge = Callable[[Sequence[tuple[Kind, int]]], Sequence[float]]
"""From pairs of what is asked and a node to the confidence in each, from -1 to 1."""


@dataclass(frozen=True)
class Search:
    """How a tree is searched. The defaults are those of LLaVA-1.5.

    Attributes:
      bias: b, how much seeing an object counts against expecting it, for the whole picture; it
        grows to 1 at the greatest depth.
      enough: the confidence in answering at which a search ends.
      least: below it a search that lowers `enough` gives up.
      steps: by how much `enough` is lowered when a search was too long; the last one again and
        again.
      patience: regions looked at before that, for every level of the tree.
      interval: and how many more before the next time.
      depth: the deepest level that is looked at.
      there: the confidence that a region shows an object, for cues that ask for all of them.
      all_depth: the deepest level for these.

    Raises:
      ValueError: no `steps`, or a number that is out of its range.
    """

    bias: float = 0.2
    enough: float = 0.6
    least: float = 0.0
    steps: tuple[float, ...] = (0.1, 0.1, 0.2)
    patience: int = 3
    interval: int = 2
    depth: int = 5
    there: float = 0.6
    all_depth: int = 2

    def __post_init__(self) -> None:
        if not self.steps or min(self.steps) <= 0:
            raise ValueError(f"steps = {self.steps}: want one or more numbers above 0")
        wrong = [n for n in ("patience", "interval", "depth", "all_depth") if getattr(self, n) < 1]
        if wrong or not 0 <= self.bias <= 1:
            raise ValueError(f"{self}: want bias between 0 and 1 and whole numbers from 1 on")


class Found(NamedTuple):
    """What a search for one thing has found.

    Attributes:
      nodes: the regions that may answer, in the order in which they were found.
      looked: the regions whose confidence in answering was asked for, in order.
      steps: regions taken from the queue.
      zoomed_in: how often the next one was deeper than the one before.
      zoomed_out: how often it was less deep.
    """

    nodes: tuple[int, ...]
    looked: tuple[int, ...]
    steps: int
    zoomed_in: int
    zoomed_out: int

    def best(self, tree: Sequence[Region]) -> tuple[int, ...]:
        """The deepest of the regions, if there is one."""
        return tuple(sorted(self.nodes, key=lambda n: tree[n].depth, reverse=True)[:1])


def find_one(
    tree: Sequence[Region],
    judge: Judge,
    search: Search,
    *,
    skip_whole: bool = False,
    to_bottom: bool = False,
) -> Found:
    """Search for a region that answers a question, the most promising first.

    Args:
      tree: see `crops.region_tree`.
      judge: the model.
      search: settings.
      skip_whole: the whole picture is no answer.
      to_bottom: no answer counts before a region of the deepest level was looked at.
    """
    deepest = min(crops.depth_of(tree), search.depth)
    enough, drops, limit = search.enough, list(search.steps), search.patience * deepest
    answering, priority = {0: -1.0}, {0: 0.0}
    queue, popped, looked, hits = [0], [], [], []
    zoomed_in = zoomed_out = 0
    bottom = False
    while queue:
        number = queue.pop(0)
        node = tree[number]
        if popped:
            zoomed_in += node.depth > tree[popped[-1]].depth
            zoomed_out += node.depth < tree[popped[-1]].depth
        popped.append(number)
        hit = False
        if number or not skip_whole:
            [answering[number]] = judge([("answering", number)])
            looked.append(number)
            hit = answering[number] >= enough
        if hit:
            hits.append(number)
            if bottom or not to_bottom:
                break
        elif len(popped) >= limit:
            enough -= drops[0]
            drops = drops[1:] or drops
            limit += search.interval
            hits += [n for n in popped if answering[n] >= enough and n not in hits]
            hits = sorted(hits, key=lambda n: answering[n], reverse=True)[:1]
            if hits or enough < search.least:
                break
        if not node.children or node.depth == deepest:
            bottom = True
            if to_bottom and hits:
                break
        else:
            queue += node.children
            kinds: tuple[Kind, ...] = ("existence", "latent")
            told = judge([(kind, child) for kind in kinds for child in node.children])
            weight = (1 - search.bias) / deepest**2 * (node.depth + 1) ** 2 + search.bias
            pairs = zip(told, told[len(node.children) :], strict=False)
            for child, (seen, expected) in zip(node.children, pairs, strict=True):
                priority[child] = seen * weight + expected * (1 - weight)
        queue.sort(key=lambda n: priority[n], reverse=True)
    return Found(tuple(hits), tuple(looked), len(popped), zoomed_in, zoomed_out)


def find_all(tree: Sequence[Region], judge: Judge, search: Search) -> tuple[int, ...]:
    """All regions that show an object at least as clearly as any of their parts does, parts before
    wholes. Arguments as those of `find_one`.
    """
    numbers = [n for n, node in enumerate(tree) if node.depth <= search.all_depth]
    there = dict(zip(numbers, judge([("existence", n) for n in numbers]), strict=True))
    found: list[int] = []

    def clearest(number: int) -> float:
        parts = [clearest(child) for child in tree[number].children if child in there]
        if there[number] >= max([*parts, search.there]):
            found.append(number)
        return max([-1.0, *parts, there[number]])

    clearest(0)
    return tuple(found)


@dataclass(frozen=True)
class ZoomEye(Agent):
    """The agent. The defaults are those of LLaVA-1.5.

    Attributes:
      search: how a tree is searched.
      resolution: side in pixels of what the model sees of a region; smaller ones are not cut.
      parts: into how many parts a region is cut: 4, 9 or 16.
      patch_scale: how much more than a region is shown; None for no more.
      beside: a region is shown beside the whole picture, in which a frame says where it is; for
        models that read several pictures. By default it is shown alone.
      side_limit: where two regions lie farther apart, in pixels, they are shown as two blocks
        (without `beside`).
      max_cues: things that are searched for, at most; what a model names beyond is left out.
      max_new_tokens: of the answer that names these things.
      colour: of the margins of pictures that are no squares, and of blocks.
      wording: the prompts.

    Raises:
      ValueError: `resolution` or `parts` with which no tree can be made, or a bound below 1.
    """

    search: Search = Search()
    resolution: int = 336
    parts: int = 4
    patch_scale: float | None = None
    beside: bool = False
    side_limit: int = 1000
    max_cues: int = 8
    max_new_tokens: int = 256
    colour: tuple[int, int, int] = (122, 116, 104)
    wording: SearchWording = SearchWording()

    def __post_init__(self) -> None:
        crops.region_tree((1, 1), smallest=self.resolution, parts=self.parts)
        if min(self.max_cues, self.max_new_tokens) < 1:
            raise ValueError(
                f"max_cues = {self.max_cues}, max_new_tokens = {self.max_new_tokens}: want 1 or "
                "more of both"
            )

    def wrap(self, subject: Subject) -> "ZoomEyeSubject":
        """The subject, shown what it needs to see of a picture."""
        return ZoomEyeSubject(self, subject)

    def views(self, picture: np.ndarray, boxes: Sequence[Box]) -> list[np.ndarray]:
        """What is shown of a picture [H, W, 3] uint8 for some of its regions, the whole one or none
        for the whole picture: one picture, or with `beside` the whole and a closer view.
        """
        size: tuple[int, int] = picture.shape[:2]
        whole, side = Box(0, 0, *size), self.resolution
        if self.beside and (not boxes or whole in boxes):
            return [picture]
        if not boxes or list(boxes) == [whole]:
            return [_resized(pad_to_square(picture, self.colour), side)]
        patches = crops.merge_near(
            [crops.patch_around(box, size, side=side, scale=self.patch_scale) for box in boxes]
        )
        if self.beside:
            square = pad_to_square(picture, self.colour)
            top, left = ((len(square) - length) // 2 for length in size)
            moved = [
                Box(b.top + top, b.left + left, b.bottom + top, b.right + left) for b in patches
            ]
            # At least a pixel, so that frames in small pictures are seen.
            square, outer = crops.framed(square, moved, "red", max(1, len(square) // 120))
            return [_resized(square, side), crops.crop(square, crops.union(outer))]
        around = crops.union(patches)
        if max(around.size) <= self.side_limit or len(patches) != 2:
            return [crops.crop(picture, around)]
        first, second = patches if patches[0].left <= patches[1].left else patches[::-1]
        rise = (second.bottom + second.top) // 2 - (first.bottom + first.top) // 2
        blocks = [_resized(crops.crop(picture, box), side) for box in (first, second)]
        return [crops.side_by_side((blocks[0], blocks[1]), rise, self.colour)]


def _resized(picture: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((side, side)))


class ZoomEyeSubject(Prepared):
    """A subject that is shown what it needs to see of a picture.

    Attributes:
      trace: what was found for each cue of the last query: (cue, boxes).
    """

    def __init__(self, agent: ZoomEye, subject: Subject):
        """Around `subject`, which is asked nothing twice."""
        super().__init__(Remembered(subject))
        self.agent = agent
        self.trace: list[tuple[str, list[Box]]] = []

    def prepare(self, query: Query) -> Query:
        """The query with views of the regions that matter in the place of its picture.

        Raises:
          UsageError: there are several pictures, or a conversation about one.
        """
        self.trace = []
        if not query.images:
            return query
        if len(query.images) > 1 or not isinstance(query.prompt, str):
            raise UsageError(
                "zoomeye searches one picture for one question: got "
                f"{len(query.images)} pictures and a {type(query.prompt).__name__}"
            )
        picture = read_image(query.images[0])
        return self._shown(picture, self.search(picture, query.question), query.prompt)

    def search(self, picture: np.ndarray, question: str) -> list[Box]:
        """The regions of a picture that a question is about; none for the whole picture."""
        agent, wording = self.agent, self.agent.wording
        tree = crops.region_tree(picture.shape[:2], smallest=agent.resolution, parts=agent.parts)
        asked = Query(wording.to_cues.format(question))
        [said] = self.subject.generate([asked], max_new_tokens=agent.max_new_tokens)
        wanted = cues(said, wording.lead)[: agent.max_cues]
        single = [cue for cue in wanted if not cue.startswith("all ")]
        if agent.beside and len(wanted) > 1 and single:
            about = [wording.ask("answering", wording.decomposed.format(cue)) for cue in single]
            known = self._confidence([self._shown(picture, [], ask) for ask in about])
            if max(known) >= agent.search.enough:
                return []
        alone = len(wanted) == 1 and bool(single)
        boxes: list[Box] = []
        for cue in wanted:
            if cue.startswith("all "):
                thing = cue.removeprefix("all ").removesuffix("s")
                nodes = find_all(tree, self._judge(picture, tree, thing, ""), agent.search)
            else:
                ask = question if alone else wording.decomposed.format(cue)
                judge = self._judge(picture, tree, cue, ask)
                skip = not alone and not agent.beside
                found = find_one(tree, judge, agent.search, skip_whole=skip, to_bottom=not alone)
                nodes = found.best(tree)
            self.trace.append((cue, [tree[node].box for node in nodes]))
            boxes += self.trace[-1][1]
        return boxes

    def _judge(self, picture: np.ndarray, tree: Sequence[Region], cue: str, question: str) -> Judge:
        """How sure the subject is of what it is asked about regions."""

        def judge(asked: Sequence[tuple[Kind, int]]) -> list[float]:
            about: dict[Kind, str] = {"answering": question, "existence": cue, "latent": cue}
            ask = self.agent.wording.ask
            return self._confidence(
                [
                    self._shown(picture, [tree[node].box], ask(kind, about[kind]))
                    for kind, node in asked
                ]
            )

        return judge

    def _confidence(self, queries: Sequence[Query]) -> list[float]:
        """2 p - 1 for the probability p of saying yes rather than no."""
        wording = self.agent.wording
        chance = self.subject.next_token(queries, (wording.yes, wording.no))
        found: list[float] = np.tanh((chance[:, 0] - chance[:, 1]) / 2).tolist()
        return found

    def _shown(self, picture: np.ndarray, boxes: Sequence[Box], prompt: str) -> Query:
        views = self.agent.views(picture, boxes)
        if len(views) > 1:
            prompt = f"{self.agent.wording.closer}\n{prompt}"
        return Query(prompt, tuple(views))


_WIDE = {"patch_scale": 1.2, "beside": True}
VARIANTS = {
    # Released settings, by the model that is asked.
    "zoomeye_llava_1_5": ZoomEye(),
    "zoomeye_llava_onevision": ZoomEye(
        Search(bias=0.6), resolution=384, colour=(127, 127, 127), **_WIDE
    ),
    "zoomeye_internvl2_5": ZoomEye(
        Search(bias=0.6, enough=0.2, least=-0.2), resolution=448, **_WIDE
    ),
    "zoomeye_qwen2_5_vl": ZoomEye(
        Search(bias=0.6, enough=0.95, steps=(0.05, 0.1, 0.2)), resolution=448, **_WIDE
    ),
    "zoomeye_tiny": ZoomEye(Search(depth=2), resolution=16),
}

register(CARD, VARIANTS)
