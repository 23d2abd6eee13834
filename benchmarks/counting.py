"""What the tables of `benchmarks/figures.py` are made of: lines that count something."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zoo.costing import Cost, cost

TERA = 1e12


@dataclass(frozen=True)
class Figure:
    """One number.

    Attributes:
      what: of which model and setting.
      ours: counts it.
      paper: the published number; None where there is none.
      digits: after the decimal point, as published.
      why: what makes a difference of more than 1 %.
    """

    what: str
    ours: Callable[[], float]
    paper: float | None
    digits: int = 2
    why: str = ""


@dataclass(frozen=True)
class Section:
    """A table.

    Attributes:
      slug: of the system, or of what several have in common.
      title: of the table.
      text: how the numbers are counted.
      figures: its lines.
    """

    slug: str
    title: str
    text: str
    figures: tuple[Figure, ...]


@functools.cache
def counted(name: str, **settings: Any) -> Cost:
    """`zoo.cost`, each model once."""
    return cost(name, **settings)


def without_head(found: Cost) -> float:
    """TFLOPs of the decoder's layers over the prompt, with attention."""
    return (found.flops["prefill"].total - found.flops["head"].total) / TERA
