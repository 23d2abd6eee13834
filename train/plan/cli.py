"""`zoo plan CONFIG --topology v5p:8x8x8`: what a step needs on devices that need not be there."""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import jax
import tyro

from zoo.models.core.errors import UsageError
from zoo.train.cli import find
from zoo.train.config import Experiment, Recipe
from zoo.train.plan.plan import Plan, plan
from zoo.train.plan.suggest import flags, suggest
from zoo.train.plan.topology import topology

_USAGE = """usage: zoo plan CONFIG --topology KIND:SHAPE [--mesh AXIS=N,...] [--stage NAME]
               [--json] [--dotted.field VALUE ...]

CONFIG and the dotted fields are those of `zoo train`; of a recipe one stage is planned, the last
one by default, whose fields are meant. Topologies are slices of TPUs, such as
v5e:16x16, v6e:16x16, v5p:8x8x8 and v4:4x4x4, for which `pip install libtpu` brings the compiler, or
CPU devices, such as cpu:8. `--mesh fsdp=64,tensor=4` stands for --mesh.fsdp 64 --mesh.tensor 4."""


@dataclass(frozen=True)
class Command:
    """Compile the step of an experiment for devices that need not be there, and tell what it needs.

    Exit status: 0 if it fits, 1 if it does not.

    Attributes:
      experiment: the configuration.
      topology: the devices, such as v5p:8x8x8 or cpu:8.
      stage: of a recipe, the name of the one that is planned; by default the last.
      json: print one JSON object, and nothing else, to standard output.
    """

    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    topology: str
    stage: str | None = None
    json: bool = False


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns 0 if the step fits and 1 if not.

    Raises:
      UsageError: as `zoo.train.plan.plan`.
      SystemExit: after `--help`, and with status 2 for flags that are unknown or do not parse.
    """
    match list(argv):
        case [] | ["-h" | "--help", *_]:
            print(_USAGE, file=sys.stdout if argv else sys.stderr)
            return 0 if argv else 2
        case [name, *rest] if not name.startswith("-"):
            return _plan(name, rest)
    raise UsageError(f"{argv[0]} comes where a configuration is expected\n{_USAGE}")


def _plan(name: str, rest: Sequence[str]) -> int:
    # First of all, because the other flags are about the fields of the stage.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--stage")
    stage = early.parse_known_args(rest)[0].stage
    default = Command(stage_of(find(name), stage), topology=tyro.MISSING)
    try:
        command = tyro.cli(
            Command,
            default=default,
            args=_spread(rest),
            prog=f"zoo plan {name}",
            config=(tyro.conf.AvoidSubcommands,),  # as `zoo train` has it
        )
    except ValueError as error:  # from a configuration that refuses its values
        raise UsageError(str(error)) from error
    # Whatever devices this machine has are left alone.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    experiment, where = command.experiment, topology(command.topology)
    found = plan(experiment, where)
    print(json.dumps(found.as_json(), indent=2) if command.json else _table(found), flush=True)
    if found.fits:
        return 0
    better = suggest(experiment, where, _note)
    if better is None:
        _note("nothing that was tried fits: want more or larger chips, or a smaller model")
    else:
        _note(f"this fits: {flags(experiment, better[0])}\n{_table(better[1])}")
    return 1


def stage_of(config: Experiment | Recipe, name: str | None) -> Experiment:
    """The stage of a recipe that is called so, the last one for None; or the one experiment.

    Raises:
      UsageError: there is no such stage.
    """
    if isinstance(config, Experiment):
        if name is not None:
            raise UsageError(f"--stage {name}: {config.name} is one experiment, and has no stages")
        return config
    stages = {stage.name: stage for stage in config.stages}
    if name is not None and name not in stages:
        raise UsageError(f"--stage {name}: {config.name} has the stages {', '.join(stages)}")
    return config.stages[-1] if name is None else stages[name]


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _spread(args: Sequence[str]) -> list[str]:
    """`--mesh fsdp=64,tensor=4` as the flags of the fields."""
    found: list[str] = []
    rest = iter(args)
    for arg in rest:
        flag, given, value = arg.partition("=")
        if flag != "--mesh":
            found.append(arg)
            continue
        value = value if given else next(rest, "")
        for size in value.split(","):
            axis, equals, number = size.partition("=")
            if not (axis and equals and number):
                raise UsageError(f"--mesh {value}: want axes and sizes, such as fsdp=64,tensor=4")
            found += [f"--mesh.{axis}", number]
    return found


def _table(found: Plan) -> str:
    """The lines that `zoo plan` prints for people."""
    sizes = " ".join(f"{axis}={size}" for axis, size in found.mesh.items() if size > 1)
    hbm = found.hbm_bytes
    lines = [
        f"{found.topology}, mesh {sizes or 'of one device'}, batch {found.batch_size}: "
        f"{'fits' if found.fits else 'DOES NOT FIT'}",
        "",
        "memory of each device",
        *(_row(name, f"{hbm[name] / 2**30:.2f} GiB") for name in hbm),
        "",
        _row("FLOPs of a step", f"{found.flops / 1e12:,.1f} T"),
        "",
        "sent by each device in a step",
        *(
            _row(f"{kind} over {' x '.join(axes)}", f"{number / 2**30:.3f} GiB")
            for (kind, axes), number in sorted(found.traffic.items())
        ),
    ]
    if found.bounds:
        lines += ["", "a step takes at least", *_seconds(found.bounds)]
        lines += [_row("model FLOPs utilisation at most", f"{found.mfu_bound:.1%}")]
    return "\n".join(lines)


def _seconds(bounds: Mapping[str, float]) -> list[str]:
    return [_row(name, f"{seconds:.4f} s") for name, seconds in bounds.items()]


def _row(name: str, value: str) -> str:
    return f"  {name:<36}{value:>16}"
