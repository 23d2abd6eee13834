"""From pictures and text to the arrays that a model takes, and back: all NumPy, on the host."""

from zoo.processors.image import ImageProcessor
from zoo.processors.text import Tokenizer
from zoo.processors.vlm import Processor

__all__ = ["ImageProcessor", "Processor", "Tokenizer"]
