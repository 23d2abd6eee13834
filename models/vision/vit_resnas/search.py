"""The evolutionary search for a network: of a space, within a budget, by what an oracle says."""

import random
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace

from zoo.models.core.config import SystemConfig
from zoo.models.core.errors import UsageError
from zoo.models.vision.vit_resnas.nets import Layer, Net, Space, Stage, largest, macs, smallest

Score = Callable[[Net], float]
"""The oracle: the larger, the better; such as the accuracy of a super-network's slice."""

NARROWINGS = 100
"""How often only heads and hidden units of a random network are narrowed, before its widths are and
layers are left out.
"""

TRIES = 1000
"""Draws in a row that are thrown away, before a generation is as small as it has become."""


@dataclass(frozen=True)
class SearchConfig(SystemConfig):
    """A search.

    Attributes:
      space: of the networks.
      budget: multiplications and additions for an image at most.
      least: the share of the budget that a network must use.
      image_size: side of the images.
      stem: as in `macs`.
      num_classes: likewise.
      first: random networks that are tried.
      rounds: generations after them.
      parents: the best so far, which have the children of a generation.
      children: by mutation, and as many by crossing.
      mutation: the share of numbers that a mutation draws anew.
      seed: of all random choices.
    """

    space: Space
    budget: float
    least: float = 0.975
    image_size: int = 224
    stem: int = 24
    num_classes: int = 1000
    first: int = 500
    rounds: int = 19
    parents: int = 75
    children: int = 75
    mutation: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.macs(smallest(self.space)), self.macs(largest(self.space))
        if not (low <= self.budget and self.least * self.budget <= high):
            raise ValueError(
                f"budget = {self.budget:,.0f}: networks of the space cost {low:,} to {high:,}"
            )
        if min(self.first, self.parents) < 2:
            raise ValueError(
                f"first = {self.first}, parents = {self.parents}: want 2 or more of each"
            )
        if not 0 < self.mutation <= 1:
            raise ValueError(f"mutation = {self.mutation}: want a share above 0, up to 1")

    def macs(self, net: Net) -> int:
        """What a network costs."""
        return macs(net, self.image_size, stem=self.stem, num_classes=self.num_classes)

    def fits(self, net: Net) -> bool:
        """Whether a network is within the budget and uses as much of it as it must."""
        return self.least * self.budget <= self.macs(net) <= self.budget

    def build(self) -> "Search":
        """What searches."""
        return Search(self)


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes:
      net: the best network.
      score: of the oracle.
      macs: for an image.
      tried: networks that the oracle was asked about.
      best: its score after the random networks and after every generation.
    """

    net: Net
    score: float
    macs: int
    tried: int
    best: tuple[float, ...]


class Search:
    """Searches when called."""

    def __init__(self, config: SearchConfig) -> None:
        self.config = config

    def __call__(self, score: Score) -> Found:
        """The best network by the oracle; the same one for the same seed and oracle.

        Raises:
          UsageError: hardly any random network fits the budget.
        """
        c, draw = self.config, random.Random(self.config.seed)
        tried = distinct(lambda: drawn(c, draw), c.fits, c.first, ())
        if len(tried) < 2:
            raise UsageError(
                f"budget = {c.budget:,.0f}, least = {c.least}: {len(tried)} of {TRIES} random "
                "networks fit; want another budget, or to use less of it"
            )
        known = {net: score(net) for net in tried}
        best = [max(known.values())]
        for _ in range(c.rounds):
            known.update({net: score(net) for net in self._generation(known, draw)})
            best.append(max(known.values()))
        net = max(known, key=lambda each: known[each])
        return Found(net, known[net], c.macs(net), len(known), tuple(best))

    def _generation(self, known: Mapping[Net, float], draw: random.Random) -> list[Net]:
        """New children of the best that are known, by mutation and by crossing."""
        c = self.config
        parents = sorted(known, key=lambda net: known[net], reverse=True)[: c.parents]

        def mutant() -> Net:
            return mutated(c.space, draw.choice(parents), c.mutation, draw)

        def child() -> Net:
            return crossed(c.space, *draw.sample(parents, 2), draw)

        mutants = distinct(mutant, c.fits, c.children, known)
        return mutants + distinct(child, c.fits, c.children, {*known, *mutants})


def distinct(
    make: Callable[[], Net], fits: Callable[[Net], bool], number: int, known: Container[Net]
) -> list[Net]:
    """So many different networks that fit and are not known; fewer where `TRIES` draws in a row
    have brought no other.
    """
    found: dict[Net, None] = {}
    failed = 0
    while len(found) < number and failed < TRIES:
        net = make()
        if fits(net) and net not in known and net not in found:
            found[net], failed = None, 0
        else:
            failed += 1
    return list(found)


def settled(space: Space, net: Net) -> Net:
    """The network without the layers that may be left out and follow one that is."""
    stages = []
    for options, stage in zip(space, net, strict=True):
        layers: list[Layer] = []
        for removable, layer in zip(options.removable, stage.layers, strict=True):
            gone = removable and bool(layers) and not layers[-1].present
            layers.append(replace(layer, present=False) if gone else layer)
        stages.append(replace(stage, layers=tuple(layers)))
    return tuple(stages)


def drawn(config: SearchConfig, draw: random.Random) -> Net:
    """A random network: widths and layers first, then one number after the other is made smaller
    until the network is within the budget.
    """
    stages = tuple(
        Stage(
            draw.choice(options.widths),
            tuple(
                replace(layer, present=not removable or draw.random() < 0.5)
                for removable, layer in zip(options.removable, stage.layers, strict=True)
            ),
        )
        for options, stage in zip(config.space, largest(config.space), strict=True)
    )
    net, steps = settled(config.space, stages), 0
    while config.macs(net) > config.budget:
        net = narrowed(config.space, net, draw, whole=steps >= NARROWINGS)
        steps += 1
    return net


def narrowed(space: Space, net: Net, draw: random.Random, *, whole: bool) -> Net:
    """The network with one number one smaller: heads or hidden units of a layer and, where `whole`,
    the width of a stage, or a layer that may be left out.
    """
    places = [(s, i) for s, stage in enumerate(net) for i in range(len(stage.layers))]
    if whole:
        places += [(s, -1) for s in range(len(net))]
    s, i = draw.choice(places)
    options, stage = space[s], net[s]
    if i < 0:
        stage = replace(stage, width=_next(options.widths, stage.width))
    else:
        layer, names = stage.layers[i], ["num_heads", "mlp_dim"]
        what = draw.choice(names + ["present"] * (whole and options.removable[i]))
        if what == "num_heads":
            layer = replace(layer, num_heads=_next(options.num_heads, layer.num_heads))
        elif what == "mlp_dim":
            layer = replace(layer, mlp_dim=_next(options.mlp_dims, layer.mlp_dim))
        else:
            layer = replace(layer, present=layer.present and draw.random() < 0.5)
        stage = replace(stage, layers=(*stage.layers[:i], layer, *stage.layers[i + 1 :]))
    return settled(space, (*net[:s], stage, *net[s + 1 :]))


def _next(options: tuple[int, ...], value: int) -> int:
    """The next smaller one; the smallest stays."""
    return max((option for option in options if option < value), default=value)


def mutated(space: Space, net: Net, share: float, draw: random.Random) -> Net:
    """The network with a share of its numbers drawn anew, and of its layers that may be left out
    turned into the other.
    """

    def perhaps(value: int, options: tuple[int, ...]) -> int:
        return draw.choice(options) if draw.random() < share else value

    stages = tuple(
        Stage(
            perhaps(stage.width, options.widths),
            tuple(
                replace(
                    layer,
                    num_heads=perhaps(layer.num_heads, options.num_heads),
                    mlp_dim=perhaps(layer.mlp_dim, options.mlp_dims),
                    present=layer.present != (removable and draw.random() < share),
                )
                for removable, layer in zip(options.removable, stage.layers, strict=True)
            ),
        )
        for options, stage in zip(space, net, strict=True)
    )
    return settled(space, stages)


def crossed(space: Space, one: Net, other: Net, draw: random.Random) -> Net:
    """Every number of one of the two."""

    def layer(a: Layer, b: Layer) -> Layer:
        names = ("num_heads", "mlp_dim", "present")
        return replace(a, **{name: getattr(draw.choice((a, b)), name) for name in names})

    stages = tuple(
        Stage(
            draw.choice((a, b)).width,
            tuple(layer(x, y) for x, y in zip(a.layers, b.layers, strict=True)),
        )
        for a, b in zip(one, other, strict=True)
    )
    return settled(space, stages)
