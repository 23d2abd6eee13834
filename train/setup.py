"""What an experiment trains with: `zoo.train.loop` runs it, `zoo.train.plan` compiles it."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import optax
from jax.sharding import Mesh

from zoo.models.core.names import tree_names
from zoo.models.core.types import Batch
from zoo.train.config import Experiment
from zoo.train.optim import learning_rate, make_optimizer
from zoo.train.parts import divide
from zoo.train.state import TrainState, abstract_state, boxed_params, state_bytes
from zoo.train.step import TrainStep, make_train_step


@dataclass(frozen=True)
class Setup:
    """Model, parameters and optimizer of an experiment, as shapes.

    Attributes:
      experiment: what is trained.
      model: the module.
      inputs: a batch of one example.
      boxed: all parameters, with the names of their axes.
      trained: those that train.
      frozen: those that stay as they are.
      schedule: the learning rate.
      optimizer: what moves those that train.
    """

    experiment: Experiment
    model: nn.Module
    inputs: Batch
    boxed: Any
    trained: Any
    frozen: Any
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
        boxed = boxed_params(model, inputs)
        trained, frozen = divide(experiment.parts, boxed)
        moving = tuple(part for part in experiment.parts if not part.frozen)
        optimizer = make_optimizer(experiment.optim, experiment.steps, tree_names(trained), moving)
        return cls(experiment, model, inputs, boxed, trained, frozen, schedule, optimizer)

    @property
    def averaged(self) -> bool:
        """Whether the state holds an average of the parameters."""
        return self.experiment.average is not None

    def state_bytes(self) -> int:
        """Bytes of a checkpoint, without what is frozen."""
        return state_bytes(self.trained, self.optimizer, averaged=self.averaged)

    def state(self, mesh: Mesh) -> TrainState:
        """Shapes and shardings of the state on the devices of `mesh`."""
        return abstract_state(
            self.trained, self.optimizer, mesh, frozen=self.frozen, averaged=self.averaged
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
        )
