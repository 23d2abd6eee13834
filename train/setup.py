"""What an experiment trains with: `zoo.train.loop` runs it, `zoo.train.plan` compiles it."""

import functools
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh

from zoo.models.core.errors import UsageError
from zoo.models.core.names import tree_names
from zoo.models.core.types import Batch
from zoo.train.config import Experiment
from zoo.train.optim import learning_rate, make_optimizer
from zoo.train.parts import divide, joined
from zoo.train.state import (
    TrainState,
    abstract_state,
    boxed_aux,
    boxed_variables,
    initial_state,
    nbytes,
    state_bytes,
    variables_of,
)
from zoo.train.step import TrainStep, make_train_step


@dataclass(frozen=True)
class Setup:
    """Model, parameters and optimizer of an experiment, as shapes.

    Attributes:
      experiment: what is trained.
      model: the module.
      inputs: a batch of one example.
      boxed: all parameters of the model, with the names of their axes.
      trained: those that train.
      frozen: those that stay as they are.
      adapters: low-rank adapters, which are among those that train, and their scales, which stay.
      stats: running statistics of the model.
      aux: what the objective carries.
      fixed: what it carries unchanged.
      schedule: the learning rate.
      optimizer: what moves those that train.
    """

    experiment: Experiment
    model: nn.Module
    inputs: Batch
    boxed: Any
    trained: Any
    frozen: Any
    adapters: Any
    stats: Any
    aux: Any
    fixed: Any
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation

    @classmethod
    def of(cls, experiment: Experiment) -> "Setup":
        """Build it.

        Raises:
          UsageError: the warmup is longer than the run, or the parts do not fit the model.
        """
        model, inputs = experiment.model.build(), experiment.model.inputs(1)
        schedule = learning_rate(experiment.optim, experiment.steps)
        variables = boxed_variables(model, inputs)
        boxed, stats = variables["params"], variables.get("stats", {})
        moving = tuple(part for part in experiment.parts if not part.frozen)
        adapters: Any = {}
        if experiment.lora is None:
            trained, frozen = divide(experiment.parts, boxed)
        else:
            trained, frozen = divide(experiment.parts, boxed) if moving else ({}, boxed)
            adapters = experiment.lora.adapters(boxed, frozen)
            moved, scales = divide(experiment.lora.parts, adapters)
            trained, frozen = joined(moved, trained), joined(scales, frozen)
            moving = (*moving, experiment.lora.parts[0])
        optimizer = make_optimizer(experiment.optim, experiment.steps, tree_names(trained), moving)
        whole = variables_of(joined(trained, frozen), stats)
        aux, fixed = boxed_aux(experiment.objective, model, whole, inputs)
        return cls(
            experiment,
            model,
            inputs,
            boxed=boxed,
            trained=trained,
            frozen=frozen,
            adapters=adapters,
            stats=stats,
            aux=aux,
            fixed=fixed,
            schedule=schedule,
            optimizer=optimizer,
        )

    @property
    def averaged(self) -> bool:
        """Whether the state holds an average of the parameters."""
        return self.experiment.average is not None

    @functools.cached_property
    def output(self) -> Any:
        """Shapes of what the model makes of a batch of one example."""
        variables = nn.unbox(variables_of(self.boxed, self.stats))
        return jax.eval_shape(self.model.apply, variables, self.inputs)

    @property
    def tokens(self) -> int | None:
        """Places of the sequences of a batch; None for a model that has none."""
        hidden = getattr(self.output, "hidden", None)
        return None if hidden is None else self.experiment.batch_size * hidden.shape[1]

    def check_vocabulary(self, processor: Any) -> None:
        """Raise UsageError if the tokenizer has ids that a language model does not know."""
        if self.tokens is None or not hasattr(self.model, "head"):
            return
        variables = nn.unbox(variables_of(self.boxed, self.stats))
        head = functools.partial(self.model.apply, method="head")
        known = jax.eval_shape(head, variables, self.output.hidden).shape[-1]
        if processor.vocab_size > known:
            raise UsageError(
                f"the tokenizer has {processor.vocab_size} tokens and the model knows {known}: "
                "lower processor.vocab_size or raise the vocab_size of the model"
            )

    def state_bytes(self) -> int:
        """Bytes of a checkpoint, without what is frozen."""
        others = (self.stats, self.aux)
        return state_bytes(self.trained, self.optimizer, averaged=self.averaged, others=others)

    def fixed_bytes(self) -> int:
        """Bytes of what lies on the disk once for all checkpoints."""
        return nbytes(nn.unbox((self.frozen, self.fixed)))

    def state(self, mesh: Mesh) -> TrainState:
        """Shapes and shardings of the state on the devices of `mesh`."""
        return abstract_state(
            self.trained,
            self.optimizer,
            mesh,
            frozen=self.frozen,
            averaged=self.averaged,
            stats=self.stats,
            aux=self.aux,
            fixed=self.fixed,
        )

    def begin(self, abstract: TrainState, start: Any = None, stats: Any = None) -> TrainState:
        """The state before the first step.

        Args:
          abstract: its shapes and shardings.
          start: all parameters, which are used up; None: they are drawn.
          stats: running statistics that belong to them; None: those of a new model.
        """
        objective, lora = self.experiment.objective, self.experiment.lora
        return initial_state(
            self.model,
            self.inputs,
            self.optimizer,
            abstract,
            self.experiment.seed,
            start,
            stats=stats,
            objective=objective,
            loaded=objective.load(abstract.step.sharding.mesh),
            adapters=None if lora is None else functools.partial(lora.draw, self.adapters),
        )

    def train_step(self, abstract: TrainState) -> TrainStep:
        """The compiled step for a state of these shapes and shardings."""
        return make_train_step(
            self.model,
            self.experiment.objective,
            self.optimizer,
            self.schedule,
            abstract,
            accumulate=self.experiment.accumulate,
            decay=self.experiment.average,
            faults=self.experiment.faults,
        )
