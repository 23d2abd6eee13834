"""What methods for fewer vision tokens are worth on the clock: `python benchmarks/reduction.py`.

A dense LLaVA of 7B-like width and few layers against the same weights with every method that has a
name: the prefill of a prompt with one picture, the tower included. All take turns on the same
machine, in float32, with random weights. Beside each ratio of times stands that of FLOPs, counted
over the very program that is timed, and by which part the one is off from the other.

What choosing costs by itself is set against the dense prefill. Before the decoder, choosing (and
merging) is timed alone, on what the tower has made. Within it, it is the difference between the
dense prefill and one in which the method ranks as ever and drops next to nothing; such a difference
of large numbers is as good as the machine is quiet, and the share of FLOPs beside it is exact.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.pillars import IMAGE_ID, Contestant, ratios, rounded, share, unstack_once
from benchmarks.timing import Runs, machine, report, take_turns, timed
from zoo.costing import measure
from zoo.models.core import registry
from zoo.models.core.compiled import jit
from zoo.models.core.errors import UsageError
from zoo.models.parts.assemblies.llava import LlavaConfig
from zoo.models.parts.assemblies.splice import fill_slots
from zoo.models.parts.decoders.gqa import DecoderConfig
from zoo.models.parts.reduce import station
from zoo.models.parts.reduce.base import Keep
from zoo.models.parts.towers.vit import ViTConfig

DENSE, RANKING = "dense", "ranking"


@dataclass(frozen=True)
class Size:
    """How large everything is. The defaults are the widths of LLaVA-1.5-7B, with few layers.

    Attributes:
      width: of the decoder.
      mlp_dim: of its MLPs.
      depth: of the decoder.
      head_dim: of its heads.
      vocab: of the decoder, whose logits are those of the last token.
      image: side of the picture in pixels; patches are 14 wide.
      tower_width: of the tower.
      tower_depth: of the tower, whose last layer is not run.
      text: tokens of the prompt's text.
    """

    width: int = 4096
    mlp_dim: int = 11_008
    depth: int = 4
    head_dim: int = 128
    vocab: int = 1_000
    image: int = 336
    tower_width: int = 1024
    tower_depth: int = 4
    text: int = 64


TINY = Size(32, 48, 5, 8, 128, 56, 16, 3, 8)


def dense(size: Size) -> LlavaConfig:
    """The model without a method."""
    heads = size.width // size.head_dim
    tower = ViTConfig(
        image_size=size.image,
        width=size.tower_width,
        depth=size.tower_depth,
        num_heads=max(1, size.tower_width // 64),
        mlp_dim=4 * size.tower_width,
    )
    decoder = DecoderConfig(
        vocab_size=size.vocab,
        width=size.width,
        depth=size.depth,
        num_heads=heads,
        num_kv_heads=heads,
        mlp_dim=size.mlp_dim,
    )
    return LlavaConfig(tower, decoder=decoder, image_id=IMAGE_ID, text_tokens=size.text + 1)


def ranking(config: LlavaConfig, plain: LlavaConfig) -> LlavaConfig | None:
    """A model whose policies rank as those of `config` and drop next to nothing; None where it has
    none, or none that can.
    """
    tokens, depth, policies = plain.slots, plain.decoder.depth, []
    stages = [tuple(tokens - i for i in range(1, 4)), tuple(tokens - i for i in range(depth))]
    for policy in config.policies:
        if not getattr(policy, "ranks", True):
            continue
        if hasattr(policy, "step"):  # a schedule of its own
            policies.append(dataclasses.replace(policy, step=1 / tokens))
            continue
        for keep in (*stages, tokens - 1, 1 - 1 / tokens):
            try:
                made = dataclasses.replace(policy, keep=keep)
                made.apply(plain.decoder.plan(), slots=tokens)
            except ValueError:
                continue
            policies.append(made)
            break
    return dataclasses.replace(plain, policies=tuple(policies)) if policies else None


def choosing(config: LlavaConfig) -> tuple[Any, Any]:
    """Two programs of parameters: a batch to what the reducer sees; and that to what it keeps."""
    reducer, model = config.reducer, config.build()
    assert reducer is not None

    def look(self: Any, batch: Any) -> tuple[Any, Any]:
        text = station.text_of(batch, self.decoder.embed(batch["ids"]), config.image_id)
        visual, seen = self._see(batch, None, text)
        if visual.tokens.index is None:  # it acts on the slots of the sequence
            filled, _, valid = fill_slots(visual.tokens, None, None, None)
            seen = station.at_slots(reducer, seen, batch, filled, valid, config.tile_tokens)
        return seen, text

    def choose(self: Any, seen: Any, text: Any) -> Any:
        tiles = seen.features.tokens.shape[1]
        slots = seen.tokens.shape[2] if seen.in_slots else None
        keep = reducer.num_slots(tiles, config.tile_tokens, slots) if slots else seen.per_tile
        return self.reducer(seen, text, keep=keep)

    def program(method: Any) -> Any:
        return lambda params, *args: model.apply({"params": params}, *args, method=method)

    return program(look), program(choose)


def entered(size: Size, keep: Keep, only: list[str]) -> Iterator[tuple[str, LlavaConfig | str]]:
    """{name: configuration}, of a method that does not fit the error; the dense one first."""
    yield DENSE, dense(size)
    for name in registry.reducers():
        if only and name not in only:
            continue
        try:
            yield name, registry.override(dense(size), {"reducer": name, "keep": keep}, name)
        except (ValueError, UsageError) as error:
            yield name, str(error)


def run(size: Size, keep: Keep, rounds: int, only: list[str]) -> dict[str, Any]:
    """All that the benchmark finds out at one size and budget."""
    every = dict(entered(size, keep, only))
    failed = {name: each for name, each in every.items() if isinstance(each, str)}
    configs = {name: each for name, each in every.items() if isinstance(each, LlavaConfig)}
    for name in list(configs):
        if (ranks := ranking(configs[name], configs[DENSE])) is not None:
            configs[f"{RANKING} {name}"] = ranks
    contestants = share({name: (config, None) for name, config in configs.items()})
    batch = jax.device_put(contestants[DENSE].batch(1))
    rows = unstack_once(contestants)
    for name, each in contestants.items():  # the stacked weights are not needed any more
        contestants[name] = Contestant(each.config, None, None, None)
    del each
    flops: dict[str, int] = {}
    runs: Runs = {}
    for name, contestant in contestants.items():
        prefill = contestant.prefill(1)
        flops[name] = measure(prefill, rows[name], batch)[0].total
        program = jit(prefill)
        runs[name] = timed(lambda p=program, w=rows[name]: p(w, batch)[0])
    chosen = {}
    for name, config in configs.items():
        if config.reducer is not None and name in every:
            look, choose = choosing(config)
            seen = jit(look)(rows[name], batch)
            chosen[name] = measure(choose, rows[name], *seen)[0].total
            program = jit(choose)
            runs[f"choosing {name}"] = timed(lambda p=program, w=rows[name], s=seen: p(w, *s))
    return {**summary(take_turns(runs, rounds), flops, chosen), "failed": failed}


def summary(
    times: Mapping[str, Mapping[str, float]], flops: Mapping[str, int], chosen: Mapping[str, int]
) -> dict[str, Any]:
    """What is reported.

    Args:
      times: seconds of each kind (fastest, median) of contestants, their ranking, their choosing.
      flops: of the former two.
      chosen: FLOPs of choosing before the decoder.
    """
    names = [name for name in flops if not name.startswith(RANKING)]
    kinds = {kind: {name: each[name] for name in names} for kind, each in times.items()}
    best, whole = times["seconds"], times["seconds"][DENSE]
    seconds, counted = {}, {}
    for name in names[1:]:
        before, within = f"choosing {name}", f"{RANKING} {name}"
        if before in best or within in best:
            ranked = best[within] - whole if within in best else 0.0
            extra = flops[within] - flops[DENSE] if within in flops else 0
            seconds[name] = (best.get(before, 0.0) + ranked) / whole
            counted[name] = (chosen.get(name, 0) + extra) / flops[DENSE]
    return {
        "prefill": {**kinds, **ratios(kinds, {name: flops[name] for name in names})},
        "choosing": {
            "share_of_dense_seconds": rounded(seconds),
            "share_of_dense_flops": rounded(counted),
        },
    }


def main(argv: list[str] | None = None) -> None:
    """Run everything and write what came out, with machine and versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--keep", type=float, default=0.25, help="share of the tokens (%(default)s)"
    )
    parser.add_argument("--tiny", action="store_true", help="a size that says nothing, for tests")
    parser.add_argument("--only", nargs="*", default=[], help="names of methods")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    size = TINY if args.tiny else Size()
    found = {
        **machine(jax, np),
        "dtype": "float32",
        "keep": args.keep,
        "size": dataclasses.asdict(size),
        **run(size, args.keep, args.rounds, args.only),
    }
    report(found, args.out)


if __name__ == "__main__":
    main()
