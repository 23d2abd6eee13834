"""The command `zoo`.

Each command is imported when it is called, so that `zoo list` and `zoo --help` answer at once. What
a program may want to read goes to stdout, everything else to stderr. Exit status: 0 done,
1 failure, 2 wrong use, 130 interrupted.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from zoo.models.core.errors import UsageError, ZooError

if TYPE_CHECKING:
    from rich.console import Console

    from zoo.models.core.config import SystemConfig

ELSEWHERE = {
    "quickstart": ("zoo.train.quickstart", "train a small model on real scans and show it"),
    "train": ("zoo.train.cli", "train by a configuration"),
    "plan": ("zoo.train.plan.cli", "tell what a step needs on devices that are not there"),
    "convert": ("zoo.convert.cli.convert", "turn a Hugging Face checkpoint into a folder of ours"),
    "export": ("zoo.convert.cli.export", "turn a converted model back into what it was"),
    "verify": ("zoo.convert.cli.verify", "compare a checkpoint with the original code"),
    "cost": ("zoo.costing", "count parameters, FLOPs, caches and memory by shapes alone"),
    "bench": ("zoo.train.bench", "compare methods for fewer vision tokens"),
    "bench-vision": ("zoo.bench_vision", "measure how large and how fast image models are"),
    "arank": ("zoo.train.arank", "rank the attention of layers: which may skip tokens"),
    "scaling": ("zoo.benchmarks.scaling_predictable", "fit power laws to learning curves in logs"),
    "generate": ("zoo.generate.cli", "answer a question, about pictures or not"),
}
"""Commands with a `main(argv) -> int` of their own, and the modules where it is."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (that of the process by default) and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _dispatch(argv)
        sys.stdout.flush()
        return status
    except UsageError as error:
        print(f"zoo: {error}", file=sys.stderr)
        return 2
    except ZooError as error:
        print(f"zoo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("zoo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has seen enough (`zoo list | head`); keep the last flush quiet too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"zoo: {error}", file=sys.stderr)
        return 1


def _dispatch(argv: list[str]) -> int:
    if argv and argv[0] in ELSEWHERE:
        module, _ = ELSEWHERE[argv[0]]
        return int(importlib.import_module(module).main(argv[1:]))
    args = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    return run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zoo", description="Vision-language models in JAX.")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    listing = commands.add_parser("list", help="list the systems, or those that match")
    listing.add_argument("pattern", nargs="?", help="part of a name or title, or a pattern: 'mqt*'")
    listing.add_argument("--kind", help="such as vlm or connector; any part of a compound kind")
    listing.add_argument("--status", help="planned, shapes, parity or trained")
    listing.add_argument(
        "--bases", action="store_true", help="list the base models that checkpoints are read into"
    )
    listing.add_argument("--json", action="store_true", help="print a list of objects")
    listing.set_defaults(run=_list)

    info = commands.add_parser("info", help="show a system's card, variants and sizes")
    info.add_argument("name", help="slug or variant")
    info.add_argument("--json", action="store_true", help="print one object")
    info.set_defaults(run=_info)

    new = commands.add_parser("new", help="start a planned system: code, parity stub and docs page")
    new.add_argument("slug")
    new.add_argument("--kind", help="the part of a compound kind that decides the folder")
    new.add_argument("--json", action="store_true", help="print one object")
    new.set_defaults(run=_new)

    for name, (_, summary) in ELSEWHERE.items():
        commands.add_parser(name, help=summary, add_help=False)
    return parser


def _version() -> str:
    import zoo

    return f"zoo {zoo.__version__}"


def _list(args: argparse.Namespace) -> int:
    from zoo.models.core.registry import listings

    if args.bases:
        return _list_bases(args)
    found = listings(args.pattern, kind=args.kind, status=args.status)
    if args.json:
        _print_json([asdict(line) for line in found])
        return 0
    if found:
        rows = [(line.slug, line.kind, line.scope, line.status, line.title) for line in found]
        _print_table(("slug", "kind", "scope", "status", "title"), rows)
    print(f"{len(found)} system{'' if len(found) == 1 else 's'}", file=sys.stderr)
    return 0


def _list_bases(args: argparse.Namespace) -> int:
    from zoo.models.core.registry import base_index, matches

    if args.kind or args.status:
        raise UsageError("--bases lists models without kind or status: leave --kind, --status out")
    found = [
        {"slug": slug, "model_types": row["model_types"], "variants": row["variants"]}
        for slug, row in base_index().items()
        if matches(args.pattern or "", (slug, *row["variants"]))
    ]
    if args.json:
        _print_json(found)
        return 0
    rows = [
        (row["slug"], *(", ".join(row[k]) for k in ("model_types", "variants"))) for row in found
    ]
    if rows:
        _print_table(("slug", "model_type", "sizes"), rows)
    print(f"{len(found)} base model{'' if len(found) == 1 else 's'}", file=sys.stderr)
    return 0


def _info(args: argparse.Namespace) -> int:
    facts = describe(args.name)
    if args.json:
        _print_json(facts)
        return 0
    variants = facts.pop("variants")
    differs = facts.pop("differs")
    _print_table(None, [(key, _text(value)) for key, value in facts.items() if value])
    if differs:
        print("\ndiffers from the official code:")
        for sentence in differs:
            print(f"  - {sentence}")
    for variant in variants:
        if not variant["parameters"]:
            continue
        print(f"\n{variant['name']}: parameters")
        sizes = [(part, f"{count:,}") for part, count in variant["parameters"].items()]
        _print_table(None, sizes, right=True)
    return 0


def _text(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def _new(args: argparse.Namespace) -> int:
    from zoo.catalogue import checkout
    from zoo.scaffold import scaffold

    root = checkout()
    files = [path.relative_to(root).as_posix() for path in scaffold(root, args.slug, args.kind)]
    if args.json:
        _print_json({"slug": args.slug, "files": files})
        return 0
    print("\n".join(files))
    print("next: CONTRIBUTING.md, from the first of these files on", file=sys.stderr)
    return 0


def describe(name: str) -> dict[str, Any]:
    """All that `zoo info` tells about a system, ready for JSON.

    Args:
      name: a slug, or a variant, to which the list of variants is then restricted.

    Returns:
      The card's facts, `status`, and for each of `variants` its `name` and `parameters` by part and
      in `total`; {} for a system that is no model. A base has no card, but `model_types`.

    Raises:
      UsageError: if nothing is called so.
    """
    from zoo.models.core import registry

    if registry.base_slug(name) is not None:
        return _describe_base(name)
    card = registry.card(name)
    line = registry.listing(card.slug)
    chosen = [name] if name in line.variants else list(line.variants)
    return {
        "slug": card.slug,
        "name": card.name,
        "title": card.title,
        "kind": card.kind,
        "scope": card.scope,
        "status": line.status,
        "paper": card.paper,
        "code": card.code,
        "extends": card.extends,
        "differs": list(card.differs),
        "variants": [
            {"name": variant, "parameters": count_parameters(registry.config(variant))}
            for variant in chosen
        ],
    }


def _describe_base(name: str) -> dict[str, Any]:
    """What `describe` tells, of a base model."""
    from zoo.models.core import registry

    base = registry.base(name)
    chosen = [name] if name in base.variants else list(base.variants)
    return {
        "slug": base.slug,
        "title": base.title,
        "kind": "base",
        "paper": base.paper,
        "model_types": list(base.hf),
        "differs": [],
        "variants": [
            {"name": variant, "parameters": count_parameters(base.variants[variant])}
            for variant in chosen
        ],
    }


def count_parameters(config: "SystemConfig") -> dict[str, int]:
    """Parameters of a model by part and in `total`, from shapes alone: no weight is made. A system
    that is no model has none.
    """
    import flax.linen as nn
    import jax

    from zoo.models.core.config import ModelConfig
    from zoo.models.core.tree import size_by_part

    if not isinstance(config, ModelConfig):
        return {}

    model = config.build()
    shapes = jax.eval_shape(lambda batch: model.init(jax.random.key(0), batch), config.inputs(1))
    return size_by_part(nn.unbox(shapes)["params"])


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=not _is_utf8()))


def _is_utf8() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"


def _print_table(
    header: Sequence[str] | None, rows: Sequence[Sequence[str]], *, right: bool = False
) -> None:
    """Print columns: cut to the window on a terminal, in full and without colours elsewhere."""
    from rich.table import Table
    from rich.text import Text

    console = _console()
    table = Table(box=None, show_header=header is not None, pad_edge=False, header_style="bold")
    titles = header or [""] * len(rows[0])
    room = console.width  # what the columns before leave is the last one's
    most = 25 if console.is_terminal else room
    for title, *cells in zip(titles, *rows):
        width = min(most, max(map(len, (title, *cells))))
        table.add_column(title, no_wrap=True, max_width=width)
        room -= width + 2
    last = table.columns[-1]
    last.max_width = max(10, room + width + 2)
    last.no_wrap, last.overflow = header is not None, "ellipsis" if header else "fold"
    last.justify = "right" if right else "left"
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    with console.capture() as capture:
        console.print(table)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def _console() -> "Console":
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=1000, no_color=True, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
