"""One experiment: everything that decides what a run computes."""

from dataclasses import dataclass, field
from typing import Any

from zoo.models.core.config import ModelConfig
from zoo.models.core.errors import UsageError
from zoo.processors.image import Filter, Fit, ImageProcessor
from zoo.processors.text import Tokenizer
from zoo.processors.vlm import Processor
from zoo.train.data.sources import DataConfig
from zoo.train.mesh import MeshConfig
from zoo.train.objectives import NextToken, Objective
from zoo.train.optim import OptimConfig


@dataclass(frozen=True)
class ProcessorConfig:
    """How records become examples. Picture size and text length follow from what the model takes.

    Attributes:
      tokenizer: a `tokenizer.json`; None trains one on the texts of the data set.
      vocab_size: the most tokens of a tokenizer that is trained here.
      mean, std, resize, fit: as in `ImageProcessor`.
    """

    tokenizer: str | None = None
    vocab_size: int = 512
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resize: Filter = "bicubic"
    fit: Fit = "pad"

    def build(self, model: ModelConfig, data: DataConfig) -> Processor:
        """The processor for a model that is trained on a data set."""
        inputs = model.inputs(1)
        size = inputs["pixels"].shape[-2]
        if self.tokenizer is None:
            tokenizer = Tokenizer.train(data.texts(), self.vocab_size)
        else:
            tokenizer = Tokenizer.load(self.tokenizer)
        image = ImageProcessor(size, self.mean, self.std, self.resize, self.fit)
        return Processor(image, tokenizer, max_length=inputs["ids"].shape[1])


@dataclass(frozen=True)
class Experiment:
    """A training run.

    Attributes:
      name: of the experiment.
      model: what is trained.
      data: the data set that it is trained on.
      steps: optimizer steps of the whole run.
      batch_size: examples per step, over all devices.
      objective: what it is trained to do.
      processor: how records become examples.
      optim: how parameters move.
      mesh: how devices share the work.
      seed: decides initial parameters, order of the data and everything drawn while training.
      log_every: steps between lines of `metrics.jsonl`.
      eval_every: steps between evaluations on the validation split; 0 evaluates after the last step
        only.
      eval_examples: validation examples per evaluation; 0 uses none.
      save_every: steps between checkpoints; the last step is always saved.
      keep: number of checkpoints that stay, the newest ones.
      max_bad_share: share of records that may be unusable before the run stops.
    """

    name: str
    model: ModelConfig
    data: DataConfig
    steps: int
    batch_size: int
    objective: Objective = field(default_factory=NextToken)
    processor: ProcessorConfig = field(default_factory=ProcessorConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    seed: int = 0
    log_every: int = 20
    eval_every: int = 0
    eval_examples: int = 0
    save_every: int = 200
    keep: int = 3
    max_bad_share: float = 0.01

    def __post_init__(self) -> None:
        least = {
            "steps": 1,
            "batch_size": 1,
            "seed": 0,
            "log_every": 1,
            "eval_every": 0,
            "eval_examples": 0,
            "save_every": 1,
            "keep": 1,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UsageError(f"{name} is {getattr(self, name)}: want {low} or more")
        if not 0 <= self.max_bad_share <= 1:
            raise UsageError(f"max_bad_share is {self.max_bad_share}: want a share from 0 to 1")


MAY_CHANGE = {
    "name": "a label",
    "log_every": "how often it is told what happens changes nothing in it",
    "eval_every": "likewise",
    "eval_examples": "likewise",
    "save_every": "likewise",
    "keep": "likewise",
    "max_bad_share": "when to give up changes nothing before",
    "mesh": "the numbers are the same up to the order of sums",
}
"""Fields in which a run that is continued may differ from its beginning, and why."""


def forbidden(changes: dict[str, Any], experiment: Experiment) -> dict[str, Any]:
    """Those of the `changes` (by dotted path) that a run cannot be continued with."""
    free = set(MAY_CHANGE)
    if experiment.optim.schedule == "constant":
        free.add("steps")  # no earlier learning rate depends on it
    return {path: change for path, change in changes.items() if path.split(".")[0] not in free}
