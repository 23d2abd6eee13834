"""One experiment: everything that decides what a run computes; and several in a row."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.models.core.config import ModelConfig
from zoo.models.core.errors import UsageError
from zoo.processors.image import Filter, Fit, ImageProcessor
from zoo.processors.text import Tokenizer
from zoo.processors.vlm import Processor
from zoo.train.data.sources import DataConfig
from zoo.train.mesh import MeshConfig
from zoo.train.objectives import NextToken, Objective
from zoo.train.optim import OptimConfig
from zoo.train.parts import Part

if TYPE_CHECKING:
    from zoo.train.data.chats import Chats


@dataclass(frozen=True)
class ProcessorConfig:
    """How records become examples. Picture size and text length follow from what the model takes.

    Attributes:
      source: a checkpoint of the Hugging Face layout, a folder or a name on the hub, whose chat
        template, tokenizer and way to see pictures are used, in place of all that follows.
      tokenizer: a `tokenizer.json`; None takes that of the model that training starts from, and
        trains one on the texts of the data set where there is none.
      vocab_size: the most tokens of a tokenizer that is trained here.
      mean, std, resize, fit: as in `ImageProcessor`.
    """

    source: str | None = None
    tokenizer: str | None = None
    vocab_size: int = 512
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resize: Filter = "bicubic"
    fit: Fit = "pad"

    def build(
        self, model: ModelConfig, data: DataConfig, known: Tokenizer | None = None
    ) -> "Processor | Chats":
        """The processor for a model that is trained on a data set.

        Args:
          model: what is trained.
          data: on what.
          known: the tokenizer of the model that training starts from.
        """
        if self.source is not None:
            return _chats(self.source, model)
        inputs = model.inputs(1)
        size = inputs["pixels"].shape[-2]
        if self.tokenizer is not None:
            tokenizer = Tokenizer.load(self.tokenizer)
        elif known is not None:
            tokenizer = known
        else:
            tokenizer = Tokenizer.train(data.texts(), self.vocab_size)
        image = ImageProcessor(size, self.mean, self.std, self.resize, self.fit)
        images, length = inputs["pixels"].shape[1], inputs["ids"].shape[1]
        views = getattr(model, "crops", None)
        crops = (0, False) if views is None else (views.number, views.square)
        return Processor(image, tokenizer, length, images, *crops)

    def read(self, folder: str | Path, model: ModelConfig) -> "Processor | Chats":
        """What `build` has made, from the folder that it was saved to."""
        return Processor.load(folder) if self.source is None else _chats(folder, model)


def _chats(source: str | Path, model: ModelConfig) -> "Chats":
    from zoo.train.data.chats import Chats  # few need it, and it takes a while to import

    return Chats.load(source, model)


@dataclass(frozen=True)
class Start:
    """A model whose parameters are taken.

    Attributes:
      source: the folder of a training run, of a converted or a Hugging Face checkpoint, or the name
        of one on the hub: all that `zoo.load` takes.
      below: only parameters below this, such as `vision`, are taken; empty: all.
      into: below what they are in the model that is trained, such as `tower`.
    """

    source: str
    below: str = ""
    into: str = ""

    def place(self, path: str) -> str | None:
        """Where a parameter of the source belongs; None if it is not taken."""
        rest = path
        if self.below:
            rest = path.removeprefix(f"{self.below}/")
            if rest == path:
                return None
        return f"{self.into}/{rest}" if self.into else rest


@dataclass(frozen=True)
class Experiment:
    """A training run.

    Attributes:
      name: of the experiment.
      model: what is trained.
      data: the data set that it is trained on.
      steps: optimizer steps of the whole run.
      batch_size: examples per step, over all devices.
      start: where parameters are taken from when the run begins; empty: all are drawn.
      fresh: patterns (see `Part`) of the parameters that are drawn although there is a start,
        because it does not have them or they shall be learned anew.
      parts: what trains, and how; empty: everything alike. Every parameter belongs to exactly one.
      objective: what it is trained to do.
      processor: how records become examples.
      optim: how parameters move.
      accumulate: into how many parts each batch is cut, which are computed one after another to
        save memory; the step is that of the whole batch.
      average: decay of an exponential moving average of the parameters, which is then what is
        evaluated and exported; None for none.
      mesh: how devices share the work.
      seed: decides initial parameters, order of the data and everything drawn while training.
      log_every: steps between lines of `metrics.jsonl`.
      eval_every: steps between evaluations on the validation split; 0 evaluates after the last step
        only.
      eval_examples: validation examples per evaluation; 0 uses none.
      save_every: steps between checkpoints; the last step is always saved.
      keep: number of checkpoints that stay, the newest ones.
      max_bad_share: share of records that may be unusable before the run stops.
      pack: whether as many examples as fit share a row, none of which sees another; `batch_size`
        then counts rows, see `zoo.train.data.packing`.
      workers: processes that read pictures and texts on each host; 0 leaves it to threads.
    """

    name: str
    model: ModelConfig
    data: DataConfig
    steps: int
    batch_size: int
    start: tuple[Start, ...] = ()
    fresh: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()
    objective: Objective = field(default_factory=NextToken)
    processor: ProcessorConfig = field(default_factory=ProcessorConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    accumulate: int = 1
    average: float | None = None
    mesh: MeshConfig = field(default_factory=MeshConfig)
    seed: int = 0
    log_every: int = 20
    eval_every: int = 0
    eval_examples: int = 0
    save_every: int = 200
    keep: int = 3
    max_bad_share: float = 0.01
    pack: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        least = {
            "steps": 1,
            "batch_size": 1,
            "accumulate": 1,
            "seed": 0,
            "log_every": 1,
            "eval_every": 0,
            "eval_examples": 0,
            "save_every": 1,
            "keep": 1,
            "workers": 0,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UsageError(f"{name} is {getattr(self, name)}: want {low} or more")
        if not 0 <= self.max_bad_share <= 1:
            raise UsageError(f"max_bad_share is {self.max_bad_share}: want a share from 0 to 1")
        if self.average is not None and not 0 < self.average < 1:
            raise UsageError(f"average is {self.average}: want a decay between 0 and 1, or None")
        if self.batch_size % self.accumulate:
            raise UsageError(
                f"accumulate is {self.accumulate}: want a divisor of batch_size = {self.batch_size}"
            )


@dataclass(frozen=True)
class Recipe:
    """Stages of a training.

    Attributes:
      name: of the recipe.
      stages: experiments in their order, with names of their own. Each starts from the model and
        the tokenizer that the one before has arrived at, unless it has a `start` itself; what its
        model has beyond that one is named in its `fresh`.
    """

    name: str
    stages: tuple[Experiment, ...]

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names:
            raise UsageError(f"recipe {self.name!r} has no stages: want at least one")
        if len(set(names)) < len(names):
            raise UsageError(f"stages are called {', '.join(names)}: want names of their own")
        if bad := [name for name in names if not re.fullmatch(r"\w[\w.-]*", name)]:
            raise UsageError(
                f"stage {bad[0]!r}: want a name for a folder, of letters, digits, _, - and ."
            )

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of the stages in that of the recipe."""
        return tuple(f"{number}_{stage.name}" for number, stage in enumerate(self.stages, 1))


MAY_CHANGE = {
    "name": "a label",
    "log_every": "how often it is told what happens changes nothing in it",
    "eval_every": "likewise",
    "eval_examples": "likewise",
    "save_every": "likewise",
    "keep": "likewise",
    "max_bad_share": "when to give up changes nothing before",
    "workers": "the batches do not depend on who reads them",
    "mesh": "the numbers are the same up to the order of sums",
    "accumulate": "likewise",
}
"""Fields in which a run that is continued may differ from its beginning, and why."""

_MEMORY = ("remat", "chunk")
"""Fields that, wherever they occur, only decide what is kept in memory: they may change too."""


def forbidden(changes: dict[str, Any], experiment: Experiment) -> dict[str, Any]:
    """Those of the `changes` (by dotted path) that a run cannot be continued with."""
    free = set(MAY_CHANGE)
    if experiment.optim.schedule == "constant":
        free.add("steps")  # no earlier learning rate depends on it

    def may(path: str) -> bool:
        names = path.split(".")
        return names[0] in free or names[-1] in _MEMORY

    return {path: change for path, change in changes.items() if not may(path)}
