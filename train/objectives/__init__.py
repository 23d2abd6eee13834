"""What a model is trained to do: each objective is one frozen configuration with its loss."""

from zoo.train.objectives.base import Mean, Means, Objective, Variant
from zoo.train.objectives.lm import NextToken

__all__ = ["Mean", "Means", "NextToken", "Objective", "Variant"]
