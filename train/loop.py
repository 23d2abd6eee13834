"""The training loop. Read `train` from top to bottom:

config → mesh → data → model and shardings → restore → step → log → eval → save → export.
"""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals
from typing import Any

import flax.linen as nn
import jax

from zoo.cache import cache_folder, keep_compiled_programs
from zoo.models.core.errors import UsageError, ZooError
from zoo.saving import MODEL, save_model, saved_about
from zoo.train.adapters import export_adapter
from zoo.train.checkpoint import Checkpoints
from zoo.train.config import Experiment, Start
from zoo.train.data.feed import Feed
from zoo.train.data.pipeline import Pipeline, check_bad
from zoo.train.evaluation import evaluate
from zoo.train.folder import CHECKPOINTS, LOG, check_room, claim, processor_of, writing
from zoo.train.host import keep_freed_memory
from zoo.train.launch import (
    first,
    gathered,
    is_first,
    locked_together,
    lost_processes,
    made_once,
    on_the_host,
)
from zoo.train.mesh import (
    barely_sharded,
    batch_sharding,
    batch_share,
    check_batch_size,
    placed,
    put_batch,
)
from zoo.train.meter import Meter
from zoo.train.metrics import Journal, MetricsWriter, NoMetrics
from zoo.train.parts import joined
from zoo.train.progress import Bar
from zoo.train.setup import Setup
from zoo.train.start import starting_tokenizer, starting_variables
from zoo.train.state import HEALTHY, TrainState, describe, norms_by_part
from zoo.train.step import make_eval_step
from zoo.train.stop import SharedStop
from zoo.train.watch import Profile, sinks

OnEval = Callable[[nn.Module, Any, int], Mapping[str, float]]

_STEPS_AHEAD = 2
"""How many steps the host may prepare before their results are there."""

BATCHES_AHEAD = 2
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
      stats: running statistics of the model, {} where it keeps none.
    """

    folder: Path
    step: int
    steps: int
    metrics: Mapping[str, float]
    params: Any
    model: nn.Module
    stopped: Signals | None
    stats: Any = field(default_factory=dict)

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
      ZooError: the folder cannot be used, steps are at fault, too much data is bad, the disk is
        full.
      UsageError: the experiment cannot be run like this, or the folder belongs to another one.
    """
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(Bar(quiet=not is_first())) if progress is None else progress
        stack.enter_context(lost_processes())

        # ──────────────────────────────── config ────────────────────────────────
        if jax.default_backend() == "cpu":
            keep_freed_memory()
        folder = stack.enter_context(locked_together(out))
        first(lambda: claim(folder, experiment))
        starts = experiment.start or ((Start(str(before)),) if before is not None else ())
        if experiment.fresh and not starts:
            raise UsageError(
                f"fresh is {experiment.fresh} where there is no start: all parameters are drawn"
            )
        journal = Journal(folder / LOG if is_first() else Path(os.devnull), bar.say)
        stack.callback(journal.close)
        setup = Setup.of(experiment)
        model, boxed = setup.model, setup.boxed
        kept = experiment.keep + experiment.best.number
        first(lambda: check_room(folder, setup.state_bytes(), kept, setup.fixed_bytes()))

        # ───────────────────────────────── mesh ─────────────────────────────────
        keep_compiled_programs()
        mesh = stack.enter_context(placed(experiment.mesh))
        check_batch_size(experiment.batch_size, mesh, experiment.accumulate)
        sharding = batch_sharding(mesh)
        share = batch_share(sharding, experiment.batch_size)

        # ───────────────────────────────── data ─────────────────────────────────
        data_dir = cache_folder() / "data" if data_dir is None else data_dir
        _prepare(experiment, data_dir, bar)
        if experiment.eval_examples:
            experiment.data.source("validation", data_dir)  # fails now if there is none
        processor = made_once(lambda: processor_of(folder, experiment, starting_tokenizer(starts)))
        setup.check_vocabulary(processor)
        pipeline = Pipeline(
            experiment.data,
            processor,
            experiment.batch_size,
            experiment.seed,
            data_dir,
            process_index=share.index,
            process_count=share.count,
            rows=share.rows,
            max_bad_share=experiment.max_bad_share,
            pack=experiment.pack,
            workers=experiment.workers,
        )
        # Devices of their own work while the next batches come; a CPU has its hands full.
        ahead = 0 if jax.default_backend() == "cpu" else BATCHES_AHEAD
        batches = Feed(iter(pipeline), lambda batch: put_batch(batch, sharding), ahead)
        stack.callback(batches.close)
        for problem in batches.faults:
            journal.say(f"data: {problem}")

        # ────────────────────────── model and shardings ─────────────────────────
        abstract = setup.state(mesh)
        for line in describe(abstract):
            journal.note(line)
        if warning := barely_sharded((abstract.params, abstract.frozen)):
            journal.say(warning)
        train_step = setup.train_step(abstract)
        eval_step = make_eval_step(model, experiment.objective)

        # ──────────────── restore: what this run has done, else start, else init ────────────
        checkpoints = Checkpoints(
            folder / CHECKPOINTS, experiment.keep, journal.say, experiment.best
        )
        stack.callback(checkpoints.close)
        if checkpoints.newest is None:
            step = 0
            begun: tuple[Any, ...] = ()
            if starts:
                begun = starting_variables(
                    starts,
                    experiment.fresh,
                    experiment.model,
                    boxed,
                    abstract.stats,
                    mesh,
                    experiment.seed,
                    journal.say,
                )
            state = setup.begin(abstract, *begun)
            if experiment.faults.do == "rewind":
                checkpoints.save(state, batches)  # what there is to go back to
        else:
            step = checkpoints.newest
            state = checkpoints.restore(abstract, batches)
            finished = "complete" if step >= experiment.steps else "continuing"
            journal.say(f"{folder}: step {step} of {experiment.steps} restored, {finished}")
        with writing(folder):
            metrics = NoMetrics()
            if is_first():
                metrics = MetricsWriter(folder, step, sinks(experiment, folder))
        stack.callback(metrics.close)
        profile = Profile(folder, experiment.watch.profile_steps)
        stack.callback(profile.close)
        meter = Meter.of(setup, mesh, lambda: batches.waited)

        record: dict[str, float] = {}
        in_flight: deque[Mapping[str, jax.Array]] = deque()
        variants: set[Any] = set()
        reported_bad, fault = batches.bad.bad, HEALTHY
        skipped, rewound, left_out = 0.0, 0, 0
        meter.reset()
        bar.phase("training", experiment.steps, step)
        stop = stack.enter_context(SharedStop(mesh, _STEPS_AHEAD))
        while step < experiment.steps and stop.agreed is None:
            # ─────────────────────────────── step ───────────────────────────────
            variant = experiment.objective.variant(experiment.seed, step)
            if variant not in variants:
                variants.add(variant)
                bar.update(step, compiling="" if variant is None else f"for {variant}")
            profile.before(step + 1)
            batch = next(batches)
            with jax.transfer_guard("disallow"):
                state, values = train_step(state, batch, variant)
            step += 1
            stop.step()
            meter.step(variant)
            profile.after(step, values)
            checkpoints.poll()

            last = step == experiment.steps
            evaluating = last or bool(experiment.eval_every and step % experiment.eval_every == 0)
            saving = last or step % experiment.save_every == 0
            logging = evaluating or saving or step % experiment.log_every == 0
            in_flight.append(values)
            while len(in_flight) > (0 if logging else _STEPS_AHEAD):
                reached = in_flight.popleft()
                loss, fault = float(reached["loss"]), int(reached["fault"])
                # It was waited for them, so that batches do not pile up.
                bar.update(step, loss=f"{loss:.3f}")

            # ────────── faults: see `Faults`; a step that is skipped is none here ──────────
            if fault != HEALTHY:
                rewound += 1
                if experiment.faults.do != "rewind" or rewound > experiment.faults.most:
                    raise _at_fault(fault, state, checkpoints)
                checkpoints.wait()
                step = checkpoints.newest or 0
                left_out += fault + 1 - step
                journal.say(
                    f"step {fault + 1} is at fault: going back to step {step} and leaving out the "
                    f"{left_out} batches that came next"
                )
                del state  # its memory is needed
                state, fault = checkpoints.restore(abstract, batches), HEALTHY
                for _ in range(left_out):
                    next(batches)
                metrics.go_back(step)
                in_flight.clear()
                meter.reset()
                bar.phase("training", experiment.steps, step)
                continue

            if logging:
                # ───────────────────────────── log ──────────────────────────────
                record = {name: float(value) for name, value in values.items()}
                del record["fault"]
                if record["skipped"] > skipped:
                    skipped = record["skipped"]
                    journal.say(f"steps at fault that were left out so far: {skipped:.0f}")
                if not skipped:
                    del record["skipped"]
                record |= meter.read()
                bad = check_bad(gathered(batches.get_state()), experiment.max_bad_share)
                if bad.bad > reported_bad:
                    reported_bad = bad.bad
                    record["bad_records"] = reported_bad
                    journal.say(f"left out so far: {bad}")

                # ───────────────────────────── eval ─────────────────────────────
                if evaluating:
                    record |= evaluate(experiment, pipeline, eval_step, state, bar)
                    record |= on_eval(model, state.variables["params"], step) if on_eval else {}
                    bar.phase("training", experiment.steps, step)
                with writing(folder):
                    metrics.write(step, record)
                    if saving:
                        metrics.sync()

                # ───────────────────────────── save ─────────────────────────────
                # After the log: a missing line could not be made up for, one too many is cut off.
                if saving:
                    checkpoints.save(state, batches, record)
                    left_out = 0
                meter.reset()

        bar.update(step)
        checkpoints.wait()
        if stop.agreed is not None and step != checkpoints.newest and step > 0:
            if (fault := int(state.fault)) != HEALTHY:
                raise _at_fault(fault, state, checkpoints)
            with writing(folder):
                metrics.sync()
            checkpoints.save(state, batches)
            checkpoints.wait()
        if stop.agreed is not None:
            where = checkpoints.folder / str(checkpoints.newest)
            saved = "nothing to save yet" if checkpoints.newest is None else f"saved {where}"
            journal.say(
                f"stopped by {stop.agreed.name} after step {step} of {experiment.steps}: {saved}; "
                "run the same command to continue"
            )

        # ─────────────────── export: the model as `zoo.load` takes it ───────────────────
        merged = state.merged
        exported = first(lambda: (saved_about(folder / MODEL) or {}).get("step"))
        if step > 0 and exported != step:
            about = {"experiment": experiment.name, "seed": experiment.seed, "step": step}
            if starts:
                about["start"] = [start.source for start in starts]
            params, stats = on_the_host((merged, state.stats))
            adapted = None
            if experiment.lora is not None:
                adapted = on_the_host(state.variables["params"])

            def export() -> None:
                if adapted is not None:
                    export_adapter(folder, experiment, adapted, starts, journal.say)
                save_model(folder / MODEL, experiment.model, params, processor, about, stats)

            first(export)
        return Result(
            folder, step, experiment.steps, record, merged, model, stop.agreed, state.stats
        )


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


def _at_fault(fault: int, state: TrainState, checkpoints: Checkpoints) -> ZooError:
    """What to raise for a step at fault."""
    params = joined(state.params, state.frozen)
    norms = ", ".join(f"{name} {norm:.4g}" for name, norm in norms_by_part(params).items())
    checkpoints.wait()
    kept = "there is no checkpoint yet"
    if checkpoints.newest is not None:
        kept = f"the last good checkpoint is {checkpoints.folder / str(checkpoints.newest)}"
    return ZooError(
        f"step {fault + 1}: the loss, its gradient or the update is not finite, or the loss jumps; "
        f"{kept}. Norms of the parameters before that step: {norms}. A lower optim.lr, a longer "
        "optim.warmup or a smaller optim.clip_norm, in a new output folder, may help; with "
        "faults.do, such steps are left out"
    )
