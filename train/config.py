"""One experiment: everything that decides what a run computes; and several in a row."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zoo.models.core.config import ModelConfig
from zoo.models.core.errors import UsageError
from zoo.processors.image import Filter, Fit, ImageProcessor
from zoo.processors.pictures import Pictures
from zoo.processors.text import Tokenizer
from zoo.processors.vlm import Processor, Rows
from zoo.train.data.sources import DataConfig
from zoo.train.lora import LoRA
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
        template, tokenizer and way to see pictures are used, in place of what follows but `pad`.
      pad: of such a checkpoint that sees a picture as one square: the picture is set in a square of
        the mean colour first, as LLaVA is trained, where its settings would cut out the middle.
      tokenizer: a `tokenizer.json`; None takes that of the model that training starts from, and
        trains one on the texts of the data set where there is none.
      vocab_size: the most tokens of a tokenizer that is trained here.
      mean, std, resize, fit: as in `ImageProcessor`.
    """

    source: str | None = None
    pad: bool = False
    tokenizer: str | None = None
    vocab_size: int = 512
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resize: Filter = "bicubic"
    fit: Fit = "pad"

    def build(
        self, model: ModelConfig, data: DataConfig, known: Tokenizer | None = None
    ) -> "Processor | Pictures | Chats":
        """The processor for a model that is trained on a data set.

        Args:
          model: what is trained.
          data: on what.
          known: the tokenizer of the model that training starts from.
        """
        if self.source is not None:
            return _chats(self.source, model, self.pad)
        inputs = model.inputs(1)
        pixels = inputs["pixels"].shape
        size = pixels[-2]
        image = ImageProcessor(size, self.mean, self.std, self.resize, self.fit)
        if "ids" not in inputs:
            return Pictures(image, pixels[-1], pixels[1] if len(pixels) == 5 else None)
        if self.tokenizer is not None:
            tokenizer = Tokenizer.load(self.tokenizer)
        elif known is not None:
            tokenizer = known
        else:
            tokenizer = Tokenizer.train(data.texts(), self.vocab_size)
        images, length = pixels[1], inputs["ids"].shape[1]
        views = getattr(model, "crops", None)
        crops = (0, False) if views is None else (views.number, views.square)
        if not getattr(model, "newline", False):
            return Processor(image, tokenizer, length, images, *crops)
        if views is None or not views.square:
            raise UsageError(
                "this model reads a picture in rows of tiles, as the processor of a checkpoint "
                "makes them: want processor.source, or a policy that sees square crops"
            )
        rows = Rows(images, model.tower.grid, inputs["layout"].shape[1])
        return Processor(image, tokenizer, length, 1, *crops, rows=rows)

    def read(self, folder: str | Path, model: ModelConfig) -> "Processor | Pictures | Chats":
        """What `build` has made, from the folder that it was saved to."""
        if self.source is not None:
            return _chats(folder, model, self.pad)
        return (Processor if "ids" in model.inputs(1) else Pictures).load(folder)


def _chats(source: str | Path, model: ModelConfig, pad: bool) -> "Chats":
    from zoo.train.data.captions import Captions  # few need them, and they take a while to import
    from zoo.train.data.chats import Chats

    inputs = model.inputs(1)
    pairs = {"pixels", "ids"} <= inputs.keys() and "labels" not in inputs
    if pairs:
        if pad:
            raise UsageError("processor.pad is for models that answer: leave it out")
        return Captions.load(source, model)
    chats = Chats.load(source, model)
    return replace(chats, processor=chats.processor.padded()) if pad else chats


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
class Faults:
    """What becomes of a step whose loss, gradient or update is not finite, or whose loss jumps.

    Such a step never changes anything but the number of steps.

    Attributes:
      do: "stop" ends the run; "skip" goes on with the next batch; "rewind" goes back to the last
        checkpoint and leaves out the batches from there to the one at fault.
      spike: a loss is at fault, too, if it is more than so many times what it was of late; None: it
        may jump.
      most: how many steps may be skipped in all, or how often a sitting may go back, before the run
        stops.
    """

    do: Literal["stop", "skip", "rewind"] = "stop"
    spike: float | None = None
    most: int = 10

    def __post_init__(self) -> None:
        if self.do not in ("stop", "skip", "rewind"):
            raise UsageError(f"faults.do is {self.do!r}: want one of stop, skip, rewind")
        if self.spike is not None and self.spike <= 1:
            raise UsageError(f"faults.spike is {self.spike}: want more than 1, or None")
        if self.most < 0:
            raise UsageError(f"faults.most is {self.most}: want 0 or more")


@dataclass(frozen=True)
class Best:
    """Checkpoints that stay because they are good.

    Attributes:
      number: how many; 0 for none.
      metric: by which; only steps that are evaluated have one of `eval/`.
      largest: whether more of it is better.
    """

    number: int = 0
    metric: str = "eval/loss"
    largest: bool = False

    def __post_init__(self) -> None:
        if self.number < 0:
            raise UsageError(f"best.number is {self.number}: want 0 or more")


@dataclass(frozen=True)
class Watch:
    """What is recorded of a run beside its metrics.

    Attributes:
      wandb: the project of Weights & Biases that is sent the metrics too; None for none.
      profile_steps: the first and the last step of which a profile is taken, into `profile/`; None
        for none.
      peak_flops: FLOPs per second that a device can do at most, for the share of them that is used
        (`mfu`); None takes what is known of bfloat16 on the device, if it is.
    """

    wandb: str | None = None
    profile_steps: tuple[int, int] | None = None
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        if self.profile_steps is not None:
            begin, end = self.profile_steps
            if not 1 <= begin <= end:
                raise UsageError(
                    f"watch.profile_steps is {self.profile_steps}: want a first step, from 1, and "
                    "a last one that is not before it"
                )
        if self.peak_flops is not None and self.peak_flops <= 0:
            raise UsageError(f"watch.peak_flops is {self.peak_flops}: want more than 0, or None")


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
      lora: low-rank adapters, which train in place of the kernels that they belong to; None for
        none. Without `parts` nothing else trains; with them, every kernel that has an adapter must
        be frozen.
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
      best: which others stay.
      faults: what becomes of a step that goes wrong.
      watch: what is recorded beside metrics.
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
    lora: LoRA | None = None
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
    best: Best = field(default_factory=Best)
    faults: Faults = field(default_factory=Faults)
    watch: Watch = field(default_factory=Watch)
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
        if self.objective.whole_batch and self.accumulate > 1:
            raise UsageError(
                f"accumulate is {self.accumulate}: {type(self.objective).__name__} reads batches "
                "as a whole, and cannot take them in parts: want 1"
            )
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
    "best": "likewise",
    "watch": "likewise",
    "faults": "when to give up, or what to do then, changes nothing before",
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
