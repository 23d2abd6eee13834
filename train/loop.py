"""The training loop. Read `train` from top to bottom:

config → mesh → data → model and shardings → restore → step → log → eval → save → export.
"""

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from signal import Signals
from typing import Any

import flax.linen as nn
import jax

from zoo.cache import cache_folder, keep_compiled_programs
from zoo.models.core.errors import UsageError, ZooError
from zoo.models.core.types import Batch
from zoo.saving import MODEL, save_model, saved_about
from zoo.train.checkpoint import Checkpoints
from zoo.train.config import Experiment, Start
from zoo.train.data.feed import Feed
from zoo.train.data.pipeline import BatchIterator, Pipeline
from zoo.train.folder import CHECKPOINTS, LOG, check_room, claim, processor_of, writing
from zoo.train.mesh import batch_sharding, check_batch_size, make_mesh, put_batch
from zoo.train.metrics import Journal, MetricsWriter
from zoo.train.parts import joined
from zoo.train.progress import Bar
from zoo.train.setup import Setup
from zoo.train.start import starting_params, starting_tokenizer
from zoo.train.state import (
    TrainState,
    describe,
    initial_state,
    nbytes,
    norms_by_part,
)
from zoo.train.step import EvalStep, make_eval_step
from zoo.train.stop import StopRequest
from zoo.whole import locked

OnEval = Callable[[nn.Module, Any, int], Mapping[str, float]]

_STEPS_AHEAD = 2
"""How many steps the host may prepare before their results are there."""

_BATCHES_AHEAD = 2
"""How many batches are brought to the devices before they are asked for."""


@dataclass(frozen=True)
class Result:
    """What has become of a run.

    Attributes:
      folder: of the run.
      step: steps done, over all sittings.
      steps: steps that make the run complete.
      metrics: of the last step that was logged in this sitting; empty if none was.
      params: the parameters on their devices, as they are exported.
      model: the module that they belong to.
      stopped: the signal that ended it early, or None.
    """

    folder: Path
    step: int
    steps: int
    metrics: Mapping[str, float]
    params: Any
    model: nn.Module
    stopped: Signals | None

    @property
    def complete(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.steps


def train(
    experiment: Experiment,
    out: str | Path,
    *,
    data_dir: str | Path | None = None,
    progress: Bar | None = None,
    on_eval: OnEval | None = None,
    before: Path | None = None,
) -> Result:
    """Train, from where this run stands, until all steps are done or a signal ends it.

    Args:
      experiment: what to train.
      out: the folder of the run, see `zoo.train.folder`.
      data_dir: where data sets are prepared; a folder in the user's cache by default.
      progress: a bar that the caller has entered; by default the run has one of its own.
      on_eval: called as `on_eval(model, params, step)` at each evaluation; the numbers that it
        returns are logged with that step. The parameters are given up right after: copy what must
        last.
      before: the folder of a run that this one starts from where the experiment has no `start`.

    Raises:
      ZooError: the folder cannot be used, a number is not finite, too much data is bad, the disk is
        full.
      UsageError: the experiment cannot be run like this, or the folder belongs to another one.
    """
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(Bar()) if progress is None else progress

        # ──────────────────────────────── config ────────────────────────────────
        folder = stack.enter_context(locked(out))
        claim(folder, experiment)
        starts = experiment.start or ((Start(str(before)),) if before is not None else ())
        if experiment.fresh and not starts:
            raise UsageError(
                f"fresh is {experiment.fresh} where there is no start: all parameters are drawn"
            )
        journal = Journal(folder / LOG, bar.say)
        stack.callback(journal.close)
        setup = Setup.of(experiment)
        model, inputs, boxed = setup.model, setup.inputs, setup.boxed
        frozen_bytes = nbytes(nn.unbox(setup.frozen))
        check_room(folder, setup.state_bytes(), experiment.keep, frozen_bytes)

        # ───────────────────────────────── mesh ─────────────────────────────────
        keep_compiled_programs()
        mesh = make_mesh(experiment.mesh)
        check_batch_size(experiment.batch_size, mesh, experiment.accumulate)
        stack.enter_context(jax.set_mesh(mesh))
        sharding = batch_sharding(mesh)

        # ───────────────────────────────── data ─────────────────────────────────
        data_dir = cache_folder() / "data" if data_dir is None else data_dir
        _prepare(experiment, data_dir, bar)
        if experiment.eval_examples:
            experiment.data.source("validation", data_dir)  # fails now if there is none
        processor = processor_of(folder, experiment, starting_tokenizer(starts))
        _check_vocabulary(model, boxed, inputs, processor)
        pipeline = Pipeline(
            experiment.data,
            processor,
            experiment.batch_size,
            experiment.seed,
            data_dir,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            max_bad_share=experiment.max_bad_share,
            pack=experiment.pack,
            workers=experiment.workers,
        )
        # Devices of their own work while the next batches come; a CPU has its hands full.
        ahead = 0 if jax.default_backend() == "cpu" else _BATCHES_AHEAD
        batches = Feed(iter(pipeline), lambda batch: put_batch(batch, sharding), ahead)
        stack.callback(batches.close)
        for fault in batches.faults:
            journal.say(f"data: {fault}")

        # ────────────────────────── model and shardings ─────────────────────────
        abstract = setup.state(mesh)
        for line in describe(abstract):
            journal.note(line)
        train_step = setup.train_step(abstract)
        eval_step = make_eval_step(model, experiment.objective)

        # ──────────────── restore: what this run has done, else start, else init ────────────
        checkpoints = Checkpoints(folder / CHECKPOINTS, experiment.keep, journal.say)
        stack.callback(checkpoints.close)
        if checkpoints.newest is None:
            step, begun, seed = 0, None, experiment.seed
            if starts:
                begun = starting_params(
                    starts, experiment.fresh, experiment.model, boxed, mesh, seed, journal.say
                )
            state = initial_state(model, inputs, setup.optimizer, abstract, seed, begun)
        else:
            step = checkpoints.newest
            state = checkpoints.restore(abstract, batches)
            finished = "complete" if step >= experiment.steps else "continuing"
            journal.say(f"{folder}: step {step} of {experiment.steps} restored, {finished}")
        with writing(folder):
            metrics = MetricsWriter(folder, step)
        stack.callback(metrics.close)

        record: dict[str, float] = {}
        in_flight: deque[jax.Array] = deque()
        variants: set[Any] = set()
        reported_bad = batches.bad.bad
        clock, clocked, waited = time.monotonic(), step, batches.waited
        bar.phase("training", experiment.steps, step)
        stop = stack.enter_context(StopRequest())
        while step < experiment.steps and stop.signal is None:
            # ─────────────────────────────── step ───────────────────────────────
            variant = experiment.objective.variant(experiment.seed, step)
            if variant not in variants:
                variants.add(variant)
                bar.update(step, compiling="" if variant is None else f"for {variant}")
            batch = next(batches)
            with jax.transfer_guard("disallow"):
                state, values = train_step(state, batch, variant)
            step += 1
            in_flight.append(values["loss"])
            if len(in_flight) > _STEPS_AHEAD:
                loss = float(in_flight.popleft())  # waits, so that batches do not pile up
                if not math.isfinite(loss):
                    _check_finite(state, checkpoints)
                bar.update(step, loss=f"{loss:.3f}")

            last = step == experiment.steps
            evaluating = last or bool(experiment.eval_every and step % experiment.eval_every == 0)
            saving = last or step % experiment.save_every == 0
            if evaluating or saving or step % experiment.log_every == 0:
                # ───────────────────────────── log ──────────────────────────────
                record = {name: float(value) for name, value in values.items()}
                _check_finite(state, checkpoints)
                now = time.monotonic()
                record["steps_per_second"] = (step - clocked) / (now - clock)
                record["data_wait"] = (batches.waited - waited) / (now - clock)
                if batches.bad.bad > reported_bad:
                    reported_bad = batches.bad.bad
                    record["bad_records"] = reported_bad
                    journal.say(f"left out so far: {batches.bad}")

                # ───────────────────────────── eval ─────────────────────────────
                if evaluating:
                    record |= _evaluate(experiment, pipeline, eval_step, state, bar)
                    record |= on_eval(model, state.served, step) if on_eval else {}
                    bar.phase("training", experiment.steps, step)
                with writing(folder):
                    metrics.write(step, record)
                    if saving:
                        metrics.sync()

                # ───────────────────────────── save ─────────────────────────────
                # After the log: a missing line could not be made up for, one too many is cut off.
                if saving:
                    checkpoints.save(state, batches)
                clock, clocked, waited = time.monotonic(), step, batches.waited

        bar.update(step)
        if stop.signal is not None and step != checkpoints.newest and step > 0:
            _check_finite(state, checkpoints)
            with writing(folder):
                metrics.sync()
            checkpoints.save(state, batches)
        if stop.signal is not None:
            where = checkpoints.folder / str(checkpoints.newest)
            saved = "nothing to save yet" if checkpoints.newest is None else f"saved {where}"
            journal.say(
                f"stopped by {stop.signal.name} after step {step} of {experiment.steps}: {saved}; "
                "run the same command to continue"
            )

        # ─────────────────── export: the model as `zoo.load` takes it ───────────────────
        if step > 0 and (saved_about(folder / MODEL) or {}).get("step") != step:
            about = {"experiment": experiment.name, "seed": experiment.seed, "step": step}
            if starts:
                about["start"] = [start.source for start in starts]
            save_model(folder / MODEL, experiment.model, state.served, processor, about)
        return Result(folder, step, experiment.steps, record, state.served, model, stop.signal)


def _prepare(experiment: Experiment, data_dir: str | Path, bar: Bar) -> None:
    """Prepare the data set, and show how far it is."""
    begun = False

    def show(done: int, total: int) -> None:
        nonlocal begun
        if not begun:
            bar.phase("preparing data", total)
            begun = True
        if done % 64 == 0 or done == total:
            bar.update(done)

    experiment.data.prepare(data_dir, show)


def _check_vocabulary(model: nn.Module, boxed: Any, inputs: Batch, processor: Any) -> None:
    """Raise UsageError if the tokenizer has ids that the model does not know."""

    def logits(params: Any, batch: Batch) -> jax.Array:
        hidden = model.apply({"params": params}, batch).hidden
        return model.apply({"params": params}, hidden[:, :1], method="head")

    known = jax.eval_shape(logits, nn.unbox(boxed), inputs).shape[-1]
    if processor.vocab_size > known:
        raise UsageError(
            f"the tokenizer has {processor.vocab_size} tokens and the model knows {known}: lower "
            "processor.vocab_size or raise the vocab_size of the model"
        )


def _evaluate(
    experiment: Experiment, pipeline: Pipeline, eval_step: EvalStep, state: TrainState, bar: Bar
) -> dict[str, float]:
    """Means over the same validation examples each time, their names prefixed by `eval/`."""
    count = math.ceil(experiment.eval_examples / experiment.batch_size)
    if not count:
        return {}
    held_out: BatchIterator = iter(replace(pipeline, split="validation", seed=0, workers=0))
    sharding = batch_sharding(jax.tree.leaves(state.params)[0].sharding.mesh)
    sums: dict[str, list[float]] = {}
    bar.phase("evaluating", count)
    params = state.served
    with contextlib.closing(held_out):
        for done in range(count):
            means = eval_step(params, put_batch(next(held_out), sharding), state.key)
            for name, mean in means.items():
                total, weight = sums.setdefault(f"eval/{name}", [0.0, 0.0])
                sums[f"eval/{name}"] = [total + float(mean.total), weight + float(mean.weight)]
            bar.update(done + 1)
    return {name: total / max(weight, 1.0) for name, (total, weight) in sums.items()}


def _check_finite(state: TrainState, checkpoints: Checkpoints) -> None:
    """Raise ZooError if a step so far was not finite."""
    fault = int(state.fault)
    if fault < 0:
        return
    params = joined(state.params, state.frozen)
    norms = ", ".join(f"{name} {norm:.4g}" for name, norm in norms_by_part(params).items())
    kept = "there is no checkpoint yet"
    if checkpoints.newest is not None:
        kept = f"the last good checkpoint is {checkpoints.folder / str(checkpoints.newest)}"
    raise ZooError(
        f"step {fault + 1}: the loss, its gradient or the update is not finite; {kept}. Norms of "
        f"the parameters before that step: {norms}. A lower optim.lr, a longer optim.warmup or a "
        "smaller optim.clip_norm, in a new output folder, may help"
    )
