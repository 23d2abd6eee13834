"""How the parameters of every model lie on meshes, as files that can be reviewed.

    python -m zoo.train.shardings            # writes docs/shardings/<slug>.json
    python -m zoo.train.shardings --check    # says which are out of date
    python -m zoo.train.shardings llava bert  # these only

A line for each parameter of each size: its shape, and for each mesh the axes that its dimensions
are divided over, "." for none. A rule, a name or a size that changes shows as a changed line.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh

from zoo.catalogue import checkout
from zoo.models.core import registry
from zoo.models.core.config import ModelConfig
from zoo.models.core.errors import UsageError, ZooError
from zoo.models.core.names import spec_for, tree_names
from zoo.models.core.tree import flatten_dict

FOLDER = "docs/shardings"

MESHES: Mapping[str, Mapping[str, int]] = {
    "fsdp=8": {"fsdp": 8},
    "fsdp=64": {"fsdp": 64},
    "fsdp=8 tensor=8": {"fsdp": 8, "tensor": 8},
}
"""One host of eight devices, 64 devices, and 64 of which eight share every layer."""


def shardings(config: ModelConfig) -> dict[str, Any]:
    """How the parameters of a model lie on `MESHES`.

    Returns:
      `parameters`, their number; `divided`: {mesh: share of them that it divides}; `params`: {path:
      [shape, axes of each mesh]}.
    """
    boxed = jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))["params"]
    names, leaves = flatten_dict(tree_names(boxed)), flatten_dict(nn.unbox(boxed))
    meshes = [AbstractMesh(tuple(mesh.values()), tuple(mesh)) for mesh in MESHES.values()]
    total, divided, params = 0, [0] * len(meshes), {}
    for path, leaf in sorted(leaves.items()):
        total += leaf.size
        line = [" x ".join(map(str, leaf.shape))]
        for i, mesh in enumerate(meshes):
            spec = spec_for(names[path], leaf.shape, mesh)
            divided[i] += leaf.size * bool(spec)
            line.append(_axes(spec, leaf.ndim))
        params["/".join(path)] = line
    shares = [round(part / total, 4) for part in divided]
    return {
        "parameters": total,
        "divided": dict(zip(MESHES, shares, strict=True)),
        "params": params,
    }


def _axes(spec: Any, ndim: int) -> str:
    """The entries of a spec: ". fsdp tensor+fsdp"."""
    entries = [*spec, *[None] * (ndim - len(spec))]
    words = ["+".join(e) if isinstance(e, tuple) else e or "." for e in entries]
    return " ".join(words)


def slugs() -> list[str]:
    """All bases and all systems that are models."""
    return sorted([*registry.base_index(), *(slug for slug in registry.index() if _sizes(slug))])


def _sizes(slug: str) -> dict[str, ModelConfig]:
    """The variants of a model that are no toys."""
    entry = registry.base(slug) if slug in registry.base_index() else registry.entry(slug)
    return {
        name: config
        for name, config in entry.variants.items()
        if isinstance(config, ModelConfig) and not name.endswith("_tiny")
    }


def render(slug: str) -> str:
    """The text of the file of a model.

    Raises:
      UsageError: there is no such model.
    """
    if slug not in registry.base_index() and slug not in registry.index():
        raise UsageError(f"{slug} is no model that is registered: want one of {', '.join(slugs())}")
    parts = []
    for name, config in _sizes(slug).items():
        found = shardings(config)
        params = found.pop("params")
        head = json.dumps(found)[1:-1]
        lines = [f"   {json.dumps(path)}: {json.dumps(line)}" for path, line in params.items()]
        parts.append(
            f" {json.dumps(name)}: {{\n  {head},\n"
            f'  "params": {{\n' + ",\n".join(lines) + "\n  }\n }"
        )
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files, or with `--check` list those that are out of date and return 1."""
    parser = argparse.ArgumentParser(prog="python -m zoo.train.shardings", description=main.__doc__)
    parser.add_argument("slugs", nargs="*", help="of models; all by default")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    folder, wanted, old = checkout() / FOLDER, args.slugs or slugs(), []
    for slug in wanted:
        file, text = folder / f"{slug}.json", render(slug)
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            old.append(file)
            if not args.check:
                folder.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
    if not args.slugs:
        gone = sorted(file for file in folder.glob("*.json") if file.stem not in wanted)
        old += gone
        for file in [] if args.check else gone:
            file.unlink()
    for file in old:
        print(f"{'out of date' if args.check else 'wrote'}: {FOLDER}/{file.name}", file=sys.stderr)
    return 1 if old and args.check else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ZooError as error:
        sys.exit(f"error: {error}")
