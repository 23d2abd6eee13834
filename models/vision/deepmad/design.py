"""The design of a DeepMAD network: the largest entropy within budgets.

Two solvers: the evolution that the paper uses, which changes a unit at a time, and differential
evolution from SciPy over all of them.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import optimize

from zoo.models.core.config import SystemConfig
from zoo.models.vision.deepmad.score import (
    Net,
    Unit,
    effectiveness,
    macs,
    parameters,
    score,
)

Solver = Literal["evolution", "differential"]
FACTORS = (1.5, 1.25, 0.8, 0.6, 0.5)
"""By which the evolution changes channels."""

STEPS = (-2, -1, 1, 2)
"""By which it changes depths."""

REACH = 4.0
"""Differential evolution searches channels and depths from a quarter to four times the first."""


@dataclass(frozen=True)
class DesignConfig(SystemConfig):
    """A programme: what to start from, and the budgets.

    Attributes:
      start: a network within the budgets. Kinds and strides stay, and so do convolutions.
      image_size: side of the images.
      max_parameters: without the classifier; None for any number.
      max_macs: multiplications and additions for an image.
      max_effectiveness: ρ, depth by width, of every level.
      max_convolutions: on the way through.
      kernels: sides to choose from.
      multiple: channels are multiples of it.
      solver: which.
      population: networks that are kept; for "differential", of a generation at least.
      candidates: networks that are tried at most.
      seed: of all random choices.
    """

    start: tuple[Unit, ...]
    image_size: int = 224
    max_parameters: float | None = None
    max_macs: float | None = None
    max_effectiveness: float | None = None
    max_convolutions: int | None = None
    kernels: tuple[int, ...] = (3, 5)
    multiple: int = 8
    solver: Solver = "evolution"
    population: int = 256
    candidates: int = 500_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.solver not in Solver.__args__:
            raise ValueError(f"solver = {self.solver!r}: want {' or '.join(Solver.__args__)}")
        if all(unit.kind == "conv" for unit in self.start):
            raise ValueError("start: want rows of blocks, which are what the design changes")
        if self.population < 2 or self.candidates < self.population:
            raise ValueError(
                f"population = {self.population}, candidates = {self.candidates}: want 2 or more "
                "that are kept, and no fewer that are tried"
            )
        if self.excess(self.start):
            raise ValueError(
                f"start: a network of {parameters(self.start):,} parameters, "
                f"{macs(self.start, self.image_size):,} multiplications and an effectiveness of "
                f"{effectiveness(self.start, self.image_size):.3f} is beyond the budgets"
            )

    def excess(self, net: Net) -> float:
        """How far a network is beyond the budgets, as shares of these summed; 0 within."""
        depth = sum(unit.depth * (1 if unit.kind == "conv" else 3) for unit in net)
        budgets: tuple[tuple[float | None, Callable[[], float]], ...] = (
            (self.max_convolutions, lambda: depth),
            (self.max_parameters, lambda: parameters(net)),
            (self.max_macs, lambda: macs(net, self.image_size)),
            (self.max_effectiveness, lambda: effectiveness(net, self.image_size)),
        )
        return sum(max(0.0, count() / most - 1) for most, count in budgets if most is not None)

    def build(self) -> "Design":
        """What solves it."""
        return Design(self)


@dataclass(frozen=True)
class Designed:
    """A solution.

    Attributes:
      net: the network.
      score: its entropies less the penalty for unequal depths.
      effectiveness: ρ.
      parameters: without the classifier.
      macs: for an image.
      tried: networks that were looked at.
    """

    net: tuple[Unit, ...]
    score: float
    effectiveness: float
    parameters: int
    macs: int
    tried: int


class Design:
    """Solves a programme when called."""

    def __init__(self, config: DesignConfig) -> None:
        self.config = config

    def __call__(self) -> Designed:
        """The best network that the solver finds; the same one for the same seed."""
        solve = self._evolve if self.config.solver == "evolution" else self._differential
        net, tried = solve()
        side = self.config.image_size
        best = score(net, side)
        rho = effectiveness(net, side)
        return Designed(net, best, rho, parameters(net), macs(net, side), tried)

    def mutated(self, net: tuple[Unit, ...], draw: random.Random) -> tuple[Unit, ...]:
        """A network with one number of one unit changed."""
        c = self.config
        place = draw.choice([i for i, unit in enumerate(net) if unit.kind != "conv"])
        unit = net[place]
        what = draw.choice(("out", "kernel", "inner", "depth"))
        if what == "kernel":
            unit = replace(unit, kernel=draw.choice(c.kernels))
        elif what == "depth":
            unit = replace(unit, depth=max(1, unit.depth + draw.choice(STEPS)))
        else:
            value = self._rounded(getattr(unit, what) * draw.choice(FACTORS))
            unit = replace(unit, **{what: value})
        if unit.kind == "bottleneck":  # no thinner within than a tenth
            unit = replace(unit, inner=max(unit.inner, self._rounded(unit.out / 10)))
        return (*net[:place], unit, *net[place + 1 :])

    def _rounded(self, channels: float) -> int:
        """The nearest number of channels that there may be."""
        multiple = self.config.multiple
        return max(1, round(channels / multiple)) * multiple

    def _evolve(self) -> tuple[tuple[Unit, ...], int]:
        c, draw = self.config, random.Random(self.config.seed)
        kept = {c.start: score(c.start, c.image_size)}
        for _ in range(c.candidates):
            net = self.mutated(draw.choice(list(kept)), draw)
            if net in kept or c.excess(net):
                continue
            kept[net] = score(net, c.image_size)
            if len(kept) > c.population:
                del kept[min(kept, key=lambda each: kept[each])]
        return max(kept, key=lambda each: kept[each]), c.candidates

    def _differential(self) -> tuple[tuple[Unit, ...], int]:
        c = self.config
        rows = [i for i, unit in enumerate(c.start) if unit.kind != "conv"]

        def decoded(numbers: np.ndarray) -> tuple[Unit, ...]:
            """Four numbers of every row: its logarithms of channels, its kernel and its depth."""
            net = list(c.start)
            for place, (out, inner, kernel, depth) in zip(
                rows, numbers.reshape(-1, 4), strict=True
            ):
                out = self._rounded(math.exp(out))
                inner = self._rounded(math.exp(inner))
                if net[place].kind == "bottleneck":
                    inner = max(inner, self._rounded(out / 10))
                side = c.kernels[round(kernel)]
                net[place] = replace(
                    net[place], out=out, inner=inner, kernel=side, depth=round(depth)
                )
            return tuple(net)

        def loss(numbers: np.ndarray) -> float:
            """Below 0 within the budgets, above it beyond, so that any way back is a descent."""
            net = decoded(numbers)
            excess = c.excess(net)
            # Within budgets entropies are well above 0; their penalty may be larger for a few.
            return 1e9 * (1 + excess) if excess else -score(net, c.image_size)

        bounds, first = [], []
        for place in rows:
            unit = c.start[place]
            for channels in (unit.out, unit.inner):
                bounds.append((math.log(channels / REACH), math.log(channels * REACH)))
            kernels, depths = (0, len(c.kernels) - 1), (1, math.ceil(REACH * unit.depth))
            bounds += [kernels, depths]
            known = c.kernels.index(unit.kernel) if unit.kernel in c.kernels else 0
            first += [math.log(unit.out), math.log(unit.inner), known, unit.depth]
        each = max(1, math.ceil(c.population / len(bounds)))
        found = optimize.differential_evolution(
            loss,
            bounds,
            x0=np.asarray(first),
            integrality=np.tile([False, False, True, True], len(rows)),
            popsize=each,
            maxiter=max(1, c.candidates // (each * len(bounds)) - 1),
            polish=False,
            tol=0,
            seed=c.seed,
        )
        return decoded(found.x), int(found.nfev)
