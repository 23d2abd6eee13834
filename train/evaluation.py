"""Evaluation while training goes on: the objective on held-out examples."""

import contextlib
import math
from dataclasses import replace

from zoo.train.config import Experiment
from zoo.train.data.pipeline import BatchIterator, Pipeline
from zoo.train.mesh import batch_sharding, put_batch
from zoo.train.progress import Bar
from zoo.train.state import TrainState
from zoo.train.step import EvalStep


def evaluate(
    experiment: Experiment, pipeline: Pipeline, eval_step: EvalStep, state: TrainState, bar: Bar
) -> dict[str, float]:
    """Means over the same validation examples each time, their names prefixed by `eval/`.

    Args:
      experiment: says over how many.
      pipeline: that of training; what is held out is read in the same way.
      eval_step: the means of one batch.
      state: what is evaluated.
      bar: shows how far it is.
    """
    count = math.ceil(experiment.eval_examples / experiment.batch_size)
    if not count:
        return {}
    held_out: BatchIterator = iter(replace(pipeline, split="validation", seed=0, workers=0))
    sharding = batch_sharding(state.step.sharding.mesh)
    sums: dict[str, list[float]] = {}
    bar.phase("evaluating", count)
    variables, aux = state.variables, {**state.aux, **state.fixed}
    with contextlib.closing(held_out):
        for done in range(count):
            means = eval_step(variables, aux, put_batch(next(held_out), sharding), state.key)
            for name, mean in means.items():
                total, weight = sums.setdefault(f"eval/{name}", [0.0, 0.0])
                sums[f"eval/{name}"] = [total + float(mean.total), weight + float(mean.weight)]
            bar.update(done + 1)
    return {name: total / max(weight, 1.0) for name, (total, weight) in sums.items()}
