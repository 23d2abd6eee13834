"""Which systems have code, under which names, and how a name becomes a configuration or a model.

Every system's file ends with `register(CARD, VARIANTS, ...)`. Nothing scans folders at run time:
`index.json`, which `python -m zoo.catalogue` writes, says in which module a system lives, so that
one name imports one module.
"""

import dataclasses
import importlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from zoo.models.core.card import Card, kinds, nearest, system, systems
from zoo.models.core.config import ModelConfig, SystemConfig
from zoo.models.core.errors import UsageError

if TYPE_CHECKING:
    from zoo.models.core.hf import Fields
    from zoo.models.core.keytable import Table

C = TypeVar("C", bound=SystemConfig)

STATUSES = ("planned", "shapes", "parity", "trained")
"""From no code at all upwards; a system holds its status and every one before it."""


@dataclass(frozen=True)
class Entry:
    """A system that has code.

    Attributes:
      card: what it says about itself.
      variants: its configurations by name; the first one is the default.
      table: from a configuration to the key table of the official checkpoint, where there is one.
      reducers: methods that leave vision tokens out, by name, see `register`.
    """

    card: Card
    variants: Mapping[str, SystemConfig]
    table: "Callable[[Any], Table] | None" = None
    reducers: Mapping[str, "Callable[..., Any]"] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Base:
    """An architecture that systems start from, as the Hugging Face hub knows it.

    Attributes:
      slug: its name here, and of its file in `zoo/models/base/`.
      title: what it is, in a few words.
      paper: "arXiv:<id>", or empty.
      variants: published sizes by name; the first one is the default.
      table: from a configuration to the key table of the hub's checkpoints; `zoo export` writes it.
        Running statistics stand below `stats/`, beside the parameters.
      hf: {`model_type`: reader of its `config.json`}.
      renames: (regular expression, replacement) pairs that turn keys of other layouts of the same
        checkpoint into those of `table`; every pair is applied to every key, in order.
      modules: such pairs that turn keys of `table` into the names of the modules of transformers,
        where these are others; adapters are saved under them.
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
    modules: tuple[tuple[str, str], ...] = ()
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
    variants: Mapping[str, SystemConfig],
    *,
    table: "Callable[[Any], Table] | None" = None,
    reducers: "Mapping[str, Callable[..., Any]]" = MappingProxyType({}),
) -> None:
    """Make a system known under its slug and its variants under their names.

    Args:
      card: its card.
      variants: configurations by name, in lower case with the size in the name; what differs by
        weights, resolution or training stage only is told apart by a tag after a dot
        ("mqt_llava_7b.official"). The first one is what `create(slug)` builds.
      table: from a configuration to the key table of the official checkpoint.
      reducers: what `reducer="name"` stands for: of `keep`, if given, it makes a reducer
        (`zoo.models.parts.reduce.base`), a policy of the decoder, or a tuple of these.

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
    for name in reducers:
        if (owner := _reducer_owner(name)) not in (None, card.slug):
            raise UsageError(f"register({card.slug}): the method {name!r} belongs to {owner}")
    _entries[card.slug] = Entry(
        card, MappingProxyType(dict(variants)), table, MappingProxyType(dict(reducers))
    )


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


def _base_names() -> dict[str, tuple[str, ...]]:
    """{slug: the names that it and its variants are known by}, imported or not."""
    names = {slug: (slug, *row["variants"]) for slug, row in base_index().items()}
    return names | {slug: (slug, *entry.variants) for slug, entry in _bases.items()}


def base_slug(name: str) -> str | None:
    """The slug of the base that a slug or variant `name` belongs to; None if it is no base's."""
    return next((slug for slug, names in _base_names().items() if name in names), None)


def base(name: str) -> Base:
    """The base of a slug or variant name, its file imported if need be.

    Raises:
      UsageError: if no base is called so, with the nearest names.
    """
    slug = base_slug(name)
    if slug is None:
        known = [name for names in _base_names().values() for name in names]
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
    known += [variant for names in _base_names().values() for variant in names]
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


def config(name: str, **overrides: Any) -> Any:
    """The configuration of a slug (its first variant) or of a variant: a `ModelConfig`, or another
    `SystemConfig` where the system is no model.

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


def override(config: C, overrides: Mapping[str, Any], name: str) -> C:
    """The configuration with other values for some fields, which are found as `config` finds them.

    Args:
      config: to start from.
      overrides: {field or dotted path: value}.
      name: of the configuration, for error messages.

    Raises:
      UsageError: as `config`.
    """
    overrides = _with_methods(config, overrides, name)
    draft = _Draft(config)
    for field, value in overrides.items():
        draft.put(_find(draft, field, name).split("."), value, name)
    changed: C = draft.finish()
    return changed


def reducer(name: str, keep: Any = None) -> tuple[Any, ...]:
    """The configurations that the name of a method for fewer vision tokens stands for: a reducer,
    policies of the decoder, or both.

    Args:
      name: "fastervlm", ...
      keep: how many tokens remain, as the method has it; by default as published.

    Raises:
      UsageError: no method is called so, with the nearest names.
      ValueError: a `keep` that the method does not take.
    """
    slug = _reducer_owner(name)
    if slug is None:
        known = reducers()
        hint = nearest(name, known) or f"; want one of {', '.join(known)}"
        raise UsageError(f"no method for fewer vision tokens is called {name!r}{hint}")
    made = entry(slug).reducers[name](**({} if keep is None else {"keep": keep}))
    return made if isinstance(made, tuple) else (made,)


def reducers() -> tuple[str, ...]:
    """The names that `reducer` takes, in alphabetical order."""
    names = {name for row in index().values() for name in row.get("reducers", ())}
    return tuple(sorted(names | {name for each in _entries.values() for name in each.reducers}))


def _reducer_owner(name: str) -> str | None:
    """The slug of the system that has a method of this name."""
    for slug, each in _entries.items():
        if name in each.reducers:
            return slug
    rows = index().items()
    return next((slug for slug, row in rows if name in row.get("reducers", ())), None)


def _with_methods(config: Any, overrides: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Overrides of a model, with what a `reducer` among them stands for: a name, a configuration of
    a reducer or of a policy, or None for all tokens; and `keep`, of it or of what the model has.
    """
    changes = dict(overrides)
    policies = getattr(config, "policies", ())
    here = [getattr(config, "reducer", None), *policies]
    here = [part for part in here if part is not None and getattr(part, "reduces", False)]
    if "reducer" not in changes and not ("keep" in changes and here):
        return changes
    if not hasattr(config, "policies"):
        raise UsageError(f"{name} has no decoder whose vision tokens a reducer could leave out")
    value, keep = changes.pop("reducer", tuple(here)), changes.pop("keep", None)
    keep = tuple(keep) if isinstance(keep, list) else keep
    if isinstance(value, str):
        made = reducer(value, keep)
    else:
        made = value if isinstance(value, tuple) else () if value is None else (value,)
        if keep is not None:
            made = tuple(dataclasses.replace(each, keep=keep) for each in made)
    found = [each for each in made if not hasattr(each, "apply")]
    if found and not hasattr(config, "reducer"):
        raise UsageError(
            f"{name} has no place for {type(found[0]).__name__}, which acts before the decoder; "
            "methods that act within the decoder can be used"
        )
    if hasattr(config, "reducer"):
        changes["reducer"] = found[0] if found else None
    others = changes.get("policies", policies)
    others = tuple(each for each in others if not getattr(each, "reduces", False))
    changes["policies"] = others + tuple(each for each in made if hasattr(each, "apply"))
    return changes


def check_part(name: str, value: Any, protocol: type) -> None:
    """Raise ValueError, which names what fits, unless a part of a configuration is of its kind.

    Args:
      name: of the field, for the message.
      value: what stands there.
      protocol: what such parts have in common, a protocol of methods that can be checked at run
        time.
    """
    if _is_part(value) and _describes(type(value)) and isinstance(value, protocol):
        return
    methods = " and ".join(name for name in vars(protocol) if not name.startswith("_"))
    fitting = [part for slug in index() for part in _parts(slug) if issubclass(part, protocol)]
    shown = f"{type(value).__name__}(...)" if _is_part(value) else repr(value)
    raise ValueError(
        f"{name} = {shown}: want an instance of a configuration with {methods}; systems have "
        f"{', '.join(map(_dotted, fitting)) or 'none yet'}"
    )


def _parts(slug: str) -> list[type]:
    """The configurations that the file of a system defines."""
    module = importlib.import_module(index()[slug]["module"])
    own = [value for value in vars(module).values() if isinstance(value, type)]
    return [cls for cls in own if cls.__module__ == module.__name__ and _describes(cls)]


def _describes(cls: type) -> bool:
    """Whether a class is one of configurations; modules and layer policies can be called."""
    return dataclasses.is_dataclass(cls) and not issubclass(cls, Callable)  # type: ignore[arg-type]


def _dotted(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def create(name: str, **overrides: Any) -> Any:
    """What a slug or variant stands for: the Flax module of a model, and of a system that is none
    the object that its configuration builds. Arguments and errors are those of `config`.

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
        if (not pattern or _meets(line, pattern)) and (not status or line.status == status)
    ]


def list_models(
    pattern: str | None = None, *, kind: str | None = None, status: str | None = None
) -> list[str]:
    """Slugs of the systems, built or planned, that meet the conditions of `listings`."""
    return [line.slug for line in listings(pattern, kind=kind, status=status)]


def _variant(name: str) -> tuple[str, SystemConfig]:
    """The variant that a name of a system or of a base stands for, and its configuration."""
    if base_slug(name) is not None:
        variants = base(name).variants
        variant = name if name in variants else next(iter(variants))
        return variant, variants[variant]
    _, variant = resolve(name)
    return variant, entry(name).variants[variant]


def _meets(line: Listing, pattern: str) -> bool:
    return matches(pattern, (line.slug, *line.variants), (system(line.slug).name, line.title))


def matches(pattern: str, names: Iterable[str], texts: Iterable[str] = ()) -> bool:
    """Whether a shell pattern ("mqt*") fits one of `names`, or a text without its signs is a part
    of one of `names` or `texts`; upper and lower case are the same.
    """
    names, pattern = [name.lower() for name in names], pattern.lower()
    if any(sign in pattern for sign in "*?["):
        return any(fnmatchcase(name, pattern) for name in names)
    return any(pattern in text for text in (*names, *map(str.lower, texts)))


class _Draft:
    """A configuration that is being changed; it is made, and so checked, when all changes are in.

    Args:
      config: a dataclass.
    """

    def __init__(self, config: Any):
        self._config = config
        self._fields = {
            field.name: _drafted(getattr(config, field.name))
            for field in dataclasses.fields(config)
            if field.init
        }

    def __repr__(self) -> str:
        return repr(self._config)

    def paths(self, prefix: str = "") -> Iterator[str]:
        """Dotted paths of all fields, however deep."""
        for name, value in self._fields.items():
            yield prefix + name
            if isinstance(value, _Draft):
                yield from value.paths(f"{prefix}{name}.")

    def put(self, path: list[str], value: Any, variant: str) -> None:
        """Give the field at `path` another value."""
        name, *rest = path
        old = self._fields[name]
        if rest:
            old.put(rest, value, variant)
        else:
            self._fields[name] = _drafted(_checked(name, old, value, variant))

    def finish(self) -> Any:
        """The configuration; the very same one if nothing has changed."""
        made = {
            name: value.finish() if isinstance(value, _Draft) else value
            for name, value in self._fields.items()
        }
        changes = {n: value for n, value in made.items() if value is not getattr(self._config, n)}
        return dataclasses.replace(self._config, **changes) if changes else self._config


def _drafted(value: Any) -> Any:
    return _Draft(value) if _is_part(value) else value


def _is_part(value: Any) -> bool:
    """Whether `value` is a dataclass, and not a class of them."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _find(draft: _Draft, wanted: str, variant: str) -> str:
    """The dotted path of the field that `wanted` means."""
    paths = list(draft.paths())
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


def _checked(name: str, old: Any, value: Any, variant: str) -> Any:
    """`value`, if it can stand where `old` stood."""
    if old is None or value is None:
        return value
    if isinstance(old, _Draft):
        allowed, want = _is_part(value), "a configuration"
    elif isinstance(old, bool) or isinstance(value, bool):
        allowed, want = isinstance(value, bool) and isinstance(old, bool), type(old).__name__
    elif isinstance(old, float):
        allowed, want = isinstance(value, int | float), "a number"
    elif isinstance(old, int | str | tuple):
        allowed, want = isinstance(value, type(old)), type(old).__name__
    else:
        allowed, want = True, ""
    if not allowed:
        such = f" such as {old!r}"
        if isinstance(old, tuple) and _is_part(value):
            such = f" such as ({type(value).__name__}(...),)"
        elif isinstance(value, str) and value in index():
            such = f", not a name: {value} has {', '.join(map(_dotted, _parts(value)))}"
        raise UsageError(f"{variant}: {name} = {value!r}, want {want}{such}")
    return value
