"""`zoo train CONFIG`: run an experiment of `zoo.configs` or of a file, its fields overridden."""

import dataclasses
import difflib
import importlib
import importlib.util
import json
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated

import tyro

from zoo.models.core.codec import encode
from zoo.models.core.errors import UsageError
from zoo.train.config import Experiment, Recipe, Start

_USAGE = """usage: zoo train CONFIG [--out DIR] [--from SOURCE] [--data-dir DIR] [--json]
                [--coordinator HOST:PORT --num-processes N --process-id I]
                [--dotted.field VALUE ...]
       zoo train --list [--json]

CONFIG is the name of a configuration of the package, or a file of yours such as mine.py.
`zoo train CONFIG --help` shows the fields of a configuration. `--list` shows all configurations."""


@dataclasses.dataclass(frozen=True)
class Command:
    """Train by a configuration. The same command continues a run that was interrupted.

    On several hosts it is started on each of them; on TPU slices and under Slurm, Open MPI and
    Kubernetes jobs the processes find each other by themselves.

    Attributes:
      config: the configuration.
      out: folder of the run; `runs/<name of the configuration>` by default.
      source: folder of a run or a checkpoint, or the name of one on the hub, whose parameters
        training starts with; in place of what the configuration says.
      data_dir: where data sets are prepared; in the user's cache by default.
      json: print the outcome as one JSON object, and nothing else, to standard output.
      coordinator: address and free port of the first of several processes, as the others reach it.
      num_processes: how many there are.
      process_id: which of them this is, from 0.
    """

    config: Annotated[Experiment, tyro.conf.arg(name="")]
    out: Path | None = None
    source: Annotated[str | None, tyro.conf.arg(name="from")] = None
    data_dir: Path | None = None
    json: bool = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


@dataclasses.dataclass(frozen=True)
class RecipeCommand(Command):
    """Train stage after stage. The same command continues what was interrupted."""

    config: Annotated[Recipe, tyro.conf.arg(name="")]


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns 0, or 128 + n if signal n ended the run early.

    Raises:
      UsageError, ZooError: as `zoo.train.loop.train`.
      SystemExit: after `--help`, and with status 2 for flags that are unknown or do not parse.
    """
    match list(argv):
        case [] | ["-h" | "--help", *_]:
            print(_USAGE, file=sys.stdout if argv else sys.stderr)
            return 0 if argv else 2
        case ["--list", *rest] if rest in ([], ["--json"]):
            _list(as_json=bool(rest))
            return 0
        case [name, *rest] if not name.startswith("-"):
            return _train(name, rest)
    raise UsageError(f"{argv[0]} comes where a configuration is expected\n{_USAGE}")


def names() -> list[str]:
    """All configurations of the package, in alphabetical order."""
    # Reached by name: experiments stand on training, not the other way round.
    found = pkgutil.iter_modules(importlib.import_module("zoo.configs").__path__)
    return sorted(module.name for module in found if not module.name.startswith("_"))


def find(name: str) -> Experiment | Recipe:
    """The configuration that is called `name`, or that the file `name` holds if it ends in `.py`.

    Raises:
      UsageError: there is none; the message has the nearest names.
    """
    if name.endswith(".py"):
        module = _load(Path(name))
    elif name in names():
        module = importlib.import_module(f"zoo.configs.{name}")
    else:
        near = difflib.get_close_matches(name, names(), 3, 0.4) or names()
        raise UsageError(f"there is no configuration {name!r}; nearest: {', '.join(near)}")
    config = getattr(module, "config", None)
    found = config() if callable(config) else None
    if not isinstance(found, Experiment | Recipe):
        raise UsageError(f"{name} has no function config() that returns an Experiment or a Recipe")
    return found


def _load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise UsageError(f"there is no configuration file {file}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _train(name: str, flags: Sequence[str]) -> int:
    found = find(name)
    default = RecipeCommand(found) if isinstance(found, Recipe) else Command(found)
    try:
        command = tyro.cli(
            type(default),
            default=default,
            args=list(flags),
            prog=f"zoo train {name}",
            config=(tyro.conf.AvoidSubcommands,),  # what is optional is as the configuration says
        )
    except ValueError as error:  # from a configuration that refuses its values
        raise UsageError(str(error)) from error
    config = command.config
    if command.source is not None:
        config = _started(config, command.source)
    settings = encode(config)

    from zoo.train.launch import is_first, join, one_of_several

    join(command.coordinator, command.num_processes, command.process_id)
    if not command.json and is_first():
        print(json.dumps(settings, indent=2), flush=True)

    from zoo.train.loop import train  # after the flags: it takes a second to import
    from zoo.train.recipe import train_recipe

    out = command.out or Path("runs") / Path(name).stem
    with one_of_several():
        if isinstance(config, Recipe):
            result = train_recipe(config, out, data_dir=command.data_dir)
        else:
            result = train(config, out, data_dir=command.data_dir)
    status = 128 + result.stopped if result.stopped else 0
    if not is_first():
        return status
    outcome = {
        "out": str(out),
        "run": str(result.folder),
        "step": result.step,
        "complete": result.complete,
        "metrics": dict(result.metrics),
        "stopped": result.stopped.name if result.stopped else None,
    }
    if command.json:
        print(json.dumps({**outcome, "config": settings}, indent=2))
    else:
        shown = "  ".join(f"{key} {value:.4g}" for key, value in result.metrics.items())
        print(f"step {result.step} of {result.steps}  {shown}\n{result.folder}")
    return status


def _started(config: Experiment | Recipe, source: str) -> Experiment | Recipe:
    """The configuration, begun with the parameters of `source`."""
    if isinstance(config, Recipe):
        first, *others = config.stages
        return dataclasses.replace(config, stages=(_started(first, source), *others))
    return dataclasses.replace(config, start=(Start(source),))


def _list(*, as_json: bool) -> None:
    about = []
    for name in names():
        module = importlib.import_module(f"zoo.configs.{name}")
        about.append({"name": name, "about": (module.__doc__ or "").strip().split("\n")[0]})
    if as_json:
        print(json.dumps(about, indent=2))
    else:
        print("\n".join(f"{item['name']:<24} {item['about']}" for item in about))
