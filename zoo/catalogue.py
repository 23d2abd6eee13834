"""The generated catalogue: `models/core/{index,bases}.json` and `docs/catalogue.md`.

`python -m zoo.catalogue` writes them from what is there; with `--check` it only says whether they
are up to date. A system is `planned` until its file calls `register`; from then on its status is
read off the evidence, the highest rung that it holds with all those before:

    shapes    it is registered, so that the suite runs all of its variants by shape
    parity    tests/parity/<slug>.py runs the official code's records tests/goldens/<slug>/*.npz
    trained   docs/results/<slug>.json records a finished training run
"""

import argparse
import ast
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from zoo.models.core import registry
from zoo.models.core.card import System, systems
from zoo.models.core.errors import ZooError

INDEX = "models/core/index.json"
BASES = "models/core/bases.json"
TABLE = "docs/catalogue.md"

HOMES = {
    "vision-backbone": "models/vision",
    "dense-head": "models/dense",
    "token-reduction": "models/reduction",
    "connector": "models/connectors",
    "decoder": "models/decoders",
    "moe": "models/decoders",
    "vlm": "models/vlm",
    "dual-encoder": "models/encoders",
    "fusion-encoder": "models/encoders",
    "generator": "models/generators",
    "policy": "models/actions",
    "training-recipe": "train/recipes",
    "data-pipeline": "train/recipes",
    "evaluation": "zoo/benchmarks",
    "agent-inference": "zoo/agents",
    "compression": "zoo/compress",
    "survey-theory": "zoo/benchmarks",
}
"""The folder of a system's one file, by kind; of a compound kind the first part decides."""


def checkout() -> Path:
    """The root of the source tree that this package runs from.

    Raises:
      ZooError: if it was installed as a wheel and there is no such tree.
    """
    root = Path(__file__).resolve().parents[1]
    if not ((root / "pyproject.toml").is_file() and (root / INDEX).is_file()):
        raise ZooError(f"this needs a source checkout of the zoo, not a package in {root}")
    return root


def system_files(root: Path) -> Iterator[tuple[str, Path]]:
    """(slug, file) of everything in the homes of systems that assigns a module-level `CARD`."""
    for home in sorted(set(HOMES.values())):
        for path in sorted((root / home).rglob("*.py")):
            if _assigns_card(path):
                yield (path.parent if path.name == "__init__.py" else path).stem, path


def build_index(root: Path) -> dict[str, dict[str, Any]]:
    """The contents of the index: every registered system with its module, variants and status.

    Imports every system's file.

    Raises:
      ZooError: if a file is not called like its system, a system has two homes, or its evidence is
        malformed.
    """
    index: dict[str, dict[str, Any]] = {}
    for slug, path in system_files(root):
        module = _module_name(root, path)
        card = importlib.import_module(module).CARD
        if card.slug != slug:
            raise ZooError(f"{path}: holds {card.slug!r}, so it must be called {card.slug}.py")
        if slug in index:
            raise ZooError(f"{slug} has two homes: {index[slug]['module']} and {module}")
        if slug not in registry.registered():
            continue
        names = list(registry.registered()[slug].variants)
        index[slug] = {"module": module, "variants": names, "status": status(root, slug, names)}
        if reducers := list(registry.registered()[slug].reducers):
            index[slug]["reducers"] = reducers
    return dict(sorted(index.items()))


def status(root: Path, slug: str, variants: Sequence[str]) -> str:
    """The highest rung that a registered system holds together with all below it."""
    goldens = root / "tests" / "goldens" / slug
    if not ((root / "tests" / "parity" / f"{slug}.py").is_file() and any(goldens.glob("*.npz"))):
        return "shapes"
    result = root / "docs" / "results" / f"{slug}.json"
    if not result.is_file():
        return "parity"
    check_result(result, variants)
    return "trained"


def check_result(path: Path, variants: Sequence[str]) -> None:
    """Check that a recorded training run says what ran and what came out.

    Raises:
      ZooError: unless it is an object with `model` (one of `variants`, or an experiment of
        `configs/` that the system is a part of), `seed`, `steps` and `accuracy`, which is a share
        between 0 and 1 or one for every budget.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ZooError(f"{path}: no JSON: {error}") from error
    accuracy = result.get("accuracy")
    shares = list(accuracy.values()) if isinstance(accuracy, dict) else [accuracy]
    experiments = {file.stem for file in path.parents[2].glob("configs/[!_]*.py")}
    wrong = {
        "model": result.get("model") not in {*variants, *experiments},
        "seed": type(result.get("seed")) is not int,
        "steps": type(result.get("steps")) is not int or result["steps"] < 1,
        "accuracy": not shares or not all(_is_share(value) for value in shares),
    }
    if bad := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise ZooError(f"{path}: missing or wrong: {', '.join(bad)}")


def build_bases(root: Path) -> dict[str, dict[str, Any]]:
    """The contents of the index of bases: every one with its module, variants and model types.

    Raises:
      ZooError: if a file of `models/base` does not register the base that it is called after.
    """
    found = {}
    for path in sorted((root / "models" / "base").glob("[!_]*.py")):
        module = _module_name(root, path)
        importlib.import_module(module)
        try:
            base = registry.bases()[path.stem]
        except KeyError:
            raise ZooError(f"{path}: registers no base that is called {path.stem!r}") from None
        found[path.stem] = {
            "module": module,
            "variants": list(base.variants),
            "model_types": list(base.hf),
        }
    return found


def render_index(index: dict[str, dict[str, Any]]) -> str:
    """The text of an index file."""
    return json.dumps(index, indent=2, ensure_ascii=False) + "\n"


def render_table(
    root: Path, index: dict[str, dict[str, Any]], bases: dict[str, dict[str, Any]]
) -> str:
    """The text of `docs/catalogue.md`."""
    statuses = {slug: index.get(slug, {}).get("status", "planned") for slug in systems()}
    counts = [f"{list(statuses.values()).count(each)} {each}" for each in registry.STATUSES]
    lines = [
        "# Catalogue",
        "",
        "<!-- Written by `python -m zoo.catalogue`; edits are lost. -->",
        "",
        f"{len(systems())} systems: {', '.join(counts)}.",
        "Scope says what the zoo takes in of a system: all of it (`full`), its training `recipe`,",
        "a `tool` made of it, or `none` (surveys). Status says what is proven, each rung with",
        "those before it: `shapes` (tests run all variants by shape), `parity` (tests hold it to",
        "the numbers of the official code), `trained` (`docs/results/` records a training run).",
        "",
        "| slug | system | kind | scope | status |",
        "|---|---|---|---|---|",
    ]
    lines += [_table_row(root, entry, statuses[slug]) for slug, entry in systems().items()]
    lines += [
        "",
        "## Base models",
        "",
        "What the systems start from. `zoo.load` reads checkpoints of these `model_type`s from a",
        "folder or the Hugging Face hub, `zoo.create` makes the sizes.",
        "",
        "| base | what it is | model_type | sizes |",
        "|---|---|---|---|",
    ]
    lines += [_base_row(registry.bases()[slug], row) for slug, row in bases.items()]
    return "\n".join(lines) + "\n"


def generate(root: Path) -> dict[str, str]:
    """What the generated files should hold now: {path from the root: text}."""
    index = build_index(root)
    bases = build_bases(root)
    return {
        INDEX: render_index(index),
        BASES: render_index(bases),
        TABLE: render_table(root, index, bases),
    }


def stale(root: Path) -> dict[str, str]:
    """Those of the generated files that are not up to date, with what they should hold."""
    return {
        path: text
        for path, text in generate(root).items()
        if not (root / path).is_file() or (root / path).read_text(encoding="utf-8") != text
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Write the catalogue, or with `--check` list the files that are out of date and return 1."""
    parser = argparse.ArgumentParser(prog="python -m zoo.catalogue", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    root = checkout()
    old = stale(root)
    for path, text in old.items():
        if not args.check:
            (root / path).write_text(text, encoding="utf-8")
        print(f"{'out of date' if args.check else 'wrote'}: {path}", file=sys.stderr)
    return 1 if old and args.check else 0


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _assigns_card(path: Path) -> bool:
    body = ast.parse(path.read_text(encoding="utf-8"), filename=str(path)).body
    targets = [t for node in body if isinstance(node, ast.Assign) for t in node.targets]
    return any(isinstance(t, ast.Name) and t.id == "CARD" for t in targets)


def _module_name(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "zoo" else ("zoo", *parts))


def _table_row(root: Path, entry: System, status: str) -> str:
    page = f"systems/{entry.slug}.md"
    slug = f"[`{entry.slug}`]({page})" if (root / "docs" / page).is_file() else f"`{entry.slug}`"
    number = entry.paper.removeprefix("arXiv:")
    title = f"[{entry.title}](https://arxiv.org/abs/{number})" if number else entry.title
    name = "" if entry.title.startswith(entry.name) else f"{entry.name}: "
    cells = (slug, name + title, entry.kind, entry.scope, status)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _base_row(base: registry.Base, row: dict[str, Any]) -> str:
    number = base.paper.removeprefix("arXiv:")
    title = f"[{base.title}](https://arxiv.org/abs/{number})" if number else base.title
    names = (", ".join(f"`{name}`" for name in row[key]) for key in ("model_types", "variants"))
    return f"| `{base.slug}` | {title} | {' | '.join(names)} |"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ZooError as error:
        sys.exit(f"error: {error}")
