"""What a model is trained to do: each objective is one frozen configuration with its loss."""

from zoo.train.objectives.base import (
    Carried,
    Mean,
    Means,
    Objective,
    Variables,
    Variant,
    applied,
)
from zoo.train.objectives.lm import NextToken

__all__ = [
    "Carried",
    "Mean",
    "Means",
    "NextToken",
    "Objective",
    "Variables",
    "Variant",
    "applied",
]
