"""Which systems have code, under which names, and how a name becomes a configuration or a model.

Every system's file ends with `register(CARD, VARIANTS, ...)`. Nothing scans folders at run time:
`index.json`, which `python -m zoo.catalogue` writes, says in which module a system lives, so that
one name imports one module.
"""

import dataclasses
import importlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from zoo.models.core.card import Card, kinds, nearest, system, systems
from zoo.models.core.config import ModelConfig
from zoo.models.core.errors import UsageError

if TYPE_CHECKING:
    import flax.linen as nn

    from zoo.models.core.hf import Fields
    from zoo.models.core.keytable import Table

STATUSES = ("planned", "shapes", "parity", "trained")
"""From no code at all upwards; a system holds its status and every one before it."""


@dataclass(frozen=True)
class Entry:
    """A system that has code.

    Attributes:
      card: what it says about itself.
      variants: its configurations by name; the first one is the default.
      table: from a configuration to the key table of the official checkpoint, where there is one.
    """

    card: Card
    variants: Mapping[str, ModelConfig]
    table: "Callable[[Any], Table] | None" = None


@dataclass(frozen=True)
class Base:
    """An architecture that systems start from, as the Hugging Face hub knows it.

    Attributes:
      slug: its name here, and of its file in `zoo/models/base/`.
      title: what it is, in a few words.
      paper: "arXiv:<id>", or empty.
      variants: published sizes by name; the first one is the default.
      table: from a configuration to the key table of the hub's checkpoints; `zoo export` writes it.
      hf: {`model_type`: reader of its `config.json`}.
      renames: (regular expression, replacement) pairs that turn keys of other layouts of the same
        checkpoint into those of `table`; every pair is applied to every key, in order.
      fit: (configuration, keys of a checkpoint) -> the configuration with the optional parts that
        the checkpoint has and its `config.json` does not tell of.
    """

    slug: str
    title: str
    paper: str
    variants: Mapping[str, ModelConfig]
    table: "Callable[[Any], Table]"
    hf: "Mapping[str, Callable[[Fields], ModelConfig]]"
    renames: tuple[tuple[str, str], ...] = ()
    fit: "Callable[[Any, Collection[str]], Any] | None" = None


@dataclass(frozen=True)
class Listing:
    """One line of the catalogue.

    Attributes:
      slug, title, kind, scope: see `zoo.models.core.card.System`.
      status: one of `STATUSES`.
      variants: names that `create` takes besides the slug; empty while planned.
    """

    slug: str
    title: str
    kind: str
    scope: str
    status: str
    variants: tuple[str, ...]


_entries: dict[str, Entry] = {}
_bases: dict[str, Base] = {}


def register(
    card: Card,
    variants: Mapping[str, ModelConfig],
    *,
    table: "Callable[[Any], Table] | None" = None,
) -> None:
    """Make a system known under its slug and its variants under their names.

    Args:
      card: its card.
      variants: configurations by name, in lower case with the size in the name; what differs by
        weights, resolution or training stage only is told apart by a tag after a dot
        ("mqt_llava_7b.official"). The first one is what `create(slug)` builds.
      table: from a configuration to the key table of the official checkpoint.

    Raises:
      UsageError: if there is no variant, or if the slug or a variant's name is taken.
    """
    if not variants:
        raise UsageError(f"register({card.slug}): want at least one variant")
    if card.slug in _entries:
        raise UsageError(f"register({card.slug}): this system is registered already")
    for name in variants:
        owner = next((slug for slug, entry in _entries.items() if name in entry.variants), None)
        if owner is None and name in systems() and name != card.slug:
            owner = name
        if owner is not None:
            raise UsageError(f"register({card.slug}): the name {name!r} belongs to {owner}")
    _entries[card.slug] = Entry(card, MappingProxyType(dict(variants)), table)


def register_base(base: Base) -> None:
    """Make an architecture known under its slug, its variants and its model types.

    Raises:
      UsageError: if a name or a model type is taken.
    """
    for name in (base.slug, *base.variants):
        owner = next((b.slug for b in _bases.values() if name in (b.slug, *b.variants)), None)
        if owner is None and name in systems():
            owner = name
        if owner is not None:
            raise UsageError(f"register_base({base.slug}): the name {name!r} belongs to {owner}")
    for kind in base.hf:
        if owner := next((b.slug for b in _bases.values() if kind in b.hf), None):
            raise UsageError(f"register_base({base.slug}): {kind!r} is read by {owner}")
    _bases[base.slug] = base


@cache
def base_index() -> Mapping[str, Mapping[str, Any]]:
    """The generated index of bases: {slug: {"module", "variants", "model_types"}}."""
    text = files("zoo.models.core").joinpath("bases.json").read_text(encoding="utf-8")
    return MappingProxyType(json.loads(text))


def bases() -> Mapping[str, Base]:
    """The bases whose files have been imported so far, by slug."""
    return MappingProxyType(_bases)


def base(name: str) -> Base:
    """The base of a slug or variant name, its file imported if need be.

    Raises:
      UsageError: if no base is called so, with the nearest names.
    """
    rows = {slug: (slug, *row["variants"]) for slug, row in base_index().items()}
    rows |= {slug: (slug, *entry.variants) for slug, entry in _bases.items()}
    slug = next((slug for slug, names in rows.items() if name in names), None)
    if slug is None:
        known = [name for names in rows.values() for name in names]
        raise UsageError(f"no base model is called {name!r}{nearest(name, known)}")
    if slug not in _bases:
        importlib.import_module(base_index()[slug]["module"])
    return _bases[slug]


def base_of(model_type: str) -> Base:
    """The base that reads configurations of `model_type`, its file imported if need be.

    Raises:
      UsageError: if there is none, with the nearest model types.
    """
    for slug, entry in _bases.items():
        if model_type in entry.hf:
            return _bases[slug]
    for slug, row in base_index().items():
        if model_type in row["model_types"]:
            return base(slug)
    known = sorted(kind for row in base_index().values() for kind in row["model_types"])
    raise UsageError(
        f"model_type {model_type!r} is not one that this zoo reads"
        f"{nearest(model_type, known) or '; it reads ' + ', '.join(known)}"
    )


def read_hf(fields: "Fields") -> ModelConfig:
    """The configuration that a Hugging Face `config.json` describes.

    Raises:
      UsageError: an unknown `model_type`, or a field that may change the numbers and is not
        understood.
    """
    return base_of(fields.model_type).hf[fields.model_type](fields)


@cache
def index() -> Mapping[str, Mapping[str, Any]]:
    """The generated index of systems that have code: {slug: {"module", "variants", "status"}}."""
    text = files("zoo.models.core").joinpath("index.json").read_text(encoding="utf-8")
    return MappingProxyType(json.loads(text))


def registered() -> Mapping[str, Entry]:
    """The systems whose files have been imported so far, by slug."""
    return MappingProxyType(_entries)


def resolve(name: str) -> tuple[str, str]:
    """The (slug, variant) that `name` stands for: a slug stands for its first variant.

    Raises:
      UsageError: if nothing is called so (with the nearest names), or the system has no code yet.
    """
    variants = {slug: tuple(row["variants"]) for slug, row in index().items()}
    variants |= {slug: tuple(entry.variants) for slug, entry in _entries.items()}
    if name in variants:
        return name, variants[name][0]
    for slug, names in variants.items():
        if name in names:
            return slug, name
    if name in systems():
        survey = systems()[name].scope == "none"
        why = "is a survey: there is nothing to build" if survey else "has no code yet"
        raise UsageError(f"{name} {why}; built so far: {', '.join(sorted(variants)) or 'nothing'}")
    known = [*systems(), *(variant for names in variants.values() for variant in names)]
    known += [variant for slug, row in base_index().items() for variant in (slug, *row["variants"])]
    raise UsageError(f"unknown name {name!r}{nearest(name, known)}")


def entry(name: str) -> Entry:
    """The system of a slug or variant name, its file imported if need be.

    Raises:
      UsageError: see `resolve`.
    """
    slug, _ = resolve(name)
    if slug not in _entries:
        importlib.import_module(index()[slug]["module"])
    return _entries[slug]


def config(name: str, **overrides: Any) -> ModelConfig:
    """The configuration of a slug (its first variant) or of a variant.

    Args:
      name: "mqt", "mqt_llava_7b", ...
      **overrides: new values for fields anywhere in the nested configuration. A field's name is
        enough where only one field on the shallowest level that has it is called so; otherwise
        give the dotted path: `config("mqt", **{"connector.num_queries": 64})`.

    Raises:
      UsageError: for an unknown name or field (with the nearest ones), an ambiguous field (with its
        paths), or a value of the wrong type.
    """
    variant, chosen = _variant(name)
    return override(chosen, overrides, variant)


def override(config: ModelConfig, overrides: Mapping[str, Any], name: str) -> ModelConfig:
    """The configuration with other values for some fields, which are found as `config` finds them.

    Args:
      config: to start from.
      overrides: {field or dotted path: value}.
      name: of the configuration, for error messages.

    Raises:
      UsageError: as `config`.
    """
    for field, value in overrides.items():
        config = _replace(config, _find(config, field, name).split("."), value, name)
    return config


def create(name: str, **overrides: Any) -> "nn.Module":
    """The Flax module of a slug or variant; arguments and errors are those of `config`.

    A value that the configuration itself refuses raises its `ValueError`.
    """
    return config(name, **overrides).build()


def card(name: str) -> Card:
    """The card of any system, by slug or by the name of a variant.

    Raises:
      UsageError: if nothing is called so, with the nearest names.
    """
    if name in systems() and name not in index() and name not in _entries:
        return Card.planned(name)
    return entry(name).card


def listing(slug: str) -> Listing:
    """The catalogue line of one system, read from the index without importing its code."""
    facts, row = system(slug), index().get(slug, {})
    status, variants = row.get("status", "planned"), tuple(row.get("variants", ()))
    return Listing(slug, facts.title, facts.kind, facts.scope, status, variants)


def listings(
    pattern: str | None = None, *, kind: str | None = None, status: str | None = None
) -> list[Listing]:
    """The catalogue, or the part of it that meets every condition given, sorted by slug.

    Args:
      pattern: a shell pattern ("mqt*") for slugs and variants, or part of a slug, variant, name or
        title; upper and lower case are the same.
      kind: a kind, also as a part of a compound one ("vlm" finds "vlm + dense-head").
      status: exactly this one of `STATUSES`.

    Raises:
      UsageError: for an unknown kind or status.
    """
    if kind is not None and not any(entry.is_kind(kind) for entry in systems().values()):
        hint = nearest(kind, kinds()) or f"; want one of {', '.join(kinds())}"
        raise UsageError(f"unknown kind {kind!r}{hint}")
    if status is not None and status not in STATUSES:
        raise UsageError(f"unknown status {status!r}; want one of {', '.join(STATUSES)}")
    lines = [listing(slug) for slug, entry in systems().items() if not kind or entry.is_kind(kind)]
    return [
        line
        for line in lines
        if (not pattern or _matches(line, pattern)) and (not status or line.status == status)
    ]


def list_models(
    pattern: str | None = None, *, kind: str | None = None, status: str | None = None
) -> list[str]:
    """Slugs of the systems, built or planned, that meet the conditions of `listings`."""
    return [line.slug for line in listings(pattern, kind=kind, status=status)]


def _variant(name: str) -> tuple[str, ModelConfig]:
    """The variant that a name of a system or of a base stands for, and its configuration."""
    if any(name in (slug, *row["variants"]) for slug, row in base_index().items()):
        variants = base(name).variants
        variant = name if name in variants else next(iter(variants))
        return variant, variants[variant]
    _, variant = resolve(name)
    return variant, entry(name).variants[variant]


def _matches(line: Listing, pattern: str) -> bool:
    names, pattern = [name.lower() for name in (line.slug, *line.variants)], pattern.lower()
    if any(sign in pattern for sign in "*?["):
        return any(fnmatchcase(name, pattern) for name in names)
    texts = (*names, system(line.slug).name.lower(), line.title.lower())
    return any(pattern in text for text in texts)


def _find(config: Any, wanted: str, variant: str) -> str:
    """The dotted path of the field that `wanted` means."""
    paths = list(_paths(config))
    if wanted in paths:
        return wanted
    tails = [path for path in paths if path.endswith(f".{wanted}")]
    depth = min((path.count(".") for path in tails), default=0)
    found = [path for path in tails if path.count(".") == depth]
    if len(found) > 1:
        raise UsageError(f"{variant}: {wanted!r} is ambiguous; say which: {', '.join(found)}")
    if not found:
        known = {*paths, *(path.rpartition(".")[2] for path in paths)}
        raise UsageError(f"{variant} has no setting {wanted!r}{nearest(wanted, sorted(known))}")
    return found[0]


def _paths(config: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        yield prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from _paths(value, f"{prefix}{field.name}.")


def _replace(config: Any, path: list[str], value: Any, variant: str) -> Any:
    name, *rest = path
    old = getattr(config, name)
    new = _replace(old, rest, value, variant) if rest else _checked(name, old, value, variant)
    return dataclasses.replace(config, **{name: new})


def _checked(name: str, old: Any, value: Any, variant: str) -> Any:
    """`value`, if it can stand where `old` stood."""
    if old is None or value is None:
        return value
    if dataclasses.is_dataclass(old):
        configured = dataclasses.is_dataclass(value) and not isinstance(value, type)
        allowed, want = configured, "a configuration"
    elif isinstance(old, bool) or isinstance(value, bool):
        allowed, want = isinstance(value, bool) and isinstance(old, bool), type(old).__name__
    elif isinstance(old, float):
        allowed, want = isinstance(value, int | float), "a number"
    elif isinstance(old, int | str | tuple):
        allowed, want = isinstance(value, type(old)), type(old).__name__
    else:
        allowed, want = True, ""
    if not allowed:
        raise UsageError(f"{variant}: {name} = {value!r}, want {want} such as {old!r}")
    return value
