"""`zoo new SLUG`: the files with which work on a planned system starts.

What it writes is honest about being empty: the system is not registered, so it stays `planned`, and
the parity stub raises.
"""

from pathlib import Path

from zoo.catalogue import HOMES, system_files
from zoo.models.core.card import System, nearest, system
from zoo.models.core.errors import UsageError

MODEL = '''"""{name}: TODO what it is, in two sentences.

Follows: {paper}.
"""

from dataclasses import dataclass

import flax.linen as nn

from zoo.models.core.card import Card
from zoo.models.core.config import ModelConfig
from zoo.models.core.types import Array, Batch

{card}

@dataclass(frozen=True)
class Config(ModelConfig):
    """TODO what this system adds or fixes, one line for each setting."""

    def build(self) -> nn.Module:
        """The module, composed of this file's and the shared parts."""
        raise NotImplementedError("{slug} is not written yet")

    def inputs(self, batch_size: int) -> Batch:
        """A batch of shapes."""
        raise NotImplementedError("{slug} is not written yet")


class {camel}(nn.Module):
    """TODO what it computes, in one sentence."""

    config: Config

    @nn.compact
    def __call__(self, batch: Batch) -> Array:
        """TODO shapes of what goes in and comes out."""
        raise NotImplementedError("{slug} is not written yet")


VARIANTS: dict[str, Config] = {{}}

# TODO the key table of the official checkpoint; then, once there are variants, the last line of the
# file registers them: `register(CARD, VARIANTS, table=table)` of zoo.models.core.registry.
'''

OTHER = '''"""{name}: TODO what it is, in two sentences.

Follows: {paper}.
"""

from zoo.models.core.card import Card

{card}'''

PARITY = '''"""Parity with the records in tests/goldens/{slug}/."""

import numpy as np

from tests.parity.case import Case


def run(case: Case) -> dict[str, np.ndarray]:
    """Build from `case.kwargs`, convert `case.params`, run `case.inputs`; return every output."""
    raise NotImplementedError("parity of {slug} is not written yet")
'''

PAGE = """# {name}

{title}

| | |
|---|---|
| slug | `{slug}` |
| kind | {kind} |
| scope | {scope} |
| paper | {paper} |
| official code | {code} |

## What it is

TODO

## How it is built here

TODO the shared parts it is made of, and its own.

## Where it differs from the official code

TODO

## What proves it

TODO the goldens and the figures of the paper that the tests hold.
"""


def scaffold(root: Path, slug: str, kind: str | None = None) -> list[Path]:
    """Write the code, the parity stub and the docs page of a system that has no code yet.

    Args:
      root: a source checkout.
      slug: a system of `systems.tsv`.
      kind: decides the folder instead of the first part of the system's kind; a key of `HOMES`.

    Returns:
      The files, the code first.

    Raises:
      UsageError: if the slug or kind is unknown, the system is a survey, or any of it is there.
    """
    facts = system(slug)
    if facts.scope == "none":
        raise UsageError(f"{slug} is a survey: there is nothing to build")
    home = root / _home(facts, kind)
    there = dict(system_files(root))
    files = {
        home / f"{slug}.py": _code(facts, home.relative_to(root).parts[0]),
        root / "tests" / "parity" / f"{slug}.py": PARITY.format(**vars(facts)),
        root / "docs" / "systems" / f"{slug}.md": _page(facts),
    }
    taken = [there[slug]] if slug in there else [path for path in files if path.exists()]
    if taken:
        raise UsageError(f"{slug} has been started: {taken[0].relative_to(root)} is there")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    package = home / "__init__.py"
    if not package.exists():
        title = f'"""{home.name.capitalize()}: one file for each system."""\n'
        package.write_text(title, encoding="utf-8")
    return list(files)


def _home(facts: System, kind: str | None) -> str:
    if kind is not None and kind not in HOMES:
        hint = nearest(kind, HOMES) or f"; want one of {', '.join(HOMES)}"
        raise UsageError(f"unknown kind {kind!r}{hint}")
    wanted = kind or facts.kinds[0]
    # A qualified kind ("vision-backbone wrapper") lives where the plain one does.
    return next(home for name, home in HOMES.items() if f"{wanted} ".startswith(f"{name} "))


def _code(facts: System, layer: str) -> str:
    lines = [f'    slug="{facts.slug}",']
    known = {"paper": facts.paper, "code": facts.code}
    lines += [f'    {key}="{value}",' for key, value in known.items() if value]
    lines += ["    differs=(),"]
    return (MODEL if layer == "models" else OTHER).format(
        name=facts.name[:1].upper() + facts.name[1:],
        paper=facts.paper or "TODO",
        slug=facts.slug,
        camel="".join(word.capitalize() for word in facts.slug.split("_")),
        card="\n".join(["CARD = Card(", *lines, ")", ""]),
    )


def _page(facts: System) -> str:
    number = facts.paper.removeprefix("arXiv:")
    link = f"[{facts.paper}](https://arxiv.org/abs/{number})"
    shown = {"paper": link if number else "not established", "code": facts.code or "none known"}
    return PAGE.format(**(vars(facts) | shown))
