"""What is known about a system: its row in `systems.tsv` and the card that its code carries.

`systems.tsv` holds the facts of every system, built or not; a `Card` adds what only its code can
tell. Nothing here imports JAX, so that listing and looking up stay quick.
"""

import csv
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType

from zoo.models.core.errors import UsageError

SCOPES = ("full", "recipe", "tool", "none")
"""What the zoo takes in of a system: all of it, its training recipe, a tool made of it, nothing."""


@dataclass(frozen=True)
class System:
    """One row of `systems.tsv`.

    Attributes:
      slug: the name by which the zoo knows the system; also the name of its file.
      name: what its authors call it.
      title: title of the paper.
      kind: one kind, or several joined by "+" or "/", the leading one first.
      scope: one of `SCOPES`.
      paper: "arXiv:<id>", or empty where the number is not established.
      code: address of the official code, or empty where none is known.
    """

    slug: str
    name: str
    title: str
    kind: str
    scope: str
    paper: str
    code: str

    @property
    def kinds(self) -> tuple[str, ...]:
        """The parts of a compound kind, the leading one first."""
        return tuple(part.strip() for part in re.split(r"[+/]", self.kind))

    def is_kind(self, kind: str) -> bool:
        """Whether `kind` is one of the parts, alone or qualified ("moe" and "moe by modality")."""
        return kind == self.kind or any(f"{part} ".startswith(f"{kind} ") for part in self.kinds)


@cache
def systems() -> Mapping[str, System]:
    """Every system that the zoo is about, by slug, in alphabetical order."""
    text = files("zoo.models.core").joinpath("systems.tsv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    found = {row["slug"]: System(**row) for row in rows}
    return MappingProxyType(dict(sorted(found.items())))


def system(slug: str) -> System:
    """The row of `slug`. Raises `UsageError` with the nearest slugs if there is none."""
    if slug not in systems():
        raise UsageError(f"unknown system {slug!r}{nearest(slug, systems())}")
    return systems()[slug]


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message, "; did you mean a, b?", or nothing where nothing is near."""
    close = difflib.get_close_matches(name.lower(), list(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""


@dataclass(frozen=True)
class Card:
    """What the code of a system says about itself. Title, kind and scope come from `systems.tsv`.

    Attributes:
      slug: name of the system, one of `systems()`.
      paper: what the code follows, "arXiv:<id>" if it is there.
      code: address of the official code, or empty.
      differs: one sentence for each way in which this code differs from the official one.
      extends: slug of the one system that this one builds on and may import, if any.

    Raises:
      UsageError: if the slug, or the one it extends, is unknown, or if `paper` or `code` contradict
        the table.
    """

    slug: str
    paper: str = ""
    code: str = ""
    differs: tuple[str, ...] = ()
    extends: str | None = None

    def __post_init__(self) -> None:
        facts = system(self.slug)
        if self.extends is not None:
            system(self.extends)
        if isinstance(self.differs, str):
            raise UsageError(f"{self.slug}: differs is one string, want a tuple of sentences")
        for field in ("paper", "code"):
            mine, known = getattr(self, field), getattr(facts, field)
            if known and mine != known:
                raise UsageError(f"{self.slug}: {field} is {mine!r}, but {known!r} in systems.tsv")

    @classmethod
    def planned(cls, slug: str) -> "Card":
        """The card of a system that has no code yet."""
        facts = system(slug)
        return cls(slug, facts.paper, facts.code)

    @property
    def name(self) -> str:
        """What its authors call it."""
        return system(self.slug).name

    @property
    def title(self) -> str:
        """Title of the paper."""
        return system(self.slug).title

    @property
    def kind(self) -> str:
        """Kind, such as "connector" or "vlm + dense-head"."""
        return system(self.slug).kind

    @property
    def scope(self) -> str:
        """How much of the system the zoo takes in, one of `SCOPES`."""
        return system(self.slug).scope


def kinds() -> tuple[str, ...]:
    """Every kind that is a part of some system's kind, sorted."""
    return tuple(sorted({part for entry in systems().values() for part in entry.kinds}))
